"""The shapes of plans and records as they lie in JSON files, for mypy. Standard library only.

A plan (`Plan`) says what is to be run, and never changes. What happened is a list of records
(`Record`), distinguished by their `kind`: a `launch`, a verdict of the `gate`, the `price` of a cell
whose output is not the reference's, an attempt that was `superseded`, a run that was `resumed`.
docs/adr/0002-plans-records-adapters.md describes the format.

A key that plans or records of older versions lack is `NotRequired`. mypy lets it be read with
`[...]` all the same: use `.get(...)` where an older file may be read.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from experiments.records.factor_levels import Level

JsonObject = dict[str, Any]
"""A JSON object whose keys this program does not know."""
Config = dict[str, Any]
"""Settings of an engine, requested or resolved: each engine has keys of its own."""
Params = dict[str, Any]
"""Parameters of a workload: each kind has keys of its own (`workloads.DEFAULTS`)."""
Levels = dict[str, Level]
"""{factor: level}, written as in studies: `on`, `off`, a name or a number."""
Tokens = dict[str, str]
"""{digest of the outputs: the outputs, as compressed JSON in base64}"""

Device = Literal["cpu", "cuda"]
Role = Literal["baseline", "aa", "treatment", "all", "reference"]
LaunchStatus = Literal["ok", "invalid", "failed"]
GateStatus = Literal["pass", "fail", "error"]


# Workloads


class Options(TypedDict, total=False):
    """Sampling parameters that few requests have, as vLLM names them. bad_words: lists of token ids."""

    min_p: float
    min_tokens: int
    stop_token_ids: list[int]
    bad_words: list[list[int]]
    logit_bias: dict[int, float]
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float


class Request(Options):
    """One request, as every engine gets it."""

    prompt_token_ids: list[int]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    ignore_eos: bool


Wave = list[Request]
"""Requests that arrive together."""


class Schedule(TypedDict):
    """When requests are due, in the order of the requests of all waves. Request i is due `offset_s[i]`
    after the start or, with `after[i]`, after that request has finished. rate: requests per second on
    average; None for a closed loop. answers: `own` if a request that follows another holds the answer
    that the engine gave to it (experiments/load/own_answers.py).
    """

    rate: float | None
    offset_s: list[float]
    after: list[int | None]
    answers: NotRequired[Literal["own"]]


class Workload(TypedDict):
    """A workload with its requests drawn. A wave begins when the one before it was answered; with
    `arrivals`, waves only group requests, which arrive when they are due.
    """

    name: str
    kind: str
    params: Params
    fingerprint: str
    requests_digest: str
    waves: list[Wave]
    arrivals: NotRequired[Schedule]


class PlannedWorkload(TypedDict):
    """A workload as a plan stores it: without tokens, which are drawn again from `params`."""

    kind: str
    params: Params
    fingerprint: str
    requests_digest: NotRequired[str]
    num_requests: int
    prompt_tokens: int
    output_tokens: int


# Plans


class ModelShape(TypedDict):
    """The sizes of a checkpoint, from its config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_experts: NotRequired[int]  # these three where a model has mixtures of experts
    num_experts_per_tok: NotRequired[int]
    moe_intermediate_size: NotRequired[int]
    tie_word_embeddings: NotRequired[bool]
    max_position_embeddings: NotRequired[int]


class PlannedModel(TypedDict):
    """The checkpoint: a preset or a folder; `digest` is of its config and weights."""

    preset: str | None
    path: str | None
    dtype: str
    digest: str | None
    shape: ModelShape


class ModelFiles(TypedDict):
    """The folder of a checkpoint and its digest."""

    path: str
    digest: str


class PlannedProfile(TypedDict):
    """The hardware, every value settled. Bandwidth, FLOP/s and memory are per device."""

    name: str
    title: str
    device: Device
    num_devices: int
    cpu_cores: int
    memory_bytes: int
    bandwidth_bytes_per_s: float
    peak_flops: float
    kv_cache_memory_bytes: int
    host_op_s: NotRequired[float]
    import_s: NotRequired[float]
    note: str
    speeds: NotRequired[str]


class PlannedDesign(TypedDict):
    kind: str
    blocks: int
    budget_s: NotRequired[float | None]
    bootstrap: NotRequired[bool]
    seed: int
    resolution: NotRequired[int]
    generators: NotRequired[dict[str, list[str]]]


class PlannedMeasurement(TypedDict):
    warm_up_requests: int
    warm_up_tokens: int
    timeout_s: float
    launch_s: float
    least_timed_s: NotRequired[float]
    preload: NotRequired[bool]
    environment: dict[str, str]


class PlannedSettings(TypedDict):
    """Engine settings that all cells share."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    kv_cache_memory_bytes: int | None


class PlannedFactor(TypedDict):
    levels: list[Level]
    baseline: Level
    in_all: NotRequired[bool]
    workloads: list[str]


class PlannedComparison(TypedDict):
    ours: str
    theirs: list[str]
    rule: Literal["best", "like-for-like"]


class ValidityRules(TypedDict):
    """When a launch is invalid because of what else the machine did."""

    foreign_gpu_processes: int
    throttle: list[str]
    max_foreign_cpu: float


class PlannedSizing(TypedDict):
    blocks: int
    least_blocks: int
    most_blocks: int
    shares: list[float]


class Objective(TypedDict, total=False):
    """Limits on the latencies of a request, in seconds (experiments/load/objective.py)."""

    ttft_s: float
    tpot_s: float
    itl_s: float
    e2e_s: float


class LoadRules(TypedDict):
    """The objective of a study under load, the share of requests that has to meet it, and when a
    launch is invalid because of its load generator.
    """

    slo: Objective | None
    slo_name: str | None
    attainment: float
    max_lateness_s: float
    min_delivered: float


class PlannedStatistics(TypedDict):
    """Whose variance an effect is judged by, and which effects are one family (ADR 10)."""

    variance: Literal["per_effect", "moderated"]
    families: Literal["joint", "by_question"]


class PlannedStudy(TypedDict):
    """The study without its workloads, cells, gate and model, which the plan holds expanded."""

    name: str
    title: str
    question: str
    engine: str
    metric: str
    smallest_effect: float
    alpha: float
    design: PlannedDesign
    measurement: PlannedMeasurement
    sizing: NotRequired[PlannedSizing | None]
    settings: PlannedSettings
    factors: dict[str, PlannedFactor]
    fixed: NotRequired[Levels]
    comparisons: NotRequired[dict[str, PlannedComparison]]
    validity: NotRequired[ValidityRules]
    statistics: NotRequired[PlannedStatistics]
    load: NotRequired[LoadRules]
    overrides: JsonObject


class Cell(TypedDict):
    """One configuration: an engine, its requested config, and the levels of the study's factors."""

    engine: str
    config: Config
    levels: Levels
    role: Role


class NotApplicable(TypedDict):
    """What the machine or the model cannot run. `factor`, `level`: a factor and its level, or a
    cell and its levels.
    """

    factor: str
    level: Level
    reason: str


class LaunchEntry(TypedDict):
    """One launch of a plan: a cell in a block. `order` is its place in the block."""

    launch: str
    block: int
    order: int
    cell: str
    seed: int
    workload_order: list[str]


class Sized(TypedDict):
    """How much work a study with `sizing` got on this machine."""

    share_of_answers: float
    blocks: int
    budget_s: float | None
    expected_launch_s: dict[str, float]


class PlannedPrice(TypedDict):
    """The price of the cells whose output is not the reference's (experiments/price/): margins by
    metric, the level of the tests, the held prompts, and of each such cell the levels that change
    its output.
    """

    margins: dict[str, float]
    level: float
    prompts: PlannedWorkload
    cells: dict[str, Levels]


class Plan(TypedDict):
    plan_version: int
    study: PlannedStudy
    profile: PlannedProfile
    model: PlannedModel
    workloads: dict[str, PlannedWorkload]
    cells: dict[str, Cell]
    not_applicable: list[NotApplicable]
    launches: list[LaunchEntry]
    gate: JsonObject
    expected_s: float
    sized: NotRequired[Sized]
    price: NotRequired[PlannedPrice]
    plan_hash: str


# Launches


class Toggle(TypedDict):
    """A toggle as an engine reports it. engaged: how often it took effect; opportunity: how often
    it could have, None where that is not counted.
    """

    level: Any
    baseline: Any
    engaged: int
    opportunity: int | None


Toggles = dict[str, Toggle]


class Answer(TypedDict):
    """What an engine returns for the requests of a wave, in their order; times since the wave
    arrived. A step is [time, requests, tokens, ...].
    """

    duration_s: float
    outputs: list[list[int]]
    finish_reasons: list[str]
    request_times_s: list[list[float]]
    step_times_s: list[list[float]]
    device_wait_s: NotRequired[float | None]
    load: NotRequired[Load]


class Served(TypedDict):
    """What an engine did with requests that arrived over time, in their order. An aborted request has
    the tokens that it got.
    """

    outputs: list[list[int]]
    finish_reasons: list[str]
    step_times_s: list[list[float]]
    device_wait_s: NotRequired[float | None]


class Trial(TypedDict):
    """One trial of a search for the highest rate (experiments/load/searching.py)."""

    rate: float
    passed: bool
    finished: int
    misses: int
    duration_s: float


class Search(TypedDict):
    """rate: the highest rate that passed, None if none did; failed: the lowest that did not."""

    rate: float | None
    failed: float | None
    stopped: str
    trials: list[Trial]


class Load(TypedDict):
    """The load of a workload with arrivals as it was delivered (experiments/load/delivered.py).

    delivered: the generator's rate over the rate asked for. lateness: of the generator itself.
    token_gaps_us: the gaps between each request's tokens, packed.
    """

    asked_rate: float | None
    delivered: float | None
    never_sent: int
    sent_s: list[float | None]
    lateness_p50_s: float
    lateness_p99_s: float
    lateness_max_s: float
    token_gaps_us: str
    search: NotRequired[Search]


class LogprobAnswer(TypedDict):
    """log softmax(logits)[token] of every output token, with the outputs."""

    outputs: list[list[int]]
    logprobs: list[list[float]]


class ServedWorkload(TypedDict):
    """A workload in the record of a launch. window_s: when it was served, rehearsals and all, in
    seconds since the process was started, as the samples of the telemetry count them.
    """

    fingerprint: str
    requests_digest: NotRequired[str]
    duration_s: float
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    request_times_s: list[list[float]]
    step_times_s: list[list[float]]
    counters: dict[str, int]
    toggles: Toggles
    tokens_digest: str
    finish_reasons: dict[str, int]
    device_wait_s: NotRequired[float | None]
    host_cpu_s: float | None
    servings_s: NotRequired[list[float]]
    rehearsals_s: NotRequired[list[float]]
    window_s: NotRequired[list[float]]
    load: NotRequired[Load]


class PeakMemory(TypedDict):
    """Bytes; None where they cannot be observed."""

    host: int | None
    device: int | None


class Telemetry(TypedDict):
    """What was observed on the machine during a launch. summary: {series: {"min", "mean", "max"}}."""

    sources: dict[str, str | None]
    interval_s: float
    summary: dict[str, dict[str, float]]
    throttle_reasons: list[str]
    foreign_gpu_pids: list[int]
    samples: list[JsonObject]


class Cpu(TypedDict):
    model: str
    cores: int
    arch: str


class Gpu(TypedDict):
    name: str
    memory_bytes: int
    driver: str


class GitState(TypedDict):
    commit: str | None
    branch: str | None
    dirty: bool
    dirty_digest: str | None


class MachineProvenance(TypedDict):
    """What is the same for all launches of a run. model_files: {name: SHA-256}."""

    git: GitState | None
    code_digest: str
    hostname: str
    os: str
    cpu: Cpu
    memory_bytes: int
    gpus: list[Gpu]
    model_files: NotRequired[dict[str, str | None]]


class InterpreterProvenance(TypedDict):
    """The process an engine ran in; absent where it failed before it could tell."""

    python: str
    implementation: str
    executable: str
    packages: dict[str, str]
    environment: dict[str, str]


class Provenance(MachineProvenance):
    python: NotRequired[str]
    implementation: NotRequired[str]
    executable: NotRequired[str]
    packages: NotRequired[dict[str, str]]
    environment: NotRequired[dict[str, str]]
    collect_env: NotRequired[str | None]


class Head(TypedDict):
    """The fields that follow the kind in every record."""

    schema: int
    study: str
    plan_hash: str


class LaunchRecord(Head):
    """One attempt at a launch. Times are None if the launch failed before."""

    kind: Literal["launch"]
    launch: str
    block: int
    order: int
    cell: str
    attempt: int
    seed: int
    boot_id: str
    started_at: str
    status: LaunchStatus
    reason: str | None
    engine: str
    requested: Config
    resolved: Config
    process_start_s: float | None
    load_s: float | None
    warm_up_s: float | None
    total_s: float
    workloads: dict[str, ServedWorkload]
    toggles: Toggles
    preloaded_s: NotRequired[float]
    peak_memory_bytes: PeakMemory
    telemetry: Telemetry
    provenance: Provenance


class Measured(TypedDict, total=False):
    """The part of a launch's record that its engine process writes."""

    status: LaunchStatus
    reason: str | None
    resolved: Config
    process_start_s: float
    load_s: float
    warm_up_s: float
    workloads: dict[str, ServedWorkload]
    toggles: Toggles
    provenance: InterpreterProvenance


class LaunchResult(TypedDict):
    """What an engine process hands to the runner."""

    record: Measured
    tokens: Tokens


class LaunchOutcome(LaunchResult):
    """The same with what the runner has observed from outside."""

    peak_memory_bytes: PeakMemory
    telemetry: Telemetry


# The gate


class PositionErrors(TypedDict):
    """Errors at the output positions from `first` to `last`."""

    first: int
    last: int
    tokens: int
    mismatches: int
    hf_mismatches: int
    margin: dict[str, float]
    hf_error: dict[str, float]


class Distribution(TypedDict):
    """The test of tokens that another random generator has drawn."""

    z: float
    z_limit: float
    hf_drift_z: float
    tokens: int
    mean_log_p_plus_entropy: float
    largest_log_evidence: float
    log_evidence_limit: float
    # not in records from before 2026-11-29
    dispersion_z: NotRequired[float]
    dispersion_limit: NotRequired[float]
    end_log_evidence: NotRequired[float]
    end_log_evidence_limit: NotRequired[float]
    outside: NotRequired[int]
    outside_explained: NotRequired[float]
    outside_log_evidence: NotRequired[float]
    outside_log_evidence_limit: NotRequired[float]


class Calibration(TypedDict, total=False):
    """How the noise bound was found; empty for a verdict that needed none. Quantiles are
    {"q50", "q99", "q999", "max"}, in logits (log-probabilities: in nats).
    """

    reference_dtype: str
    factor: float
    alpha: float
    floor: float
    hf_error: dict[str, float]
    hf_mismatches: int
    typical_bound: float
    above_typical_bound: int
    allowed_above_typical_bound: int
    excess_mismatches_z: float
    z_limit: float
    margin: dict[str, float]
    by_position: list[PositionErrors]
    hf_logprob_error: dict[str, float]
    repeated_tokens: float
    distribution: Distribution | None


class Offender(TypedDict):
    """The first token beyond the bound, else the one with the largest margin. top5: [token, score]."""

    request: int
    position: int
    token: int
    margin: float
    reference_choice: int
    reference_top5: list[list[float | int | None]]
    hf_top5: list[list[float | int | None]]


class Verdict(TypedDict):
    """The gate's judgement of one set of outputs. Margins and bounds are in logits, None for an
    error.
    """

    status: GateStatus
    reason: str | None
    tokens_checked: int
    mismatches: int
    within_bound: int
    max_margin: float | None
    bound: float | None
    calibration: Calibration
    first_offender: Offender | None
    duration_s: float


class GateRecord(Head, Verdict):
    """A verdict on what launches generated for one workload, by the digest of the outputs. The
    last one on a digest counts.
    """

    kind: Literal["gate"]
    workload: str
    tokens_digest: str
    dtype: str
    is_negative_control: bool


# The price of a lossy configuration


class PricedPrompts(TypedDict):
    """What a price is computed from, prompt by prompt: the number of predicted tokens, and of each
    metric (experiments/price/rules.py) the sums over them, of the engine and of the noise floor.
    """

    tokens: list[int]
    engine: dict[str, list[float]]
    floor: dict[str, list[float]]


class PriceFigures(TypedDict):
    """One cell against the unquantized reference. engine_kl, floor_kl: quantiles of the KL divergence
    of a token, in nats: {"q50", "q99", "q999", "max"}. step_tokens: how many tokens of a prompt
    the engine read in a step.
    """

    prompts: PricedPrompts
    engine_kl: dict[str, float]
    floor_kl: dict[str, float]
    step_tokens: int


class PriceRecord(Head):
    """The price of a cell, or why there is none (`reason`; `figures` is None then). The last one of a
    cell counts. levels: those that change its output.
    """

    kind: Literal["price"]
    cell: str
    levels: Levels
    status: Literal["ok", "error"]
    reason: str | None
    fingerprint: str
    dtype: str
    reference_dtype: str
    requested: Config
    resolved: Config
    figures: PriceFigures | None
    code_digest: str
    duration_s: float


# What else happened to a folder of records


class SupersededRecord(Head):
    """An attempt that no longer counts."""

    kind: Literal["superseded"]
    launch: str
    attempt: int
    reason: str


class ResumedRecord(Head):
    """An execution that went on after an interruption."""

    kind: Literal["resumed"]
    boot_id: str
    at: str


Record = LaunchRecord | GateRecord | PriceRecord | SupersededRecord | ResumedRecord


class TokenLine(TypedDict):
    """A line of tokens.jsonl."""

    digest: str
    tokens: str


class Event(TypedDict, total=False):
    """The details of an event of a run; the keys depend on the event (see `ledger.Listener`)."""

    text: str
    count: int
    launches: list[LaunchEntry]
    launch: LaunchEntry
    attempt: int
    expected_s: float
    record: LaunchRecord
    tokens: Tokens
