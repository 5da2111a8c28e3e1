"""What docs/methodology.md promises of every launch that is counted, checked again from the records.

The runner applies most of this when a launch ends, but records may come from an older runner, be
copied together, or be edited. A launch that breaks a promise is excluded, with the reason. That the
work was the work asked for, and that the gate accepted it, are promises too; they are checked last,
because they look at each workload (consistency.py, gate_lines.py).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.host import validity
from experiments.records.types import Plan

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """What launches are held against: the plan, and what most of the launches that finished have in
    common: the measured code of the study, and the boot of each block.
    """

    plan: Plan
    code: str
    boots: Mapping[int, str]

    @classmethod
    def of(cls, plan: Plan, launches: Iterable[Record]) -> "Study":
        """launches: those of the plan whose status is `ok`."""
        found = list(launches)
        blocks: dict[int, list[str]] = {}
        for record in found:
            blocks.setdefault(record["block"], []).append(record["boot_id"])
        return cls(
            plan,
            _usual(map(_code, found)),
            {block: _usual(boots) for block, boots in blocks.items()},
        )


@dataclass(frozen=True)
class Promise:
    """broken: why a launch breaks it, or None."""

    name: str
    words: str
    broken: Callable[[Record, Study], str | None]


def broken(record: Record, study: Study) -> Iterator[str]:
    """The reasons why a launch that finished breaks a promise, in the order of PROMISES."""
    for promise in PROMISES:
        if reason := promise.broken(record, study):
            yield reason


def _as_planned(record: Record, study: Study) -> str | None:
    cell = study.plan["cells"][record["cell"]]
    entry = next(each for each in study.plan["launches"] if each["launch"] == record["launch"])
    for name, planned in (
        ("engine", cell["engine"]),
        ("requested", cell["config"]),
        ("seed", entry["seed"]),
    ):
        if record[name] != planned:
            return f"not the launch that was planned: {name} is {record[name]}, planned {planned}"
    return None


def _toggles_worked(record: Record, study: Study) -> str | None:
    """Of the whole launch, and of the servings that were timed: what never engaged while the times
    were taken changed nothing that is reported.
    """
    config = study.plan["cells"][record["cell"]]["config"]
    timed: dict[str, Any] = {}
    for work in record["workloads"].values():
        for factor, toggle in work.get("toggles", {}).items():
            before = timed.get(factor, {"engaged": 0})["engaged"]
            timed[factor] = {**toggle, "engaged": before + toggle["engaged"]}
    for toggles in (record.get("toggles", {}), timed):
        if found := validity.wrong_toggles(toggles, config):
            return f"toggles: {'; '.join(found)}"
    return None


def _undisturbed(record: Record, study: Study) -> str | None:
    telemetry: Any = {"foreign_gpu_pids": [], **record["telemetry"]}
    found = validity.objections(telemetry, study.plan["study"].get("validity"))
    return f"disturbed: {'; '.join(found)}" if found else None


def _one_code(record: Record, study: Study) -> str | None:
    if _code(record) == study.code:
        return None
    return f"ran code {_code(record)[:12]}, most launches of the study ran {study.code[:12]}"


def _one_boot(record: Record, study: Study) -> str | None:
    boot, usual = record["boot_id"], study.boots[record["block"]]
    if boot == usual:
        return None
    return f"ran on boot {boot}, most of block {record['block']} on {usual}"


def _code(record: Record) -> str:
    return str(record["provenance"].get("code_digest"))


def _usual(values: Iterable[str]) -> str:
    """The most frequent one; of equally frequent ones the first. Empty if there is none."""
    common = Counter(values).most_common(1)
    return common[0][0] if common else ""


PROMISES = (
    Promise(
        "as planned", "It ran the engine, settings and seed that the plan gives it.", _as_planned
    ),
    Promise(
        "toggles",
        "Every toggle that is on engaged, and every toggle that is off did not.",
        _toggles_worked,
    ),
    Promise("undisturbed", "The machine kept the plan's rules of validity.", _undisturbed),
    Promise("one code", "All launches of a study ran the same measured code.", _one_code),
    Promise("one boot", "All launches of a block ran on one machine and one boot.", _one_boot),
)
