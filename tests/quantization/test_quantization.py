"""quantization and kv_cache_dtype in an engine: what they take, what they refuse, what they count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import LLM, EngineConfig, Optimizations, SamplingParams
from nanovllm.config import BASELINE, LEVELS
from nanovllm.gpu import machine
from nanovllm.toggles.row import toggles_of

PROMPTS = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (4, 17, 40)]
PARAMS = SamplingParams(temperature=0.6, max_tokens=12, seed=7, ignore_eos=True)


def engine(model: Path, dtype: str = "float32", **levels: Any) -> LLM:
    return LLM(
        str(model),
        device="cpu",
        dtype=dtype,
        max_model_len=128,
        max_num_seqs=4,
        kv_cache_memory_bytes=1 << 20,
        optimizations=levels,
    )


def bytes_of_projections(llm: LLM) -> int:
    """Bytes of everything that the projections hold, scales and zero points with it; no biases."""
    return sum(
        tensor.nbytes
        for name, tensor in (
            *llm.runner.model.named_parameters(),
            *llm.runner.model.named_buffers(),
        )
        if "_proj." in name and ".bias" not in name
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_take_the_bytes_that_they_say(tiny: Path, dtype: str) -> None:
    taken = {}
    for level in LEVELS["quantization"]:
        with engine(tiny, dtype, quantization=level) as llm:
            taken[level] = bytes_of_projections(llm)
    values = taken["none"] // getattr(torch, dtype).itemsize
    # each output channel, of 256 inputs or more, has a scale of at most 4 bytes
    assert values < taken["int8"] <= values * (1 + 4 / 256)
    assert values < taken["fp8"] <= values * (1 + 4 / 256)
    # each group of 128 has a scale and one byte of zero point
    assert values / 2 < taken["int4"] <= values * (1 / 2 + 5 / 128)


def test_a_small_cache_has_as_many_more_blocks(tiny: Path) -> None:
    blocks = {}
    for level in LEVELS["kv_cache_dtype"]:
        with engine(tiny, kv_cache_dtype=level) as llm:
            blocks[level] = llm.config.num_kv_blocks
            stored = {cache.dtype for layer in llm.runner.kv_caches for cache in layer}
        assert stored == {torch.float8_e4m3fn if level == "fp8_e4m3" else torch.float32}
    assert blocks["fp8_e4m3"] == 4 * blocks["auto"]


@pytest.mark.parametrize(
    ("name", "level"),
    [(name, level) for name in ("quantization", "kv_cache_dtype") for level in LEVELS[name][1:]],
)
@pytest.mark.parametrize("others", [{}, {"kernels": "native"}, {"overlap": True}], ids=str)
def test_it_proves_that_it_ran(tiny: Path, name: str, level: str, others: dict[str, Any]) -> None:
    with engine(tiny, **{name: level}, **others) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        toggles = llm.toggles()
    assert toggles[name]["engaged"] > 0
    assert {other for other, toggle in toggles.items() if toggle["engaged"]} == {name, *others}
    assert all(len(output.outputs[0].token_ids) == 12 for output in outputs)


def test_the_prefix_cache_changes_no_token(tiny: Path) -> None:
    """A block that is found holds what a prompt would read of its own tokens."""
    tokens = []
    for prefix_cache in (False, True):
        with engine(tiny, kv_cache_dtype="fp8_e4m3", prefix_cache=prefix_cache) as llm:
            for _ in range(2):
                outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
                tokens.append([output.outputs[0].token_ids for output in outputs])
            hits = llm.stats()["prefix_hit_tokens"]
        assert bool(hits) == prefix_cache
    assert all(found == tokens[0] for found in tokens[1:])


def test_what_is_lossy_says_so() -> None:
    lossy = [name for name, row in toggles_of(Optimizations).items() if row.lossy]
    assert lossy == ["quantization", "kv_cache_dtype"]


def test_everything_on_is_not_lossy() -> None:
    for device in ("cpu", "cuda"):
        resolved = EngineConfig(model="m").optimizations.resolve(device)  # type: ignore[arg-type]
        assert resolved.quantization == "none"
        assert resolved.kv_cache_dtype == "auto"


def test_the_line_of_a_start_names_what_is_lossy() -> None:
    def line(**levels: str) -> str:
        config = SimpleNamespace(
            optimizations=Optimizations(**levels),  # type: ignore[arg-type]
            dtype="bfloat16",
            num_kv_blocks=1,
            block_size=16,
            kv_cache_bytes=1,
            max_num_seqs=1,
            max_model_len=1,
        )
        return machine.describe(config, "a GPU")

    assert "quantization" not in line()
    assert "KV values" not in line()
    assert "quantization int4, KV values fp8_e4m3" in line(
        quantization="int4", kv_cache_dtype="fp8_e4m3"
    )


def test_names_of_vllm() -> None:
    config = EngineConfig.from_kwargs("m", quantization="fp8", kv_cache_dtype="fp8")
    assert config.optimizations.quantization == "fp8"
    assert config.optimizations.kv_cache_dtype == "fp8_e4m3"
    config = EngineConfig.from_kwargs("m", quantization=None, kv_cache_dtype="auto")
    assert config.optimizations.resolve("cpu").quantization == "none"
    for name, value in (("quantization", "awq"), ("quantization", ["int8"]), ("kv_cache_dtype", 8)):
        with pytest.raises(ValueError, match=f"{name}=.* is not allowed; it must be one of"):
            EngineConfig.from_kwargs("m", **{name: value})


def test_attention_that_cannot_read_a_small_cache_is_refused_or_not_chosen() -> None:
    on = Optimizations(kv_cache_dtype="fp8_e4m3", attention_backend="auto")
    assert on.resolve("cpu", in_engine=True).attention_backend == "torch"
    native = Optimizations(kv_cache_dtype="fp8_e4m3", attention_backend="native")
    with pytest.raises(ValueError, match=r"attention_backend='native' needs kv_cache_dtype='auto'"):
        native.resolve("cpu", in_engine=True)
    assert BASELINE.kv_cache_dtype == "auto"


def test_an_odd_number_of_inputs_is_refused_by_name() -> None:
    from nanovllm.quantization.weights import Int4Weight

    with pytest.raises(ValueError, match=r"quantization='int4' packs inputs in pairs.*use 'int8'"):
        Int4Weight(torch.zeros(2, 3), None)


def test_weights_of_zeros_stay_zeros() -> None:
    from nanovllm.quantization.weights import WEIGHTS

    for made in WEIGHTS.values():
        weight = made(torch.zeros(2, 4), None)
        assert torch.equal(weight.product(torch.ones(3, 4)), torch.zeros(3, 2))
