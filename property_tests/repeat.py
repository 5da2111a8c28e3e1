"""`python -m property_tests.repeat 50`: the fast properties again and again with other seeds. A
failure is a bug or a false alarm.

Bad implementations are left out: they are always tried on the same examples.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAST = ["property_tests", "-m", "not slow", "-k", "not bad_implementation"]


def once(seed: int) -> tuple[int, bool, float, str]:
    """Runs the fast properties with `--hypothesis-seed`, without an example database: repetitions
    know nothing of each other.

    Returns the seed, whether all passed, seconds, and what pytest printed.
    """
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", *FAST, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--hypothesis-profile=repeat", f"--hypothesis-seed={seed}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return seed, done.returncode == 0, time.monotonic() - begin, done.stdout + done.stderr


def repeat(seeds: range, jobs: int) -> Iterator[tuple[int, bool, float, str]]:
    """The results of all seeds, as they end; `jobs` run side by side, each in its own process."""
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(once, seed) for seed in seeds]):
            yield done.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("times", type=int, nargs="?", default=50)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="repetitions side by side (default: 1)")
    args = parser.parse_args()
    if args.times < 1 or args.jobs < 1:
        parser.error(f"times: {args.times}, --jobs: {args.jobs}; allowed: 1 and more")
    failed = []
    for seed, passed, seconds, output in repeat(
        range(args.first_seed, args.first_seed + args.times), args.jobs
    ):
        if not passed:
            failed.append(seed)
            print(output)
        print(f"seed {seed}: {'passed' if passed else 'FAILED'} in {seconds:.0f} s", flush=True)
    print(
        f"{args.times - len(failed)} of {args.times} repetitions passed"
        + (f"; failed: seeds {sorted(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
