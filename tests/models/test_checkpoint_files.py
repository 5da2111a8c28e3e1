"""What the files of a checkpoint say is honoured, refused by name, or warned of: the rows of
docs/checkpoints.md.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from nanovllm import LLM, SamplingParams
from nanovllm.engine.llm_engine import load_tokenizer
from nanovllm.layers import rope_scaling
from nanovllm.models import config as model_config
from nanovllm.models import sampling_defaults, tokenizer_files
from nanovllm.models.checkpoint import EOS_TOKEN_ID, checkpoint_digest, ensure_checkpoint
from nanovllm.models.config import load_hf_config
from nanovllm.models.families import FAMILIES
from nanovllm.models.sampling_defaults import default_params
from tests.models.test_loader import SMALL, edit_config, edit_weights, load

TEXT = "  Hello <|im_start|>Wörld e\u0301 <extra> don't 123  stop<|im_end|>"
PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_checkpoint("tiny", cache_dir=tmp_path_factory.mktemp("checkpoints"), **SMALL)


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(small, tmp_path / "model"))


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def test_the_page_names_every_key_that_the_code_knows() -> None:
    named = set(re.findall(r"`([a-z_0-9]+)`", PAGE.read_text(encoding="utf-8")))
    known = {
        *(name for name in model_config.COMPUTED if " " not in name),
        *(
            f.replace("eos_token_ids", "eos_token_id").replace("architecture", "architectures")
            for f in model_config.ModelConfig.__dataclass_fields__
            if f not in ("scaled_rope", "own")
        ),
        *(key for kind in rope_scaling.TYPES.values() for key in kind.__dataclass_fields__),
        *(key for row in FAMILIES.values() for key in (*row[1], *row[2:])),
        *sampling_defaults.HONOURED,
        *sampling_defaults.LEFT_OUT,
        *tokenizer_files.REFUSED,
        *tokenizer_files.NAMED,
    }
    assert not known - named


# -- config.json -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, r"model_type='qwen2'.*'qwen3' only"),
        ({"is_causal": False}, r"is_causal=False.*True only"),
        (
            {"dual_chunk_attention_config": {"chunk_size": 8}},
            r"dual_chunk_attention_config=.*'none' only",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantization_config=.*fp8.*'none' only",
        ),
        ({"compression_config": {"format": "int"}}, r"compression_config"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor=0\.5.*1\.0 only",
        ),
        ({"rope_parameters": {"rope_theta": 1e6, "mrope_section": [1, 2]}}, r"mrope_section"),
        ({"partial_rotary_factor": 0.25}, r"partial_rotary_factor=0\.25"),
        ({"rope_parameters": "yarn"}, r"lacks factor for rope_type='yarn'"),
        ({"layer_types": [1, "full_attention"]}, r"layer_types"),
        # Values of another type than the one that is meant.
        ({"num_hidden_layers": "2"}, r"num_hidden_layers='2'; it must be a whole number"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers=2\.0"),
        ({"num_attention_heads": 0}, r"num_attention_heads=0"),
        ({"num_attention_heads": 0, "head_dim": None}, r"num_attention_heads=0"),
        ({"hidden_size": [32]}, r"hidden_size=\[32\]"),
        ({"vocab_size": True}, r"vocab_size=True"),
        ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps='1e-6'; it must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps=nan"),
        ({"rope_parameters": {"rope_theta": -1}}, r"rope_theta=-1"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings='yes'; it must be true or false"),
        ({"dtype": 16}, r"dtype=16"),
        ({"eos_token_id": "2"}, r"eos_token_id=\('2',\); it must be token ids"),
    ],
)
def test_a_setting_that_is_not_computed_is_refused_by_name(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    (folder / "generation_config.json").unlink()
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_hf_config(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": None},
        {"model_type": None},
        {"is_causal": True},
        {"sliding_window": 4096, "max_window_layers": 1},
        {"auto_map": {"AutoModel": "code.Model"}},
        {"attention_dropout": 0.5},
        {
            "rope_parameters": {
                "rope_theta": 1000000,
                "rope_type": "default",
                "partial_rotary_factor": 1,
            }
        },
    ],
)
def test_settings_that_change_nothing_are_taken(folder: Path, changes: dict[str, Any]) -> None:
    before = load_hf_config(folder)
    edit_config(folder, **changes)
    assert load_hf_config(folder) == before


@pytest.mark.parametrize("content", [b"[1, 2]", b"null", b'{"a": "\xe9"}', b"\xff\xfe{}"])
def test_a_file_that_is_not_keys_and_values(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_hf_config(folder)


# -- generation_config.json ------------------------------------------------------------------------


@pytest.mark.parametrize("eos", ["2", [["2"]], [2, "3"], 1.5, True, -1, {"a": 1}])
def test_an_end_of_sequence_id_that_is_none_is_refused(folder: Path, eos: Any) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=eos)
    with pytest.raises(ValueError, match=r"eos_token_id=.*must be token ids"):
        load_hf_config(folder)


def test_recommended_sampling_is_what_generate_takes_without_parameters(
    tiny: Path, tmp_path: Path
) -> None:
    """As vLLM: with top_k 1, every call gives the greedy answer; with parameters given, the
    recommendation is left alone.
    """
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    edit_json(
        model / "generation_config.json",
        do_sample=True,
        temperature=0.6,
        top_k=1,
        top_p=0.95,
        max_new_tokens=5,
    )
    small = {"max_num_seqs": 2, "max_model_len": 64, "kv_cache_memory_bytes": 1 << 22}
    with LLM(str(model), **small) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(
            temperature=0.6, top_k=1, top_p=0.95, max_tokens=5
        )
        greedy = (
            llm.generate(["hello"], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)[0]
            .outputs[0]
            .token_ids
        )
        for _ in range(2):
            assert llm.generate(["hello"], use_tqdm=False)[0].outputs[0].token_ids == greedy
        assert (
            len(llm.generate(["hello"], SamplingParams(), use_tqdm=False)[0].outputs[0].token_ids)
            == 16
        )


def test_an_answer_ends_at_each_of_several_ends_of_sequence(tiny: Path, tmp_path: Path) -> None:
    """As instruction-tuned models have them: the end of a turn and the end of a text."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    small = {"max_num_seqs": 2, "max_model_len": 64, "kv_cache_memory_bytes": 1 << 22}
    greedy = {"temperature": 0, "max_tokens": 12}
    with LLM(str(model), **small) as llm:
        ignoring = SamplingParams(**greedy, ignore_eos=True)
        free = llm.generate([[5, 6, 7]], ignoring, use_tqdm=False)[0].outputs[0].token_ids
    assert len(set(free)) > 4
    for end in (free[4], free[1]):
        edit_json(model / "generation_config.json", eos_token_id=[2047, end, 2046])
        with LLM(str(model), **small) as llm:
            params = [SamplingParams(**greedy), ignoring]
            one, other = llm.generate([[5, 6, 7]] * 2, params, use_tqdm=False)
        assert one.outputs[0].token_ids == free[: free.index(end) + 1]
        assert (one.outputs[0].finish_reason, one.outputs[0].stop_reason) == ("stop", None)
        assert other.outputs[0].token_ids == free


def test_without_a_recommendation_the_defaults_are_ours(folder: Path) -> None:
    assert default_params(folder) == SamplingParams()
    (folder / "generation_config.json").unlink()
    assert default_params(folder) == SamplingParams()


OTHER_VALUES = {
    name: 2 if nothing is None or isinstance(nothing, (int, bool)) else [1]
    for name, nothing in sampling_defaults.LEFT_OUT.items()
} | {"do_sample": False}


@pytest.mark.parametrize("name", sampling_defaults.LEFT_OUT)
def test_a_recommendation_that_is_left_out_is_warned_of(folder: Path, name: str) -> None:
    edit_json(folder / "generation_config.json", **{name: OTHER_VALUES[name]})
    with pytest.warns(UserWarning, match=rf"recommends {name}=.*leaves out"):
        assert default_params(folder) == SamplingParams()
    edit_json(folder / "generation_config.json", **{name: sampling_defaults.LEFT_OUT[name]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        default_params(folder)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", "hot"), ("top_k", 1.5), ("top_p", 2), ("max_new_tokens", 0)]
)
def test_a_recommendation_out_of_range_names_the_file(folder: Path, name: str, value: Any) -> None:
    edit_json(folder / "generation_config.json", **{name: value})
    with pytest.raises(
        ValueError, match=r"generation_config\.json recommends what is not allowed: .*must be"
    ):
        default_params(folder)


# -- the tokenizer ---------------------------------------------------------------------------------


def edit_tokenizer(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def prefixed(tokenizer: dict[str, Any]) -> None:
    start = {"id": "<|im_start|>", "ids": [EOS_TOKEN_ID + 1], "tokens": ["<|im_start|>"]}
    single = [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {"<|im_start|>": start}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special,
    }


def cut(tokenizer: dict[str, Any]) -> None:
    tokenizer["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }


def padded(tokenizer: dict[str, Any]) -> None:
    tokenizer["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": EOS_TOKEN_ID,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }


def grown(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"].append(
        {
            "id": EOS_TOKEN_ID + 3,
            "content": "<extra>",
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
    )


@pytest.mark.parametrize("edit", [cut, padded, prefixed, grown])
def test_a_text_has_the_token_ids_that_hf_gives_it(
    folder: Path, edit: Callable[[dict[str, Any]], None]
) -> None:
    edit_tokenizer(folder, edit)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(str(folder))
    assert ours.encode(TEXT).ids == theirs(TEXT).input_ids
    assert ours.decode(ours.encode(TEXT).ids) == theirs.decode(
        theirs(TEXT).input_ids, skip_special_tokens=True
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"add_bos_token": True, "bos_token": "<|im_start|>"},
        {"add_eos_token": True},
        {"clean_up_tokenization_spaces": True},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "Qwen2TokenizerFast"},
        {"model_max_length": 5},
        {"additional_special_tokens": ["<|im_start|>"]},
        {"chat_template": "{{ messages }}"},
        {"truncation_side": "left"},
        {"extra_special_tokens": {}},
        {"errors": "strict"},
    ],
)
def test_what_is_taken_beside_it_changes_nothing_in_hf_either(
    folder: Path, settings: dict[str, Any]
) -> None:
    edit_json(folder / "tokenizer_config.json", **settings)
    ours = load_tokenizer(str(folder), (EOS_TOKEN_ID,))
    assert ours.encode(TEXT).ids == AutoTokenizer.from_pretrained(folder)(TEXT).input_ids


EXTRA = {
    "content": "<extra>",
    "special": True,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
}


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("tokenizer_config.json", {"add_prefix_space": True}, r"add_prefix_space=True.*False only"),
        ("tokenizer_config.json", {"split_special_tokens": True}, r"split_special_tokens=True"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"2048": EXTRA}},
            r"'<extra>', and tokenizer\.json has no such token",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9": {**EXTRA, "content": "<|im_end|>"}}},
            r"id 2047, not 9",
        ),
        ("tokenizer_config.json", {"additional_special_tokens": ["<extra>"]}, r"'<extra>'"),
        (
            "tokenizer_config.json",
            {"additional_special_tokens": [{"__type": "AddedToken", **EXTRA}]},
            r"'<extra>'",
        ),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": {"image_token": "<extra>"}},
            r"'<extra>'",
        ),
        ("tokenizer_config.json", {"eos_token": {"__type": "AddedToken", **EXTRA}}, r"'<extra>'"),
        ("special_tokens_map.json", {"additional_special_tokens": ["<extra>"]}, r"'<extra>'"),
        ("special_tokens_map.json", {"pad_token": {"content": "<extra>"}}, r"'<extra>'"),
        ("added_tokens.json", {"<extra>": 2048}, r"'<extra>'"),
    ],
)
def test_what_would_give_other_token_ids_is_refused(
    folder: Path, file: str, settings: dict[str, Any], message: str
) -> None:
    ours = load_tokenizer(str(folder)).encode(TEXT).ids
    edit_json(folder / file, **settings)
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids != ours or "not 9" in message
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(folder), (EOS_TOKEN_ID,))


def test_a_tokenizer_that_hf_would_build_itself_is_warned_of(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    with pytest.warns(UserWarning, match="tokenizer_class is 'LlamaTokenizerFast'"):
        load_tokenizer(str(folder), (EOS_TOKEN_ID,))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", errors="replace")
    edit_tokenizer(folder, lambda tokenizer: tokenizer.update(normalizer=None))
    with pytest.warns(UserWarning, match="another normalizer than NFC"):
        load_tokenizer(str(folder), (EOS_TOKEN_ID,))


def test_an_end_of_text_token_at_which_nothing_ends_is_warned_of(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    with pytest.warns(
        UserWarning,
        match=rf"no answer ends at '<\|im_end\|>'.*stop_token_ids=\[{EOS_TOKEN_ID + 2}\]",
    ):
        load_tokenizer(str(folder), (EOS_TOKEN_ID,))


def test_a_missing_tokenizer_says_how_to_make_it(folder: Path) -> None:
    """Sentencepiece and vocab.json with merges.txt are formats that only transformers reads."""
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(
        FileNotFoundError,
        match=r"tokenizer\.json is missing: .*tokenizer\.model.*save_pretrained\('.*model'\)",
    ):
        load_tokenizer(str(folder))


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(str(folder))


# -- weights ---------------------------------------------------------------------------------------


def shards(folder: Path, number: int) -> dict[str, str]:
    """Writes the weights in so many files beside what is there; the weight_map of their index."""
    weights = (
        load_file(folder / "model.safetensors") if (folder / "model.safetensors").exists() else None
    )
    assert weights is not None
    names = sorted(weights)
    files = [f"model-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)]
    for i, file in enumerate(files):
        save_file({name: weights[name] for name in names[i::number]}, folder / file)
    return {name: files[i % number] for i, name in enumerate(names)}


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_the_index_decides_which_shards_are_the_model(folder: Path) -> None:
    before, digest = load(folder), checkpoint_digest(folder)
    shards(folder, 2)
    write_index(folder, shards(folder, 3))
    (folder / "model.safetensors").unlink()
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file({"layers.0.attention.wq.weight": torch.ones(2)}, folder / name)
    with pytest.warns(
        UserWarning,
        match=r"not from adapter_model\.safetensors, .*model-00001-of-00002\.safetensors",
    ):
        after = load(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    )
    assert checkpoint_digest(folder) == digest  # strays are no part of it


@pytest.mark.parametrize(
    "stray",
    ["consolidated.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors"],
)
def test_one_model_safetensors_is_the_model(folder: Path, stray: str) -> None:
    digest = checkpoint_digest(folder)
    save_file({"model.norm.weight": torch.ones(32)}, folder / stray)
    with pytest.warns(UserWarning, match=rf"read from model\.safetensors; not from {stray}"):
        load(folder)
    assert checkpoint_digest(folder) == digest


def test_shards_without_an_index_are_all_read(folder: Path) -> None:
    shards(folder, 3)
    (folder / "model.safetensors").unlink()
    assert not any(param.isnan().any() for param in load(folder).parameters())


def test_a_model_beside_an_index_of_others_is_refused(folder: Path) -> None:
    write_index(folder, shards(folder, 2))
    with pytest.raises(
        ValueError, match=r"does not name it; HF reads the one, vLLM what the other names: remove"
    ):
        load(folder)


def test_an_index_that_names_a_missing_file(folder: Path) -> None:
    write_index(folder, shards(folder, 2))
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=r"lacks model-00002-of-00002\.safetensors, of which .* holds model\..*: fetch",
    ):
        load(folder)


@pytest.mark.parametrize(
    "weight_map", [None, [], {"a": 5}, {"a": "../b.safetensors"}, {"a": "b.bin"}, {"a": ["b"]}]
)
def test_an_index_that_is_none(folder: Path, weight_map: Any) -> None:
    shards(folder, 2)
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    with pytest.raises(ValueError, match=r"index\.json (is not an index|names)"):
        load(folder)


def test_a_stored_head_that_is_not_the_tied_one_is_refused(folder: Path) -> None:
    def permute(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()

    edit_weights(folder, permute)
    with pytest.raises(
        ValueError,
        match=r"lm_head\.weight that differs from model\.embed_tokens\.weight.*tie_word_embeddings",
    ):
        load(folder)
    edit_config(folder, tie_word_embeddings=False)  # as the message says
    assert torch.equal(
        load(folder).lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"]
    )
