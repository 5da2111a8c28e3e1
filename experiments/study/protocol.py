"""The parts of a study that say how it is carried out: the design, how a launch is measured, and
what makes a launch invalid.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.host.validity import HARMFUL, THROTTLE_REASONS
from experiments.load import objective
from experiments.study import block_count
from experiments.study.designs import Kind

Variable = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
MOST_S = 1e8
"""Three years. Operating systems do not accept much longer timeouts."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Design(Strict):
    """Which configurations run and how often. The baseline, its A/A arm and the study's own `cells`
    are always part of it.

    kind (see experiments/study/designs.py):

        one_at_a_time         each level of each factor alone, everything else off
        add_one_in            the same, and `all`: everything on
        leave_one_out         `all`, and `all` with one factor at a time at its baseline; ratios are relative to `all`
        both                  add_one_in and leave_one_out
        full_factorial        every combination of levels: gives interactions and Shapley values
        fractional_factorial  a balanced subset of them, for factors with one level besides the baseline
        listed                only the study's `cells`

    blocks: how often each configuration runs; defaults to 6 if budget_s is not given either.
    budget_s: time budget of all launches in seconds (each takes measurement.launch_s); it sets the
    number of blocks or, if `blocks` is given, is a limit. bootstrap: also compute bootstrap
    intervals, which need 6 blocks. resolution, generators: for a fractional factorial.
    `generators: {overlap: [kernels, cuda_graphs, batching]}` means that overlap is on where an odd
    number of the other three are on; by default the smallest fraction of the given resolution is
    used.
    """

    kind: Kind = "one_at_a_time"
    blocks: int | None = Field(default=None, ge=block_count.MIN_BLOCKS, le=block_count.MAX_BLOCKS)
    budget_s: float | None = Field(default=None, gt=0, le=MOST_S)
    bootstrap: bool = False
    seed: int = Field(default=0, ge=0)
    resolution: int = Field(default=4, ge=3)
    generators: dict[str, list[str]] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        least = block_count.least_blocks(self.bootstrap)
        if self.blocks is not None and self.blocks < least:
            raise ValueError(
                f"blocks: {self.blocks} is too few for bootstrap intervals; use {least} to "
                f"{block_count.MAX_BLOCKS}, or bootstrap: false"
            )
        if (
            self.kind != "fractional_factorial"
            and {"resolution", "generators"} & self.model_fields_set
        ):
            raise ValueError(
                f"resolution and generators are only allowed with kind: fractional_factorial, not {self.kind}"
            )
        return self


class Sizing(Strict):
    """Adapts the work of a study to the speed of the machine (experiments/study/work_size.py).

    On a GPU the outputs of every workload are cut to the largest of `shares` with which `blocks`
    blocks fit into design.budget_s. On a CPU workloads stay as written. On both, as many blocks run
    as fit into the budget, from least_blocks to most_blocks.
    """

    blocks: int = Field(default=4, ge=block_count.MIN_BLOCKS, le=block_count.MAX_BLOCKS)
    least_blocks: int = Field(default=3, ge=block_count.MIN_BLOCKS, le=block_count.MAX_BLOCKS)
    most_blocks: int = Field(default=6, ge=block_count.MIN_BLOCKS, le=block_count.MAX_BLOCKS)
    shares: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default=[1.0, 0.75, 0.5, 0.35, 0.25], min_length=1
    )


class Measurement(Strict):
    """How a launch is measured.

    warm_up_requests, warm_up_tokens: warm-up serves the first requests of each wave with outputs cut
    to this length. timeout_s: a launch that takes longer is killed and recorded as failed.
    launch_s: expected duration of a launch, for the first time estimate. least_timed_s: a shorter
    workload is served repeatedly, at most 15 times, until it was timed for this long in total; the
    run of median duration is recorded. preload: fork launches from a fork server that has imported
    the engine's libraries, a new one per block, which often halves the duration of a launch
    (docs/adr/0009). environment: variables set for all launches, overriding the shell's. By
    default, waiting threads sleep: with spinning ones, launches were many times slower whenever
    anything else ran (ablations/LOG.md, 2026-11-22).
    """

    warm_up_requests: int = Field(default=16, ge=1)
    warm_up_tokens: int = Field(default=8, ge=1)
    timeout_s: float = Field(default=300, gt=0, le=MOST_S)
    launch_s: float = Field(default=8, gt=0, le=MOST_S)
    least_timed_s: float = Field(default=0, ge=0, le=60)
    preload: bool = False
    environment: dict[Variable, Annotated[str, Field(pattern=r"^[^\x00]*$")]] = {
        "OMP_WAIT_POLICY": "PASSIVE"
    }


class Validity(Strict):
    """Rules, fixed before anything runs, that mark a launch invalid because of other activity on the
    machine (experiments/host/validity.py).

    foreign_gpu_processes: allowed number of other processes on its GPUs. throttle: throttling
    reasons that make a launch invalid ("power_cap" is not among them: a busy GPU runs at its power
    limit). max_foreign_cpu: share of CPU time that other processes may use on average.
    """

    foreign_gpu_processes: int = Field(default=0, ge=0)
    throttle: list[Literal[THROTTLE_REASONS]] = list(HARMFUL)  # type: ignore[valid-type]
    max_foreign_cpu: float = Field(default=0.9, gt=0, le=1)


class Statistics(Strict):
    """How the effects of a study are judged, fixed before anything runs (docs/methodology.md).

    variance: `per_effect` estimates the variance of each effect from its own blocks. `moderated` lets
    all effects of a workload and metric tell of the noise of each (reports/statistics/moderation.py):
    for studies of ten cells or more with few blocks.
    families: what Holm's method adjusts together. `joint`: all ratios to the baseline on one metric.
    `by_question`: what each factor buys alone, what everything on buys, and the cells between are
    families of their own. Each question has the error rate alpha then.
    """

    variance: Literal["per_effect", "moderated"] = "per_effect"
    families: Literal["joint", "by_question"] = "joint"


class Load(Strict):
    """How a study with requests that arrive over time is judged, fixed before anything runs.

    slo: the objective of each request: a preset or limits in seconds (experiments/load/objective.py).
    attainment: the share of requests that has to meet it for a rate to be sustainable.
    max_lateness_s, min_delivered: a launch is invalid if its load generator itself was later than this
    at p99, or delivered a smaller share of the rate asked for (experiments/load/delivered.py).
    """

    slo: dict[str, float] | None = None
    slo_name: str | None = None
    attainment: float = Field(default=0.99, gt=0, le=1)
    max_lateness_s: float = Field(default=0.01, gt=0, le=60)
    min_delivered: float = Field(default=0.98, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("slo") is None:
            return given
        name = given["slo"] if isinstance(given["slo"], str) else given.get("slo_name")
        return {**given, "slo": objective.check(given["slo"]), "slo_name": name}
