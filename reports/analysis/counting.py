"""Which launches count: the rules of docs/adr/0002, applied once, with a reason for every launch
left out.

A launch counts if it is in the plan, ran under this plan, has `status: ok`, was not superseded,
keeps what the methodology promises (promises.py), contradicts neither the plan nor itself
(consistency.py), every one of its workloads produced tokens that passed the equivalence gate
(gate_lines.py), and, if it changes the output on purpose, its price is known
(statistics/price.py). Of several attempts the first that finished decides
(experiments/records/store.py), whatever came of it; whether a launch counts never depends on how fast it
was.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.records import store
from experiments.records.types import LaunchRecord, Plan
from reports.analysis.consistency import Check, check_workload
from reports.analysis.gate_lines import Gate
from reports.analysis.promises import Study, broken
from reports.statistics.price import unpriced

Record = Mapping[str, Any]

WITHOUT_PRICE = "changes the output, and its price is unknown"
"""How the reason begins for which a launch of a lossy configuration does not count."""


@dataclass
class Counted:
    """The outcome of counting: `launches` and `excluded` together hold every launch record once. code:
    the digest of the code that most of the launches measured.
    """

    launches: list[Record] = field(default_factory=list)
    excluded: list[dict[str, Any]] = field(default_factory=list)
    duplicates: int = 0
    checks_made: Counter[str] = field(default_factory=Counter)
    checks_failed: list[dict[str, Any]] = field(default_factory=list)
    code: str = ""

    def exclude(self, record: LaunchRecord, reason: str) -> None:
        self.excluded.append(
            {
                "launch": record["launch"],
                "attempt": record["attempt"],
                "block": record["block"],
                "cell": record["cell"],
                "status": record["status"],
                "reason": reason,
            }
        )


def count(records: Sequence[store.Record], plan: Plan, gate: Gate) -> Counted:
    """Sort every launch record of `records` into counted and excluded; a duplicated record is
    looked at once.
    """
    planned = {launch["launch"]: launch for launch in plan["launches"]}
    if len({(launch["block"], launch["cell"]) for launch in planned.values()}) < len(
        plan["launches"]
    ):
        raise ValueError("the plan runs a cell twice in one block; a block holds every cell once")
    superseded = store.superseded(
        record for record in records if record["plan_hash"] == plan["plan_hash"]
    )
    counted = Counted()
    seen: dict[store.Attempt, LaunchRecord] = {}
    own: list[LaunchRecord] = []
    for record in records:
        if record["kind"] != "launch":
            continue
        key = (record["launch"], record["attempt"])
        if seen.get(key) == record:
            counted.duplicates += 1
        elif key in seen:
            counted.exclude(record, "another record of the same launch and attempt came first")
        elif key in superseded:
            counted.exclude(record, f"superseded: {superseded[key]}")
        elif reason := _foreign(record, plan, planned):
            counted.exclude(record, reason)
        else:
            own.append(record)
        seen.setdefault(key, record)
    judged = list(store.decided(own))
    study = Study.of(plan, (record for record, reason in judged if reason is None))
    counted.code = study.code
    without_price = unpriced(records, plan, study.code)
    for record, reason in judged:
        reason = reason or _objection(record, study, gate, counted)
        if reason is None and record["cell"] in without_price:
            reason = f"{WITHOUT_PRICE}: {without_price[record['cell']]}"
        if reason is not None:
            counted.exclude(record, reason)
        else:
            counted.launches.append(record)
    counted.launches.sort(key=lambda record: (record["block"], record["order"], record["launch"]))
    counted.excluded.sort(
        key=lambda row: (row["block"], row["launch"], row["attempt"], row["reason"])
    )
    return counted


def _foreign(record: Record, plan: Plan, planned: Mapping[str, Any]) -> str | None:
    """Why a record does not belong to this plan, or None."""
    if record["plan_hash"] != plan["plan_hash"]:
        return f"ran under another plan ({record['plan_hash'][:12]})"
    entry = planned.get(record["launch"])
    if entry is None:
        return "not in the plan"
    if (entry["cell"], entry["block"]) != (record["cell"], record["block"]):
        return f"the plan puts {entry['cell']} in block {entry['block']} under this name"
    return None


def _objection(record: Record, study: Study, gate: Gate, counted: Counted) -> str | None:
    """The first rule that a launch of this plan breaks, or None."""
    plan = study.plan
    missing = sorted(set(plan["workloads"]) - set(record["workloads"]))
    if missing:
        return f"did not serve {', '.join(missing)}"
    if reason := next(broken(record, study), None):
        return reason
    failed = _failed_checks(record, plan, counted)
    if failed:
        return f"contradicts itself: {failed[0].name} ({failed[0].detail})"
    for workload in sorted(plan["workloads"]):
        objection = gate.objection(workload, record["workloads"][workload])
        if objection:
            return objection
    return None


def _failed_checks(record: Record, plan: Plan, counted: Counted) -> list[Check]:
    """Run the consistency checks, note them in `counted`, and return the hard ones that failed."""
    hard = []
    for name in sorted(plan["workloads"]):
        for check in check_workload(
            name, record["workloads"][name], plan["workloads"][name], record.get("resolved", {})
        ):
            counted.checks_made[check.name] += 1
            if not check.ok:
                counted.checks_failed.append(
                    {
                        "launch": record["launch"],
                        "attempt": record["attempt"],
                        "workload": name,
                        "check": check.name,
                        "hard": check.hard,
                        "detail": check.detail,
                    }
                )
                if check.hard:
                    hard.append(check)
    return hard
