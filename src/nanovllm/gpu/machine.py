"""Which device an engine runs on, and whether everything it needs is there. Loaded unless
device='cpu'.

`prepare` runs before anything is loaded, so that what cannot work is an error within a second, not
a traceback from inside a library.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import Device, EngineConfig, Optimizations
from nanovllm.toggles.row import toggles_of

LOG = logging.getLogger("nanovllm")

LEAST_CAPABILITY = (8, 0)
"""The first GPUs with bfloat16 in tensor cores and asynchronous copies to shared memory, which
every kernel here needs.
"""

_SIGNS_OF_A_GPU = ("/proc/driver/nvidia/gpus", "/dev/nvidia0", "/usr/lib/wsl/lib/nvidia-smi")
_PROBE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "nanovllm_probe", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_nanovllm_probe(void) { return PyModule_Create(&module); }
"""


def prepare(config: EngineConfig) -> tuple[Device, EngineConfig]:
    """The device of an engine, and its configuration, in which an 'auto' that cannot be the best
    level here is replaced.

    Raises ValueError where device='cuda' finds no GPU, a GPU is too old, there are too few, or an
    explicit level cannot run.
    """
    # torch warns why it cannot use a GPU; we report that once, with the remedy
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = why_no_gpu([str(warning.message) for warning in said])
        if config.device == "cuda":
            raise ValueError(
                f"device='cuda' was asked for and torch sees no GPU: {why}; or use device='cpu'"
            )
        if gpu_is_present() and not _hidden_by_caller():
            LOG.warning("running on the CPU although there is an NVIDIA GPU: %s", why)
        return "cpu", config
    ranks = config.optimizations.tensor_parallel_size
    if ranks == 1:
        check_capability(torch.cuda.current_device())
    else:  # each rank checks its own GPU: this process does not use them
        require_gpus(ranks, f"tensor_parallel_size={ranks}")
    return "cuda", dataclasses.replace(
        config, optimizations=_without_triton_where_it_cannot_run(config.optimizations)
    )


def check_capability(index: int) -> None:
    """Raises ValueError for a GPU that is too old, with its name and what to do."""
    capability, name = torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
    if capability < LEAST_CAPABILITY:
        raise ValueError(
            f"GPU {index} ({name}) has compute capability {capability[0]}.{capability[1]}; allowed is "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or newer (Ampere: A100, RTX 30 series, and later). "
            "Choose another GPU with CUDA_VISIBLE_DEVICES, or use device='cpu'"
        )


def require_gpus(count: int, wanted_by: str) -> None:
    """Raises ValueError where this process sees fewer than `count` GPUs."""
    if (visible := torch.cuda.device_count()) < count:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown!r})"
        raise ValueError(
            f"{wanted_by} needs {count} GPUs and {visible} {'is' if visible == 1 else 'are'} visible{seen}: "
            f"use at most {visible}, or make more visible"
        )


# -- a GPU that torch cannot use -------------------------------------------------------------------


def gpu_is_present() -> bool:
    """Whether the operating system shows an NVIDIA GPU, whatever torch says."""
    return any(Path(sign).exists() for sign in _SIGNS_OF_A_GPU)


def why_no_gpu(said: list[str]) -> str:
    """Why torch uses no GPU, and the remedy. said: the warnings of torch.cuda.is_available()."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install the build for NVIDIA GPUs "
            "(https://pytorch.org/get-started/locally)"
        )
    if _hidden_by_caller():
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides all; unset it"
    if not said:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            said = [str(error)]
    reason = " ".join(said[0].split()) if said else "no reason given"
    return (
        f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, says {reason!r}; update the NVIDIA driver, or "
        "install a torch for an older CUDA (https://pytorch.org/get-started/previous-versions); in a container, pass the GPU "
        "in (--gpus all)"
    )


def _hidden_by_caller() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


# -- what Triton needs -----------------------------------------------------------------------------


def triton_problem() -> str | None:
    """What keeps Triton from running here, and the remedy; None if nothing does.

    Before its first kernel Triton compiles a small C module and keeps it in its cache. This does
    the same in the same way: once it has worked, no compiler is needed any more.
    """
    if find_spec("triton") is None:
        return "Triton is not installed; `pip install triton`"
    from triton.runtime import build

    try:
        build.compile_module_from_src(_PROBE, "nanovllm_probe")
        _find_driver_library()
    except (
        RuntimeError,
        OSError,
        ImportError,
        AssertionError,
        subprocess.CalledProcessError,
    ) as error:
        return _what_is_missing(error)
    return None


def _find_driver_library() -> None:
    from triton.backends.nvidia.driver import library_dirs

    library_dirs()


def _what_is_missing(error: Exception) -> str:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if compiler is None:
        return (
            "Triton needs a C compiler and none was found; install gcc (Debian, Ubuntu: apt-get install gcc), or name one in "
            "the environment variable CC"
        )
    if shutil.which(compiler) is None:
        return f"Triton needs a C compiler and CC={compiler!r} is none; correct or unset CC"
    if not header.is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"Triton needs the C headers of Python and {header} is missing; install them (Debian, Ubuntu: apt-get install "
            f"python{version}-dev, or python3-dev), or use a Python that brings them (uv, conda, pyenv)"
        )
    if "libcuda" in str(error) or "ldconfig" in str(error):
        return (
            "Triton cannot find libcuda.so.1 through /sbin/ldconfig; run ldconfig, or name its folder in the environment variable "
            "TRITON_LIBCUDA_PATH"
        )
    return f"the C compiler {compiler} could not build Triton's launcher ({type(error).__name__}: {error}); its output is above"


def _without_triton_where_it_cannot_run(asked: Optimizations) -> Optimizations:
    """Handles a machine where Triton cannot run: raises ValueError if Triton was asked for
    explicitly; replaces 'auto' by PyTorch operations, with a warning.
    """
    by_triton = {name: row for name, row in toggles_of(asked).items() if row.by_triton}
    levels = {name: getattr(asked, name) for name in by_triton}
    explicit = [
        f"{name}={levels[name]!r}"
        for name, row in by_triton.items()
        if levels[name] in row.by_triton
    ]
    # a switch, such as cascade_attention, follows the level that it needs
    auto = [
        name
        for name, row in by_triton.items()
        if levels[name] == "auto" and type(row.levels[0]) is not bool
    ]
    problem = triton_problem() if explicit or auto else None
    if problem is None:
        return asked
    baselines = {name: row.levels[0] for name, row in by_triton.items()}
    if explicit:
        raise ValueError(
            f"{' and '.join(explicit)} cannot run here: {problem}. "
            f"Or use {', '.join(f'{name}={level!r}' for name, level in baselines.items())}."
        )
    changes: dict[str, Any] = {name: baselines[name] for name in auto}
    # A graph serves every length, so torch's attention would gather max_model_len tokens per request
    # in each step.
    if "attention_backend" in auto and asked.cuda_graphs == "auto":
        changes["cuda_graphs"] = False
    LOG.warning(
        "running much slower than possible, with %s: %s",
        ", ".join(f"{k}={v!r}" for k, v in changes.items()),
        problem,
    )
    return dataclasses.replace(asked, **changes)


# -- a started engine ------------------------------------------------------------------------------


class OnDevice:
    """The step protocol on the engine's GPU, whichever GPU is current in the caller: Triton
    launches on the current device.
    """

    def __init__(self, loop: Any, device: torch.device) -> None:
        self.loop, self.device = loop, device

    def step(self) -> Any:
        with torch.cuda.device(self.device):
            return self.loop.step()


def started(engine: Any, duration_s: float) -> Any:
    """Prints one line about an engine on a GPU; returns its step loop, bound to its device."""
    compiled = getattr(engine.runner, "rehearsal", None)
    how = (
        f" ({compiled.num_kernels} kernels compiled in {compiled.duration_s:.1f} s)"
        if compiled and compiled.num_kernels
        else ""
    )
    tell(f"{describe(engine.config, _where(engine.runner))}; started in {duration_s:.1f} s{how}")
    # a tensor-parallel engine has none: each rank is a process of its own
    device = getattr(engine.runner, "device", None)
    return engine.loop if device is None else OnDevice(engine.loop, device)


def tell(line: str) -> None:
    """Writes a line to standard error, or to the logger `nanovllm` at level INFO if the application
    has set up logging.
    """
    if LOG.hasHandlers() or LOG.level != logging.NOTSET:
        LOG.info(line)
    else:
        print(f"nanovllm: {line}", file=sys.stderr)


def describe(config: Any, where: str) -> str:
    """One line that says what was chosen. config: a ResolvedConfig."""
    named, switched_on, switched_off = [], [], []
    for name, row in toggles_of(config.optimizations).items():
        level = getattr(config.optimizations, name)
        if not row.title or (row.lossy and level == row.levels[0]):
            continue
        if level is True:
            switched_on.append(row.title)
        elif level is False:
            switched_off.append(row.title)
        else:
            named.append(f"{row.title} {level}")
    levels = named + switched_on
    off = f" (off: {', '.join(switched_off)})" if switched_off else ""
    tokens = config.num_kv_blocks * config.block_size
    cache = f"KV cache of {tokens:,} tokens, {config.kv_cache_bytes / 2**30:.2f} GiB"
    return (
        f"{where}, {config.dtype}; {', '.join(levels)}{off}; {cache}, "
        f"for up to {config.max_num_seqs} requests of up to {config.max_model_len:,} tokens"
    )


def _where(runner: Any) -> str:
    if (device := getattr(runner, "device", None)) is None:
        return f"{runner.size} GPUs, 0 to {runner.size - 1}"
    return f"{torch.cuda.get_device_name(device)} ({device})"
