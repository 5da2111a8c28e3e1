"""Sizes the work of a study for the machine: chooses how many blocks fit into the time budget, and
on a GPU shortens outputs so that enough of them do.

A study with `sizing` states its workloads at full size. With all optimizations off, an engine on a
GPU takes ten to fifty times as long as with all of them on, and how long depends on the host's
speed more than on the GPU's. So the duration of every launch is estimated from the measured speeds
of this machine, and all outputs are cut to the same share. On a CPU all engines take about as long,
so only the number of blocks is chosen. The plan holds what was chosen.

The estimate decides how much is measured, never what is reported. Its constants were fitted on an
H100 and H200s (ablations/LOG.md, 2026-11-28), in units that carry over to other machines:
operations issued by the host, and bytes and FLOPs of the GPU. Those for CPUs were fitted on two
cores of an Intel and of an AMD server (2026-11-29).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import workloads
from experiments.records.types import (
    ModelShape,
    Params,
    PlannedModel,
    PlannedProfile,
    Request,
    Sized,
    Wave,
)
from experiments.study.block_count import least_blocks
from experiments.study.spec import Cell, Study

OPS_PER_LAYER = {"torch": 150, "compile": 100, "triton": 100, "hf": 400}
"""Host time of one layer in an eager step, in operations, by the level of `kernels` (`hf`: HF's `generate`)."""
OPS_PER_ROW = 1.5
"""Further operations per layer and request with PyTorch's attention, which gathers the pages of 16 requests at a time."""
OPS_PER_PROMPT = 10.0
"""Further operations per layer and prompt of a prefill step with PyTorch's attention."""
GATHER_COST = 7.0
"""Bytes moved per byte of KV cache read by PyTorch's attention, which gathers pages and masks them."""
GRAPH_STEP_OPS = 80
"""Host time of replaying a CUDA graph for one step, in operations."""
BANDWIDTH_SHARE, PEAK_SHARE = 0.7, 0.35
"""The share of the measured copy bandwidth and of the measured matmul peak that a step reaches."""
START_S, GRAPHS_START_S, PARALLEL_START_S, SYMMETRIC_START_S = 2.5, 2.0, 5.0, 3.0
"""Start-up times: device and weights of a process with imported libraries; graph capture; ranks or
replicas, without imports; symmetric memory.
"""
HF_IMPORTS, COMPILE_IMPORTS = 3.0, 1.8
"""In times of PyTorch's import: HF transformers imported and its model built; the kernels of a cell
compiled on a machine that has none of them yet.
"""
READ_BYTES_PER_S = 4e9
CPU_PEAK_SHARE, CPU_TOKEN_S = 0.6, 2e-5
"""On a CPU: the share of one core's measured matmul peak that products reach, and the time of
everything else per layer and token. All tokens of a wave count, those of the prompts too.
"""
CPU_START_S, CPU_PARALLEL_START_S = 1.2, 1.5
"""Start-up times on a CPU: weights and warm-up of an engine whose libraries are imported; ranks."""
CPU_HF_COST, CPU_RANKS_COST = 1.9, 1.4
"""Duration of a wave on a CPU with HF, and with ranks that share the cores, relative to one engine."""
CPU_NATIVE_COST = {"kernels": 0.65, "attention_backend": 0.8}
"""The same with the level `native` of a toggle (ablations/LOG.md, 2026-11-29)."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one value, by dtype."""
USUAL_OP_S = 1e-5
"""`host_op_s` of the host on which the start-up times were measured."""


def fit(
    study: Study, profile: PlannedProfile, model: PlannedModel, cells: Mapping[str, Cell]
) -> tuple[Study, Sized | None]:
    """The study with its outputs cut for this machine, and what was chosen. Returns the study
    unchanged, and None, for a study without `sizing`.

    Takes the largest share with which `sizing.blocks` blocks fit into `design.budget_s`, or the
    smallest if none does; on a CPU outputs are not cut. If the study states its number of blocks,
    only outputs are cut.
    """
    sizing = study.sizing
    if sizing is None:
        return study, None
    budget_s = study.design.budget_s or math.inf
    on_cpu = profile["device"] == "cpu"
    shares, seconds = ([1.0], cpu_seconds) if on_cpu else (sizing.shares, launch_seconds)
    for share in sorted(shares, reverse=True):
        cut = shortened(study, share)
        # drawn once for all cells: drawing takes longer than everything else here
        waves = [
            wave
            for name, w in cut.workloads.items()
            for wave in workloads.build(name, w.kind, w.params)["waves"]
        ]
        launch_s = {name: seconds(cut, cell, profile, model, waves) for name, cell in cells.items()}
        block_s = sum(launch_s.values())
        once_s = sum(first_seconds(cut, cell, profile) for cell in cells.values())
        if once_s + (study.design.blocks or sizing.blocks) * block_s <= budget_s:
            break
    fitting = (
        sizing.most_blocks
        if math.isinf(budget_s)
        else min(sizing.most_blocks, int((budget_s - once_s) / block_s))
    )
    blocks = study.design.blocks or max(
        sizing.least_blocks, least_blocks(study.design.bootstrap), fitting
    )
    mean_s = round((once_s / blocks + block_s) / len(cells), 2)
    measurement = cut.measurement.model_copy(update={"launch_s": mean_s})
    design = cut.design.model_copy(update={"blocks": blocks, "budget_s": None})
    chosen: Sized = {
        "share_of_answers": share,
        "blocks": blocks,
        "budget_s": study.design.budget_s,
        "expected_launch_s": {name: round(expected, 1) for name, expected in launch_s.items()},
    }
    return cut.model_copy(update={"measurement": measurement, "design": design}), chosen


def shortened(study: Study, share: float) -> Study:
    """The study with all outputs cut to a share of their length, but to no less than two tokens."""

    def cut(params: Params) -> Params:
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
    study: Study,
    cell: Cell,
    profile: PlannedProfile,
    model: PlannedModel,
    waves: Sequence[Wave],
) -> float:
    """The estimated total duration of a launch of a cell. waves: of all workloads of the study."""
    levels = {**study.baselines(), **study.fixed, **cell.levels}
    shape, slow = model["shape"], profile["host_op_s"] / USUAL_OP_S
    ours = cell.engine == study.engine
    graphs = ours and levels.get("cuda_graphs") == "on"
    ranks = int(levels.get("tensor_parallel_size", 1)) * int(levels.get("data_parallel_size", 1))
    imports = 0.0 if ours and ranks == 1 and study.measurement.preload else profile["import_s"]
    imports *= 1.0 if ours else HF_IMPORTS
    start = START_S * slow + weight_bytes(shape, model["dtype"]) / READ_BYTES_PER_S + imports
    start += GRAPHS_START_S * slow if graphs else 0.0
    start += PARALLEL_START_S * slow if ranks > 1 else 0.0
    start += SYMMETRIC_START_S * slow if levels.get("all_reduce") == "symmetric_memory" else 0.0
    first, few = study.measurement.warm_up_requests, study.measurement.warm_up_tokens
    heads: list[list[Request]] = [
        [{**r, "max_tokens": min(r["max_tokens"], few)} for r in wave[:first]] for wave in waves
    ]
    warm_up = sum(
        _wave_seconds(wave, levels if ours else None, study, profile, model) for wave in heads
    )
    timed = [_wave_seconds(wave, levels if ours else None, study, profile, model) for wave in waves]
    # a short workload is served once untimed, then repeatedly
    again = study.measurement.least_timed_s
    return float(start + warm_up + sum(2 * s + again if s < again else s for s in timed))


def cpu_seconds(
    study: Study,
    cell: Cell,
    profile: PlannedProfile,
    model: PlannedModel,
    waves: Sequence[Wave],
) -> float:
    """The estimated total duration of a launch of a cell on a CPU, where one thread of one core
    computes, as the studies for CPUs set it (OMP_NUM_THREADS=1).
    """
    levels = {**study.baselines(), **study.fixed, **cell.levels}
    ours = cell.engine == study.engine
    ranks = int(levels.get("tensor_parallel_size", 1)) * int(levels.get("data_parallel_size", 1))
    forked = ours and ranks == 1 and study.measurement.preload
    imports = 0.0 if forked else profile["import_s"] * (1.0 if ours else HF_IMPORTS)
    start = CPU_START_S + imports + (CPU_PARALLEL_START_S if ranks > 1 else 0.0)
    tokens = sum(len(r["prompt_token_ids"]) + r["max_tokens"] for wave in waves for r in wave)
    shape, cores = model["shape"], profile["cpu_cores"] or 1
    flops_per_s = CPU_PEAK_SHARE * profile["peak_flops"] / cores
    token_s = 2 * parameters(shape) / flops_per_s + shape["num_hidden_layers"] * CPU_TOKEN_S
    native = [share for name, share in CPU_NATIVE_COST.items() if levels.get(name) == "native"]
    cost = math.prod(native) if ours else CPU_HF_COST
    return float(start + tokens * token_s * (CPU_RANKS_COST if ranks > 1 else cost))


def first_seconds(study: Study, cell: Cell, profile: PlannedProfile) -> float:
    """How much longer than `launch_seconds` the first launch of a cell takes: its Triton kernels
    are compiled, and HF transformers is read from disk for the first time.
    """
    if profile["device"] == "cpu":
        return 0.0
    levels = {**study.baselines(), **study.fixed, **cell.levels}
    compiles = cell.engine != study.engine or levels.get("kernels") == "triton"
    return float(COMPILE_IMPORTS * profile["import_s"]) if compiles else 0.0


def _wave_seconds(
    wave: list[Request],
    levels: Mapping[str, Any] | None,
    study: Study,
    profile: PlannedProfile,
    model: PlannedModel,
) -> float:
    """The estimated duration of one wave. levels: None for HF, which has no optimizations."""
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
    # Host: operations per step, and per prompt with PyTorch's attention.
    ops = layers * (
        OPS_PER_LAYER[levels.get("kernels", "torch")]
        + (OPS_PER_ROW * rows if torch_attention else 0.0)
    )
    host_s = op_s * (GRAPH_STEP_OPS if graphs else ops)
    prompts_s = op_s * layers * OPS_PER_PROMPT * len(wave) if torch_attention else 0.0
    # Device: weights and KV cache are read in each step. In a graph, PyTorch's attention gathers
    # max_model_len tokens per request.
    context = study.settings.max_model_len if graphs and torch_attention else longest
    read = weight_bytes(shape, model["dtype"]) + rows * context * kv_bytes_per_token(
        shape, model["dtype"]
    ) * (GATHER_COST if torch_attention else 1.0)
    device_s = read / (BANDWIDTH_SHARE * profile["bandwidth_bytes_per_s"])
    prefill_s = 2 * parameters(shape) * prompt_tokens / (PEAK_SHARE * profile["peak_flops"])
    return steps * max(host_s, device_s) + max(prefill_s, prompts_s)


def _steps(lengths: list[int], rows: int, static: bool) -> int:
    """Decode steps for outputs of these lengths, `rows` at a time, with static batches or with
    continuous batching.
    """
    if static:
        return sum(max(lengths[first : first + rows]) for first in range(0, len(lengths), rows))
    ends = [0] * rows
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def parameters(shape: ModelShape, experts: int | None = None) -> int:
    """The number of weights that a token is multiplied with: layers and LM head. experts: how many of a layer
    count, where it has a mixture of them; by default those that a token goes through.
    """
    hidden, head = shape["hidden_size"], shape["head_dim"]
    attention = (
        hidden * head * (2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"])
    )
    width = shape["intermediate_size"]
    if "num_experts" in shape:
        width = shape["moe_intermediate_size"] * (experts or shape["num_experts_per_tok"])
    layer = attention + 3 * hidden * width
    return int(shape["num_hidden_layers"] * layer + hidden * shape["vocab_size"])


def weight_bytes(shape: ModelShape, dtype: str) -> int:
    """The size of the weights in memory, without norms, biases and routers, which are a few thousand elements
    per layer.
    """
    embedding = (
        0 if shape.get("tie_word_embeddings", True) else shape["hidden_size"] * shape["vocab_size"]
    )
    return (parameters(shape, shape.get("num_experts")) + embedding) * BYTES[dtype]


def kv_bytes_per_token(shape: ModelShape, dtype: str) -> int:
    """The size of the keys and values of one token in all layers."""
    values = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return int(values * BYTES[dtype])


def step_bytes(
    shape: ModelShape, dtype: str, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """The approximate memory of the largest step besides weights and KV cache: activations of a
    prefill, logits, CUDA graphs and libraries.
    """
    per_token = (6 * shape["hidden_size"] + 3 * shape["intermediate_size"]) * BYTES[dtype]
    return int(
        max_num_batched_tokens * per_token + 12 * max_num_seqs * shape["vocab_size"] + (1 << 30)
    )
