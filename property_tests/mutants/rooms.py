"""Which modules are changed, and which tests have to notice. A room is a row of docs/mutants.md."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Room:
    """modules: by their dotted names; tests: files, of which a mutant gets the tests that reach it."""

    name: str
    modules: tuple[str, ...]
    tests: tuple[str, ...]


_ENGINE = (
    "property_tests/test_scheduler_properties.py",
    "property_tests/test_resource_properties.py",
    "tests/engine/test_admission.py",
    "tests/engine/test_prefix_cache.py",
    "tests/engine/test_engine.py",
)
_SAMPLING = (
    "property_tests/test_sampling_properties.py",
    "property_tests/test_kernel_properties.py",
    "tests/gate/test_rules_by_example.py",
    "tests/kernels/test_sampling.py",
    "tests/distributed/test_sampling_shards.py",
)
_GATE = (
    "property_tests/test_gate_properties.py",
    "property_tests/test_sampling_properties.py",
    "tests/gate/test_gate.py",
    "tests/gate/test_rules_by_example.py",
    "tests/reports/test_promises.py",
)
_REPORTS = (
    "property_tests/test_statistics_properties.py",
    "tests/reports/test_analysis.py",
    "tests/run/test_checks_by_example.py",
    "tests/reports/test_compare.py",
    "tests/reports/test_moderation.py",
    "tests/reports/test_promises.py",
    "tests/reports/test_render.py",
    "tests/reports/test_small_alpha.py",
    "tests/reports/test_unjudged.py",
)

ROOMS = (
    Room(
        "scheduler",
        tuple(
            f"nanovllm.engine.{name}"
            for name in ("scheduler", "continuous_batching", "sequence", "block_manager", "overlap")
        ),
        _ENGINE,
    ),
    Room("prefix cache", ("nanovllm.engine.prefix_cache",), _ENGINE),
    Room("admission", ("nanovllm.engine.admission",), _ENGINE),
    Room(
        "sampling",
        ("nanovllm.kernels.torch.sampling", "nanovllm.kernels.torch.sampling_shards"),
        _SAMPLING,
    ),
    Room("filtering", ("nanovllm.kernels.torch.filtering",), _SAMPLING),
    Room(
        "scoring",
        tuple(
            f"experiments.gate.{name}"
            for name in ("scoring", "truncation", "gumbel_noise", "edited_logits")
        ),
        _GATE,
    ),
    Room(
        "margins",
        tuple(
            f"experiments.gate.{name}"
            for name in ("logit_margins", "rules", "chance.significance", "verdicts", "same_work")
        ),
        _GATE,
    ),
    Room(
        "statistics",
        tuple(
            f"reports.statistics.{name}"
            for name in (
                "intervals",
                "contrasts",
                "linear_model",
                "moderation",
                "metrics",
                "residuals",
                "ceiling",
            )
        ),
        _REPORTS,
    ),
    Room(
        "counting",
        tuple(
            f"reports.analysis.{name}"
            for name in ("counting", "promises", "gate_lines", "gate_and_launches", "consistency")
        )
        + ("nanovllm.toggles.counters",),
        (*_REPORTS, "tests/engine/test_toggles.py", "tests/engine/test_engine.py"),
    ),
    Room(
        "records",
        tuple(
            f"experiments.records.{name}"
            for name in ("reading", "store", "ledger", "merged_folders", "factor_levels")
        ),
        (
            "tests/run/test_records.py",
            "tests/run/test_merged_folders.py",
            "tests/run/test_dispatch.py",
            "tests/reports/test_analysis.py",
            "tests/run/test_checks_by_example.py",
            "tests/reports/test_promises.py",
            "tests/study/test_plan.py",
        ),
    ),
)


@cache
def room_of(module: str) -> Room:
    return next(room for room in ROOMS if module in room.modules)


def all_modules() -> list[str]:
    return [module for room in ROOMS for module in room.modules]


def files_of_tests() -> list[str]:
    """Each file of tests once."""
    return list(dict.fromkeys(file for room in ROOMS for file in room.tests))


@cache
def path_of(module: str) -> Path:
    """Of its source file."""
    file = Path(*module.split(".")).with_suffix(".py")
    return ROOT / "src" / file if module.startswith("nanovllm") else ROOT / file
