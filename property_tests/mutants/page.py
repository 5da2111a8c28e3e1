"""docs/mutants.md, made of the results and of what people said about the survivors."""

from __future__ import annotations

import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from property_tests.mutants import results
from property_tests.mutants.operators import Mutant
from property_tests.mutants.results import KILLED, SURVIVED, Line
from property_tests.mutants.rooms import ROOMS, ROOT, room_of

DOCUMENT = ROOT / "docs" / "mutants.md"
JUDGEMENTS = Path(__file__).with_name("judgements.toml")
VERDICTS = ("equivalent", "open")
MOST_OPEN = 0.03


@dataclass(frozen=True)
class Judgement:
    """equivalent: no input can tell it from the original, or only speed and messages differ; open:
    nobody has said yet, or no test was found that is worth its time.
    """

    verdict: str
    why: str


def judgements(path: Path = JUDGEMENTS) -> dict[str, Judgement]:
    """By name of the mutant. Raises ValueError where one has another verdict, or no reason."""
    found = {}
    for entry in tomllib.loads(path.read_text()).get("survivor", []):
        verdict, why = entry["verdict"], entry["why"].strip()
        if verdict not in VERDICTS or not why:
            raise ValueError(
                f"{path.name}: {entry['mutant']} is judged {verdict!r} because {why!r}; "
                f"allowed are {' and '.join(VERDICTS)}, with a reason"
            )
        found[entry["mutant"]] = Judgement(verdict, why)
    return found


@dataclass(frozen=True)
class Fate:
    """Of a mutant: killed, or how it was judged. since: it survived the first run of its room's
    tests, and `killer` notices it today.
    """

    name: str
    line: Line
    fate: str
    why: str = ""
    since: bool = False

    @property
    def column(self) -> str:
        if self.fate != "killed" or not self.since:
            return self.fate
        return "property" if self.line.get("killer", "").startswith("property_tests") else "example"


def fates(
    lines: list[Line], judged: dict[str, Judgement], mutants: dict[str, Mutant] | None = None
) -> list[Fate]:
    """Of every mutant that was tried, by name. With `mutants`, only where the function is still as
    it was.
    """
    first: dict[str, str] = {}
    last: dict[str, Line] = {}
    for line in lines:
        if "mutant" in line and line["outcome"] in (*KILLED, *SURVIVED):
            first.setdefault(line["mutant"], line["outcome"])
            last[line["mutant"]] = line
    if mutants is not None:
        last = results.latest(last.values(), mutants)
    found = []
    for name, line in sorted(last.items()):
        if line["outcome"] in KILLED:
            found.append(Fate(name, line, "killed", since=first[name] in SURVIVED))
        else:
            verdict = judged.get(name, Judgement("open", "not judged yet"))
            found.append(Fate(name, line, verdict.verdict, verdict.why))
    return found


def share_open(known: Iterable[Fate]) -> float:
    counts = Counter(fate.fate for fate in known)
    return counts["open"] / max(1, counts.total())


def document(lines: list[Line], judged: dict[str, Judgement]) -> str:
    """The page."""
    known = fates(lines, judged)
    rooms: dict[str, list[Fate]] = defaultdict(list)
    for fate in known:
        rooms[room_of(fate.name.split(":")[0]).name].append(fate)
    text = [
        "# Mutants",
        "",
        "Made by `make mutants` (`property_tests/mutants`). A mutant is one small error, planted into a module that decides",
        "something: a comparison turned around, a sum that became a difference, a constant one larger, a statement left out. The",
        "tests that run the changed statement then have to fail. Each mutant that they let live is judged below: killed by a",
        "property or by an example that was added since, equivalent (no input tells it from the original, or only speed or the",
        f"wording of a message does), or open. At most {MOST_OPEN:.0%} may be open; {share_open(known):.1%} are.",
        "",
        *_runs(lines),
        "",
        "| part | modules | tried | killed at once | by a property since | by an example since | equivalent | open |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    total: Counter[str] = Counter()
    for room in ROOMS:
        own = Counter(fate.column for fate in rooms[room.name])
        total += own
        modules = ", ".join(f"`{module.split('.')[-1]}`" for module in room.modules)
        text.append(f"| {room.name} | {modules} | {_cells(own)} |")
    text.append(f"| all | | {_cells(total)} |")
    for room in ROOMS:
        survivors = [fate for fate in rooms[room.name] if fate.fate != "killed" or fate.since]
        if survivors:
            text += ["", f"## {room.name.capitalize()}", ""]
            text += ["| mutant | change | judged |", "| --- | --- | --- |"]
            text += [_row(fate) for fate in survivors]
    return "\n".join(text) + "\n"


def _cells(counts: Counter[str]) -> str:
    columns = ("killed", "property", "example", "equivalent", "open")
    return " | ".join(str(n) for n in (counts.total(), *(counts[name] for name in columns)))


def _runs(lines: list[Line]) -> list[str]:
    runs = [line["run"] for line in lines if "run" in line]
    told = [
        f"- {run['at'][:10]}, commit {run['commit']}, Python {run['python']}, torch {run['torch']}, "
        f"{run['jobs']} process{'es' * (run['jobs'] != 1)}, seed {run['seed']}"
        for run in runs
    ]
    return ["Runs:", "", *dict.fromkeys(told)] if told else ["It has not run yet."]


def _row(fate: Fate) -> str:
    module, scope, *operator = fate.name.split(":")
    place = f"`{module.split('.')[-1]}.{scope}` {' '.join(operator)}"
    change = f"`{_code(fate.line['before'])}` became `{_code(fate.line['after'])}`"
    if fate.fate == "killed":
        killer = fate.line.get("killer", "").split("::")[-1].split("[")[0]
        kind = "property" if fate.column == "property" else "example"
        judged = f"killed since by the {kind} `{killer}`" if killer else "killed since"
    else:
        judged = f"{fate.fate}: {fate.why}"
    return f"| {place} | {change} | {judged} |"


def _code(text: str, longest: int = 160) -> str:
    """On one line of a table, cut where it is long."""
    flat = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"
