"""What docs/methodology.md promises of every launch that is counted, checked again from the records.

The runner applies most of this when a launch ends, but records may come from an older runner, be
copied together, or be edited. A launch that breaks a promise is excluded, with the reason. That the
work was the work asked for, and that the gate accepted it, are promises too; they are checked last,
because they look at each workload (consistency.py, gate_lines.py).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any

from experiments.host import validity
from experiments.load import delivered
from experiments.records.types import Plan

Record = Mapping[str, Any]

CLOCK_SLACK_S = 0.5
"""By how much two clocks of one launch may differ: they start and stop at different moments."""


@dataclass(frozen=True)
class Study:
    """What launches are held against: the plan, what most of the launches that finished have in
    common (the measured code of the study, and the boot of each block), and when the next launch on
    the same boot started, by launch and attempt.
    """

    plan: Plan
    code: str
    boots: Mapping[int, str]
    next_starts: Mapping[tuple[str, int], datetime] = field(default_factory=dict)

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
            _next_starts(found),
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
    if (rules := study.plan["study"].get("load")) is not None:
        found += [
            objection
            for work in record["workloads"].values()
            if "load" in work
            for objection in delivered.objections(work["load"], rules)
        ]
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


def _clocks_agree(record: Record, study: Study) -> str | None:
    """Three clocks tell how long a launch took: the runner's, which gives total_s and the times of
    its parts; that of the thread which samples the machine; and the computer's, by which the next
    launch started. None of them can have seen less than another.
    """
    total_s = record["total_s"]
    parts_s = sum(
        record.get(part) or 0.0 for part in ("process_start_s", "load_s", "warm_up_s")
    ) + sum(
        sum(work.get("servings_s") or [work["duration_s"]]) for work in record["workloads"].values()
    )
    samples = record["telemetry"].get("samples") or []
    last_s = max((sample["time_s"] for sample in samples), default=0.0)
    for what, seconds in (("its parts took", parts_s), ("samples of the machine span", last_s)):
        if seconds > total_s + CLOCK_SLACK_S:
            return f"clocks disagree: {what} {seconds:.1f} s, the whole launch {total_s:.1f} s"
    following = study.next_starts.get((record["launch"], record["attempt"]))
    if following is not None:
        apart_s = (following - _start(record)).total_seconds()
        if apart_s < total_s - CLOCK_SLACK_S:
            return f"clocks disagree: it took {total_s:.1f} s, the next launch started {apart_s:.1f} s after it"
    return None


def _next_starts(launches: Iterable[Record]) -> dict[tuple[str, int], datetime]:
    """When the launch that follows each on its boot started."""
    by_boot: dict[str, list[Record]] = {}
    for record in launches:
        by_boot.setdefault(record["boot_id"], []).append(record)
    return {
        (record["launch"], record["attempt"]): _start(following)
        for records in by_boot.values()
        for ordered in [sorted(records, key=_start)]
        for record, following in pairwise(ordered)
    }


def _start(record: Record) -> datetime:
    return datetime.fromisoformat(record["started_at"])


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
    Promise("clocks", "No clock saw less of it than another one.", _clocks_agree),
    Promise("one boot", "All launches of a block ran on one machine and one boot.", _one_boot),
)
