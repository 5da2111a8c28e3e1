"""enable_expert_parallel: each rank holds some experts whole, and computes the tokens that the router sends them."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, EngineConfig, SamplingParams
from nanovllm.config import ALL, BASELINE, Optimizations
from nanovllm.kernels.registry import load_kernels
from nanovllm.kernels.torch.experts import mix_every_expert, mix_experts
from nanovllm.layers.linear import TensorParallel
from nanovllm.models.checkpoint import ensure_checkpoint
from nanovllm.models.config import load_hf_config
from nanovllm.models.loader import load_weights
from nanovllm.models.qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeMLP
from property_tests.support.ranks import in_place_of_processes
from tests.gate.test_gate_of_families import ON, outputs_of, rescorer_of, verdict

MOE = "tiny-qwen3-moe"
SMALL: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 64,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 1 << 20,
    "skip_tokenizer_init": True,
}


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return ensure_checkpoint(MOE)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def load(folder: Path, rank: int = 0, size: int = 1) -> Qwen3MoeForCausalLM:
    tp = TensorParallel()
    tp.rank, tp.size, tp.whole_experts = rank, size, size > 1
    kernels = load_kernels(BASELINE, Counter())
    # no attention: not run
    model = Qwen3MoeForCausalLM(load_hf_config(folder), 64, kernels, None, tp)  # type: ignore[arg-type]
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(torch.nan)
    load_weights(model, folder, tp)
    return model


def test_every_expert_is_on_one_rank_and_whole(checkpoint: Path) -> None:
    whole, ranks = load(checkpoint), [load(checkpoint, rank, 4) for rank in range(4)]
    for i, layer in enumerate(whole.model.layers):
        mlps = [rank.model.layers[i].mlp for rank in ranks]
        assert [list(mlp.experts) for mlp in mlps] == [
            ["0", "1"],
            ["2", "3"],
            ["4", "5"],
            ["6", "7"],
        ]
        for name in ("gate_up", "down"):
            parts = torch.cat([getattr(mlp, name) for mlp in mlps])
            assert torch.equal(parts, getattr(layer.mlp, name))
            assert not parts.isnan().any()
        # the router is everywhere, what is no expert is split as before
        assert all(torch.equal(mlp.gate.weight, layer.mlp.gate.weight) for mlp in mlps)
        halves = [rank.model.layers[i].self_attn.o_proj.weight for rank in ranks]
        assert torch.equal(torch.cat(halves, 1), layer.self_attn.o_proj.weight)


def test_a_rank_reads_no_expert_of_another(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanovllm.models import loader

    read: list[str] = []
    before = loader._load
    monkeypatch.setattr(
        loader, "_load", lambda *given: (read.append(given[-1].split()[0]), before(*given))
    )
    load(checkpoint, 1, 2)
    experts = {name.split(".experts.")[1].split(".")[0] for name in read if ".experts." in name}
    assert experts == {"4", "5", "6", "7"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "stray",
    [
        "model.layers.0.mlp.experts.8.up_proj.weight",  # there are eight
        "model.layers.9.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.1.up_proj.bias",
        "model.layers.0.self_attn.experts.1.up_proj.weight",
    ],
)
def test_tensors_of_no_expert_are_refused_on_every_rank(
    folder: Path, stray: str, rank: int
) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {stray: torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"no place for: {stray}"):
        load(folder, rank, 2)


def test_an_expert_that_is_missing_is_named_by_its_rank(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.experts.5.down_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    load(folder, 0, 2)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.experts\.5\.down_proj"):
        load(folder, 1, 2)


@pytest.mark.parametrize("mix", [mix_experts, mix_every_expert])
def test_ranks_add_up_to_the_mixture(checkpoint: Path, mix: Any) -> None:
    whole, ranks = load(checkpoint), [load(checkpoint, rank, 2) for rank in range(2)]
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(2))
    mlp: Qwen3MoeMLP = whole.model.layers[0].mlp
    expected = mlp(x)
    parts = []
    for rank in ranks:
        own = rank.model.layers[0].mlp
        shares, chosen = own.gate(x)
        here = own.numbered_here(chosen)
        assert set(here.unique().tolist()) <= {0, 1, 2, 3, 4}
        how = {"some_elsewhere": True} if mix is mix_experts else {}
        parts.append(mix(x, shares, here, own.gate_up, own.down, **how))
    torch.testing.assert_close(parts[0] + parts[1], expected)
    assert all(part.abs().sum() > 0 for part in parts)


def with_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every engine that the gate's tests start spread its experts."""
    from tests.gate import test_gate_of_families as gate

    class Spread(LLM):
        def __new__(cls, model: str, **kwargs: Any) -> Any:
            return object.__new__(cls)

        def __init__(self, model: str, **kwargs: Any) -> None:
            super().__init__(model, **kwargs, enable_expert_parallel=True)

    monkeypatch.setattr(gate, "LLM", Spread)


ONLY_RANKS = {name: level for name, level in ON.items() if name == "tensor_parallel_size"}


@pytest.mark.parametrize("switches", [ONLY_RANKS, ON], ids=["ranks alone", "everything on"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gate_passes_it(
    monkeypatch: pytest.MonkeyPatch, switches: dict[str, Any], dtype: str
) -> None:
    with_experts(monkeypatch)
    result = verdict(rescorer_of(MOE, dtype), outputs_of(MOE, switches, dtype))
    assert result.passed, f"{result.reason}; first: {result.first_offender}"


def no_expert_of_others(self: Qwen3MoeMLP, chosen: torch.Tensor) -> torch.Tensor:
    """A rank takes its own experts in the place of other ranks'."""
    return chosen % len(self.experts)


def one_too_far(self: Qwen3MoeMLP, chosen: torch.Tensor) -> torch.Tensor:
    own, held = chosen - self.first + 1, len(self.experts)
    return own.where((own >= 0) & (own < held), held)


@pytest.mark.parametrize("broken", [no_expert_of_others, one_too_far])
def test_the_gate_fails_what_is_broken(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    with_experts(monkeypatch)
    monkeypatch.setattr(Qwen3MoeMLP, "numbered_here", broken)
    assert not verdict(rescorer_of(MOE), outputs_of(MOE, ONLY_RANKS)).passed


@pytest.mark.slow
def test_ranks_in_processes(checkpoint: Path) -> None:
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=12, ignore_eos=True)
    results = []
    for more in ({}, {"tensor_parallel_size": 2, "enable_expert_parallel": True}):
        with LLM(str(checkpoint), **SMALL, **more) as llm:
            outputs = llm.generate([[5, 6, 7], [8, 9]], params, use_tqdm=False)
            results.append([output.outputs[0].token_ids for output in outputs])
            assert llm.resolved_config()["enable_expert_parallel"] is bool(more)
    assert results[0] == results[1]


def test_it_is_refused_where_it_means_nothing(checkpoint: Path, tiny: Path) -> None:
    two = {**SMALL, "tensor_parallel_size": 2, "enable_expert_parallel": True}
    with pytest.raises(
        ValueError,
        match=r"enable_expert_parallel=True is for models with experts; Qwen3For.* is dense",
    ):
        LLM(str(tiny), **two)
    with pytest.raises(ValueError, match=r"is dense"):
        LLM(str(tiny), **SMALL, enable_expert_parallel=True)
    with pytest.raises(
        ValueError, match=r"enable_expert_parallel=True needs tensor_parallel_size of 2"
    ):
        LLM(str(checkpoint), **SMALL, enable_expert_parallel=True)
    with pytest.raises(ValueError, match=r"enable_expert_parallel='yes' is not allowed"):
        EngineConfig.from_kwargs("m", enable_expert_parallel="yes")
    assert EngineConfig.from_kwargs("m", enable_expert_parallel=True).optimizations == ALL
    mixed = EngineConfig.from_kwargs("m", enable_expert_parallel=True, tensor_parallel_size=2)
    assert mixed.optimizations == Optimizations(**{**vars(ALL), "tensor_parallel_size": 2})


def test_ranks_have_to_divide_the_experts(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_experts": 8', '"num_experts": 7'))
    assert load_hf_config(folder).own["num_experts"] == 7
    with in_place_of_processes(), pytest.raises(ValueError, match=r"7 experts of a layer"):
        LLM(str(folder), **SMALL, tensor_parallel_size=2, enable_expert_parallel=True)
