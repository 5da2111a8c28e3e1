"""Makes constraints.txt, and checks that it resolves on every supported Python and machine.

    python -m requirements.lock make     # the newest versions that the ranges of pyproject.toml allow
    python -m requirements.lock check    # no download but of metadata

The check sees what a stranger sees: the index with its default torch, and no wheels or versions of
this machine's own.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from requirements import index_settings
from requirements.environment import (
    ROOT,
    SetupError,
    find_installer,
    is_this_python,
    make_venv,
    say,
)

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = {
    "Linux x86-64": "x86_64-manylinux_2_28",
    "Linux arm64": "aarch64-manylinux_2_28",
    "macOS arm64": "aarch64-apple-darwin",
}
"""uv's names for them. The C libraries are the oldest that torch's wheels run on: glibc 2.28, macOS 14."""
_CONTENT = (
    "--extra",
    "research",
    "--extra",
    "gpu",
    "--extra",
    "ray",
    "--extra",
    "serve",
    "--group",
    "dev",
    "--group",
    "docs",
    "--group",
    "setup",
)
_HEADER = """\
# Exact versions of everything, for CPython {first} to {last} on Linux (x86-64, arm64) and macOS (arm64).
# Made by `make lock`, checked by `make check-lock`. Used as constraints: what an environment does not need is not installed,
# and a CPU build of torch fits as well. It names no index, so it works with every mirror.
"""


@dataclass(frozen=True)
class Target:
    python: str
    platform: str

    def __str__(self) -> str:
        return f"Python {self.python}, {self.platform}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m requirements.lock", description=__doc__.splitlines()[0]
    )
    parser.add_argument("action", choices=("make", "check"))
    action = parser.parse_args(arguments).action
    try:
        uv, environment, settings = strangers_uv(ROOT / ".venv")
        if action == "make":
            make(ROOT, uv, environment, settings)
            say("constraints.txt is made again: git diff constraints.txt")
            return 0
        targets = [
            Target(python, platform) for python, platform in itertools.product(PYTHONS, PLATFORMS)
        ]
        problems = check(ROOT, uv, targets, environment, settings)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in dict.fromkeys(problems.values()):  # most are the same everywhere
        where = "\n".join(str(target) for target, text in problems.items() if text == problem)
        print(f"{where}:\n    " + problem.replace("\n", "\n    "), file=sys.stderr)
    print(
        f"constraints.txt resolves on {len(targets) - len(problems)} of {len(targets)} pairs of Python and machine"
    )
    return 1 if problems else 0


def strangers_uv(venv: Path) -> tuple[Path, dict[str, str], list[str]]:
    """The exact uv in the environment (which is begun where there is none), the variables and the
    arguments for it.
    """
    python = venv / "bin" / "python"
    if not (is_this_python(venv) and (venv / ".ready").is_file()):
        python = make_venv(venv)
    uv = find_installer(python).uv
    if uv is None:
        raise SetupError("the lock is made and checked by uv, which has no wheel for this machine")
    pip = index_settings.pip_settings(python)
    own = {key: value for key, value in pip.items() if key not in index_settings.NOT_A_STRANGERS}
    environment = index_settings.as_a_stranger(pip, os.environ)
    settings = index_settings.uv_settings(
        own, environment, index_settings.toml_keys(environment), index_settings.has_certificates()
    )
    return uv, {**environment, **settings.environment}, settings.arguments


def make(
    root: Path, uv: Path, environment: Mapping[str, str], arguments: Sequence[str] = ()
) -> None:
    """Writes constraints.txt in `root`. Raises SetupError."""
    command = [
        str(uv),
        "pip",
        "compile",
        "--quiet",
        "--universal",
        "--python-version",
        PYTHONS[0],
        "--upgrade",
        "--no-header",
        "--no-annotate",
        "--no-emit-index-url",
        "--no-emit-find-links",
        *arguments,
        *_CONTENT,
        "pyproject.toml",
    ]
    done = subprocess.run(
        command, cwd=root, env=dict(environment), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SetupError(f"the ranges of pyproject.toml do not resolve:\n{done.stderr.strip()}")
    header = _HEADER.format(first=PYTHONS[0], last=PYTHONS[-1])
    (root / "constraints.txt").write_text(header + done.stdout)


def check(
    root: Path,
    uv: Path,
    targets: Sequence[Target],
    environment: Mapping[str, str],
    arguments: Sequence[str] = (),
    content: Sequence[str] = _CONTENT,
) -> dict[Target, str]:
    """Why constraints.txt in `root` does not resolve, for each target where it does not."""
    lock = set(
        re.findall(r"(?m)^[a-z0-9][^ ;\n]*==[^ ;\n]+", (root / "constraints.txt").read_text())
    )

    surroundings = {**environment, "MACOSX_DEPLOYMENT_TARGET": "14.0"}
    common = [
        # no compiler needed
        str(uv),
        "pip",
        "compile",
        "--quiet",
        "--no-header",
        "--no-annotate",
        "--only-binary",
        ":all:",
        "--constraints",
        "constraints.txt",
        *arguments,
        *content,
        "pyproject.toml",
        "--python-version",
    ]

    def compiled(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*common, *more],
            cwd=root,
            env=surroundings,
            capture_output=True,
            text=True,
            check=False,
        )

    def problem(target: Target) -> str:
        which = (target.python, "--python-platform", PLATFORMS[target.platform])
        done = compiled(*which, "--offline")
        # it may lack the metadata of a package that only this target needs
        if done.returncode != 0:
            done = compiled(*which)
        if done.returncode != 0:
            return done.stderr.strip()
        free = sorted(set(done.stdout.split("\n")) - lock - {""})
        return f"not pinned: {', '.join(free)}; make lock" if free else ""

    # asks the index once for everything; its answers then serve all targets
    compiled(PYTHONS[0], "--universal")
    with ThreadPoolExecutor(max_workers=4) as pool:  # mostly waiting for the index
        return {
            target: text
            for target, text in zip(targets, pool.map(problem, targets), strict=True)
            if text
        }


if __name__ == "__main__":
    sys.exit(main())
