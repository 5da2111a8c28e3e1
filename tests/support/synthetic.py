"""Synthetic studies with known truth: a plan and its records, in the shapes of docs/adr/0002, with
planted effects and noise.

The noise is planted in the times of the launches, as a machine would: a factor shared by a block
(it must cancel) and one of the launch's own. Everything is drawn from one seed.
"""

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from statistics import NormalDist
from typing import Any

import numpy as np

from experiments import workloads
from experiments.records.store import plan_hash
from experiments.study import designs
from reports.statistics.coverage import Noise, noise

TINY_SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}
BASE_LEVELS: dict[str, Any] = {
    "prefix_cache": "off",
    "batching": "static",
    "tensor_parallel_size": 1,
}
# A factor beside these three is off or on.
ON: dict[str, Any] = {"prefix_cache": "on", "batching": "continuous", "tensor_parallel_size": 2}
WORKLOADS = {
    "scaled": (
        "random",
        {"num_requests": 8, "prompt_tokens": [12, 32], "output_tokens": [12, 32], "seed": 0},
    ),
    "shared": (
        "shared_prefix",
        {
            "num_requests": 8,
            "num_prefixes": 2,
            "prefix_tokens": 64,
            "output_tokens": [4, 16],
            "seed": 0,
        },
    ),
}


def cell_of(
    name: str, role: str, on: Sequence[str] = (), engine: str = "nanovllm"
) -> dict[str, Any]:
    """A plan's cell with the named factors at their other level."""
    levels = (
        {}
        if engine != "nanovllm"
        else {
            factor: ON[factor] if factor in on else level for factor, level in BASE_LEVELS.items()
        }
    )
    return {name: {"engine": engine, "config": dict(levels), "levels": levels, "role": role}}


def one_at_a_time(reference: bool = True) -> dict[str, Any]:
    """Baseline, A/A, each factor alone, everything on, and HF."""
    cells = cell_of("baseline", "baseline") | cell_of("baseline-again", "aa")
    for factor, level in ON.items():
        cells |= cell_of(f"{factor}={level}", "treatment", [factor])
    cells |= cell_of("all", "all", list(ON))
    return cells | (cell_of("hf", "reference", engine="hf") if reference else {})


def factorial() -> dict[str, Any]:
    """Every combination of the three factors, and the A/A arm."""
    cells = cell_of("baseline", "baseline") | cell_of("baseline-again", "aa")
    for code in range(1, 8):
        on = [factor for bit, factor in enumerate(ON) if code >> bit & 1]
        role = "all" if len(on) == len(ON) else "treatment"
        cells |= cell_of("all" if role == "all" else "+".join(on), role, on)
    return cells


def designed(
    kind: designs.Kind, factors: Sequence[str], generators: designs.Generators | None = None
) -> dict[str, Any]:
    """The cells that experiments/study/designs.py makes of factors with one level each, and the A/A arm
    of their reference.
    """
    off = {factor: BASE_LEVELS.get(factor, "off") for factor in factors}
    levels = {factor: [ON.get(factor, "on")] for factor in factors}
    name, point = designs.reference(kind, off, levels)
    points = {name: ("baseline", point), "aa": ("aa", point)} | designs.cells(
        kind, off, levels, generators or {}
    )
    return {
        cell: {"engine": "nanovllm", "config": dict(found), "levels": found, "role": role}
        for cell, (role, found) in points.items()
    }


def make_plan(
    cells: Mapping[str, Any],
    blocks: int,
    names: Sequence[str] = ("scaled",),
    seed: int = 0,
    **study: Any,
) -> dict[str, Any]:
    """A plan that runs every cell once a block, in random order."""
    rng = np.random.default_rng(seed)
    launches = []
    for block in range(blocks):
        for order, index in enumerate(rng.permutation(len(cells))):
            cell = list(cells)[index]
            name = f"b{block:02d}-o{order:02d}-{cell}"
            launches.append(
                {
                    "launch": name,
                    "block": block,
                    "order": order,
                    "cell": cell,
                    "seed": int(rng.integers(2**31)),
                    "workload_order": list(names),
                }
            )
    plan = {
        "plan_version": 1,
        "study": {
            "name": "synthetic",
            "title": "A synthetic study",
            "question": "Are planted effects found?",
            "metric": "output_tokens_per_s",
            "smallest_effect": 0.05,
            "alpha": 0.05,
            **study,
        },
        "profile": {
            "name": "cpu",
            "device": "cpu",
            "memory_bytes": 8 << 30,
            "bandwidth_bytes_per_s": 2.0e10,
            "peak_flops": 1.0e11,
            "kv_cache_memory_bytes": 256 << 20,
        },
        "model": {
            "preset": "tiny",
            "path": None,
            "dtype": "float32",
            "digest": "d" * 64,
            "shape": TINY_SHAPE,
        },
        "workloads": {
            name: workloads.summarize(workloads.build(name, *WORKLOADS[name])) for name in names
        },
        "cells": dict(cells),
        "not_applicable": [{"factor": "cuda_graphs", "level": "on", "reason": "needs a CUDA GPU"}],
        "launches": launches,
        "gate": {},
        "expected_s": 12.0,
    }
    return plan | {"plan_hash": plan_hash(plan)}


def make_records(
    plan: Mapping[str, Any],
    speedups: Mapping[str, float],
    seed: int = 0,
    sd: float = 0.01,
    kind: Noise = "normal",
    interactions: Mapping[tuple[str, str], float] | None = None,
) -> list[dict[str, Any]]:
    """One passing launch record for each launch of the plan, and the gate's lines.

    speedups: {factor that is on, or engine: how many times the baseline's rate}; interactions:
    {(factor, factor): times} on top.
    """
    rng = np.random.default_rng(seed)
    block_log = rng.normal(0, 0.05, 1 + max(launch["block"] for launch in plan["launches"]))
    drawn = {name: workloads.rebuild(name, entry) for name, entry in plan["workloads"].items()}
    records: list[dict[str, Any]] = []
    for number, launch in enumerate(plan["launches"]):
        cell = plan["cells"][launch["cell"]]
        on = [
            factor
            for factor, level in cell["levels"].items()
            if level != BASE_LEVELS.get(factor, "off")
        ]
        speed = math.prod(speedups.get(factor, 1.0) for factor in on) * speedups.get(
            cell["engine"], 1.0
        )
        speed *= math.prod(
            times for pair, times in (interactions or {}).items() if set(pair) <= set(on)
        )
        parts = {}
        for name, work in drawn.items():
            log_time = block_log[launch["block"]] + float(noise(rng, kind, (1,), sd)[0])
            parts[name] = _served(work, plan["workloads"][name], math.exp(log_time) / speed, cell)
        records.append(_launch_record(plan, launch, cell, parts, number))
    digests = sorted(
        {
            (name, part["tokens_digest"])
            for record in records
            for name, part in record["workloads"].items()
        }
    )
    records += [gate_line(plan, name, digest) for name, digest in digests]
    broken = gate_line(plan, digests[0][0], "broken") | {
        "status": "fail",
        "mismatches": 40,
        "is_negative_control": True,
    }
    return [*records, broken]


def gate_line(
    plan: Mapping[str, Any], workload: str, digest: str, status: str = "pass"
) -> dict[str, Any]:
    """A verdict of the gate, with figures that say the same."""
    tokens = plan["workloads"][workload]["output_tokens"]
    return {
        "kind": "gate",
        "schema": 1,
        "study": plan["study"]["name"],
        "plan_hash": plan["plan_hash"],
        "workload": workload,
        "tokens_digest": digest,
        "dtype": "float32",
        "status": status,
        "reason": None if status == "pass" else "margin over the bound",
        "tokens_checked": tokens,
        "mismatches": 0,
        "within_bound": 0,
        "max_margin": 0.0,
        "bound": 2 * 6.1e-6 + 2e-6,
        "calibration": {
            "reference_dtype": "float64",
            "factor": 2.0,
            "alpha": 1e-6,
            "floor": 2e-6,
            "hf_error": {"q50": 1e-7, "q99": 2e-6, "q999": 4.0e-6, "max": 6.1e-6},
            "hf_mismatches": 0,
            "typical_bound": 2 * 4.0e-6 + 2e-6,
            "above_typical_bound": 0,
            "allowed_above_typical_bound": 4,
            "excess_mismatches_z": 0.0,
            "z_limit": NormalDist().inv_cdf(1 - 1e-6),
            "margin": {"q50": 0.0, "q99": 0.0, "q999": 0.0, "max": 0.0},
            "by_position": [
                {
                    "first": 0,
                    "last": 31,
                    "tokens": tokens,
                    "mismatches": 0,
                    "hf_mismatches": 0,
                    "margin": {"q50": 0.0, "q99": 0.0, "q999": 0.0, "max": 0.0},
                    "hf_error": {"q50": 1e-7, "q99": 2e-6, "q999": 4.0e-6, "max": 6.1e-6},
                }
            ],
        },
        "first_offender": None,
        "duration_s": 1.0,
        "is_negative_control": False,
    }


def _served(
    work: Mapping[str, Any], planned: Mapping[str, Any], duration_s: float, cell: Mapping[str, Any]
) -> dict[str, Any]:
    """A workload's part of a record: all requests arrive at 0, share the machine evenly, and finish
    by their length.
    """
    lengths = [request["max_tokens"] for wave in work["waves"] for request in wave]
    longest = max(lengths)
    times = [
        [0.0, 0.1 * duration_s, duration_s * (0.1 + 0.9 * length / longest)] for length in lengths
    ]
    steps = [[0.1 * duration_s, planned["prompt_tokens"], 0]]
    steps += [
        [0.9 * duration_s / longest, 0, sum(length > step for length in lengths)]
        for step in range(1, longest)
    ]
    digest = hashlib.sha256(
        f"{work['name']}/{cell['engine']}/{cell['levels'].get('tensor_parallel_size')}".encode()
    ).hexdigest()
    toggles = {
        factor: {
            "level": level,
            "baseline": BASE_LEVELS.get(factor, "off"),
            "engaged": 0 if level == BASE_LEVELS.get(factor, "off") else 7,
            "opportunity": 0 if factor == "prefix_cache" else None,
        }
        for factor, level in cell["levels"].items()
    }
    return {
        "fingerprint": planned["fingerprint"],
        "requests_digest": planned["requests_digest"],
        "duration_s": duration_s,
        "num_requests": len(lengths),
        "prompt_tokens": planned["prompt_tokens"],
        "output_tokens": sum(lengths),
        "request_times_s": times,
        "step_times_s": steps,
        "counters": {"steps": len(steps)},
        "toggles": toggles,
        "tokens_digest": digest,
        "finish_reasons": {"length": len(lengths)},
        "host_cpu_s": duration_s,
    }


STARTED, APART = datetime(2026, 11, 22, 10, tzinfo=UTC), timedelta(minutes=10)
"""When the first launch started, and how far apart launches are."""


def _launch_record(
    plan: Mapping[str, Any],
    launch: Mapping[str, Any],
    cell: Mapping[str, Any],
    parts: Mapping[str, Any],
    number: int,
) -> dict[str, Any]:
    return {
        "kind": "launch",
        "schema": 1,
        "study": plan["study"]["name"],
        "plan_hash": plan["plan_hash"],
        **{key: launch[key] for key in ("launch", "block", "order", "cell", "seed")},
        "attempt": 1,
        "boot_id": "boot-1",
        "started_at": (STARTED + number * APART).isoformat(),
        "status": "ok",
        "reason": None,
        "engine": cell["engine"],
        "requested": dict(cell["config"]),
        "resolved": {**cell["config"], "max_num_seqs": 64},
        "process_start_s": 0.4,
        "load_s": 0.8,
        "warm_up_s": 0.5,
        "total_s": 2.0 + sum(part["duration_s"] for part in parts.values()),
        "workloads": dict(parts),
        "toggles": copy.deepcopy(next(iter(parts.values()))["toggles"]),
        "peak_memory_bytes": {"host": 500 << 20, "device": None},
        "telemetry": {
            "summary": {
                "cpu_mhz": {"min": 2990.0, "mean": 3000.0 + number % 7, "max": 3010.0},
                "cpu_busy": {"min": 0.9, "mean": 0.95, "max": 1.0},
            },
            "throttle_reasons": [],
        },
        "provenance": {
            "code_digest": "a" * 64,
            "git": {"commit": "c" * 40, "dirty": False},
            "cpu": {"model": "Synthetic 2-core", "cores": 2},
            "python": "3.11.7",
            "packages": {"torch": "2.13.0"},
        },
    }
