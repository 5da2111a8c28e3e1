"""Small plans of one cell, as much of one as a prediction reads."""

from __future__ import annotations

from typing import Any

from experiments import workloads
from experiments.prediction.shapes import SHAPES
from experiments.records.types import Plan, Workload


def plan_of(levels: dict[str, Any], *, kv_blocks: int = 200, preset: str = "tiny") -> Plan:
    """One cell, `cell`, of a model that is quick to plan for. kv_blocks: of a rank."""
    ranks = levels.get("tensor_parallel_size", 1)
    shape = SHAPES[preset]
    a_token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * 2
    config = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "max_model_len": 256,
        "block_size": 8,
        "kv_cache_memory_bytes": kv_blocks * 8 * a_token // ranks,
        "dtype": "bfloat16",
        "device": "cuda",
        "optimizations": levels,
    }
    plan: Any = {
        "model": {"preset": preset, "path": None, "dtype": "bfloat16", "shape": shape},
        "cells": {"cell": {"engine": "nanovllm", "config": config}},
    }
    return plan  # type: ignore[no-any-return]


def workload_of(plan: Plan, seed: int = 0) -> Workload:
    return workloads.build(
        "work",
        "random",
        {
            "num_requests": 16,
            "prompt_tokens": [8, 100],
            "output_tokens": [2, 30],
            "vocab_size": 2048,
            "seed": seed,
        },
    )
