"""What `python -m experiments predict` prints, and writes with --json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.prediction.cards import card_of
from experiments.prediction.cells import PREDICTED, NotPredicted, Predicted, as_json, ratio
from experiments.prediction.step_time import DEVICE_PARTS, Fitted
from experiments.records.types import Plan

NAMES = {"kernels": "launch gaps", "all_reduce": "all-reduce"}
"""What parts of a step's time are called, where it is not their own name."""


def content(
    plan: Plan, found: list[Predicted], unknown: list[NotPredicted], fitted: Fitted
) -> dict[str, Any]:
    """A prediction as JSON-able values, ratios to the baseline of each workload included."""
    rows = []
    for predicted in found:
        base = baseline_of(found, predicted)
        value, low, high = ratio(predicted, base, fitted) if base else (None, None, None)
        row = as_json(predicted)
        row["ratio_to_baseline"] = value and float(f"{value:.6g}")
        row["ratio_low"], row["ratio_high"] = (x and float(f"{x:.6g}") for x in (low, high))
        rows.append(row)
    return {
        "evidence": PREDICTED,
        "study": plan["study"]["name"],
        "profile": plan["profile"],
        "card": dataclasses.asdict(card_of(plan["profile"])),
        "model": plan["model"],
        "plan_hash": plan["plan_hash"],
        "interval": "90 % of studies left out of the fit",
        "fitted_on": list(fitted.fitted_on),
        "cells": rows,
        "not_predicted": [{"cell": cell.cell, "reason": cell.reason} for cell in unknown],
    }


def baseline_of(found: list[Predicted], predicted: Predicted) -> Predicted | None:
    """The baseline on the same workload; None for the baseline itself, and where there is none."""
    return next(
        (
            p
            for p in found
            if (p.cell, p.workload) == ("baseline", predicted.workload) and p is not predicted
        ),
        None,
    )


def write(path: Path, what: dict[str, Any]) -> None:
    path.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")


def show(
    console: Console,
    plan: Plan,
    found: list[Predicted],
    unknown: list[NotPredicted],
    fitted: Fitted,
) -> None:
    """A table for each workload: the cells, fastest first, and where the time of their steps goes."""
    card = card_of(plan["profile"])
    console.print(
        f"predicted, not measured: {plan['study']['name']} on {card.name} "
        f"({card.bandwidth_bytes_per_s / 1e9:,.0f} GB/s, {card.peak_flops / 1e12:,.0f} TFLOP/s, "
        f"{card.host_op_s * 1e6:.1f} us a host operation)",
        highlight=False,
    )
    for workload in dict.fromkeys(p.workload for p in found):
        table = Table(box=None, pad_edge=False, title=workload, title_justify="left")
        for name, how in (
            ("configuration", {}),
            ("tok/s", {"justify": "right"}),
            ("90 % interval", {"justify": "right"}),
            ("baseline x", {"justify": "right"}),
            ("where the time goes", {}),
        ):
            table.add_column(name, **how)  # type: ignore[arg-type]
        members = [p for p in found if p.workload == workload]
        for p in sorted(members, key=lambda p: -p.output_tokens_per_s):
            base = baseline_of(found, p)
            times = (
                "" if base is None else "{:.2f} ({:.2f} to {:.2f})".format(*ratio(p, base, fitted))
            )
            table.add_row(
                p.cell,
                f"{p.output_tokens_per_s:,.0f}",
                f"{p.low:,.0f} to {p.high:,.0f}",
                times,
                where(p),
            )
        console.print(table, highlight=False)
    for cell in unknown:
        console.print(f"not predicted: {cell.cell}: {cell.reason}", highlight=False)
    console.print(
        "Intervals hold 90 % of studies that were left out of the fit; how far off predictions were on a card that the "
        "model never saw: docs/prediction.md",
        highlight=False,
    )


def where(predicted: Predicted) -> str:
    """The largest parts of the time, in percent of the duration."""
    shares = sorted(
        (
            (predicted.parts[part] / predicted.duration_s, NAMES.get(part, part))
            for part in (*DEVICE_PARTS, "host")
        ),
        reverse=True,
    )
    return ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.05)
