"""The jobs of a check: each is an engine, its settings, and the expected verdict.

The command line loads this module whatever it is asked for, so what needs torch is imported where
it is used.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from experiments.checking import work
from experiments.checking.pairs import Choice, pairwise
from experiments.gate.lossy.recipe import EXACT, recipe_of
from experiments.records.factor_levels import level_name
from experiments.records.types import Config, Device, JsonObject, ModelShape, PlannedProfile
from experiments.study.plan import inapplicable
from experiments.study.work_size import BYTES
from nanovllm.config import ALL, BASELINE, LEVELS, Optimizations

MAX_NUM_SEQS, MAX_MODEL_LEN, BATCHED_TOKENS = 4, 256, 48
"""Small, so that requests wait, prompts are chunked, and requests are preempted (see `kv_cache_bytes`)."""
CONTROL, SAMPLED, TRUNCATED = "control", "sampled", "truncated"


@dataclass(frozen=True)
class Job:
    """An engine that serves some of the workloads. expected: the gate's verdict, "pass" or "fail".
    like: the job whose outputs these are compared with, request by request. logprobs: workloads
    that are served a second time, for log-probabilities.
    """

    name: str
    group: str
    engine: str
    config: Config
    dtype: str
    workloads: tuple[str, ...]
    logprobs: tuple[str, ...]
    expected: str = "pass"
    broken: str | None = None
    like: str | None = None

    def as_dict(self) -> JsonObject:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Scope:
    """What is checked, and on which machine. `shape` and `profile` are as in a plan."""

    profile: PlannedProfile
    shape: ModelShape
    device: Device
    dtypes: tuple[str, ...]
    """All configurations run in the first dtype, some also in the others."""
    peers: tuple[str, ...]
    """Other engines besides HF, by adapter name."""


def control_workloads(vocab_size: int) -> work.Workloads:
    """Fixed workloads in addition to the drawn ones, for broken engines and for engines with another
    random generator.
    """
    from experiments.gate.negative_controls import CONTROL_PROMPT

    hot: work.Sampling = {"temperature": 0.8, "top_k": 0, "top_p": 1.0}
    cut: work.Sampling = {"temperature": 1.0, "top_k": 40, "top_p": 0.9}
    return {
        CONTROL: work.uniform(48, vocab_size, CONTROL_PROMPT, 24, work.GREEDY, seed=1),
        SAMPLED: work.uniform(48, vocab_size, CONTROL_PROMPT, 24, hot, seed=2),
        TRUNCATED: work.uniform(48, vocab_size, CONTROL_PROMPT, 24, cut, seed=3),
    }


def never_shared(factor: str, level: Any, shape: ModelShape) -> str | None:
    """Why cascade attention would never engage in a check, if so: it needs more concurrent requests
    with a shared prefix than a check has.
    """
    from nanovllm.gpu.cuda_graph import fewest_sharing

    fewest = fewest_sharing(shape["num_key_value_heads"])
    if factor != "cascade_attention" or not level or fewest < MAX_NUM_SEQS:
        return None
    return (
        f"needs {fewest} concurrent requests that share a prefix, but a check runs {MAX_NUM_SEQS}; "
        "covered by tests/gpu/test_cuda_graph.py"
    )


def lacks_library(factor: str, level: Any) -> str | None:
    """Why a level cannot run with the packages of this environment, if so: FlashAttention is not
    among those that `make setup` installs.
    """
    if (factor, level) != ("attention_backend", "flash_attn"):
        return None
    from nanovllm.kernels import flash_attn

    try:
        flash_attn.find_library()
    except ImportError:
        return "no FlashAttention library is installed (`pip install flash-attn`, or vLLM, whose wheel carries one)"
    return None


def lacks_float16(factor: str, level: Any, dtypes: tuple[str, ...]) -> str | None:
    """Why a level cannot run in all of these dtypes, if so."""
    if level != "native" or "float16" not in dtypes:
        return None
    return "computes in float32 and bfloat16, not in float16"


def configurations(scope: Scope) -> tuple[list[Choice], list[str]]:
    """(configurations that cover every pair of levels that can run together on this machine, what
    cannot run here and why). The first configuration is the baseline, the second all best levels.
    """
    levels: dict[str, list[Any]] = {}
    absent = []
    for factor, known in LEVELS.items():
        levels[factor] = []
        for level in known:
            reason = (
                inapplicable(factor, level_name(level), scope.profile, scope.shape)
                or never_shared(factor, level, scope.shape)
                or lacks_library(factor, level)
                or lacks_float16(factor, level, scope.dtypes)
            )
            if reason:
                absent.append(f"{factor}={level_name(level)}: {reason}")
            else:
                levels[factor].append(level)

    def allowed(choice: Choice) -> bool:
        try:
            dataclasses.replace(Optimizations(**choice), data_parallel_size=1).resolve(
                scope.device,  # type: ignore[arg-type]
                in_engine=True,
            )
        except ValueError:
            return False
        return True

    least = "float16" if "float16" in scope.dtypes else scope.dtypes[0]
    best = dataclasses.asdict(ALL.resolve(scope.device, dtype=least))  # type: ignore[arg-type]
    best["cascade_attention"] &= True in levels["cascade_attention"]
    return pairwise(levels, allowed, [dataclasses.asdict(BASELINE), best]), absent


def all_jobs(scope: Scope, drawn: list[str]) -> tuple[list[Job], list[str]]:
    """The jobs in the order of the page, and what cannot run on this machine."""
    from experiments.gate.negative_controls import CONTROL_PROMPT, controls

    choices, absent = configurations(scope)
    drawn_and_more = (*drawn, CONTROL, SAMPLED, TRUNCATED)
    first = scope.dtypes[0]
    jobs = []
    for number, choice in enumerate(choices):
        name = ("baseline", "all on")[number] if number < 2 else f"pairs {number - 1}"
        for dtype in scope.dtypes if number < 2 else (first,):
            config = engine_config(scope, dtype) | {
                "optimizations": choice,
                "block_size": work.BLOCK_SIZE,
                "kv_cache_memory_bytes": kv_cache_bytes(scope.shape, dtype),
            }
            exact = recipe_of(config) == EXACT
            like = f"nanovllm {dtype}: baseline" if number and exact else None
            jobs.append(
                Job(
                    f"nanovllm {dtype}: {name}",
                    describe(choice),
                    "nanovllm",
                    config,
                    dtype,
                    drawn_and_more,
                    (*drawn[::4], CONTROL),
                    like=like,
                )
            )
    for dtype in scope.dtypes:
        for size in (48, 7):
            config = {"dtype": dtype, "device": scope.device, "max_num_seqs": size}
            jobs.append(
                Job(
                    f"hf {dtype}: batches of {size}",
                    "HF generate, with its own random generator",
                    "hf",
                    config,
                    dtype,
                    (CONTROL, SAMPLED, TRUNCATED),
                    (CONTROL,),
                )
            )
    for peer in scope.peers:
        config = engine_config(scope, first)
        config |= (
            {"kv_cache_memory_bytes": 2**28, "max_num_batched_tokens": MAX_MODEL_LEN}
            if peer == "vllm"
            else {}
        )
        jobs.append(
            Job(
                f"{peer} {first}",
                "another engine, with its own random generator",
                peer,
                config,
                first,
                drawn_and_more,
                (*drawn[::4], CONTROL),
            )
        )
    for dtype in scope.dtypes:
        for broken in controls(CONTROL_PROMPT):
            config = {"dtype": dtype, "device": scope.device, "max_num_seqs": 48}
            jobs.append(
                Job(
                    f"broken {dtype}: {broken}",
                    "HF, deliberately broken",
                    "hf",
                    config,
                    dtype,
                    (CONTROL,),
                    (CONTROL,),
                    expected="fail",
                    broken=broken,
                )
            )
    return jobs, absent


def engine_config(scope: Scope, dtype: str) -> Config:
    return {
        "dtype": dtype,
        "device": scope.device,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": BATCHED_TOKENS,
        "seed": 0,
    }


def kv_cache_bytes(shape: ModelShape, dtype: str) -> int:
    """The size of a KV cache for two of the longest requests: MAX_NUM_SEQS of them do not fit, so
    some are preempted.
    """
    blocks = 2 * -(-(work.LONGEST_PROMPT + work.LONGEST_ANSWER) // work.BLOCK_SIZE) + 1
    bytes_per_value = BYTES[dtype]
    per_token = (
        2
        * shape["num_hidden_layers"]
        * shape["num_key_value_heads"]
        * shape["head_dim"]
        * bytes_per_value
    )
    return blocks * work.BLOCK_SIZE * per_token


def describe(choice: Choice) -> str:
    """The optimizations that are not at their baseline, as text."""
    on = [
        f"{name}={level_name(level)}" for name, level in choice.items() if level != LEVELS[name][0]
    ]
    return ", ".join(on) or "everything at its baseline"
