"""Compiles C++ sources of this package into a shared library, once for each machine. Standard library only.

The library has a plain C interface and is called through ctypes: no headers of Python or torch are needed, so a
compiler is all that a machine must have, and it takes seconds. (torch.utils.cpp_extension also wants ninja and Python's
headers, and compiles torch's own headers for half a minute.)

The library's name holds a digest of all that it depends on: sources, compiler, flags, and what the CPU can do. It is
built in a folder of its own and moved to its name when it is complete, so a killed build leaves nothing that is used.
Processes that need it at the same time wait for the first one.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HOW_TO_INSTALL = (
    "install g++ (Debian and Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`; conda: `conda install "
    "cxx-compiler`; macOS: `xcode-select --install`) or name a compiler in the environment variable CXX"
)
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
CONTRACTION = "-ffp-contract="
EXACT = "-ffp-contract=off"
"""A source whose text contains this flag is compiled with it: each product and sum is rounded. Elsewhere a compiler may
fuse them."""

PARALLEL = sys.platform == "linux"
"""Whether kernels use several cores: the compilers of macOS have no OpenMP."""


class CompilerError(RuntimeError):
    """There is no working C++ compiler. The message says what to install."""


def compiler() -> list[str]:
    """The command of a C++ compiler: that of the environment variable CXX, or the first that is found. Raises
    CompilerError where there is none.
    """
    if asked := os.environ.get("CXX"):
        command = shlex.split(asked)
        if shutil.which(command[0]) is None:
            raise CompilerError(f"CXX={asked!r} is not found; {HOW_TO_INSTALL}")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CompilerError(f"it needs a C++ compiler, and none was found; {HOW_TO_INSTALL}")


def why_not() -> str | None:
    """Why sources cannot be compiled here; None where a compiler is found."""
    try:
        compiler()
    except CompilerError as error:
        return str(error)
    return None


def cache_folder() -> Path:
    """$NANOVLLM_CACHE, else .cache/nanovllm in the repository, or in the working directory of an installed package."""
    repository = Path(__file__).resolve().parents[2]
    home = repository if (repository / "pyproject.toml").is_file() else Path.cwd()
    return Path(os.environ.get("NANOVLLM_CACHE") or home / ".cache" / "nanovllm")


def library(folder: Path, cache: Path | None = None) -> Path:
    """The shared library of all *.cpp in `folder`, compiled if the cache does not have it yet.

    Raises CompilerError where there is no compiler or it fails, with its output; OSError where the cache cannot be
    written.
    """
    command, target_flags = compiler(), machine_flags()
    name = f"{folder.name}-{_digest(folder, command, target_flags)}"
    cache = cache or cache_folder()
    file = cache / f"{name}.so"
    if file.is_file():
        return file
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f".{name}.lock"):
            if not file.is_file():
                _build(folder, command, target_flags, file)
    except OSError as error:
        raise OSError(
            error.errno,
            f"native kernels cannot be built in {cache} ({error.strerror}): set NANOVLLM_CACHE to a folder that can "
            "be written",
        ) from error
    return file


def load(file: Path) -> ctypes.CDLL:
    """Loads a library of `library`. OpenMP's runtime is the one in the process, which torch has loaded; where it has
    loaded none, the system's.
    """
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        if "undefined symbol" not in str(error):
            raise
        with contextlib.suppress(OSError):
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(file))


def machine_flags() -> tuple[str, ...]:
    """Compiler flags for this CPU, or for the less that ATEN_CPU_CAPABILITY allows, as it does for torch."""
    allowed = os.environ.get("ATEN_CPU_CAPABILITY", "")
    if platform.machine() in ("x86_64", "AMD64"):
        if allowed == "default":
            return ("-march=x86-64",)
        return ("-march=native", *(("-mno-avx512f",) if allowed == "avx2" else ()))
    return ("-mcpu=native",)


def cpu_features() -> str:
    """What the CPU can do, as the operating system lists it."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE):
            model = re.search(r"^(?:model name|CPU part)\s*:(.*)$", text, re.MULTILINE)
            return found[1] + (model[1] if model else "")
    return platform.processor()


def _digest(folder: Path, command: list[str], target_flags: tuple[str, ...]) -> str:
    path = Path(shutil.which(command[0]) or command[0]).resolve()
    made_of = hashlib.sha256()
    for source in sorted((*folder.glob("*.cpp"), *folder.glob("*.h"))):
        made_of.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    state = path.stat()  # a compiler that was updated is another one
    facts = (command, str(path), state.st_size, state.st_mtime_ns, FLAGS, target_flags)
    made_of.update(repr((*facts, platform.machine(), cpu_features())).encode())
    return made_of.hexdigest()[:16]


def _build(folder: Path, command: list[str], target_flags: tuple[str, ...], file: Path) -> None:
    print(
        f"nanovllm: compiling native kernels with {' '.join(command)}, once for this machine ...",
        file=sys.stderr,
        flush=True,
    )
    begin = time.perf_counter()
    openmp = ("-fopenmp",) if PARALLEL else ()
    # Nothing is linked but the C++ library: OpenMP's functions are found in the process (load).
    link = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
    prefix = f".building-{file.stem}-"
    # left by a build that was killed: nobody else builds now
    for left in file.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=file.parent) as aside:
        running = []
        for source in sorted(folder.glob("*.cpp")):
            contract = (
                EXACT if EXACT in source.read_text(encoding="utf-8") else f"{CONTRACTION}fast"
            )
            to = os.path.join(aside, f"{source.stem}.o")
            arguments = [
                *command,
                *FLAGS,
                *target_flags,
                *openmp,
                contract,
                "-c",
                str(source),
                "-o",
                to,
            ]
            running.append((arguments, to, _start(arguments)))
        failed = [_failure(arguments, process) for arguments, _, process in running]
        built = os.path.join(aside, file.name)
        if not any(failed):
            arguments = [*command, "-shared", *link, *(to for _, to, _ in running), "-o", built]
            failed = [_failure(arguments, _start(arguments))]
        if found := [text for text in failed if text]:
            raise CompilerError(
                f"the native kernels could not be compiled: {found[0]}\n{HOW_TO_INSTALL}"
            )
        os.replace(built, file)
    print(
        f"nanovllm: native kernels are compiled ({time.perf_counter() - begin:.0f} s, {file})",
        file=sys.stderr,
        flush=True,
    )


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _failure(arguments: list[str], process: subprocess.Popen[str]) -> str:
    """Waits for a compiler; what it said if it failed."""
    said = process.communicate()[0]
    return f"{shlex.join(arguments)}\n{said[-3000:]}" if process.returncode else ""


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its process, however that ends."""
    import fcntl

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
