"""Weights without files: the shards of any number of ranks are parts of one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments import workloads
from experiments.gate.judge import rescore
from experiments.host import model_files
from nanovllm import LLM, SamplingParams
from nanovllm.config import Optimizations
from nanovllm.kernels.registry import load_kernels
from nanovllm.layers.attention import Attention
from nanovllm.layers.linear import TensorParallel
from nanovllm.models import checkpoint, generated, hub
from nanovllm.models.checkpoint import checkpoint_digest, ensure_checkpoint
from nanovllm.models.config import load_hf_config
from nanovllm.models.families import model_class
from nanovllm.models.loader import load_weights

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "dtype": "float32",
}


@pytest.fixture(scope="module", params=["Qwen3ForCausalLM", "Qwen2ForCausalLM"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second has biases, which are split over the ranks as well."""
    return ensure_checkpoint(
        "qwen3-8b",
        cache_dir=tmp_path_factory.mktemp("cache"),
        architecture=request.param,
        **SHAPE,
    )


def parameters(folder: Path, rank: int, size: int) -> dict[str, torch.nn.Parameter]:
    tp = TensorParallel()
    tp.rank, tp.size = rank, size
    on, calls = Optimizations(), __import__("collections").Counter()
    attention = Attention(
        on, calls, num_kv_heads=4 // size, block_size=16, head_dim=16, dtype=torch.float32
    )
    config = load_hf_config(folder)
    model = model_class(config.architecture)(config, 64, load_kernels(on, calls), attention, tp)
    load_weights(model, folder, tp)
    return dict(model.named_parameters())


@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_parts_of_the_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    whole = parameters(folder, 0, 1)
    monkeypatch.setattr(generated, "_CHUNK", 1000)  # cut elsewhere
    shards = [parameters(folder, rank, size) for rank in range(size)]
    for name, param in whole.items():
        for part, (begin, end) in (param.parts or {None: (0, len(param))}).items():
            rows = [
                shard[name] if part is None else shard[name][slice(*shard[name].parts[part])]
                for shard in shards
            ]
            joined = rows[0] if param.shard_dim is None else torch.cat(rows, dim=param.shard_dim)
            assert torch.equal(joined, param[begin:end]), name
    weights = [p for name, p in whole.items() if name.endswith("down_proj.weight")]
    assert 0.99 < float(torch.stack(weights).std()) * 384**0.5 < 1.01
    assert not torch.equal(*weights)


@pytest.mark.usefixtures("forked_processes")
def test_ranks_generate_the_tokens_of_one(folder: Path) -> None:
    prompts = [[5 + i, 6, 7] for i in range(4)]
    results = []
    for degree in (1, 2):
        with LLM(
            str(folder),
            device="cpu",
            max_model_len=64,
            max_num_seqs=4,
            skip_tokenizer_init=True,
            kv_cache_memory_bytes=1 << 20,
            tensor_parallel_size=degree,
        ) as llm:
            outputs = llm.generate(
                prompts,
                SamplingParams(temperature=0.7, max_tokens=12, ignore_eos=True),
                use_tqdm=False,
            )
            results.append([o.outputs[0].token_ids for o in outputs])
    assert results[0] == results[1]
    assert len({tuple(tokens) for tokens in results[0]}) == 4


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize("degree", [1, 2])
def test_the_gate_judges_against_the_same_weights(
    folder: Path, tmp_path: Path, degree: int
) -> None:
    """The reference makes them as well: a rank's tokens pass, and those of other weights fail."""
    work = workloads.build(
        "w",
        "random",
        {"num_requests": 6, "prompt_tokens": 12, "output_tokens": 16, "temperature": 0.8},
    )
    requests = work["waves"][0]
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos")
    with LLM(
        str(folder),
        device="cpu",
        max_model_len=64,
        max_num_seqs=6,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=1 << 20,
        tensor_parallel_size=degree,
    ) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": r["prompt_token_ids"]} for r in requests],
            [SamplingParams(**{n: r[n] for n in names}) for r in requests],
            use_tqdm=False,
        )
    tokens = [o.outputs[0].token_ids for o in outputs]
    assert rescore(folder, "float32", requests, tokens).status == "pass"
    other = ensure_checkpoint("qwen3-8b", cache_dir=tmp_path, **SHAPE, seed=2)
    assert rescore(other, "float32", requests, tokens).status == "fail"


def test_digest_and_missing_recipe(folder: Path, tmp_path: Path) -> None:
    other = ensure_checkpoint("qwen3-8b", cache_dir=tmp_path, **SHAPE, seed=2)
    assert checkpoint_digest(folder) != checkpoint_digest(other)
    assert not list(folder.glob("*.safetensors"))
    (other / generated.RECIPE).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors"):
        parameters(other, 0, 1)
    assert checkpoint.GENERATED.keys().isdisjoint(checkpoint.PRESETS)


def test_the_command_line_lists_every_preset() -> None:
    """It cannot ask: the list is printed without importing torch."""
    assert set(model_files.PRESETS) == {
        *checkpoint.PRESETS,
        *checkpoint.GENERATED,
        *hub.CONVERTED,
    }
