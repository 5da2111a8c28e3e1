"""Code lines of our engine and of vLLM, counted in the same way: what a run loads, and the whole package.

A run of the same job (one prompt, four tokens, CPU) in an interpreter of its own prints the modules
that it loaded. Beside them stands the whole package, tests left out. A run on a CPU loads no Triton
kernel, CUDA graph or cascade attention, whatever is on; those are in the whole package alone. The
result is a record: reports/published/code-lines/lines.json.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.host import provenance
from reports.claims.code_lines import count_code_lines

_PRINT = """
import json, sys
files = {name: module.__file__ for name, module in list(sys.modules.items()) if name.split(".")[0] == PACKAGE
         and str(getattr(module, "__file__", None)).endswith(".py")}
package = sys.modules[PACKAGE]
print("LINES" + json.dumps({"version": getattr(package, "__version__", None), "files": files, "root": package.__path__[0]}))
"""
_OURS = """
import sys
from nanovllm import ALL, BASELINE, LLM, SamplingParams
with LLM(sys.argv[1], device="cpu", max_model_len=64, max_num_seqs=2, optimizations=WHICH) as llm:
    llm.generate(["one two three"], SamplingParams(max_tokens=4, temperature=0.5), use_tqdm=False)
"""
_VLLM = """
import os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=64, max_num_seqs=2, dtype="float32", enforce_eager=True)
llm.generate(["one two three"], SamplingParams(max_tokens=4, temperature=0.5), use_tqdm=False)
"""


class CountError(Exception):
    """A run whose modules could not be counted; the message holds the end of its output."""


def count_lines(
    model: str, vllm_python: Path | None = None, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The record. model: a checkpoint that both engines run. vllm_python: an interpreter that has
    vLLM; without one its count is that of the record `before`, with the time at which it was made,
    or left out.

    Raises CountError.
    """
    git: Mapping[str, Any] = provenance.git_state() or {}
    made_at = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    result: dict[str, Any] = {
        "kind": "code-lines",
        "made_at": made_at,
        "what": "lines that hold code: no blanks, comments, docstrings, tests; Python files (reports/claims/code_lines.py)",
        "job": "one prompt, four tokens, on a CPU",
        "git": {key: git.get(key) for key in ("commit", "dirty")},
        "nanovllm": _count_engine(
            Path(sys.executable),
            "nanovllm",
            model,
            {
                "core": _OURS.replace("WHICH", "BASELINE"),
                "everything_on": _OURS.replace("WHICH", "ALL"),
            },
        ),
    }
    if vllm_python:
        result["vllm"] = {
            "made_at": made_at,
            **_count_engine(vllm_python, "vllm", model, {"loaded": _VLLM}),
        }
    elif before and "vllm" in before:
        result["vllm"] = {"made_at": before["made_at"], **before["vllm"]}
    return result


def _count_engine(python: Path, package: str, model: str, runs: dict[str, str]) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    for name, script in runs.items():
        found = _loaded(python, package, script, model)
        counts["version"] = found["version"]
        files = {module: Path(file) for module, file in found["files"].items()}
        counts[name] = _tally(files.values())
        whole = [
            file
            for file in Path(found["root"]).rglob("*.py")
            if not {"tests", "test"} & set(file.parts)
        ]
        counts["package"] = _tally(whole)
    return counts


def _tally(files: Iterable[Path]) -> dict[str, int]:
    listed = sorted(set(files))
    return {"files": len(listed), "lines": sum(map(count_code_lines, listed))}


def _loaded(python: Path, package: str, script: str, model: str) -> dict[str, Any]:
    code = script + _PRINT.replace("PACKAGE", repr(package))
    environment = {
        **os.environ,
        "PYTHONPATH": str(provenance.ROOT / "src") if package == "nanovllm" else "",
    }
    # our folders must not be found in vLLM's interpreter
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [str(python), "-c", code, model]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=elsewhere, check=False
        )
    line = next((line for line in done.stdout.splitlines() if line.startswith("LINES")), None)
    if line is None:
        raise CountError(
            f"{package} in {python} ended with status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return json.loads(line.removeprefix("LINES"))  # type: ignore[no-any-return]
