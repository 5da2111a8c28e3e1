"""Every family computes what HF transformers does: logits of small random checkpoints in float32, with every
rope type, as transformers 4 and 5 write it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from nanovllm.config import BASELINE, EngineConfig, Optimizations
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.stats import StepStats
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.models.config import load_hf_config

SMALL: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_parameters": DEFAULT}),
    "qwen3 with biases": ("Qwen3", {"attention_bias": True, "rope_parameters": DEFAULT}),
    "qwen3 with yarn": ("Qwen3", {"head_dim": 32, "rope_parameters": YARN}),
    "qwen2": ("Qwen2", {"rope_parameters": DEFAULT}),
    "qwen2, tied": ("Qwen2", {"rope_parameters": DEFAULT, "tie_word_embeddings": True}),
    "qwen2 with yarn": ("Qwen2", {"rope_parameters": YARN}),
    "llama 2": ("Llama", {"rope_parameters": DEFAULT}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama 3.2": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "rope_parameters": DEFAULT}),
    "llama, linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama, dynamic": ("Llama", {"rope_parameters": DYNAMIC}),
    "smollm2": (
        "Llama",
        {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            "tie_word_embeddings": True,
        },
    ),
    "mistral": (
        "Mistral",
        {"sliding_window": None, "head_dim": 32, "rope_parameters": DEFAULT},
    ),
}
TEXT = torch.randint(160, (100,), generator=torch.Generator().manual_seed(5)).tolist()


def random_model(family: str, **changes: Any) -> Any:
    """HF's model, every parameter random: HF would make biases 0 and norms 1."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SMALL | settings | changes)
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.5, 0.5)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Replaces settings; None is written as null."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def runner_of(folder: Path, **switches: Any) -> ModelRunner:
    model = load_hf_config(folder)
    asked = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        max_num_seqs=1,
        max_model_len=min(256, model.max_position_embeddings),
        kv_cache_memory_bytes=1 << 21,
        optimizations=Optimizations(**switches) if switches else BASELINE,
    )
    resolved = asked.resolve(
        device="cpu", dtype="float32", max_position_embeddings=model.max_position_embeddings
    )
    return ModelRunner(resolved, model, folder, StepStats())


def logits_of(folder: Path, token_ids: list[int], **switches: Any) -> Tensor:
    """Of every position of a text, read in one step: [tokens, vocabulary]."""
    runner, n = runner_of(folder, **switches), len(token_ids)
    batch = ForwardBatch(
        torch.tensor(token_ids),
        torch.arange(n),
        torch.arange(n),
        torch.arange(-(-n // 16), dtype=torch.int32)[None],
        torch.tensor([n], dtype=torch.int32),
        torch.tensor([0, n]),
        0,
        [n],
        [n],
    )
    with torch.inference_mode():
        runner.attention.prepare(batch)
        return runner.model.logits(runner.model(batch, runner.kv_caches))


def hf_logits(model: Any, token_ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Within the rounding of float32, relative to the largest logit."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_hf(tmp_path: Path, family: str) -> None:
    """The text is three times as long as the original context of llama3 and yarn."""
    model = random_model(family)
    model.save_pretrained(tmp_path)
    theirs = hf_logits(model, TEXT)
    assert_same(logits_of(tmp_path, TEXT), theirs)
    rope = FAMILIES[family][1]["rope_parameters"]
    if rope["rope_type"] not in ("default", "dynamic"):  # and the rope is seen
        edit_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
        apart = (logits_of(tmp_path, TEXT) - theirs).abs().max()
        assert apart > 0.1 * theirs.abs().max()


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("family", ["llama 3.1", "qwen3 with yarn", "llama, linear"])
def test_ropes_as_transformers_4_writes_them(tmp_path: Path, family: str, key: str) -> None:
    model = random_model(family)
    model.save_pretrained(tmp_path)
    rope = dict(FAMILIES[family][1]["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    edit_config(tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling={**rope, key: kind})
    assert_same(logits_of(tmp_path, TEXT), hf_logits(model, TEXT))


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_factor": 1.3},
        {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"mscale": 0.7},
        {"beta_fast": 8.0, "beta_slow": 2.0},
        {"truncate": False},
        {"factor": 1.0},
        {"beta_fast": None, "attention_factor": None},
        {"original_max_position_embeddings": None},
        {"original_max_position_embeddings": 7},
    ],
)
def test_settings_of_yarn(tmp_path: Path, settings: dict[str, Any]) -> None:
    rope = {key: value for key, value in (YARN | settings).items() if value is not None}
    model = random_model("qwen2", rope_parameters=rope)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters=YARN | settings)
    text = TEXT[: load_hf_config(tmp_path).max_position_embeddings]
    assert_same(logits_of(tmp_path, text), hf_logits(model, text))


def test_a_context_that_yarn_extends_is_longer(tmp_path: Path) -> None:
    """As vLLM has it: 4 times 32,768 for Qwen3, whose config.json says 40,960 besides."""
    random_model("qwen3 with yarn").save_pretrained(tmp_path)
    edit_config(
        tmp_path,
        max_position_embeddings=40_960,
        rope_parameters=YARN | {"original_max_position_embeddings": 32_768},
    )
    assert load_hf_config(tmp_path).max_position_embeddings == 131_072
    for rope in (LLAMA3, LINEAR, DYNAMIC):
        edit_config(tmp_path, rope_parameters=rope)
        assert load_hf_config(tmp_path).max_position_embeddings == 40_960


def test_an_original_context_outside_of_the_rope_comes_first(tmp_path: Path) -> None:
    """As in HF."""
    random_model("llama 3.1").save_pretrained(tmp_path)
    edit_config(tmp_path, original_max_position_embeddings=16)
    scaled = load_hf_config(tmp_path).scaled_rope
    assert scaled.original_max_position_embeddings == 16
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(logits_of(tmp_path, TEXT), hf_logits(model, TEXT))


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope"}, r"rope_type='longrope'.*'default', 'linear', 'llama3', 'yarn'"),
        (LINEAR | {"factor": None}, r"lacks factor for rope_type='linear'"),
        (LLAMA3 | {"low_freq_factor": None}, r"lacks low_freq_factor for rope_type='llama3'"),
        (LINEAR | {"factor": 0.5}, r"factor=0\.5 .* must be a number, 1 or more"),
        (LINEAR | {"factor": "2"}, r"factor='2' .* must be a number"),
        (LLAMA3 | {"low_freq_factor": 0}, r"low_freq_factor=0 .* must be a number above 0"),
        (LLAMA3 | {"low_freq_factor": 4.0}, r"low_freq_factor=4\.0 and high_freq_factor=4\.0"),
        (YARN | {"attn_factor": 2.0}, r"attn_factor=2\.0 for rope_type='yarn'.*attention_factor"),
        (YARN | {"truncate": 1}, r"truncate=1 .* must be true or false"),
        (
            YARN | {"original_max_position_embeddings": 0.5},
            r"original_max_position_embeddings=0\.5",
        ),
        (LINEAR | {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5.*1\.0 only"),
        (YARN | {"mrope_section": [1, 2]}, r"mrope_section"),
        (YARN | {"rope_theta": None}, r"lacks rope_theta"),
    ],
)
def test_ropes_that_are_not_computed_are_refused_by_name(
    tmp_path: Path, rope: dict[str, Any], message: str
) -> None:
    random_model("llama 3.1").save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters=rope)
    with pytest.raises(ValueError, match=message):
        load_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral", {"sliding_window": 4096}, r"sliding_window=4096; MistralForCausalLM"),
        ("qwen2", {"use_sliding_window": True}, r"use_sliding_window=True"),
        ("qwen2", {"attention_bias": False}, r"attention_bias=False.*True only"),
        ("llama 2", {"mlp_bias": True}, r"mlp_bias=True"),
        ("llama 2", {"bias": True}, r"bias=True"),
        ("mistral", {"attention_bias": True}, r"attention_bias=True"),
        ("llama 2", {"model_type": "mistral"}, r"model_type='mistral'.*'llama' only"),
        ("llama 2", {"hidden_act": "gelu"}, r"hidden_act='gelu'"),
        ("llama 2", {"num_key_value_heads": None}, r"lacks num_key_value_heads"),
    ],
)
def test_settings_that_a_family_does_not_compute_are_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    random_model(family).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_hf_config(tmp_path)


def test_a_window_that_is_not_named_is_mistrals_default(tmp_path: Path) -> None:
    """HF takes 4,096 tokens where the key is missing; null, as version 0.3 has it, means none."""
    random_model("mistral").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("sliding_window") is None
    load_hf_config(tmp_path)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"sliding_window='nothing'.*None only"):
        load_hf_config(tmp_path)


MOE = {
    "head_dim": 32,
    "rope_parameters": DEFAULT,
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_topk_prob": True},
        {"norm_topk_prob": False},
        {"norm_topk_prob": True, "decoder_sparse_step": 2},
        {"mlp_only_layers": [1], "num_experts_per_tok": 8},
        {"num_experts_per_tok": 1, "attention_bias": True},
    ],
    ids=str,
)
def test_mixtures_of_experts_are_those_of_hf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setitem(FAMILIES, "moe", ("Qwen3Moe", MOE))
    model = random_model("moe", **settings)
    model.save_pretrained(tmp_path)
    theirs = hf_logits(model, TEXT)
    assert_same(logits_of(tmp_path, TEXT), theirs)
    # transformers 4 writes num_experts, 5 may write num_local_experts
    config = json.loads((tmp_path / "config.json").read_text())
    number = config.pop("num_experts", None) or config.pop("num_local_experts")
    for name in ("num_experts", "num_local_experts"):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: number}))
        assert_same(logits_of(tmp_path, TEXT), theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok=9, more than its num_experts=8"),
        ({"moe_intermediate_size": None}, r"lacks moe_intermediate_size"),
        ({"num_experts": 0}, r"num_experts=0; it must be a whole number"),
        ({"norm_topk_prob": "yes"}, r"norm_topk_prob='yes'; it must be true or false"),
        ({"mlp_only_layers": [0.5]}, r"mlp_only_layers=.*0\.5"),
    ],
)
def test_settings_of_experts_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(FAMILIES, "moe", ("Qwen3Moe", MOE))
    random_model("moe").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    file.write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        runner_of(tmp_path)
