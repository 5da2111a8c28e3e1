"""A quantized engine is an exact computation of its own definition: the gate judges it against HF that rounds alike, in every
family, alone and with everything on, and fails what computes anything else.
"""

from __future__ import annotations

import itertools
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.gate.judge import Gate
from experiments.gate.lossy.recipe import EXACT, Recipe, recipe_of
from experiments.gate.lossy.reference import rounded_to_e4m3
from experiments.gate.rescoring import Rescorer
from experiments.gate.rules import GateParams, GateResult, judge
from experiments.gate.verdicts import Work
from nanovllm import LLM, SamplingParams
from nanovllm.models.checkpoint import PRESETS, ensure_checkpoint
from property_tests.bad_implementations import BAD
from property_tests.support.ranks import in_place_of_processes
from tests.gate.test_gate import GREEDY, SAMPLED, TRUNCATED, make_requests

FAMILIES = [name for name in PRESETS if name.startswith("tiny")]
ALONE: list[dict[str, Any]] = [
    {"quantization": "int8"},
    {"quantization": "int4"},
    {"quantization": "fp8"},
    {"kv_cache_dtype": "fp8_e4m3"},
]
IN_EVERY_RUN = {("tiny", "int4"), ("tiny-qwen3-moe", "fp8")}
SWITCHES: dict[str, Any] = {
    "batching": "chunked",
    "prefix_cache": True,
    "overlap": True,
    "tensor_parallel_size": 2,
}
NAMES = ("max_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos")
REQUESTS = make_requests(GREEDY, SAMPLED, TRUNCATED, each=2, max_tokens=10)
REQUESTS += [{**one, "seed": one["seed"] + 1} for one in REQUESTS]  # so that prefixes are found


@cache
def rescorer_of(preset: str, recipe: Recipe, dtype: str = "float32") -> Rescorer:
    return Rescorer(ensure_checkpoint(preset), dtype, recipe=recipe)


def outputs_of(preset: str, levels: dict[str, Any], dtype: str = "float32") -> list[list[int]]:
    """Of an engine whose pool is small, so that requests are preempted where batching can."""
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
            kv_cache_memory_bytes=(1 << 19) // (4 if "kv_cache_dtype" in levels else 1),
            optimizations=levels,
        ) as llm,
    ):
        outputs = llm.generate(
            [{"prompt_token_ids": one["prompt_token_ids"]} for one in REQUESTS],
            [SamplingParams(**{name: one[name] for name in NAMES}) for one in REQUESTS],
            use_tqdm=False,
        )
        toggles = llm.toggles()
        for name, toggle in toggles.items():
            assert bool(toggle["engaged"]) == (name in levels), (name, toggle)
    return [output.outputs[0].token_ids for output in outputs]


def verdict(
    preset: str, recipe: Recipe, outputs: list[list[int]], dtype: str = "float32"
) -> GateResult:
    scores = rescorer_of(preset, recipe, dtype).score(REQUESTS, outputs)
    return judge(scores, dtype, GateParams())


@pytest.mark.parametrize("levels", ALONE, ids=str)
@pytest.mark.parametrize(
    "preset",
    [
        name if name in ("tiny", "tiny-qwen3-moe") else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_each_level_alone_passes_by_its_own_definition(preset: str, levels: dict[str, Any]) -> None:
    outputs = outputs_of(preset, levels)
    recipe = recipe_of({"optimizations": levels})
    result = verdict(preset, recipe, outputs)
    assert result.passed, f"{result.reason}; first: {result.first_offender}"
    # what passes by every definition would show nothing
    assert not verdict(preset, EXACT, outputs).passed
    others = {"int8": "int4", "int4": "int8", "fp8": "int8", "none": "int8"}
    other = Recipe(others[recipe.quantization], recipe.kv_cache_dtype)
    assert not verdict(preset, other, outputs).passed


@pytest.mark.parametrize(
    ("preset", "quantization"),
    [
        case if case in IN_EVERY_RUN else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(FAMILIES, ("int8", "int4", "fp8"))
    ],
)
def test_everything_on_passes(preset: str, quantization: str) -> None:
    levels = SWITCHES | {"quantization": quantization, "kv_cache_dtype": "fp8_e4m3"}
    result = verdict(preset, recipe_of({"optimizations": levels}), outputs_of(preset, levels))
    assert result.passed, f"{result.reason}; first: {result.first_offender}"


@pytest.mark.parametrize(
    "levels",
    [*ALONE[::3], *(pytest.param(levels, marks=pytest.mark.slow) for levels in ALONE[1:3])],
    ids=str,
)
def test_bfloat16_passes(levels: dict[str, Any]) -> None:
    outputs = outputs_of("tiny", levels, "bfloat16")
    result = verdict("tiny", recipe_of({"optimizations": levels}), outputs, "bfloat16")
    assert result.passed, f"{result.reason}; first: {result.first_offender}"


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("levels", ALONE, ids=str)
@pytest.mark.slow
def test_pairs_pass(switch: str, levels: dict[str, Any]) -> None:
    result = verdict(
        "tiny",
        recipe_of({"optimizations": levels}),
        outputs_of("tiny", levels | {switch: SWITCHES[switch]}),
    )
    assert result.passed, f"{result.reason}; first: {result.first_offender}"


LEVELS_OF_BAD: dict[str, dict[str, Any]] = {
    "an_output_has_the_scale_of_the_next_one": {"quantization": "int8"},
    "a_zero_point_is_one_too_high": {"quantization": "int4"},
    "groups_of_64_are_read_as_groups_of_128": {"quantization": "int4"},
    "nibbles_are_swapped": {"quantization": "int4"},
    "the_last_group_is_dropped": {"quantization": "int4"},
    "a_rank_takes_the_groups_of_rank_0": {"quantization": "int4", "tensor_parallel_size": 2},
    "ranks_do_not_agree_on_scales": {"quantization": "int8", "tensor_parallel_size": 2},
    "values_are_rounded_twice": {"kv_cache_dtype": "fp8_e4m3"},
    "a_prompt_reads_its_own_keys_unrounded": {"kv_cache_dtype": "fp8_e4m3"},
}
"""Not here: a scale that is left out and values that do not saturate, as scales are 1.0 and the values of these models small; and
a scale that all tokens share, which is within the noise of activations that are rounded. The property tests have all three."""


@pytest.mark.parametrize(
    "name",
    [
        name
        if "groups" in name or "unrounded" in name
        else pytest.param(name, marks=pytest.mark.slow)
        for name in LEVELS_OF_BAD
    ],
)
def test_a_bad_implementation_fails(name: str) -> None:
    """The same that the property tests plant, in a whole engine: "it is lossy" hides none of them."""
    (bad,) = (bad for bad in BAD if bad.name == name)
    levels = LEVELS_OF_BAD[name]
    preset = "tiny-qwen3-moe" if name == "the_last_group_is_dropped" else "tiny"
    with bad.installed():
        outputs = outputs_of(preset, levels)
    assert not verdict(preset, recipe_of({"optimizations": levels}), outputs).passed


def test_the_gate_takes_the_recipe_of_each_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that a quantized engine gave are not judged by the unquantized reference, and those that several engines gave must be
    right for all of them.
    """
    cells = {
        "baseline": {"resolved": {"optimizations": {"quantization": "none"}}},
        "old": {"resolved": {"optimizations": {"prefix_cache": True}}},
        "hf": {"resolved": {"dtype": "float32"}},
        "int8": {"resolved": {"optimizations": {"quantization": "int8", "kv_cache_dtype": "auto"}}},
        "both": {
            "resolved": {"optimizations": {"quantization": "int8", "kv_cache_dtype": "fp8_e4m3"}}
        },
    }
    gate: Any = object.__new__(Gate)
    gate.plan = {"model": {"dtype": "float32"}}
    gate._rescorers, gate.params, gate.model_dir = {}, GateParams(), "m"
    made: list[Recipe] = []

    def make(*_: Any, recipe: Recipe) -> Recipe:
        made.append(recipe)
        return recipe

    monkeypatch.setattr("experiments.gate.judge.make_rescorer", make)

    def of(*names: str) -> Work:
        return Work("w", "d", tuple({"engine": "nanovllm", **cells[name]} for name in names))  # type: ignore[misc]

    assert gate.recipes_of(of("baseline", "old", "hf")) == [EXACT]
    int8, both = Recipe("int8"), Recipe("int8", "fp8_e4m3")
    assert gate.recipes_of(of("int8", "baseline")) == [int8, EXACT]
    assert gate.recipes_of(of("both")) == [both]
    assert str(both) == "quantization=int8, kv_cache_dtype=fp8_e4m3"
    for recipe in (EXACT, int8, both, both, EXACT):
        assert gate.rescorer(recipe) == recipe
    assert made == [EXACT, int8, both], "a model was loaded twice"
    assert set(gate._rescorers) == {EXACT, both}, "models of another recipe are kept"

    passed, failed = (
        GateResult(status, None, 1, 0, 0, 0.0, 0.0, {}, None)  # type: ignore[arg-type]
        for status in ("pass", "fail")
    )
    monkeypatch.setattr(gate, "requests_of", lambda workload: [])
    monkeypatch.setattr(gate, "requests_as_served", lambda workload, outputs: [])
    monkeypatch.setattr("experiments.gate.judge.read_tokens", lambda *_: [])
    monkeypatch.setattr("experiments.gate.judge.check_same_work", lambda *_: [])
    monkeypatch.setattr("experiments.gate.judge.gate_record", lambda plan, work, result: result)
    monkeypatch.setattr(
        "experiments.gate.judge.judge_outputs",
        lambda rescorer, *_, **__: failed if rescorer == EXACT else passed,
    )
    gate.folder = SimpleNamespace(path=None)
    assert gate.judge(of("int8")) is passed
    assert gate.judge(of("int8", "baseline")) is failed


def test_the_references_rounding_is_that_of_the_format() -> None:
    """Every number of e4m3, what lies between two of them, and what lies beyond."""
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = bits.view(torch.float8_e4m3fn).double()
    numbers = numbers[~numbers.isnan()].sort().values
    assert torch.equal(rounded_to_e4m3(numbers), numbers)
    middle = (numbers[1:] + numbers[:-1]) / 2
    for values in (middle, middle * (1 - 1e-6), middle * (1 + 1e-6)):
        # single steps: exact in float32
        expected = values.float().to(torch.float8_e4m3fn).double()
        assert torch.equal(rounded_to_e4m3(values.float()).double(), expected)
    assert rounded_to_e4m3(torch.tensor([449.0, 1e9, -480.0])).tolist() == [448.0, 448.0, -448.0]
