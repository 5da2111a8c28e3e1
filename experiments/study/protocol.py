"""How a study is carried out, as written in YAML: its design, how a launch is measured, and what
makes one invalid.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.host.validity import HARMFUL, THROTTLE_REASONS
from experiments.study import block_count
from experiments.study.designs import Kind

Variable = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
MOST_S = 1e8
"""Three years: no study is meant to take longer, and operating systems wait for no larger number."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Design(Strict):
    """Which configurations run and how often. The reference and its A/A arm are always there, and
    the study's own `cells`.

    kind: see experiments/study/designs.py. With `factors: {kernels: {levels: [triton]}, overlap: {levels:
    [on]}}`

        one_at_a_time         each level of each factor alone, over everything off
        add_one_in            the same, and `all`: everything on
        leave_one_out         from `all`, each factor back to its baseline alone; `all` is the reference of the ratios
        both                  add_one_in beside leave_one_out
        full_factorial        every combination of levels: interactions, Shapley's shares
        fractional_factorial  a balanced part of them, for factors of one level beside the baseline
        listed                the study's `cells` only

    blocks: how often each configuration runs; 6 if neither it nor budget_s is given. budget_s:
    seconds that the launches may take (measurement.launch_s each): alone it gives the number of
    blocks; with blocks it is a limit.
    bootstrap: the study asks for the bootstrap interval too; it needs 6 blocks.
    resolution, generators: of a fractional factorial. `generators: {overlap: [kernels, cuda_graphs,
    batching]}` says that overlap is on where an odd number of the three are; if not given, the
    smallest fraction of that resolution is chosen.
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
                f"blocks: {self.blocks} are too few for a bootstrap interval; allowed: {least} to "
                f"{block_count.MAX_BLOCKS}, or bootstrap: false"
            )
        if (
            self.kind != "fractional_factorial"
            and {"resolution", "generators"} & self.model_fields_set
        ):
            raise ValueError(
                f"resolution and generators belong to kind fractional_factorial, this one is {self.kind}"
            )
        return self


class Sizing(Strict):
    """How the work of a study follows the speed of a GPU and its host (experiments/study/work_size.py):
    the answers of every workload are cut to the largest of `shares` with which `blocks` blocks fit
    into design.budget_s, and then as many blocks run as fit, from least_blocks to most_blocks. On a
    CPU the work is as written.
    """

    blocks: int = Field(default=4, ge=block_count.MIN_BLOCKS, le=block_count.MAX_BLOCKS)
    least_blocks: int = Field(default=3, ge=block_count.MIN_BLOCKS, le=block_count.MAX_BLOCKS)
    most_blocks: int = Field(default=6, ge=block_count.MIN_BLOCKS, le=block_count.MAX_BLOCKS)
    shares: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default=[1.0, 0.75, 0.5, 0.35, 0.25], min_length=1
    )


class Measurement(Strict):
    """How a launch is measured. Warm-up: the first requests of each wave, answers cut short.
    timeout_s: a launch that takes longer is killed and recorded as failed. launch_s: what a launch
    is expected to take, for the estimate before the first.
    least_timed_s: a workload that takes less is served again until it was timed for so long in all,
    at most 15 times, and the serving of median duration is what counts. preload: launches are
    forked from a process that has imported the engine's libraries and done nothing else, a new one
    for each block, which often saves half of a launch (docs/adr/0009).
    environment: variables set for every launch of every engine, whatever the shell says. By
    default, threads that wait for each
    other sleep: spinning ones made launches many times slower wherever anything else ran
    (ablations/LOG.md, 2026-11-22).
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
    """Rules, fixed before anything runs, that mark a launch invalid for what the machine did
    meanwhile (experiments/host/validity.py).

    foreign_gpu_processes: how many may compute on its GPUs. throttle: reasons for which no GPU may
    lower its clock ("power_cap" is
    not one: a GPU at its power limit is at work). max_foreign_cpu: share of all CPU time that other
    processes may use on average.
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
