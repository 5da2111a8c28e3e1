"""Every family's seeded checkpoint through the gate in float32 on a CPU: with everything off, everything on, and
in every pair of switches that a CPU has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from experiments.checking.pairs import pairwise
from experiments.gate.negative_controls import change_norm_epsilon, scale_rope_theta
from experiments.gate.rescoring import Request, Rescorer
from experiments.gate.rules import GateParams, GateResult, judge
from nanovllm import LLM, SamplingParams
from nanovllm.models.checkpoint import PRESETS, ensure_checkpoint
from property_tests.support.ranks import in_place_of_processes
from tests.gate.test_gate import GREEDY, SAMPLED, TRUNCATED, make_requests

FAMILIES = [name for name in PRESETS if name.startswith("tiny")]
SWITCHES: dict[str, list[Any]] = {
    "batching": ["static", "continuous", "chunked"],
    "prefix_cache": [False, True],
    "overlap": [False, True],
    "tensor_parallel_size": [1, 2],
}
OFF = {name: levels[0] for name, levels in SWITCHES.items()}
ON = {name: levels[-1] for name, levels in SWITCHES.items()}
OTHERS = [on for on in pairwise(SWITCHES, first=[OFF, ON]) if on not in (OFF, ON)]


def requests() -> list[Request]:
    """Twice the same prompts, so that the second has a prefix to find."""
    drawn = make_requests(GREEDY, SAMPLED, TRUNCATED, each=2, max_tokens=16)
    return [*drawn, *({**one, "seed": one["seed"] + 1} for one in drawn)]


@cache
def rescorer_of(preset: str, dtype: str = "float32") -> Rescorer:
    return Rescorer(ensure_checkpoint(preset), dtype)


def outputs_of(preset: str, switches: dict[str, Any], dtype: str = "float32") -> list[list[int]]:
    asked = requests()
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos")
    with (
        in_place_of_processes(),
        LLM(
            str(ensure_checkpoint(preset)),
            device="cpu",
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=128,
            max_num_seqs=4,
            max_num_batched_tokens=96,
            kv_cache_memory_bytes=1 << 22,
            optimizations=switches,
        ) as llm,
    ):
        outputs = llm.generate(
            [{"prompt_token_ids": one["prompt_token_ids"]} for one in asked],
            [SamplingParams(**{name: one[name] for name in names}) for one in asked],
            use_tqdm=False,
        )
        toggles = llm.toggles()
        for name, level in switches.items():
            assert bool(toggles[name]["engaged"]) == (level != OFF[name]), (name, toggles[name])
    return [output.outputs[0].token_ids for output in outputs]


def verdict(rescorer: Rescorer, outputs: list[list[int]]) -> GateResult:
    return judge(rescorer.score(requests(), outputs), rescorer.dtype, GateParams())


@pytest.mark.parametrize("preset", FAMILIES)
@pytest.mark.parametrize(
    "switches", [OFF, ON, *(pytest.param(on, marks=pytest.mark.slow) for on in OTHERS)], ids=str
)
def test_every_family_passes(preset: str, switches: dict[str, Any]) -> None:
    result = verdict(rescorer_of(preset), outputs_of(preset, switches))
    assert result.passed, f"{result.reason}; first: {result.first_offender}"


@pytest.mark.parametrize("preset", FAMILIES)
def test_every_family_passes_in_float16(preset: str) -> None:
    one, all_on = (outputs_of(preset, on, "float16") for on in (OFF, ON))
    rescorer = rescorer_of(preset, "float16")
    for outputs in (one, all_on):
        result = verdict(rescorer, outputs)
        assert result.passed, f"{result.reason}; first: {result.first_offender}"
    assert result.calibration["reference_dtype"] == "float32"
    broken = Rescorer(ensure_checkpoint(preset), "float16", mutate=scale_rope_theta)
    assert not verdict(broken, one).passed


def without_biases(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.zero_()


def without_scaling(model: Any) -> None:
    embedding, theta = model.base_model.rotary_emb, model.config.rope_parameters["rope_theta"]
    half = len(embedding.inv_freq)
    embedding.inv_freq = theta ** -(torch.arange(half, dtype=torch.float64) / half)


def without_normalized_shares(model: Any) -> None:
    for layer in model.base_model.layers:
        layer.mlp.gate.norm_topk_prob = False


def with_one_expert_a_token(model: Any) -> None:
    for layer in model.base_model.layers:
        layer.mlp.gate.top_k = 1


BROKEN: list[tuple[str, Callable[[Any], None]]] = [
    *((preset, scale_rope_theta) for preset in FAMILIES),
    *((preset, change_norm_epsilon) for preset in FAMILIES),
    ("tiny-qwen2", without_biases),
    ("tiny-llama", without_scaling),
    ("tiny-qwen3-moe", without_normalized_shares),
    ("tiny-qwen3-moe", with_one_expert_a_token),
]


@pytest.mark.parametrize(
    ("preset", "mutate"), BROKEN, ids=[f"{preset} {how.__name__}" for preset, how in BROKEN]
)
def test_every_family_fails_when_it_is_broken(
    preset: str, mutate: Callable[[Any], None], everything_off: Callable[[str], list[list[int]]]
) -> None:
    """A reference that differs so from the engine: the gate is told of the same difference."""
    broken = Rescorer(ensure_checkpoint(preset), "float32", mutate=mutate)
    assert not verdict(broken, everything_off(preset)).passed


@pytest.fixture(scope="module")
def everything_off() -> Callable[[str], list[list[int]]]:
    return cache(lambda preset: outputs_of(preset, OFF))
