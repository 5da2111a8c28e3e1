"""The types of what a check writes: results of jobs, verdicts, check.json. Standard library only."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from experiments.records.types import (
    Calibration,
    GateStatus,
    JsonObject,
    LogprobAnswer,
    ModelFiles,
    Toggles,
    Verdict,
)


class Served(TypedDict):
    """The outputs of a workload."""

    outputs: list[list[int]]
    finish_reasons: list[str]


class JobResult(TypedDict):
    """The outputs of a job; if it failed, only `job` and `error`. problems: toggles that did not
    run as requested.
    """

    job: str
    error: NotRequired[str]
    workloads: dict[str, Served]
    logprobs: dict[str, LogprobAnswer] | None
    toggles: Toggles
    problems: list[str]
    resolved: JsonObject
    duration_s: float


class Logprobs(TypedDict):
    """The comparison of log-probabilities (gate.rules.LogprobResult)."""

    status: GateStatus
    reason: str | None
    positions: int
    engine_error: dict[str, float]
    hf_error: dict[str, float]
    bound: dict[str, float]


class Line(TypedDict):
    """One verdict of a check. good: it is the expected one."""

    name: str
    group: str
    dtype: str
    expected: str
    status: GateStatus
    good: bool
    reason: str | None
    gate: Verdict | None
    logprobs: NotRequired[Logprobs | None]
    serve_s: NotRequired[float]
    judge_s: NotRequired[float]
    answers: NotRequired[int]
    identical: NotRequired[int]


class Noise(Calibration):
    """HF's own error in one dtype, and the bound that follows from it."""

    bound: float
    tokens: int


class NamedModel(ModelFiles):
    name: str


class Workloads(TypedDict):
    drawn: int
    requests: int


class CheckResult(TypedDict):
    """check.json. noise: by dtype; absent: what cannot run on this machine, with the reason."""

    model: NamedModel
    device: str
    hardware: str
    workloads: Workloads
    absent: list[str]
    duration_s: float
    lines: list[Line]
    noise: dict[str, Noise]
    good: bool
