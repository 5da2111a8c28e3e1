"""`python -m property_tests.repeat 50`: the fast properties again and again with other seeds. A
failure is a bug or a false alarm.

Bad implementations are left out: they are always tried on the same examples.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAST = ["property_tests", "-m", "not slow", "-k", "not bad_implementation"]


def once(seed: int) -> tuple[bool, str]:
    """Runs the fast properties with `--hypothesis-seed`, without an example database: repetitions
    know nothing of each other.
    """
    command = [sys.executable, "-m", "pytest", *FAST, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--hypothesis-profile=repeat", f"--hypothesis-seed={seed}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0, done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("times", type=int, nargs="?", default=50)
    parser.add_argument("--first-seed", type=int, default=1)
    args = parser.parse_args()
    failed = []
    for seed in range(args.first_seed, args.first_seed + args.times):
        begin = time.monotonic()
        passed, output = once(seed)
        if not passed:
            failed.append(seed)
            print(output)
        print(
            f"seed {seed}: {'passed' if passed else 'FAILED'} in {time.monotonic() - begin:.0f} s",
            flush=True,
        )
    print(
        f"{args.times - len(failed)} of {args.times} repetitions passed"
        + (f"; failed: seeds {failed}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
