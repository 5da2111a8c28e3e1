"""A plan -> what each of its cells would measure, with an interval."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from experiments import workloads
from experiments.prediction import step_time
from experiments.prediction.cards import Card, card_of
from experiments.prediction.step_time import DEVICE_PARTS, Fitted, Rank
from experiments.prediction.step_work import StepWork, WorkCounter
from experiments.prediction.virtual_engine import Served, Settings, StepTime, VirtualEngine
from experiments.records.types import Cell, LaunchRecord, ModelShape, Plan, Request, Workload
from experiments.study.work_size import kv_bytes_per_token, weight_bytes
from nanovllm.config import Optimizations
from nanovllm.engine.scheduler import StepPlan

SECOND_READ_S = 1e-3
"""A mixed step is run as two replays where the weights are read within this time (nanovllm.gpu.cuda_graph)."""
REPLAYED_MIXED_SINCE = "2026-11-29"
"""Launches before this day ran mixed steps eagerly (ablations/LOG.md, 2026-11-28)."""
PREDICTED = "predicted"


@dataclass(frozen=True)
class Predicted:
    """One cell on one workload. low, high: the 90 % interval of output_tokens_per_s. parts: where the
    time goes, in seconds: each part of the GPU, `host` for what the GPU waits for (arrivals as well). host_share: of the
    duration, how much the host's speed decides. kinds: steps by how they were run.
    """

    cell: str
    workload: str
    output_tokens_per_s: float
    low: float
    high: float
    duration_s: float
    ttft_p50_s: float
    tpot_p50_s: float
    steps: int
    host_share: float
    parts: dict[str, float]
    kinds: dict[str, int]
    evidence: str = PREDICTED


@dataclass(frozen=True)
class NotPredicted:
    """A cell, or a workload, that the model does not know, and why."""

    cell: str
    reason: str


def predict(
    plan: Plan, fitted: Fitted, *, splits: bool | None = None
) -> tuple[list[Predicted], list[NotPredicted]]:
    """Every cell of a plan on every workload. splits: whether mixed steps may be run as two replays; None
    for what the engine does today, False for engines before 2026-11-29. A workload that
    searches for a rate is not predicted. Raises ValueError for a CPU's profile and a model with experts.
    """
    card = card_of(plan["profile"])
    if "num_experts" in plan["model"]["shape"]:
        raise ValueError("mixtures of experts are not modelled; give a dense model")
    found: list[Predicted] = []
    unknown: list[NotPredicted] = []
    drawn: dict[str, Workload] = {}
    for name, entry in plan["workloads"].items():
        if "search" in entry["params"].get("arrivals", {}):
            unknown.append(NotPredicted(f"workload {name}", "it searches for a rate"))
        else:
            drawn[name] = workloads.rebuild(name, entry)
    same: dict[str, Predicted] = {}  # an A/A twin is its baseline
    for name, cell in plan["cells"].items():
        if reason := why_not(cell):
            unknown.append(NotPredicted(name, reason))
            continue
        for workload in drawn.values():
            key = f"{workload['name']} {sorted(cell['config'].items())}"
            if key not in same:
                same[key] = predict_cell(name, plan, workload, card, fitted, splits=splits)
            found.append(dataclasses.replace(same[key], cell=name))
    return found, unknown


def why_not(cell: Cell) -> str | None:
    """Why a cell cannot be predicted; None if it can."""
    if cell["engine"] != "nanovllm":
        return f"only nanovllm's own steps are modelled, not those of {cell['engine']}"
    on = cell["config"]["optimizations"]
    if on["kernels"] not in ("torch", "triton"):
        return f"kernels={on['kernels']}: no published records to fit it on"
    if on["attention_backend"] == "native":
        return "attention_backend=native runs on CPUs"
    return None


def predict_cell(
    name: str,
    plan: Plan,
    workload: Workload,
    card: Card,
    fitted: Fitted,
    *,
    splits: bool | None = None,
) -> Predicted:
    """Serves the workload in virtual time, on one replica after the other: replicas share nothing, and
    the slowest one ends last.
    """
    config = plan["cells"][name]["config"]
    replicas = int(config["optimizations"].get("data_parallel_size", 1))
    runs = [Run(plan, config, card, fitted.coefficients, splits=splits) for _ in range(replicas)]
    duration_s = sum(
        max(
            run.serve(part, workload)
            for run, part in zip(runs, shared_out(wave, replicas), strict=True)
        )
        for wave in waves_of(workload)
    )
    served = [request for run in runs for request in run.requests]
    tokens = sum(request["max_tokens"] for wave in workload["waves"] for request in wave)
    slowest = max(runs, key=lambda run: run.duration_s)
    parts, host_share = slowest.where_it_goes()
    log_s = fitted.t * math.hypot(
        fitted.spread["host"] * host_share, fitted.spread["device"] * (1 - host_share)
    )
    rate = tokens / duration_s
    times = [times for run in runs for times in run.times]
    return Predicted(
        name,
        workload["name"],
        rate,
        rate * math.exp(-log_s),
        rate * math.exp(log_s),
        duration_s,
        median(first - arrival for arrival, first, _ in times),
        median(
            (end - first) / max(1, request["max_tokens"] - 1)
            for (_, first, end), request in zip(times, served, strict=True)
        ),
        sum(len(run.works) for run in runs),
        host_share,
        parts,
        dict(Counter(work.kind for run in runs for work in run.works)),
    )


class Run:
    """One replica of a cell in virtual time. It keeps the work of all steps, and the times of all
    requests.
    """

    def __init__(
        self,
        plan: Plan,
        config: dict[str, Any],
        card: Card,
        coefficients: step_time.Coefficients,
        *,
        splits: bool | None = None,
        num_kv_blocks: int | None = None,
    ) -> None:
        """num_kv_blocks: of a rank, where a record says so; else as many as the bytes of the plan hold."""
        shape, dtype = plan["model"]["shape"], config["dtype"]
        on: Any = Optimizations(**{**config["optimizations"], "data_parallel_size": 1})
        self.card, self.coefficients = card, coefficients
        self.rank = Rank.of(shape, dtype, on)
        self.settings = Settings(
            max_num_seqs=config["max_num_seqs"],
            max_num_batched_tokens=config["max_num_batched_tokens"]
            or max(16_384, config["max_num_seqs"]),
            block_size=config["block_size"],
            num_kv_blocks=num_kv_blocks or blocks_of(config, shape, on.tensor_parallel_size),
            optimizations=on,
        )
        if splits is None:
            read_s = weight_bytes(shape, dtype) / on.tensor_parallel_size
            splits = read_s / card.bandwidth_bytes_per_s <= SECOND_READ_S
        self.count = WorkCounter(
            on,
            max_num_seqs=config["max_num_seqs"],
            max_model_len=config["max_model_len"],
            block_size=config["block_size"],
            num_kv_heads=shape["num_key_value_heads"],
            splits=splits and on.attention_backend == "triton",
        )
        self.works: list[StepWork] = []
        self.engine = VirtualEngine(self.settings, self._clock)
        self.requests: list[Request] = []
        self.times: list[tuple[float, float, float]] = []
        self.step_times_s: list[tuple[float, int, int]] = []
        self.duration_s = self.by_host_s = self.set_up_s = 0.0
        self.parts = dict.fromkeys(DEVICE_PARTS, 0.0)

    def _clock(self, plan: StepPlan) -> StepTime:
        work = self.count(plan)
        self.works.append(work)
        parts = step_time.device_parts(work, self.card, self.rank, self.coefficients)
        for part, seconds in parts.items():
            self.parts[part] += seconds
        device_s = sum(parts.values())
        plan_s, issue_s = step_time.host_parts(work, self.card, self.rank, self.coefficients)
        if self.settings.optimizations.overlap:
            self.by_host_s += plan_s + issue_s if plan_s + issue_s > device_s else 0.0
        elif work.eager:
            self.by_host_s += plan_s + (issue_s if issue_s > device_s else 0.0)
        else:
            self.by_host_s += plan_s + issue_s
        # a graph begins when it has been issued; the first of many kernels begins at once
        return StepTime(plan_s, issue_s, 0.0 if work.eager else issue_s, device_s)

    def serve(self, requests: list[Request], workload: Workload) -> float:
        """Serves requests that this replica got; their duration."""
        if not requests:
            return 0.0
        tokens = sum(len(request["prompt_token_ids"]) for request in requests)
        schedule = workload.get("arrivals")
        set_up_s = tokens * self.coefficients.set_up_token_ops * self.card.host_op_s
        set_up_s = 0.0 if schedule is not None else set_up_s
        served: Served = self.engine.serve(requests, schedule, set_up_s)
        self.set_up_s += set_up_s
        self.requests += requests
        self.times += served.request_times_s
        self.step_times_s += served.step_times_s
        self.duration_s += served.duration_s
        return served.duration_s

    def where_it_goes(self) -> tuple[dict[str, float], float]:
        """Seconds by part, `host` being what the GPU's work does not cover; and the share of the duration
        that the host decides: steps whose issue and plan take longer than the GPU, and everything the
        host does alone.
        """
        busy = sum(self.parts.values())
        parts = self.parts | {"host": max(0.0, self.duration_s - busy)}
        return parts, min(1.0, (self.by_host_s + self.set_up_s) / self.duration_s)


def splits_of(launch: LaunchRecord) -> bool | None:
    """What `splits` was in the engine of a launch, by its date."""
    return None if launch["started_at"] >= REPLAYED_MIXED_SINCE else False


def waves_of(workload: Workload) -> Iterator[list[Request]]:
    """The waves, one after the other; all requests at once where they arrive over time."""
    if "arrivals" in workload:
        yield [request for wave in workload["waves"] for request in wave]
    else:
        yield from workload["waves"]


def shared_out(wave: list[Request], replicas: int) -> list[list[Request]]:
    """The requests of each replica, as the engine shares them out."""
    if replicas == 1:
        return [wave]
    from nanovllm.distributed.sharing import expected_work, share_out

    work = [expected_work(len(r["prompt_token_ids"]), r["max_tokens"]) for r in wave]
    return [[wave[i] for i in share] for share in share_out(work, replicas)]


def blocks_of(config: dict[str, Any], shape: ModelShape, ranks: int) -> int:
    """KV blocks of one rank. Raises ValueError where the configuration does not say how much memory the
    cache has.
    """
    if not (budget := config["kv_cache_memory_bytes"]):
        raise ValueError(
            "kv_cache_memory_bytes is not set; a prediction needs it (--set settings.kv_cache_memory_bytes=...)"
        )
    size = kv_bytes_per_token(shape, config["dtype"]) // ranks * config["block_size"]
    return int(budget) // size


def ratio(one: Predicted, other: Predicted, fitted: Fitted) -> tuple[float, float, float]:
    """one / other in throughput, and its 90 % interval. What both have in common, the card and the host,
    cancels: the spread is that of deviations from the mean of a study.
    """
    value = one.output_tokens_per_s / other.output_tokens_per_s
    device, host = fitted.spread["ratio_device"], fitted.spread["ratio_host"]
    shares = [predicted.host_share for predicted in (one, other)]
    log_s = fitted.t * math.hypot(*(host * h for h in shares), *(device * (1 - h) for h in shares))
    return value, value * math.exp(-log_s), value * math.exp(log_s)


def as_json(predicted: Predicted) -> dict[str, Any]:
    """A prediction as JSON-able values of six significant digits."""
    rounded = dataclasses.asdict(predicted)
    return {key: _rounded(value) for key, value in rounded.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return value
