"""Fits the coefficients of step_time.py to published records, and finds out how far off they are on a
study that was left out.

What is fitted are durations of cells, and, where steps do not overlap, of their steps with and without
prefill: the schedule of each launch is computed by the virtual engine, and the formulas of
step_time.py are evaluated for all of its steps at once. The residuals are log(predicted / measured), with
a loss that outliers do not decide. Every coefficient has a weak prior at its initial value, so that
what no record tells stays where physics puts it. Each study has a factor of its own on `host_op_s`, as
rented hosts differ by more than the measured `host_op_s` says, and one on the times of the GPU, as the
engine's kernels changed between studies. Both are 1 in predictions.

Spreads are those of studies left out: the model is fitted without a study, its cells are predicted with a
host factor of 1, and the squared residuals are explained by the share of the time that the host
decides.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean, median
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from experiments import workloads
from experiments.prediction import step_time
from experiments.prediction.cards import Card, card_of
from experiments.prediction.cells import Run, splits_of, why_not
from experiments.prediction.step_time import NAMES, Coefficients, Rank
from experiments.prediction.step_work import StepWork
from experiments.records import store
from experiments.records.types import LaunchRecord, Plan

MOST_DECODES = 48
NOISE, PRIOR, DEVICE_PRIOR = 0.08, 1.0, 0.08
"""Standard deviations, in logarithms: of a duration, of a coefficient, of a study's GPU factor."""
HOST_PRIOR = {True: 0.15, False: 0.5}
"""The same of a study's host factor, where its `host_op_s` was measured and where it is USUAL_HOST_OP_S."""
AT_MOST = {"weights_bandwidth": 1.1, "kv_bandwidth": 1.1, "matmul_peak": 1.0, "link_share": 1.0}


@dataclass(frozen=True)
class Observed:
    """One cell of a study on one workload: the work of its steps, and what was measured.

    step_weights: how many steps of the launch each kept step stands for. durations_s: of the launches;
    split_s: their steps with and without prefill, where steps do not overlap and the schedule is the
    record's.
    """

    study: str
    cell: str
    workload: str
    card: Card
    rank: Rank
    overlap: bool
    host_measured: bool
    works: list[StepWork]
    step_weights: list[float]
    prompt_tokens: int
    output_tokens: int
    durations_s: list[float]
    split_s: tuple[float, float] | None
    schedule_matches: bool

    @property
    def measured_s(self) -> float:
        return harmonic_mean([1 / d for d in self.durations_s]) ** -1


def observe(folder: Path, name: str) -> list[Observed]:
    """What a published study measured, without replicas, which the fit leaves out."""
    plan = store.read_plan(folder / store.PLAN)
    records = store.counted(store.read(folder))
    drawn = {key: workloads.rebuild(key, entry) for key, entry in plan["workloads"].items()}
    card = card_of(plan["profile"])
    found = []
    for cell, entry in plan["cells"].items():
        launches = [r for r in records if r["cell"] == cell and r["status"] == "ok"]
        if why_not(entry) or not launches:
            continue
        if entry["config"]["optimizations"].get("data_parallel_size", 1) != 1:
            continue
        for workload_name, workload in drawn.items():
            if "arrivals" in workload:
                continue
            run = virtual_run(plan, cell, launches[0], card)
            for wave in workload["waves"]:
                run.serve(wave, workload)
            found.append(_observed(name, plan, run, launches, cell, workload_name))
    return found


def virtual_run(plan: Plan, cell: str, launch: LaunchRecord, card: Card) -> Run:
    """The engine of a launch in virtual time, as it was at its date."""
    return Run(
        plan,
        {"data_parallel_size": 1, **plan["cells"][cell]["config"]},
        card,
        Coefficients(),
        splits=splits_of(launch),
        num_kv_blocks=launch["resolved"].get("num_kv_blocks"),
    )


def _observed(
    study: str, plan: Plan, run: Run, launches: list[LaunchRecord], cell: str, workload: str
) -> Observed:
    served = [launch["workloads"][workload] for launch in launches]
    counts = [[(int(p), int(d)) for _, p, d in s["step_times_s"]] for s in served]
    ours = [(p, d) for _, p, d in run.step_times_s]
    matches = all(recorded == ours for recorded in counts)
    overlap = bool(run.settings.optimizations.overlap)
    split = None
    if matches and not overlap:
        with_prefill = [sum(t for t, p, _ in s["step_times_s"] if p) for s in served]
        without = [sum(t for t, p, _ in s["step_times_s"] if not p) for s in served]
        split = median(with_prefill), median(without)
    decodes = [i for i, work in enumerate(run.works) if work.prefills == 0]
    stride = max(1, -(-len(decodes) // MOST_DECODES))
    kept = {i: len(decodes[first : first + stride]) for first, i in _strided(decodes, stride)}
    kept |= {i: 1 for i, work in enumerate(run.works) if work.prefills}
    order = sorted(kept)
    return Observed(
        study,
        cell,
        workload,
        run.card,
        run.rank,
        overlap,
        plan["profile"].get("speeds") == "measured on this machine",
        [run.works[i] for i in order],
        [float(kept[i]) for i in order],
        plan["workloads"][workload]["prompt_tokens"],
        plan["workloads"][workload]["output_tokens"],
        [s["duration_s"] for s in served],
        split,
        matches,
    )


def _strided(indices: list[int], stride: int) -> Iterable[tuple[int, int]]:
    """(where a group of `stride` begins, the index in its middle)"""
    for first in range(0, len(indices), stride):
        group = indices[first : first + stride]
        yield first, group[len(group) // 2]


class Problem:
    """All observations as arrays, grouped by the rank that ran them, so that one evaluation takes
    milliseconds.
    """

    def __init__(self, observed: Sequence[Observed]) -> None:
        self.observed = list(observed)
        self.studies = sorted({o.study for o in observed})
        fields = [field.name for field in dataclasses.fields(StepWork)]
        grouped: dict[tuple[Rank, float, float], list[int]] = {}
        for i, o in enumerate(self.observed):
            key = (o.rank, o.card.bandwidth_bytes_per_s, o.card.peak_flops)
            grouped.setdefault(key, []).append(i)
        self.groups = []
        for (rank, bandwidth, peak), members in grouped.items():
            works = [work for i in members for work in self.observed[i].works]
            arrays = {f: np.array([getattr(w, f) for w in works], dtype=float) for f in fields}
            owner = np.repeat(members, [len(self.observed[i].works) for i in members])
            host = np.array([self.observed[i].card.host_op_s for i in owner])
            card: Any = SimpleNamespace(
                bandwidth_bytes_per_s=bandwidth,
                peak_flops=peak,
                link_bytes_per_s=self.observed[members[0]].card.link_bytes_per_s,
            )
            weights = np.concatenate([self.observed[i].step_weights for i in members])
            overlap = np.array([self.observed[i].overlap for i in owner])
            study = np.array([self.studies.index(self.observed[i].study) for i in owner])
            self.groups.append(
                (rank, SimpleNamespace(**arrays), owner, host, card, weights, overlap, study)
            )
        self.set_up = np.array(
            [o.prompt_tokens * o.card.host_op_s for o in self.observed], dtype=float
        )
        measured = {o.study: o.host_measured for o in observed}
        self.host_prior = np.array([HOST_PRIOR[measured[study]] for study in self.studies])
        self.study_of = np.array([self.studies.index(o.study) for o in self.observed])
        self.measured = np.array([o.measured_s for o in self.observed])

    def seconds(
        self, c: Coefficients, factors: np.ndarray, slower: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Durations; those of steps with prefill; the share that the host decides."""
        total = self.set_up * c.set_up_token_ops * factors[self.study_of]
        prefill, by_host = np.zeros_like(total), total.copy()
        for rank, work, owner, host, card, weights, overlap, study in self.groups:
            card.host_op_s = host * factors[study]
            plan_s, issue_s = step_time.host_parts(work, card, rank, c)
            device_s = sum(step_time.device_parts(work, card, rank, c).values()) * slower[study]
            host_s = plan_s + issue_s
            eager = plan_s + np.maximum(issue_s, device_s)
            alone = np.where(work.eager > 0, eager, host_s + device_s)
            step_s = np.where(overlap, np.maximum(host_s, device_s), alone)
            decided = np.where(
                overlap,
                np.where(host_s > device_s, host_s, 0.0),
                np.where(
                    work.eager > 0, plan_s + np.where(issue_s > device_s, issue_s, 0.0), host_s
                ),
            )
            size = len(total)
            total += np.bincount(owner, weights * step_s, size)
            by_host += np.bincount(owner, weights * decided, size)
            prefill += np.bincount(owner, weights * step_s * (work.prefills > 0), size)
        return total, prefill, by_host / total

    def residuals(self, theta: np.ndarray, initial: np.ndarray) -> np.ndarray:
        c, factors, slower = self.unpack(theta)
        total, prefill, _ = self.seconds(c, factors, slower)
        parts = [np.log(total / self.measured) / NOISE]
        set_up = self.set_up * c.set_up_token_ops * factors[self.study_of]
        for i, o in enumerate(self.observed):
            if o.split_s is None:
                continue
            decode = total[i] - set_up[i] - prefill[i]
            pairs = zip((prefill[i], decode), o.split_s, strict=True)
            parts.append(
                np.array([0.5 * np.log(a / b) / NOISE for a, b in pairs if a > 0 and b > 0])
            )
        n, m = len(NAMES), len(NAMES) + len(self.studies)
        parts += [
            (theta[:n] - initial[:n]) / PRIOR,
            theta[n:m] / self.host_prior,
            theta[m:] / DEVICE_PRIOR,
        ]
        return np.concatenate(parts)

    def unpack(self, theta: np.ndarray) -> tuple[Coefficients, np.ndarray, np.ndarray]:
        """Coefficients, and the factors of each study's host and GPU."""
        n, m = len(NAMES), len(NAMES) + len(self.studies)
        values = dict(zip(NAMES, np.exp(theta[:n]).tolist(), strict=True))
        return Coefficients(**values), np.exp(theta[n:m]), np.exp(theta[m:])

    def fit(self, start: np.ndarray | None = None, evaluations: int = 40) -> np.ndarray:
        """Logarithms of all coefficients, then of the studies' factors of host and GPU."""
        defaults = Coefficients()
        initial = np.array(
            [np.log(getattr(defaults, name)) for name in NAMES] + [0.0] * (2 * len(self.studies))
        )
        upper = np.array(
            [np.log(AT_MOST.get(name, 1e12)) for name in NAMES] + [3.0] * (2 * len(self.studies))
        )
        begin = initial if start is None else start
        found = least_squares(
            self.residuals,
            np.minimum(begin, upper - 1e-6),
            bounds=(-np.inf, upper),
            loss="soft_l1",
            f_scale=1.0,
            args=(initial,),
            max_nfev=evaluations,
            x_scale=0.3,
        )
        return np.asarray(found.x)


def left_out(observed: Sequence[Observed], theta: np.ndarray) -> list[dict[str, Any]]:
    """Each study predicted by a fit on the others: log(predicted / measured) in throughput, and the share
    of the time that the host decides.
    """
    whole = Problem(observed)
    n, rows = len(NAMES), []
    for index, study in enumerate(whole.studies):
        others = Problem([o for o in observed if o.study != study])
        start = np.delete(theta, [n + index, n + len(whole.studies) + index])
        c, _, _ = others.unpack(others.fit(start, evaluations=12))
        here = Problem([o for o in observed if o.study == study])
        total, _, host = here.seconds(c, np.ones(1), np.ones(1))
        for o, seconds, share in zip(here.observed, total, host, strict=True):
            rows.append(
                {
                    "study": study,
                    "cell": o.cell,
                    "workload": o.workload,
                    "log_error": float(np.log(o.measured_s / seconds)),
                    "host_share": float(share),
                }
            )
    return rows


def spreads(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, float], float]:
    """Standard deviations of the device's and the host's times, and how many of them hold 90 % of the
    residuals of `left_out`; `ratio_*` are those of deviations from a study's and workload's mean.
    """
    shares = np.array([row["host_share"] for row in rows])
    errors = np.array([row["log_error"] for row in rows])
    device, host = _explained(errors, shares)
    z = np.abs(errors) / np.hypot(host * shares, device * (1 - shares))
    within = errors.copy()
    keys = [(row["study"], row["workload"]) for row in rows]
    for key in set(keys):
        members = [i for i, other in enumerate(keys) if other == key]
        within[members] -= errors[members].mean()
    ratio_device, ratio_host = _explained(within, shares)
    found = {
        "device": device,
        "host": host,
        "ratio_device": ratio_device,
        "ratio_host": ratio_host,
    }
    return found, float(max(1.645, np.quantile(z, 0.9)))


def _explained(errors: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """(device, host) that maximize the likelihood of normal errors with variance
    (host share)^2 + (device (1 - share))^2.
    """

    def misfit(log_sd: np.ndarray) -> np.ndarray:
        device, host = np.exp(log_sd)
        variance = (host * shares) ** 2 + (device * (1 - shares)) ** 2 + 1e-6
        return np.asarray(np.sqrt(np.log(variance) + errors**2 / variance + 20))

    found = least_squares(misfit, np.log([0.06, 0.2]))
    device, host = np.exp(found.x)
    return float(max(device, 0.01)), float(max(host, 0.01))


def fit_to(folders: dict[str, Path], out: Path) -> dict[str, Any]:
    """Fits, writes the coefficients to `out`, and returns what was written."""
    observed = [o for name, folder in folders.items() for o in observe(folder, name)]
    problem = Problem(observed)
    theta = problem.fit()
    c, factors, slower = problem.unpack(theta)
    total, _, _ = problem.seconds(c, factors, slower)
    rows = left_out(observed, theta)
    spread, t = spreads(rows)
    in_sample = np.abs(np.log(problem.measured / total))
    out_of = np.abs([row["log_error"] for row in rows])
    content = {
        "studies": problem.studies,
        "cells": len(observed),
        "schedules_as_recorded": sum(o.schedule_matches for o in observed),
        "coefficients": {name: _six(getattr(c, name)) for name in NAMES},
        "host_factors": {
            name: _six(float(factor)) for name, factor in zip(problem.studies, factors, strict=True)
        },
        "device_factors": {
            name: _six(float(factor)) for name, factor in zip(problem.studies, slower, strict=True)
        },
        "spread": {name: _six(value) for name, value in spread.items()},
        "t": _six(t),
        "median_error": {
            "fitted": _six(float(np.median(in_sample))),
            "study left out": _six(float(np.median(out_of))),
        },
        "left_out": [
            {key: _six(value) if isinstance(value, float) else value for key, value in row.items()}
            for row in rows
        ],
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def _six(value: float) -> float:
    return float(f"{value:.6g}")
