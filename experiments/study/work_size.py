"""How much work a launch gets on a GPU: as long answers as let enough blocks of a study end within
its budget of time.

A study that has `sizing` states its work at full size. With everything off, an engine on a GPU
takes ten to fifty times as long as with everything on, and how long depends on the host's speed
more than on the GPU's: so the seconds of every launch are estimated from the measured speeds of
this machine, and all answers are cut by the same share. What was chosen is part of the plan.

The estimate decides how much is measured, never what is reported. Its constants are of visits to an
H100 and an H200 (ablations/LOG.md, 2026-11-28) in units that carry over: operations that the host
launches, and bytes and FLOPs that the GPU moves and computes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import Any

from experiments import workloads
from experiments.study.block_count import least_blocks
from experiments.study.spec import Cell, Study

OPS_PER_LAYER = {"torch": 150, "compile": 100, "triton": 100, "hf": 400}
"""Operations' worth of host time that one layer of an eager step takes, by the level of `kernels`; of HF's `generate`."""
OPS_PER_ROW = 1.5
"""More of them for each request of a layer where PyTorch attends: it gathers the pages of 16 requests at a time."""
OPS_PER_PROMPT = 10.0
"""And for each prompt of a prefill step."""
GATHER_COST = 7.0
"""Bytes that PyTorch's attention moves for each byte of KV that it reads: it gathers pages, and masks what it gathered."""
GRAPH_STEP_OPS = 80
"""Host time of a step that is one graph replay, in operations."""
BANDWIDTH_SHARE, PEAK_SHARE = 0.7, 0.35
"""Of the measured copy bandwidth and matrix product, what a step reaches."""
START_S, GRAPHS_START_S, PARALLEL_START_S = 2.5, 2.0, 3.0
"""Of a process whose libraries are imported: device, weights, the end; capturing graphs; ranks or replicas, imports aside."""
READ_BYTES_PER_S = 4e9
USUAL_OP_S = 1e-5
"""The host for which the times to start are stated."""


def fit(
    study: Study, profile: Mapping[str, Any], model: Mapping[str, Any], cells: Mapping[str, Cell]
) -> tuple[Study, dict[str, Any] | None]:
    """The study with its answers cut for this machine, and what was chosen; as it is where it has
    no `sizing`, and on a CPU.

    profile: settled; model: its `shape` and `dtype` as in a plan. The largest share with which
    `sizing.blocks` blocks fit into `design.budget_s`, the smallest where none does. A number of
    blocks that the study states stays, and only the answers are cut.
    """
    sizing = study.sizing
    if sizing is None or profile["device"] != "cuda":
        return study, None
    budget_s = study.design.budget_s or math.inf
    for share in sorted(sizing.shares, reverse=True):
        cut = shortened(study, share)
        launch_s = {name: launch_seconds(cut, cell, profile, model) for name, cell in cells.items()}
        block_s = sum(launch_s.values())
        if (study.design.blocks or sizing.blocks) * block_s <= budget_s:
            break
    mean_s = round(block_s / len(cells), 2)
    measurement = cut.measurement.model_copy(update={"launch_s": mean_s})
    fitting = (
        sizing.most_blocks
        if math.isinf(budget_s)
        else min(sizing.most_blocks, int(budget_s / block_s))
    )
    blocks = study.design.blocks or max(
        sizing.least_blocks, least_blocks(study.design.bootstrap), fitting
    )
    design = cut.design.model_copy(update={"blocks": blocks, "budget_s": None})
    chosen = {
        "share_of_answers": share,
        "blocks": blocks,
        "budget_s": study.design.budget_s,
        "expected_launch_s": {name: round(seconds, 1) for name, seconds in launch_s.items()},
    }
    return cut.model_copy(update={"measurement": measurement, "design": design}), chosen


def shortened(study: Study, share: float) -> Study:
    """The study with the answers of every workload cut to a share, at least two tokens each."""

    def cut(params: dict[str, Any]) -> dict[str, Any]:
        return params | {
            "output_tokens": [
                max(2, math.ceil(share * length)) for length in params["output_tokens"]
            ]
        }

    work = {
        name: w.model_copy(update={"params": cut(w.params)}) if "output_tokens" in w.params else w
        for name, w in study.workloads.items()
    }
    changed = study.model_copy(update={"workloads": work})
    changed._source = study.source
    return changed


def launch_seconds(
    study: Study, cell: Cell, profile: Mapping[str, Any], model: Mapping[str, Any]
) -> float:
    """What a launch of a cell will take, all told."""
    levels = {**study.baselines(), **study.fixed, **cell.levels}
    shape, slow = model["shape"], profile["host_op_s"] / USUAL_OP_S
    ours = cell.engine == study.engine
    graphs = ours and levels.get("cuda_graphs") == "on"
    ranks = int(levels.get("tensor_parallel_size", 1)) * int(levels.get("data_parallel_size", 1))
    imports = 0.0 if ours and ranks == 1 and study.measurement.preload else profile["import_s"]
    start = START_S * slow + weight_bytes(shape, model["dtype"]) / READ_BYTES_PER_S + imports
    start += GRAPHS_START_S * slow if graphs else 0.0
    start += PARALLEL_START_S * slow if ranks > 1 else 0.0
    waves = [
        wave
        for name, w in study.workloads.items()
        for wave in workloads.build(name, w.kind, w.params)["waves"]
    ]
    first, few = study.measurement.warm_up_requests, study.measurement.warm_up_tokens
    heads = [
        [{**r, "max_tokens": min(r["max_tokens"], few)} for r in wave[:first]] for wave in waves
    ]
    warm_up = sum(
        _wave_seconds(wave, levels if ours else None, study, profile, model) for wave in heads
    )
    timed = [_wave_seconds(wave, levels if ours else None, study, profile, model) for wave in waves]
    # short work is rehearsed, and served until it was timed for so long
    again = study.measurement.least_timed_s
    return float(start + warm_up + sum(2 * s + again if s < again else s for s in timed))


def _wave_seconds(
    wave: list[dict[str, Any]],
    levels: Mapping[str, Any] | None,
    study: Study,
    profile: Mapping[str, Any],
    model: Mapping[str, Any],
) -> float:
    """levels: None for HF, which is like everything off."""
    shape, op_s = model["shape"], profile["host_op_s"]
    levels = (
        {"kernels": "hf", "attention_backend": "torch", "batching": "static"}
        if levels is None
        else levels
    )
    rows = min(study.settings.max_num_seqs, len(wave))
    steps = _steps(
        [r["max_tokens"] for r in wave], rows, levels.get("batching", "static") == "static"
    )
    prompt_tokens = sum(len(r["prompt_token_ids"]) for r in wave)
    longest = max(len(r["prompt_token_ids"]) + r["max_tokens"] for r in wave)
    torch_attention = levels.get("attention_backend", "torch") == "torch"
    layers, graphs = shape["num_hidden_layers"], levels.get("cuda_graphs") == "on"
    # Host: operations of a step, and of each prompt that PyTorch attends to.
    ops = layers * (
        OPS_PER_LAYER[levels.get("kernels", "torch")]
        + (OPS_PER_ROW * rows if torch_attention else 0.0)
    )
    host_s = op_s * (GRAPH_STEP_OPS if graphs else ops)
    prompts_s = op_s * layers * OPS_PER_PROMPT * len(wave) if torch_attention else 0.0
    # Device: weights and KV a step; a graph with PyTorch's attention gathers as many tokens as a
    # request may ever have.
    context = study.settings.max_model_len if graphs and torch_attention else longest
    read = weight_bytes(shape, model["dtype"]) + rows * context * kv_bytes_per_token(
        shape, model["dtype"]
    ) * (GATHER_COST if torch_attention else 1.0)
    device_s = read / (BANDWIDTH_SHARE * profile["bandwidth_bytes_per_s"])
    prefill_s = 2 * parameters(shape) * prompt_tokens / (PEAK_SHARE * profile["peak_flops"])
    return steps * max(host_s, device_s) + max(prefill_s, prompts_s)


def _steps(lengths: list[int], rows: int, static: bool) -> int:
    """Decode steps of answers of these lengths, `rows` at a time: batch by batch, or each place
    filled again as it falls free.
    """
    if static:
        return sum(max(lengths[first : first + rows]) for first in range(0, len(lengths), rows))
    ends = [0] * rows
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def parameters(shape: Mapping[str, Any]) -> int:
    """Elements of a Qwen3's matrices that a token is multiplied with: its layers and the head."""
    hidden, head = shape["hidden_size"], shape["head_dim"]
    attention = (
        hidden * head * (2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"])
    )
    layer = attention + 3 * hidden * shape["intermediate_size"]
    return int(shape["num_hidden_layers"] * layer + hidden * shape["vocab_size"])


def weight_bytes(shape: Mapping[str, Any], dtype: str) -> int:
    """Of a checkpoint in memory, embeddings included; norms, a few thousand elements a layer, are
    left out.
    """
    embedding = (
        0 if shape.get("tie_word_embeddings", True) else shape["hidden_size"] * shape["vocab_size"]
    )
    return (parameters(shape) + embedding) * {"float32": 4, "bfloat16": 2}[dtype]


def kv_bytes_per_token(shape: Mapping[str, Any], dtype: str) -> int:
    """Keys and values of one token in all layers."""
    values = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return int(values * {"float32": 4, "bfloat16": 2}[dtype])


def step_bytes(
    shape: Mapping[str, Any], dtype: str, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """About what the largest step needs beside weights and cache: activations of a prefill, logits,
    graphs and libraries.
    """
    per_token = (6 * shape["hidden_size"] + 3 * shape["intermediate_size"]) * {
        "float32": 4,
        "bfloat16": 2,
    }[dtype]
    return int(
        max_num_batched_tokens * per_token + 12 * max_num_seqs * shape["vocab_size"] + (1 << 30)
    )
