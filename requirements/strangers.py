"""Runs the test suite as strangers would: in whole environments of the other Pythons of this
machine, made by the README's own commands from the index's default torch, with nothing of this
machine's but its way to the index.

    python -m requirements.strangers [--pythons "3.12 /path/to/python3.13"] [-- tests/engine/test_engine.py ...]

Each lives in `.strangers/<version>`, a copy of what git tracks or would add, and is kept for the
next time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from requirements import index_settings
from requirements.environment import ROOT, output, say
from requirements.lock import PYTHONS

FOLDER = ROOT / ".strangers"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m requirements.strangers", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--pythons",
        help="versions or interpreters, with blanks; without it, every other supported one that is here",
    )
    parser.add_argument(
        "tests", nargs="*", help="what pytest is to run; without it, what `make test` runs"
    )
    given = parser.parse_args(arguments)
    main_version = f"3.{sys.version_info.minor}"
    wanted = (
        given.pythons.split()
        if given.pythons
        else [version for version in PYTHONS if version != main_version]
    )
    found = {name: interpreter(name) for name in wanted}
    for name, python in found.items():
        if python is None:
            say(f"Python {name}: not on this machine, not tested")
    results = {name: try_out(python, given.tests) for name, python in found.items() if python}
    if not results:
        say(
            f"no Python other than {main_version} was found, so nothing was tested: --pythons (make: PYTHONS=) takes paths as well"
        )
        return 1
    for name, code in results.items():
        say(f"Python {name}: {'passed' if code == 0 else f'FAILED (make ended with {code})'}")
    return 0 if all(code == 0 for code in results.values()) else 1


def interpreter(name: str) -> str | None:
    """A path as it is; for a version an interpreter on the PATH, or one that pyenv or uv has put
    elsewhere.
    """
    if "/" in name:
        return name if output(name, "-V") else None
    candidates = [shutil.which(f"python{name}")]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path("~/.pyenv").expanduser())
    uv = Path(
        os.environ.get("UV_PYTHON_INSTALL_DIR") or Path("~/.local/share/uv/python").expanduser()
    )
    candidates += sorted(
        map(
            str,
            [
                *pyenv.glob(f"versions/{name}*/bin/python{name}"),
                *uv.glob(f"cpython-{name}*/bin/python{name}"),
            ],
        )
    )
    # Tried out, because pyenv puts a `python3.12` on the PATH that only says that it is not
    # switched on.
    return next(
        (
            python
            for python in candidates
            if python and output(python, "-V").startswith(f"Python {name}")
        ),
        None,
    )


def try_out(python: str, tests: Sequence[str]) -> int:
    """What make returned."""
    version = output(python, "-c", "import platform; print(platform.python_version())")
    folder = FOLDER / version
    say(f"--- Python {version} in {folder.relative_to(ROOT)}")
    copy_tree(folder)
    environment = index_settings.as_a_stranger(index_settings.pip_settings(python), os.environ)
    for name in (
        "PYTHON",
        "TORCH",
        "EXTRAS",
        "MAKEFLAGS",
        "MAKEOVERRIDES",
        "VIRTUAL_ENV",
        "PYTHONPATH",
    ):
        environment.pop(name, None)  # what this make was told
    setup = subprocess.run(
        ["make", f"PYTHON={python}", "setup"], cwd=folder, env=environment, check=False
    ).returncode
    if setup != 0 or not tests:
        return (
            setup
            or subprocess.run(["make", "test"], cwd=folder, env=environment, check=False).returncode
        )
    command = [
        str(folder / ".venv" / "bin" / "python"),
        "-m",
        "pytest",
        "-m",
        "not slow and not bench",
        "-n",
        "auto",
        "--dist",
        "worksteal",
        *tests,
    ]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def copy_tree(folder: Path) -> None:
    """The working tree as it is, without what git ignores; what earlier copies left there beside
    environment and caches goes.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.name not in (".venv", ".cache"):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


if __name__ == "__main__":
    sys.exit(main())
