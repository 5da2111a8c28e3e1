"""A registered prediction beside the records of the study that it predicts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import harmonic_mean, median
from typing import Any

from experiments import workloads
from experiments.prediction.cards import card_of
from experiments.prediction.cells import Run, splits_of, waves_of, why_not
from experiments.prediction.step_time import Fitted, device_parts, host_parts
from experiments.records import store
from experiments.records.types import LaunchRecord, Plan

REGISTERED = Path(__file__).parent / "registered"
"""Predictions as they were committed before the records were read, one JSON file a study."""


@dataclass(frozen=True)
class Compared:
    """One cell on one workload. error: predicted / measured - 1 in output tokens per second. inside:
    whether the measured value lies in the predicted 90 % interval. The ratios are to the baseline.
    """

    cell: str
    workload: str
    predicted: float
    low: float
    high: float
    measured: float
    lowest: float
    highest: float
    host_share: float
    predicted_ratio: float
    measured_ratio: float
    ttft_error: float
    tpot_error: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def ratio_error(self) -> float:
        return self.predicted_ratio / self.measured_ratio - 1

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high


def compare(registered: Path, folder: Path) -> list[Compared]:
    """The cells of a registered prediction, the largest misses first. Raises ValueError where the
    prediction was made for another plan.
    """
    said = json.loads(registered.read_text(encoding="utf-8"))
    plan = store.read_plan(folder / store.PLAN)
    if said["plan_hash"] != plan["plan_hash"]:
        raise ValueError(
            f"{registered} predicts plan {said['plan_hash'][:12]}, but {folder} holds {plan['plan_hash'][:12]}: compare it "
            "with the study that it was made for"
        )
    records = store.counted(store.read(folder))
    by_key = {(row["cell"], row["workload"]): row for row in said["cells"]}
    found = []
    for (cell, workload), row in by_key.items():
        base = by_key["baseline", workload]
        measured, of_base = (_rates(records, name, workload) for name in (cell, "baseline"))
        if not measured or not of_base:
            continue
        ttft, tpot = _latencies(plan, records, cell, workload)
        found.append(
            Compared(
                cell,
                workload,
                row["output_tokens_per_s"],
                row["low"],
                row["high"],
                harmonic_mean(measured),
                min(measured),
                max(measured),
                row["host_share"],
                row["output_tokens_per_s"] / base["output_tokens_per_s"],
                harmonic_mean(measured) / harmonic_mean(of_base),
                row["ttft_p50_s"] / ttft - 1,
                row["tpot_p50_s"] / tpot - 1,
            )
        )
    return sorted(found, key=lambda c: -abs(math.log(c.predicted / c.measured)))


def _rates(records: Sequence[LaunchRecord], cell: str, workload: str) -> list[float]:
    served = [
        r["workloads"][workload] for r in records if r["cell"] == cell and r["status"] == "ok"
    ]
    return [s["output_tokens"] / s["duration_s"] for s in served]


def _latencies(
    plan: Plan, records: Sequence[LaunchRecord], cell: str, workload: str
) -> tuple[float, float]:
    """Medians over launches of the median time to the first token and per output token."""
    waves = workloads.rebuild(workload, plan["workloads"][workload])["waves"]
    lengths = [request["max_tokens"] for wave in waves for request in wave]
    ttft, tpot = [], []
    for record in records:
        if record["cell"] == cell and record["status"] == "ok":
            times = record["workloads"][workload]["request_times_s"]
            ttft.append(median(first - arrival for arrival, first, _ in times))
            tpot.append(
                median(
                    (end - first) / max(1, n - 1)
                    for (_, first, end), n in zip(times, lengths, strict=True)
                )
            )
    return median(ttft), median(tpot)


@dataclass(frozen=True)
class Term:
    """Steps of one kind, over the cells without overlap: seconds predicted over seconds measured, as
    the median over cells, the least and the most. cells: those whose schedule is the record's.
    """

    kind: str
    host: bool
    cells: int
    median: float
    least: float
    most: float


def terms(folder: Path, fitted: Fitted) -> list[Term]:
    """Which steps were predicted too fast and which too slow: predicted and recorded times of the same
    steps, by how they were run and whether the host decides their time.
    """
    plan = store.read_plan(folder / store.PLAN)
    records = store.counted(store.read(folder))
    card = card_of(plan["profile"])
    drawn = {name: workloads.rebuild(name, entry) for name, entry in plan["workloads"].items()}
    found: dict[tuple[str, bool], list[float]] = {}
    for cell, entry in plan["cells"].items():
        launches = [r for r in records if r["cell"] == cell and r["status"] == "ok"]
        if why_not(entry) or not launches or entry["config"]["optimizations"]["overlap"]:
            continue
        for name, workload in drawn.items():
            run = Run(
                plan, entry["config"], card, fitted.coefficients, splits=splits_of(launches[0])
            )
            for wave in waves_of(workload):
                run.serve(wave, workload)
            ours = [(p, d) for _, p, d in run.step_times_s]
            measured = [launch["workloads"][name]["step_times_s"] for launch in launches]
            seconds: dict[tuple[str, bool], list[float]] = {}
            if any([(int(p), int(d)) for _, p, d in steps] != ours for steps in measured):
                continue
            for i, work in enumerate(run.works):
                plan_s, issue_s = host_parts(work, card, run.rank, fitted.coefficients)
                device_s = sum(device_parts(work, card, run.rank, fitted.coefficients).values())
                what = (
                    "with prefill" if work.prefills else "decodes alone",
                    bool(work.eager) and plan_s + issue_s > device_s,
                )
                pair = seconds.setdefault((f"{work.kind}, {what[0]}", what[1]), [0.0, 0.0])
                pair[0] += run.step_times_s[i][0]
                pair[1] += sum(steps[i][0] for steps in measured) / len(measured)
            for key, (predicted, recorded) in seconds.items():
                found.setdefault(key, []).append(predicted / recorded)
    return [
        Term(kind, host, len(values), median(values), min(values), max(values))
        for (kind, host), values in sorted(found.items())
    ]


def summary(rows: Sequence[Compared]) -> dict[str, Any]:
    """What the page says in one line each. Errors are of all cells; ratio errors without the baseline
    and its A/A twin, whose ratio is 1. rank: Kendall's tau over the cells of each workload.
    """
    errors = [abs(row.error) for row in rows]
    ratios = [abs(row.ratio_error) for row in rows if row.cell not in ("baseline", "aa")]
    by_workload: dict[str, list[Compared]] = {}
    for row in rows:
        if row.cell == "aa":  # the baseline again: no order to predict
            continue
        by_workload.setdefault(row.workload, []).append(row)
    return {
        "cells": len(rows),
        "median_error": median(errors),
        "worst_error": max(errors),
        "within_10": sum(error <= 0.1 for error in errors) / len(errors),
        "median_ratio_error": median(ratios),
        "ratios_within_6": sum(error <= 0.06 for error in ratios) / len(ratios),
        "inside": sum(row.inside for row in rows) / len(rows),
        "median_ttft_error": median(abs(row.ttft_error) for row in rows),
        "median_tpot_error": median(abs(row.tpot_error) for row in rows),
        "rank": {name: kendall(members) for name, members in by_workload.items()},
    }


def kendall(rows: Sequence[Compared]) -> float:
    """Kendall's tau-a between predicted and measured throughput: pairs in the same order less pairs in
    the other, over all pairs (Kendall, "A New Measure of Rank Correlation", Biometrika 1938).
    """
    signs = [
        (a.predicted > b.predicted) * 2 - 1 == (a.measured > b.measured) * 2 - 1
        for a, b in combinations(rows, 2)
    ]
    return 2 * sum(signs) / len(signs) - 1
