"""No false alarm, whatever the seed: the fast properties again and again, each time with other
examples. A failure is a bug or a false alarm.

    python -m property_tests.repeat 50                       # all of them, in a fresh pytest each time: two minutes or more
    python -m property_tests.repeat 50 --only a_right_engine_passes statistics       # some, all in this process

--only takes names of properties, without `test_`, and of their files: `gate` for
test_gate_properties.py. Bad implementations are left out: they are always tried on the same examples.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path

import hypothesis

from property_tests.support.profiles import COMMON, Property

ROOT = Path(__file__).parents[1]
FAST = ["property_tests", "-m", "not slow", "-k", "not bad_implementation"]
Result = tuple[int, bool, float, str]
"""The seed, whether all passed, seconds, and what was printed."""


def once(seed: int) -> Result:
    """Runs the fast properties with `--hypothesis-seed`, without an example database: repetitions
    know nothing of each other.
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


def repeat(seeds: range, jobs: int) -> Iterator[Result]:
    """The results of all seeds, as they end; `jobs` run side by side, each in its own process."""
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(once, seed) for seed in seeds]):
            yield done.result()


def chosen(names: Sequence[str]) -> list[Property]:
    """The properties of these names, and of files of these names. Raises ValueError."""
    by_file = {
        path.stem.removeprefix("test_").removesuffix("_properties"): [
            value.property
            for value in vars(import_module(f"property_tests.{path.stem}")).values()
            if isinstance(getattr(value, "property", None), Property)
        ]
        for path in sorted(Path(__file__).parent.glob("test_*_properties.py"))
    }
    by_name = {own.name: [own] for found in by_file.values() for own in found}
    known = by_file | by_name
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{unknown[0]!r} is no property and no file of properties; allowed: {', '.join(known)}"
        )
    return [own for name in names for own in known[name]]


def here(properties: Sequence[Property], seeds: range) -> Iterator[Result]:
    """The same of some properties, in this process, one seed after the other."""
    quiet = hypothesis.settings(database=None, print_blob=False, **COMMON)
    for seed in seeds:
        begin, failed = time.monotonic(), []
        for own in properties:
            test = hypothesis.given(**own.strategies)(own.body)
            test = hypothesis.settings(quiet, max_examples=own.fast)(hypothesis.seed(seed)(test))
            try:
                test()
            except AssertionError as error:
                failed.append(f"{own.name}: {error}")
        yield seed, not failed, time.monotonic() - begin, "\n".join(failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("times", type=int, nargs="?", default=50)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="repetitions side by side (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="in this process (see above)")
    args = parser.parse_args()
    if args.times < 1 or args.jobs < 1:
        parser.error(f"times: {args.times}, --jobs: {args.jobs}; allowed: 1 and more")
    if args.only and args.jobs > 1:
        parser.error("--jobs: properties of --only run in this process, one after the other")
    seeds = range(args.first_seed, args.first_seed + args.times)
    try:
        results = here(chosen(args.only), seeds) if args.only else repeat(seeds, args.jobs)
    except ValueError as error:
        parser.error(str(error))
    failed = []
    for seed, passed, seconds, output in results:
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
    sys.exit(main())
