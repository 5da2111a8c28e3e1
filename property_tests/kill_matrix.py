"""`python -m property_tests.kill_matrix`: which property kills which bad implementation; --write
renews the page in docs/, --write --add only what the page lacks: pairs with a new property or a new
bad implementation.

Every property gets a third of its fast number of examples, always the same ones; the one that is
there for a bad implementation gets as many as the test suite gives it. A cross is a death by
assertion; where the engine only crashed, there is none.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from property_tests.bad_implementations import BAD, BadImplementation
from property_tests.kill import Verdict, examples_for, kill, properties

DOCUMENT = Path(__file__).parents[1] / "docs" / "bad-implementations.md"
FACTS = {
    "1": "a prompt whose every block is cached leaves no query token",
    "2": "a hit on a block whose KV is not computed yet; equal prompts in one step",
    "3": "stale entries after reuse; a hash collision served as a hit",
    "4": "a preempted sequence with a wrong position, a lost token, an index past its blocks",
    "5": "a pool smaller than a request; requests that preempt each other for ever",
    "6": "a graph's batch between buckets; stale rows",
    "7": "ranks with caches of different sizes; a lost rank that leaves others hanging; a fixed name",
    "8": "temperature 0 refused; max_tokens 0; an empty or too long prompt; unknown arguments dropped",
    "9": "RMSNorm writing into its residual; rope settings of newer transformers ignored",
    "10": "memory held after the end; a cache sized from memory that others hold",
    "11": "a search through a list at every step",
}
"""Bugs that engines of this kind have had."""
KINDS = {
    "stale state": "what belonged to an earlier step, block or request is used once more, or before it is ready",
    "mistaken identity": "one thing is taken for another: a block, a row, a head, a shard, a place to meet",
    "ownership": "memory, a block, a row or a place is given back twice, too early or never, or is not one's own",
    "off by one": "one token, slot or candidate too many or too few",
    "after a preemption": "a request that starts again has lost, or kept, something of its first life",
    "across steps": "what is right in one step is wrong over several: chunks, lagged commits, texts that grow",
    "order and fairness": "the wrong request goes first or gives way",
    "what is asked does not arrive": "a parameter, a setting or an argument has no effect, or another one",
    "wrong formula": "a computation is not its definition",
    "randomness": "random numbers repeat, or depend on what they must not",
    "ranks that disagree": "tensor-parallel ranks compute, hold or wait for different things",
    "wrongly taken or refused": "what is impossible is accepted, or what is allowed is not",
    "lost or repeated delivery": "an output or a wake-up reaches its reader twice, late or never",
    "cost": "work that grows with what is none of its business",
    "schedulers that guess": "a forecast learns from what it must not",
    "a path that only large inputs take": "an error behind a threshold that small inputs never reach",
}
"""Kinds of mistakes; each bad implementation is an example of one."""


def verdicts(bad: BadImplementation, known: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """By property. known: those that need no run."""
    return {
        name: known.get(name) or kill(bad, tested, examples_for(bad, tested))
        for name, tested in properties().items()
    }


def on_page() -> dict[str, dict[str, Verdict]]:
    """{bad implementation: {property: verdict}} of the page as it is."""
    page = DOCUMENT.read_text()
    names = re.findall(r"^\| \d+ \| `(\w+)` \|", page, re.MULTILINE)
    found = {}
    for line in page.splitlines():
        if row := re.match(r"\| `(\w+)` ", line):
            marks = [cell.strip() for cell in line.strip("|").split("|")[-len(names) :]]
            verdicts = [Verdict("x" in mark, "as the page says") for mark in marks]
            found[row[1]] = dict(zip(names, verdicts, strict=True))
    return found


def document(matrix: dict[str, dict[str, Verdict]]) -> str:
    """The page: properties by number, then a row for each bad implementation."""
    names = list(properties())
    lines = [
        "# Bad implementations that the property tests catch",
        "",
        "Made by `make property MATRIX=1`. Each bad implementation is a small patch of real functions, made from outside",
        "(`property_tests/bad_implementations.py`). **x**: killed by the property that is there for it; x: killed by another one",
        "as well, within a third of its fast number of examples. Killed means that an assertion of the property or of",
        "`check_invariants` failed: a crash of the engine does not count.",
        "",
        "| | property | what must hold |",
        "| --- | --- | --- |",
        *(f"| {i} | `{name}` | {properties()[name].what} |" for i, name in enumerate(names, 1)),
        "",
        "By the kind of mistake for which they stand; others of a kind are to be expected where one was found:",
        "",
        "| kind | | bad implementations |",
        "| --- | --- | --- |",
        *(
            f"| {kind} | {what} | "
            + ", ".join(f"`{bad.name}`" for bad in BAD if bad.kind == kind)
            + " |"
            for kind, what in KINDS.items()
        ),
        "",
        "| bad implementation | bug | "
        + " | ".join(str(i) for i in range(1, len(names) + 1))
        + " |",
        "| --- | --- | " + " | ".join("---" for _ in names) + " |",
    ]
    for bad in BAD:
        cells = [
            ("**x**" if name == bad.killer else "x") if matrix[bad.name][name].killed else ""
            for name in names
        ]
        lines.append(f"| `{bad.name}` {bad.what} | {bad.fact} | " + " | ".join(cells) + " |")
    lines += ["", "Bugs that engines of this kind have had, by number:", ""]
    lines += [f"{number}. {what}" for number, what in FACTS.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help=f"renew {DOCUMENT.relative_to(DOCUMENT.parents[1])}"
    )
    parser.add_argument("--add", action="store_true", help="with --write: only what the page lacks")
    parser.add_argument("--only", default="", help="bad implementations whose name holds this")
    args = parser.parse_args()
    if args.write and args.only:
        parser.error("--write needs the whole matrix: leave --only out")
    if args.add and not args.write:
        parser.error("--add goes with --write")
    known = on_page() if args.add else {}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    matrix, survivors = {}, []
    for bad in BAD:
        if args.only in bad.name:
            matrix[bad.name] = found = verdicts(bad, known.get(bad.name, {}))
            killers = [name for name, verdict in found.items() if verdict.killed]
            print(f"{bad.name}\n    killed by {', '.join(killers) or 'NOTHING'}", flush=True)
            if not found[bad.killer].killed:
                survivors.append(bad.name)
            else:
                print(f"    {bad.killer}: {found[bad.killer].message[:150]}", flush=True)
    if args.write:
        DOCUMENT.write_text(document(matrix))
    print(
        f"{len(matrix) - len(survivors)} of {len(matrix)} killed by their property"
        + (f"; NOT: {survivors}" if survivors else "")
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
