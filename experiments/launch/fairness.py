"""Checks that comparisons of engines are fair: on the plan before anything runs, and on the resolved
config of each launch.

A study lists its comparisons (experiments/study/spec.py): a cell of ours, cells of others, and a
rule that says what they must share:

    best           checkpoint, dtype, work and KV-cache size; all other differences are printed
    like-for-like  also max_num_seqs, max_num_batched_tokens, max_model_len, and the level of every optimization that both have

A violation stops the study with a message; the records so far are kept. Standard library only;
`Runner` calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from experiments.records import store
from experiments.records.factor_levels import level_name
from experiments.records.store import Record, RecordError
from experiments.records.types import Config, LaunchRecord, Levels, Plan, PlannedComparison

LIMITS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len")
_NOT_A_DIFFERENCE = {
    "seed",
    "model",
    "tokenizer",
    "optimizations",
    "levels",
    "kv_cache_memory_bytes",
}
"""Settings that differ between launches anyway, or that are shown under another name."""


class FairnessError(RecordError):
    """An unfair comparison; the message names the cells and what differs."""


def check_plan(plan: Plan) -> None:
    """Raises FairnessError if the requested settings violate the rule of a comparison."""
    comparisons = plan["study"].get("comparisons", {})
    if comparisons and plan["model"]["digest"] is None:
        raise FairnessError(
            "a comparison needs the digest of its checkpoint, but this plan has none: make the plan again"
        )
    for name, comparison in comparisons.items():
        for ours, theirs in pairs(plan, comparison):
            mine, other = (plan["cells"][cell]["config"] for cell in (ours, theirs))
            keys = (
                "dtype",
                "kv_cache_memory_bytes",
                *(LIMITS if comparison["rule"] == "like-for-like" else ()),
            )
            # A setting that an engine does not have is judged by what that engine reports once it
            # runs.
            found = [
                _differ(key, mine[key], other[key])
                for key in keys
                if key in mine and key in other and mine[key] != other[key]
            ]
            _stop(name, comparison, ours, theirs, found)


def check_launches(plan: Plan, all_records: Iterable[Record]) -> None:
    """Raises FairnessError if launches that count violate the rule of a comparison."""
    comparisons = plan["study"].get("comparisons", {})
    if not comparisons:
        return
    latest = {record["cell"]: record for record in store.counted(all_records)}
    for name, comparison in comparisons.items():
        for ours, theirs in pairs(plan, comparison):
            if ours in latest and theirs in latest:
                found = list(breaches(plan, comparison["rule"], latest[ours], latest[theirs]))
                _stop(name, comparison, ours, theirs, found)


def pairs(plan: Plan, comparison: PlannedComparison) -> Iterator[tuple[str, str]]:
    """The (our cell, their cell) pairs of a comparison, without cells that cannot run here."""
    for theirs in comparison["theirs"]:
        if comparison["ours"] in plan["cells"] and theirs in plan["cells"]:
            yield comparison["ours"], theirs


def breaches(plan: Plan, rule: str, mine: LaunchRecord, other: LaunchRecord) -> Iterator[str]:
    """Describes each setting that two launches must share but do not."""
    left, right = mine["resolved"], other["resolved"]
    if left.get("dtype") != right.get("dtype"):
        yield _differ("dtype", left.get("dtype"), right.get("dtype"))
    for workload, entry in plan["workloads"].items():
        for record in (mine, other):
            found = record["workloads"].get(workload)
            served = found["fingerprint"] if found else None
            if served != entry["fingerprint"]:
                yield f"{record['cell']} served {workload} with fingerprint {served}, the plan's is {entry['fingerprint']}"
    yield from _kv_breaches(left, right, must_report=rule == "like-for-like")
    if rule == "like-for-like":
        for limit in LIMITS:
            if left.get(limit) != right.get(limit):
                yield _differ(limit, left.get(limit), right.get(limit))
        ours, theirs = switches(left), switches(right)
        if not theirs:
            yield f"{other['cell']} does not report its optimizations"
        for switch in sorted(ours.keys() & theirs.keys()):
            if ours[switch] != theirs[switch]:
                yield _differ(switch, ours[switch], theirs[switch])
        for record in (mine, other):
            declared = plan["cells"][record["cell"]]["levels"]
            ran = switches(record["resolved"])
            yield from (
                f"{record['cell']} was planned with {factor}={level}, but ran with {ran[factor]}"
                for factor, level in declared.items()
                if factor in ran and ran[factor] != level
            )


def switches(resolved: Config) -> Levels:
    """{optimization: level} by our names, from our `optimizations` or another engine's `levels`; {}
    if the engine reports none.
    """
    if "optimizations" not in resolved:
        return dict(resolved.get("levels", {}))
    levels = {factor: level_name(value) for factor, value in resolved["optimizations"].items()}
    return levels | {"compile": "on" if levels.get("kernels") == "compile" else "off"}


def differences(left: Config, right: Config) -> list[tuple[str, Any, Any]]:
    """(setting, ours, theirs) of all differences between two resolved configs; None if an engine has
    no such setting.
    """
    mine, other = ({**_shown(resolved), **switches(resolved)} for resolved in (left, right))
    return [
        (key, mine.get(key), other.get(key))
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key) != other.get(key)
    ]


def _shown(resolved: Config) -> Config:
    return {key: value for key, value in resolved.items() if key not in _NOT_A_DIFFERENCE}


def _kv_breaches(left: Config, right: Config, must_report: bool) -> Iterator[str]:
    """KV-cache sizes may differ by up to one block, because engines round to blocks of their own
    size.
    """
    mine, other = left.get("kv_cache_bytes"), right.get("kv_cache_bytes")
    if mine is None or other is None:
        if must_report:
            yield _differ("kv_cache_bytes", mine, other)
        # HF `generate` has no KV budget and allocates what a batch needs
        return
    sides = ((mine, left), (other, right))
    blocks = [
        size / resolved["num_kv_blocks"]
        for size, resolved in sides
        if resolved.get("num_kv_blocks")
    ]
    if abs(mine - other) > max(blocks, default=0):
        yield _differ("kv_cache_bytes", mine, other)


def _differ(what: str, mine: Any, other: Any) -> str:
    return f"{what}: {mine} against {other}"


def _stop(
    name: str, comparison: PlannedComparison, ours: str, theirs: str, found: list[str]
) -> None:
    if found:
        raise FairnessError(
            f"comparison {name!r} ({comparison['rule']}) of {ours} with {theirs} would not be fair: {'; '.join(found)}. Make them "
            "equal in the study (settings, cells.*.config), or remove this comparison; finished launches are kept."
        )
