"""`python -m property_tests.mutants`: plants small errors and sees which tests notice them.

run    tries mutants until the time is up; goes on where an interrupted run ended
page   writes docs/mutants.md from the results and judgements.toml
list   prints the mutants that survived, for judgements.toml
show   prints one mutant and the tests that it got, and runs them with their output
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from property_tests.mutants import results
from property_tests.mutants.rooms import ROOMS, ROOT


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="the file of results")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="try mutants")
    run.add_argument("--jobs", type=int, default=0, help="processes side by side (0: one per core)")
    run.add_argument("--minutes", type=float, default=60.0, help="no mutant starts after them")
    run.add_argument("--seed", type=int, default=1, help="of the order (default: 1)")
    run.add_argument("--count", type=int, help="try the first so many of that order, no more")
    run.add_argument("--budget", type=float, default=60.0, help="seconds of tests for one mutant")
    run.add_argument("--only", default="", help=f"a part: {', '.join(r.name for r in ROOMS)}")
    run.add_argument("--again", action="store_true", help="those that survived, once more")
    run.add_argument("--tests", nargs="+", default=[], help="only tests of these files")
    commands.add_parser("page", help="write docs/mutants.md")
    commands.add_parser("list", help="print survivors")
    show = commands.add_parser("show", help="print and run one mutant")
    show.add_argument("mutant")
    args = parser.parse_args(arguments)
    return {"run": _run, "page": _page, "list": _list, "show": _show}[args.command](args, parser)


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from property_tests.mutants.run import Runner, Settings, shown

    chosen = [room for room in ROOMS if args.only in ("", room.name)]
    if not chosen:
        parser.error(f"--only {args.only!r}: allowed are {', '.join(r.name for r in ROOMS)}")
    if args.jobs < 0 or args.minutes <= 0 or args.budget <= 0 or (args.count or 1) < 1:
        parser.error("--jobs, --minutes, --budget and --count must be positive")
    jobs = args.jobs or len(os.sched_getaffinity(0))
    modules = tuple(module for room in chosen for module in room.modules)
    settings = Settings(
        jobs,
        args.minutes,
        args.seed,
        args.count,
        args.budget,
        args.results,
        modules,
        args.again,
        tuple(args.tests),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends its processes as Ctrl-C does
    runner = Runner(settings)
    print(f"{len(runner.mutants)} mutants, {runner.planned} of them to try; {jobs} processes")
    try:
        shown(runner)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where this one ended", file=sys.stderr)
        return 130
    for file in runner.files.values():
        for name, why in file.left_out.items():
            if not why.startswith("skipped"):
                print(f"left out, as it does not pass without a mutant: {name}: {why}")
    outcomes = ", ".join(f"{n} {outcome}" for outcome, n in sorted(runner.tried.items()))
    print(f"{runner.tried.total()} tried: {outcomes or 'none'}; {args.results}")
    return 0


def _page(args: argparse.Namespace, _: argparse.ArgumentParser) -> int:
    from property_tests.mutants import page

    lines, judged = results.read(args.results), page.judgements()
    page.DOCUMENT.write_text(page.document(lines, judged))
    share = page.share_open(page.fates(lines, judged))
    print(f"{page.DOCUMENT.relative_to(ROOT)}: {share:.1%} open, at most {page.MOST_OPEN:.0%}")
    return 1 if share > page.MOST_OPEN else 0


def _list(args: argparse.Namespace, _: argparse.ArgumentParser) -> int:
    from property_tests.mutants import page

    for fate in page.fates(results.read(args.results), page.judgements()):
        if fate.fate != "killed":
            print(f"{fate.name}  ({fate.fate}, {fate.line['outcome']}, line {fate.line['line']})")
            print(f"    {fate.line['before']}\n    {fate.line['after']}")
    return 0


def _show(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from property_tests.mutants.rooms import room_of
    from property_tests.mutants.run import shown_alone

    module = args.mutant.split(":")[0]
    known = results.every_mutant([module]) if module in results.all_modules() else {}
    if args.mutant not in known:
        parser.error(f"{args.mutant!r} is no mutant; `list` prints some")
    mutant = known[args.mutant]
    print(f"{module}, line {mutant.line}\n- {mutant.before}\n+ {mutant.after}")
    return shown_alone(mutant, room_of(module))


if __name__ == "__main__":
    raise SystemExit(main())
