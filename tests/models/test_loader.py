"""Reading a model's folder: every weight arrives where it belongs, and every defect is an error
that names it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from nanovllm import LLM, SamplingParams
from nanovllm.config import BASELINE
from nanovllm.kernels.registry import load_kernels
from nanovllm.layers.linear import TensorParallel
from nanovllm.models.checkpoint import ensure_checkpoint
from nanovllm.models.config import load_hf_config
from nanovllm.models.loader import load_weights, resolve_model
from nanovllm.models.qwen3 import Qwen3ForCausalLM

SMALL = {
    "num_hidden_layers": 2,
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_checkpoint("tiny", cache_dir=tmp_path_factory.mktemp("checkpoints"), **SMALL)


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(small, tmp_path / "model"))


def load(folder: Path, tp: TensorParallel | None = None) -> Qwen3ForCausalLM:
    tp = tp or TensorParallel()
    kernels = load_kernels(BASELINE, Counter())
    # no attention: not run
    model = Qwen3ForCausalLM(load_hf_config(folder), 64, kernels, None, tp)  # type: ignore[arg-type]
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(torch.nan)
    load_weights(model, folder, tp)
    return model


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    """Replaces settings; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )


def rank(number: int, size: int) -> TensorParallel:
    tp = TensorParallel()
    tp.rank, tp.size = number, size
    return tp


def test_every_weight_arrives(small: Path) -> None:
    stored, model = load_file(small / "model.safetensors"), load(small)
    for i, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{i}."
        for part, rows in layer.self_attn.qkv_proj.weight.parts.items():
            assert torch.equal(
                layer.self_attn.qkv_proj.weight[slice(*rows)],
                stored[f"{prefix}self_attn.{part}_proj.weight"],
            )
        for part, rows in layer.mlp.gate_up_proj.weight.parts.items():
            assert torch.equal(
                layer.mlp.gate_up_proj.weight[slice(*rows)],
                stored[f"{prefix}mlp.{part}_proj.weight"],
            )
    plain = {name: param for name, param in model.named_parameters() if param.parts is None}
    assert len(plain) == 2 * 6 + 2
    assert all(torch.equal(param, stored[name]) for name, param in plain.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_two_ranks_hold_each_weight_once(small: Path) -> None:
    whole, halves = load(small), [load(small, rank(number, 2)) for number in (0, 1)]
    for name, param in whole.named_parameters():
        shares = [dict(half.named_parameters())[name] for half in halves]
        if param.shard_dim is None:
            assert all(torch.equal(share, param) for share in shares), name
            continue
        for part, rows in (param.parts or {None: (0, len(param))}).items():
            pieces = [share[slice(*share.parts[part])] if part else share for share in shares]
            assert torch.equal(torch.cat(pieces, param.shard_dim), param[slice(*rows)]), (
                name,
                part,
            )


def test_shards_and_an_untied_head_are_read(tmp_path: Path) -> None:
    folder = ensure_checkpoint(
        "tiny", cache_dir=tmp_path, **SMALL, max_shard_bytes=20_000, tie_word_embeddings=False
    )
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    model = load(folder)
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(
        model.model.layers[1].mlp.down_proj.weight, stored["model.layers.1.mlp.down_proj.weight"]
    )
    assert not any(param.isnan().any() for param in model.parameters())


LOAD_AND_MEASURE = """
import sys, threading, psutil
from collections import Counter
from pathlib import Path
import torch
from nanovllm.config import BASELINE
from nanovllm.kernels.registry import load_kernels
from nanovllm.layers.linear import TensorParallel
from nanovllm.models.config import load_hf_config
from nanovllm.models.loader import load_weights
from nanovllm.models.qwen3 import Qwen3ForCausalLM

folder = Path(sys.argv[1])
torch.set_default_dtype(getattr(torch, sys.argv[2]))
model = Qwen3ForCausalLM(load_hf_config(folder), 64, load_kernels(BASELINE, Counter()), None, TensorParallel())
for param in model.parameters():
    param.data.fill_(0)  # its memory is there before the first file is opened
# sampled, as the peak that the system keeps begins with that of the process that started this one
process, done, seen = psutil.Process(), threading.Event(), []
def watch():
    while not done.wait(0.001):
        seen.append(process.memory_info().rss)
before = process.memory_info().rss
thread = threading.Thread(target=watch)
thread.start()
load_weights(model, folder, TensorParallel())
done.set(), thread.join()
print(max(seen, default=before) - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_no_more_than_one_shard_beside_the_weights(
    tmp_path: Path, dtype: str
) -> None:
    """Also where the files' numbers have to be converted. All files together are five times as large."""
    folder = ensure_checkpoint(
        "tiny",
        cache_dir=tmp_path,
        num_hidden_layers=2,
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=10_240,
        max_shard_bytes=12_000_000,
    )
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert len(sizes) >= 5
    assert sum(sizes) > 60e6
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_MEASURE, str(folder), dtype],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": "/usr/bin:/bin"},
    )
    assert int(done.stdout) < max(sizes) + 8e6


def test_bfloat16_and_float32_are_converted(tmp_path: Path, small: Path) -> None:
    narrow = load(ensure_checkpoint("tiny", cache_dir=tmp_path, **SMALL, dtype="bfloat16"))
    for (name, param), other in zip(
        load(small).named_parameters(), narrow.parameters(), strict=True
    ):
        assert torch.equal(param, other), name  # the checkpoints' weights are exact in bfloat16


def test_a_stored_copy_of_a_tied_head_does_no_harm(folder: Path) -> None:
    edit_weights(
        folder,
        lambda weights: weights.update(
            {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
        ),
    )
    load(folder)


def test_tensors_that_follow_from_the_configuration_are_passed_over(folder: Path) -> None:
    """As older versions of transformers stored them, once a layer."""
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(8) for name in names}))
    load(folder)
    edit_weights(folder, lambda weights: weights.update({"model.rotary": torch.ones(8)}))
    with pytest.raises(ValueError, match=r"no place for: model\.rotary$"):
        load(folder)


def test_float16_weights_are_converted(folder: Path, small: Path) -> None:
    edit_weights(
        folder,
        lambda weights: weights.update({name: w.half() for name, w in weights.items()}),
    )
    for (name, param), exact in zip(
        load(folder).named_parameters(), load(small).parameters(), strict=True
    ):
        assert param.dtype == torch.float32
        torch.testing.assert_close(param, exact, rtol=1e-3, atol=1e-6, msg=name)


def test_a_folder_without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000, -1])
def test_a_truncated_file(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=r"model\.safetensors cannot be read .* truncated or damaged"
    ):
        load(folder)


def test_a_file_of_another_kind(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04" + b"not a tensor" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load(folder)


def test_missing_tensors_are_listed(folder: Path) -> None:
    gone = ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"]
    edit_weights(folder, lambda weights: [weights.pop(name) for name in gone] and None)
    with pytest.raises(
        ValueError,
        match=r"lacks model\.layers\.1\.self_attn\.qkv_proj\.weight \(k\), model\.norm\.weight",
    ):
        load(folder)


def test_a_missing_shard_lists_what_it_held(tmp_path: Path) -> None:
    folder = ensure_checkpoint("tiny", cache_dir=tmp_path, **SMALL, max_shard_bytes=20_000)
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(ValueError, match=r"lacks .*model\.norm\.weight"):
        load(folder)


def test_an_untied_head_that_is_missing(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        load(folder)


def test_unexpected_tensors_are_listed(folder: Path) -> None:
    extra = {"model.layers.2.mlp.experts": torch.zeros(1), "visual.bias": torch.zeros(1)}
    edit_weights(folder, lambda weights: weights.update(extra))
    with pytest.raises(
        ValueError, match=r"no place for: model\.layers\.2\.mlp\.experts, visual\.bias"
    ):
        load(folder)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.0.self_attn.v_proj.weight", "model.norm.weight"],
)
def test_a_wrong_shape_is_named(folder: Path, name: str) -> None:
    edit_weights(folder, lambda weights: weights.update({name: weights[name][:-1].contiguous()}))
    with pytest.raises(
        ValueError, match=rf"{name} of .* has shape \[.*\] where the model needs \["
    ):
        load(folder)


def test_a_transposed_matrix_is_refused(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: weights[name].T.contiguous()}))
    with pytest.raises(ValueError, match=r"has shape \[48, 32\] where the model needs \[32, 48\]"):
        load(folder)


def test_nothing_is_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", pytest.fail)
    monkeypatch.setattr("pickle.load", pytest.fail)
    monkeypatch.setattr("pickle.loads", pytest.fail)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    load(folder)


def test_config_as_transformers_5_writes_it(tmp_path: Path) -> None:
    Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=5e5,
        tie_word_embeddings=True,
        eos_token_id=[3, 4],
        dtype="bfloat16",
        rms_norm_eps=1e-5,
    ).save_pretrained(tmp_path)
    config = load_hf_config(tmp_path)
    assert (config.rope_theta, config.head_dim, config.rms_norm_eps, config.dtype) == (
        5e5,
        32,
        1e-5,
        "bfloat16",
    )
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (3, 4)


def test_config_as_transformers_4_writes_it(folder: Path) -> None:
    edit_config(
        folder,
        rope_parameters=None,
        rope_theta=1e4,
        dtype=None,
        torch_dtype="bfloat16",
        layer_types=None,
        head_dim=None,
    )
    config = load_hf_config(folder)
    assert (config.rope_theta, config.dtype, config.head_dim) == (1e4, "bfloat16", 8)


def test_generation_config_has_the_last_word_on_eos(folder: Path) -> None:
    edit_config(folder, eos_token_id=7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_hf_config(folder).eos_token_ids == (5, 6)
    (folder / "generation_config.json").unlink()
    assert load_hf_config(folder).eos_token_ids == (7,)
    edit_config(folder, eos_token_id=None)
    assert load_hf_config(folder).eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures=\['GPT2LMHeadModel'\].*Qwen3ForCausalLM.*LlamaForCausalLM",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, r"model_type='qwen3'; LlamaForCausalLM"),
        ({"architectures": None}, r"architectures.*Qwen3ForCausalLM"),
        (
            {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"rope_type": "new"}},
            r"'new'.*'default'",
        ),
        ({"rope_parameters": {"rope_type": "default"}}, r"lacks rope_theta"),
        ({"use_sliding_window": True}, r"use_sliding_window=True"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types=.*sliding_attention",
        ),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'.*'silu'"),
        ({"hidden_size": None, "head_dim": None}, r"lacks .*hidden_size"),
        (
            {"vocab_size": None, "num_key_value_heads": None},
            r"lacks vocab_size, num_key_value_heads",
        ),
    ],
)
def test_what_the_engine_does_not_compute_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_hf_config(folder)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: give a folder"):
        load_hf_config(tmp_path)


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_hf_config(folder)


def test_a_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve_model(str(folder)) == folder


def test_a_hub_id_is_fetched_without_code_or_pickles(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(hub_id: str, **kwargs: Any) -> str:
        asked.update(kwargs, hub_id=hub_id)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("Qwen/Qwen3-0.6B") == folder
    assert asked["hub_id"] == "Qwen/Qwen3-0.6B"
    assert all(pattern.endswith((".safetensors", ".json")) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "no/such/folder", "/nowhere", "tinny"])
def test_a_name_that_leads_nowhere_says_what_to_do(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError,
        match=rf"{name}.* is neither a folder here nor a hub id .*: give a folder with",
    ) as raised:
        resolve_model(name)
    assert "or a preset, which needs no hub" in str(raised.value)
    assert ("(did you mean tiny?)" in str(raised.value)) == (name == "tinny")


def test_a_preset_is_built_and_found_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny") == tiny
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    large = resolve_model("qwen3-8b")
    assert load_hf_config(large).hidden_size == 4096
    assert not list(large.glob("*.safetensors")), "weights of large presets are never stored"
    (tmp_path / "tiny").mkdir()
    assert resolve_model("tiny") == Path("tiny"), "a folder here has precedence"


def test_the_engine_takes_a_preset_by_name() -> None:
    with LLM("tiny", device="cpu", max_model_len=64, max_num_seqs=2) as llm:
        (output,) = llm.generate("one two", SamplingParams(max_tokens=2), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 2
