"""The embedded checkpoints: the same bits everywhere, loadable by transformers, and sensitive
enough to show an error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from nanovllm.models import checkpoint
from nanovllm.models.checkpoint import DIGESTS, PRESETS, checkpoint_digest, ensure_checkpoint
from tests.support import forks
from tests.support.hf_names import CACHE

ROWS, PROMPT, OUTPUT = 4, 96, 64
FAMILIES = ["hf", "qwen2", "llama", "mistral", "moe"]  # fixtures
DEEP = pytest.param("deep", marks=pytest.mark.slow)  # a minute for all of them
SMALL = {"num_hidden_layers": 1, "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96}


def logprobs(model: Any, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(tokens, **kwargs).logits.float().log_softmax(-1)


def seen_by_hf(folder: Path, rows: int, prompt: int, output: int) -> SimpleNamespace:
    """HF in float32, free-running greedy and sampled texts, and what bfloat16 does to the
    log-probabilities of the latter.
    """
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, checkpoint.TEXT_SIZE, (rows, prompt), generator=generator)

        cache, tokens = DynamicCache(), [prompts.repeat(2, 1)]
        for _ in range(output):
            greedy, sampled = model(tokens[-1], **{CACHE: cache}).logits[:, -1].chunk(2)
            tokens.append(
                torch.cat(
                    [
                        greedy.argmax(-1, keepdim=True),
                        (sampled / 0.6).softmax(-1).multinomial(1, generator=generator),
                    ]
                )
            )
        greedy, sampled = torch.cat(tokens, dim=1).chunk(2)
        reference = logprobs(model, sampled)
        in_bfloat16 = logprobs(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), sampled
        )
        noise = float((in_bfloat16 - reference).abs().max())
        return SimpleNamespace(
            model=model,
            prompt=prompt,
            read=prompt,
            greedy=greedy,
            sampled=sampled,
            reference=reference,
            bfloat16_noise=noise,
        )


@pytest.fixture(scope="module")
def hf(tiny: Path) -> SimpleNamespace:
    return seen_by_hf(tiny, ROWS, PROMPT, OUTPUT)


@pytest.fixture(scope="module")
def qwen2() -> SimpleNamespace:
    return seen_by_hf(ensure_checkpoint("tiny-qwen2"), ROWS, PROMPT, OUTPUT)


@pytest.fixture(scope="module")
def llama() -> SimpleNamespace:
    return seen_by_hf(ensure_checkpoint("tiny-llama"), ROWS, PROMPT, OUTPUT)


@pytest.fixture(scope="module")
def mistral() -> SimpleNamespace:
    return seen_by_hf(ensure_checkpoint("tiny-mistral"), ROWS, PROMPT, OUTPUT)


@pytest.fixture(scope="module")
def moe() -> SimpleNamespace:
    return seen_by_hf(ensure_checkpoint("tiny-qwen3-moe"), ROWS, PROMPT, OUTPUT)


def bar(preset: str, value: float) -> float:
    """An effect that has to be reached; 0.7 of it with experts, which add less to the residual stream than an
    MLP does elsewhere.
    """
    return value * (0.7 if preset == "moe" else 1.0)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The preset with Qwen3-0.6B's layers, and fewer words: those shrink the largest error and the
    largest change alike.
    """
    folder = ensure_checkpoint(
        "qwen3-0.6b", cache_dir=tmp_path_factory.mktemp("cache"), vocab_size=8192
    )
    seen = seen_by_hf(folder, 1, 256, 32)
    seen.read = 192  # 96 tokens follow these: as many as it takes to look at each of them
    return seen


def effect(hf: SimpleNamespace) -> float:
    """Largest change of a log-probability since `reference`, in units of bfloat16's largest error."""
    with torch.no_grad():
        return (
            float((logprobs(hf.model, hf.sampled) - hf.reference).abs().max()) / hf.bfloat16_noise
        )


@contextmanager
def changed(target: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(target, name)
    setattr(target, name, value)
    yield
    setattr(target, name, before)


def wrong_slots(
    hf: SimpleNamespace, layers: Sequence[int], num_slots: int, generator: torch.Generator
) -> torch.Tensor:
    """What one wrong slot does, [num_slots], in units of bfloat16's largest error: when the first
    tokens have been read, one slot of these layers gets another token's key and value, and the rest
    follows. The largest change of a log-probability.
    """
    read, rest = hf.sampled[:1, : hf.read], hf.sampled[:1, hf.read :]
    with torch.no_grad():
        cache = DynamicCache()
        hf.model(read, **{CACHE: cache})
        cache.batch_repeat_interleave(num_slots)
        slots = torch.randint(0, hf.read, (num_slots,), generator=generator)
        others = (slots + torch.randint(1, hf.read, (num_slots,), generator=generator)) % hf.read
        rows = torch.arange(num_slots)
        for layer in layers:
            for cached in (cache.layers[layer].keys, cache.layers[layer].values):
                cached[rows, :, slots] = cached[rows, :, others].clone()
        moved = (
            logprobs(hf.model, rest.expand(num_slots, -1), **{CACHE: cache})
            - hf.reference[0, hf.read :]
        )
    return moved.abs().amax((1, 2)) / float(hf.bfloat16_noise)


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("preset", [*FAMILIES, DEEP])
def test_free_running_text_seldom_repeats_its_last_token(
    preset: str, kind: str, request: pytest.FixtureRequest
) -> None:
    hf = request.getfixturevalue(preset)
    tokens = getattr(hf, kind)[:, hf.prompt - 1 :]
    assert (tokens[:, 1:] == tokens[:, :-1]).float().mean() < 0.2  # measured: 0
    distinct = sum(len(set(row.tolist())) for row in tokens) / tokens.numel()
    assert distinct > 0.5  # nor does it run in a circle


@pytest.mark.parametrize("preset", FAMILIES)
def test_bfloat16_noise_is_moderate(preset: str, request: pytest.FixtureRequest) -> None:
    hf = request.getfixturevalue(preset)
    # measured: 0.12 to 0.18; the log-probabilities' standard deviation is 2.0 to 2.2
    assert hf.bfloat16_noise < 0.25
    assert hf.reference.std(-1).mean() > 1.5


@pytest.mark.parametrize("preset", FAMILIES)
def test_one_wrong_kv_slot_of_one_layer_shows(preset: str, request: pytest.FixtureRequest) -> None:
    hf = request.getfixturevalue(preset)
    generator = torch.Generator().manual_seed(1)
    by_layer = torch.stack(
        [
            wrong_slots(hf, [layer], 24, generator)
            for layer in range(hf.model.config.num_hidden_layers)
        ]
    )
    assert by_layer.median(dim=1).values.min() > 10  # measured: 11.8 to 22.7
    assert by_layer.quantile(0.1) > 8  # measured: 10.5 to 16.8
    assert by_layer.min() > 5  # measured: 9.1 to 14.4


@pytest.mark.slow
def test_one_wrong_kv_slot_shows_in_a_deep_model(deep: SimpleNamespace) -> None:
    """As a wrong slot mapping makes it: in every layer. In one of 28 layers alone it shows where
    that layer looks.
    """
    generator = torch.Generator().manual_seed(1)
    layers = range(PRESETS["qwen3-0.6b"].num_hidden_layers)
    whole = wrong_slots(deep, layers, 12, generator)
    assert whole.median() > 15  # measured: 22.7
    assert whole.min() > 10  # measured: 16.2, and 14.8 of other slots
    assert wrong_slots(deep, [15], 6, generator).median() > 3  # measured: 5.2


@pytest.mark.parametrize("preset", [*FAMILIES, DEEP])
def test_another_rope_theta_shows(preset: str, request: pytest.FixtureRequest) -> None:
    hf = request.getfixturevalue(preset)
    frequencies = hf.model.model.rotary_emb.inv_freq
    half = len(frequencies)
    with changed(
        hf.model.model.rotary_emb, "inv_freq", frequencies * 1.1 ** -(torch.arange(half) / half)
    ):
        assert effect(hf) > 5  # measured: 8.2 to 19.9


def test_another_rope_type_shows(llama: SimpleNamespace) -> None:
    embedding = llama.model.model.rotary_emb
    half = len(embedding.inv_freq)
    with changed(embedding, "inv_freq", 5e5 ** -(torch.arange(half) / half)):
        assert effect(llama) > 20  # measured: 44.5


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_a_bias_that_is_left_out_in_one_layer_shows(qwen2: SimpleNamespace, part: str) -> None:
    for layer in qwen2.model.model.layers:
        projection = getattr(layer.self_attn, part)
        none = torch.nn.Parameter(torch.zeros_like(projection.bias))
        with changed(projection, "bias", none):
            assert effect(qwen2) > 4  # measured: 5.2 to 20.9


@pytest.mark.parametrize(
    ("preset", "part"),
    [
        *((preset, "model.") for preset in FAMILIES),
        *(
            pytest.param("deep", part, marks=pytest.mark.slow)
            for part in ("layers.14.", "model.norm")
        ),
    ],
)
def test_another_epsilon_of_any_norm_shows(
    preset: str, part: str, request: pytest.FixtureRequest
) -> None:
    hf = request.getfixturevalue(preset)
    norms = [
        (name, module)
        for name, module in hf.model.named_modules()
        if part in name and hasattr(module, "variance_epsilon")
    ]
    in_a_layer = 4 if preset in ("hf", "deep", "moe") else 2
    in_all = in_a_layer * hf.model.config.num_hidden_layers + 1
    assert len(norms) == {"model.": in_all, "layers.14.": in_a_layer, "model.norm": 1}[part]
    if preset != "deep":
        assert effect(hf) < 1e-3
    for name, module in norms:
        with changed(module, "variance_epsilon", 1e-3):
            # measured: at least 4.9, 1.6 with experts, 2.1 where deep
            assert effect(hf) > (bar(preset, 2) if preset != "deep" else 1.5), name


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("tiny-")])
def test_transformers_finds_every_weight_of_a_family(preset: str) -> None:
    folder = ensure_checkpoint(preset)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == PRESETS[preset].architecture
    assert all(
        torch.equal(weight, weight.bfloat16().float()) for weight in model.state_dict().values()
    )


def test_transformers_finds_every_weight(tiny: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(tiny, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    assert model.config.rope_parameters["rope_theta"] == 1e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(
        torch.equal(weight, weight.bfloat16().float()) for weight in model.state_dict().values()
    )


def test_the_tokenizer_is_one_for_transformers_too(tiny: Path) -> None:
    ours, theirs = (
        Tokenizer.from_file(str(tiny / "tokenizer.json")),
        AutoTokenizer.from_pretrained(tiny),
    )
    text = "Errors should never pass silently.\n\n\tx = {'a': 1234.5}  # Zürich, 東京 🙂 <|im_start|>user<|endoftext|>"
    token_ids = ours.encode(text).ids
    assert token_ids == theirs(text).input_ids
    assert len(token_ids) < 0.6 * len(text.encode())
    assert max(token_ids) < PRESETS["tiny"].vocab_size
    assert ours.decode(token_ids, skip_special_tokens=False) == theirs.decode(token_ids) == text
    config = json.loads((tiny / "config.json").read_text())
    assert ours.token_to_id("<|endoftext|>") == config["eos_token_id"] == theirs.eos_token_id


def test_presets_have_their_recorded_digest(tiny: Path) -> None:
    assert DIGESTS.keys() == PRESETS.keys()
    assert checkpoint_digest(tiny) == DIGESTS["tiny"]
    for preset in PRESETS:
        if preset.startswith("tiny-"):
            assert checkpoint_digest(ensure_checkpoint(preset)) == DIGESTS[preset]


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "nanovllm.models.checkpoint",
        "tiny",
        "--cache-dir",
        str(tmp_path / "cache"),
        "--num-hidden-layers",
        "1",
    ]
    said = [tmp_path / name for name in "ab"]
    builds = []
    for path in said:
        with path.open("w") as out:
            environment = os.environ | {"PYTHONPATH": "src"}
            builds.append(forks.start(command, stdout=out, env=environment))
    assert [build.wait(120) for build in builds] == [0, 0]
    ((folder, digest),) = {tuple(path.read_text().split()) for path in said}
    assert [str(path) for path in (tmp_path / "cache").iterdir()] == [folder]
    assert checkpoint_digest(folder) == digest


def test_the_cache_is_used_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    folder = ensure_checkpoint("tiny", **SMALL)
    assert folder.parent == tmp_path
    monkeypatch.setattr(checkpoint, "build_checkpoint", pytest.fail)
    assert ensure_checkpoint("tiny", **SMALL) == folder


def test_shards_hold_the_same_weights(tmp_path: Path) -> None:
    one = ensure_checkpoint("tiny", cache_dir=tmp_path, **SMALL)
    many = ensure_checkpoint("tiny", cache_dir=tmp_path, **SMALL, max_shard_bytes=50_000)
    assert len(list(many.glob("model-*-of-*.safetensors"))) > 2
    assert checkpoint_digest(one) == checkpoint_digest(many)
    AutoModelForCausalLM.from_pretrained(many)


def test_a_cut_variant_has_the_first_layers(tiny: Path, tmp_path: Path) -> None:
    cut = load_file(
        ensure_checkpoint("tiny", cache_dir=tmp_path, num_hidden_layers=2) / "model.safetensors"
    )
    full = load_file(tiny / "model.safetensors")
    assert cut.keys() == {
        name for name in full if "layers.2." not in name and "layers.3." not in name
    }
    assert all(torch.equal(cut[name], full[name]) for name in cut if name != "model.norm.weight")


def test_an_untied_variant_has_a_head_of_its_own(tmp_path: Path) -> None:
    folder = ensure_checkpoint(
        "tiny", cache_dir=tmp_path, **SMALL, tie_word_embeddings=False, dtype="bfloat16"
    )
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.dtype == torch.bfloat16
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'huge' is unknown; known are tiny, qwen3-0.6b"):
        ensure_checkpoint("huge")
    with pytest.raises(ValueError, match=r"no num_layers; it has .*num_hidden_layers"):
        ensure_checkpoint("tiny", num_layers=2)
    with pytest.raises(FileNotFoundError):
        checkpoint_digest(tmp_path)
    monkeypatch.setitem(checkpoint.DIGESTS, "tiny", "0" * 64)
    with pytest.raises(RuntimeError, match="expected is 000"):
        ensure_checkpoint("tiny", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
