"""What 'auto' becomes, and which level cannot run where. Loaded when an optimization is asked for."""

import logging
from pathlib import Path
from typing import Any

from nanovllm import cxx
from nanovllm.toggles.row import toggles_of

LOG = logging.getLogger("nanovllm")
NATIVE = Path(cxx.__file__).with_name("kernels") / "native"


def check(optimizations: Any) -> None:
    """Raises ValueError for an unknown level, with what is allowed."""
    for name, row in toggles_of(optimizations).items():
        level = getattr(optimizations, name)
        if allowed := row.refuses(level):
            raise ValueError(f"{name}={level!r} is not allowed; it must be {allowed}")


def resolve(
    optimizations: Any, device: str, in_engine: bool, dtype: str | None = None
) -> dict[str, Any]:
    """The level of each toggle, without 'auto'. A toggle whose `needs` the others do not meet keeps its baseline
    where 'auto' was asked for, and so does one whose best level cannot be compiled here or does not compute in
    `dtype`.

    Raises ValueError for a level that cannot run on `device` or in `dtype`, with what to use instead; in_engine:
    also for one whose `needs` are not met.
    """
    toggles, asked = toggles_of(optimizations), vars(optimizations)
    chosen = {
        name: row.best.get(device, row.levels[0]) if asked[name] == "auto" else asked[name]
        for name, row in toggles.items()
    }
    replaced, problem = [], None
    for name, row in toggles.items():
        baseline = row.levels[0]
        if asked[name] == "auto" and row.needs and not row.needs[0](chosen):
            chosen[name] = baseline
        level = chosen[name]
        if level in row.gpu_only and device != "cuda":
            raise ValueError(
                f"{name}={level!r} cannot run on device {device!r}: {row.gpu_only[level]}. "
                f"Use {name}={baseline!r}, or a machine with an NVIDIA GPU."
            )
        if level in row.cpu_only and device != "cpu":
            raise ValueError(
                f"{name}={level!r} cannot run on device {device!r}: {row.cpu_only[level]}. "
                f"Use {name}={baseline!r}, or device='cpu'."
            )
        if level in row.by_compiler and dtype == "float16":
            if asked[name] != "auto":
                raise ValueError(
                    f"{name}={level!r} computes in float32 and bfloat16, not in float16. "
                    f"Use {name}={baseline!r}, or another dtype."
                )
            chosen[name] = baseline
        elif level in row.by_compiler and (
            problem := compilation_problem(in_engine, asked[name] == "auto")
        ):
            if asked[name] != "auto":
                raise ValueError(
                    f"{name}={level!r} cannot run here: {problem}. Or use {name}={baseline!r}."
                )
            chosen[name] = baseline
            replaced.append(f"{name}={baseline!r}")
        if in_engine and level != baseline and row.needs and not row.needs[0](chosen):
            raise ValueError(f"{name}={level!r} needs {row.needs[1]}. Use {name}={baseline!r}.")
    if replaced and in_engine:
        LOG.warning("running slower than possible, with %s: %s", ", ".join(replaced), problem)
    return chosen


def compilation_problem(compile_now: bool, only_if_best: bool) -> str | None:
    """Why the native kernels cannot run on this machine; None if they can. compile_now: compile them if the cache does
    not have them; otherwise a compiler that is found is enough. only_if_best: or would be slower than torch.
    """
    if only_if_best and not cxx.PARALLEL:
        return "the compiler of this system has no OpenMP, so native kernels use one core"
    if not compile_now:
        return cxx.why_not()
    try:
        cxx.library(NATIVE)
    except (cxx.CompilerError, OSError) as error:
        return str(error)
    return None
