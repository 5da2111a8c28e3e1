"""What `--help` says after the options: examples of each command, and the names that it accepts."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from experiments.host.environment import COMMAND
from experiments.host.model_files import PRESETS
from experiments.study.spec import PROFILES, STUDIES
from experiments.study.yaml_files import names

WIDTH = 78
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "ablate": (
        ("ablate", "the study that fits this machine"),
        ("ablate --dry-run", "only its plan: launches, time, detectable effect"),
        ("ablate --study my.yaml --model tiny", "a study of your own, on another model"),
        ("ablate --set design.blocks=2", "two blocks instead of the study's number"),
    ),
    "run": (
        ("run --study conversation", "any study, by name or path"),
        (
            "run --study embedded --dry-run --write-plan plan.json",
            "a plan for another machine",
        ),
    ),
    "compare": (
        ("compare --with hf", "HF transformers, in this environment"),
        (
            "compare --with vllm --python vllm=~/vllm/bin/python",
            "vLLM, in an environment of its own",
        ),
        ("compare --with vllm-online", "nanovllm serve and vllm serve, under load"),
    ),
    "check": (
        ("check", "pairs of optimizations and HF, on the model tiny"),
        ("check --model Qwen/Qwen3-0.6B --workloads 20", "a model of the hub, less work"),
        ("check --model smollm2 --workloads 4 --dtype float32", "a trained model, one dtype"),
    ),
    "predict": (
        ("predict --study gpu-ablate --profile h100", "what each optimization would buy there"),
        ("predict --study gpu-8gb --profile rtx4070-laptop", "on a small GPU"),
    ),
    "report": (
        ("report", "of the latest execution"),
        ("report --verbose", "with every row, legend and note"),
        ("report runs/20261129-101500-embedded-1a2b3c4d", "of that one"),
    ),
    "import": (
        ("import runs/20261129-101500-embedded-1a2b3c4d", "again into MLflow"),
        ("import visit-1 visit-2 --merge whole", "two parts of one study as one"),
    ),
    "chat": (
        ("chat Qwen/Qwen3-0.6B", "a model of the hub"),
        ("chat ./my-model --temperature 0", "a folder, greedy"),
    ),
    "validate": (
        ("validate", "all studies and profiles"),
        ("validate my.yaml --profile h200", "what it would launch on an H200"),
    ),
    "serve": (
        ("serve tiny", "on 127.0.0.1:8000, in this environment's best configuration"),
        ("serve Qwen/Qwen3-0.6B --port 9000 --json-logs", "a model of the hub"),
        ("serve tiny --engine max_num_seqs=64", "arguments of LLM"),
    ),
    "list": (("list", "for this machine"), ("list --profile h200", "for an H200")),
}
_NAMES = {
    "studies": lambda: names(STUDIES),
    "profiles": lambda: names(PROFILES),
    "presets": lambda: list(PRESETS),
}
_ACCEPTED = {
    "ablate": ("studies", "profiles", "presets"),
    "run": ("studies", "profiles", "presets"),
    "compare": ("profiles", "presets"),
    "check": ("profiles", "presets"),
    "predict": ("studies", "profiles", "presets"),
    "chat": ("presets",),
    "validate": ("studies", "profiles"),
    "serve": ("presets",),
    "list": ("profiles",),
}


def epilog(command: str) -> str:
    """The examples of a command and the names that its options accept, as click shows them
    unchanged: a block after a backspace is not wrapped.
    """
    blocks = [examples(COMMAND, EXAMPLES[command])]
    for kind in _ACCEPTED.get(command, ()):
        blocks.append("\b\n" + "\n".join(_listed(kind, _NAMES[kind]())))
    return "\n\n".join(blocks)


def examples(program: str, pairs: Iterable[tuple[str, str]]) -> str:
    """(arguments, meaning) pairs as the end of a help text."""
    lines = ["\b", "Examples:"]
    for example, meaning in pairs:
        lines += [f"  # {meaning}", f"  {program} {example}"]
    return "\n".join(lines)


def _listed(kind: str, found: Iterable[str]) -> list[str]:
    return textwrap.wrap(
        f"{kind.capitalize()}: {', '.join(found)}",
        WIDTH,
        subsequent_indent="  ",
        break_on_hyphens=False,
    )
