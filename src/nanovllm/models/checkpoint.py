"""Builds small seeded checkpoints of every family, so that nothing has to be downloaded: `python -m
nanovllm.models.checkpoint tiny`.

Plain random weights are useless for tests: the layers hardly change the residual stream, so with
tied embeddings the model repeats its last token whatever attention computes, and errors stay
hidden. These weights are random too, but scaled and arranged so that every part of the model
affects the output while rounding errors stay small:

- *No vote for itself.* The final norm's weights have random signs, so that a token's embedding,
  carried through the residual stream, does not favour the same token again.
- *Every KV slot is read.* Channel 0 of the residual stream is a large constant (trained models have
  such "massive activations", Sun et al. 2024). Queries and keys turn it into rotary vectors, whose
  peak is at a different distance for each head. So most of a head's attention is on one token at
  that distance, whatever the text, and the rest follows content.
- *Small residual stream.* An epsilon of 1e-3 instead of 1e-6 changes every norm.

The effect is measured in tests/models/test_checkpoint.py: repeats, one wrong KV slot, rope_theta,
epsilons, against the error of bfloat16. A slot is read well by the `Gains.max_distance` tokens
after it, and faintly by later ones.

Weights are integers from Philox4x32-10, keyed by (seed, name of the tensor), times a scale, rounded
to float32 and then to bfloat16: the same bits on every machine, and exact in bfloat16 whatever
dtype they are stored in.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from nanovllm.cxx import cache_folder
from nanovllm.kernels.torch.sampling import philox4x32
from nanovllm.layers.rope_scaling import read_scaled_rope
from nanovllm.models.generated import RECIPE
from nanovllm.models.weight_files import weight_files


@dataclass(frozen=True)
class Gains:
    """Root mean squares that the weights are scaled to, and how queries and keys are arranged."""

    embedding: float = 0.005
    """RMS of a token's embedding (its noise)."""
    constant: float = 20.0
    """Channel 0 of every embedding, in units of `embedding`."""
    attention: float = 0.005
    """RMS of what attention adds to the residual stream, before heads average over several tokens."""
    mlp: float = 0.004
    """RMS of what the MLP adds to it."""
    query_key: float = 0.005
    """RMS of the content part of queries and keys before their norms: small, so that the norms' epsilon matters too."""
    positional: float = 5.0
    """RMS of the part of queries and keys that comes from channel 0, in units of the content part."""
    bias: float = 0.3
    """RMS of the biases of q, k and v, in units of the RMS of what they are added to."""
    router: float = 4.0
    """RMS of a router's logits."""
    scores: float = 2.5
    """RMS of the attention scores that random queries and keys of the same length would have."""
    logits: float = 2.5
    """RMS of the logits."""
    norm_spread: float = 0.25
    """Spread of a norm's weights around their mean, relative to it."""
    max_distance: int = 160
    """The heads' distances are spread over [1, max_distance]."""
    distances: int = 8
    """A layer has at most this many; more heads share them, so that one slot keeps its weight in the output."""
    distance_sets: int | None = None
    """Layers take turns with this many sets of distances: what many layers read at the same place, they show together, and fewer
    places are read. None: each layer has its own."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a checkpoint is built from. The shape uses the names of config.json. A family without
    norms of heads has queries and keys of the same size in its weights.
    """

    architecture: str = "Qwen3ForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 1e6
    rope_scaling: Mapping[str, Any] | None = None
    """rope_parameters, beside rope_theta. None: not scaled."""
    experts: Mapping[str, Any] | None = None
    """Settings of a family with mixtures of experts, in each layer."""
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    dtype: str = "float32"
    seed: int = 1
    gains: Gains = Gains()
    max_shard_bytes: int | None = None
    """Bytes per file, about: weights are split over files with an index, as large models are published. None: one file."""


_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PRESETS = {
    "tiny": Preset(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
    ),
    "qwen3-0.6b": Preset(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        dtype="bfloat16",
        # 28 layers share what 4 share in `tiny`: less each, so they look at the same four places,
        # 13, 92, 141 and 220 tokens back (all of the last 220 slots are read so by 79 tokens and
        # more). A token that reads a slot wrong moves by 15 to 24 times bfloat16's largest error,
        # and by 4 to 6 where one layer alone reads it wrong.
        gains=Gains(attention=0.003, mlp=0.001, max_distance=256, distances=2, distance_sets=2),
    ),
    # Without norms of heads bfloat16's error grows faster with depth, so the other families have two layers.
    # All named tiny take the same bytes of KV cache for a token.
    "tiny-qwen2": Preset(
        architecture="Qwen2ForCausalLM",
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        gains=Gains(distances=4),
    ),
    "tiny-llama": Preset(
        architecture="LlamaForCausalLM",
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        rope_theta=5e5,
        # so short that the frequencies with which heads find their places are scaled as well
        rope_scaling=_LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 64},
        rms_norm_eps=1e-5,
        gains=Gains(distances=4),
    ),
    "tiny-mistral": Preset(
        architecture="MistralForCausalLM",
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    ),
    # Where rounding to bfloat16 changes which expert is chosen, the output jumps: experts add less here than an MLP elsewhere, so
    # little that bfloat16's error is as small as in the other families. (At 0.001 it was 2.5 times as large and hid a wrong rope.)
    "tiny-qwen3-moe": Preset(
        architecture="Qwen3MoeForCausalLM",
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        experts={
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 192,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        seed=3,
        gains=Gains(attention=0.008, mlp=0.0003, distances=4),
    ),
}

_GENERATED = {
    "qwen3-8b": Preset(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ),
    "qwen3-32b": Preset(
        vocab_size=151_936,
        hidden_size=5120,
        intermediate_size=25_600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ),
    "llama-3.1-8b": Preset(
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131_072,
        rope_theta=5e5,
        rope_scaling=_LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ),
}
GENERATED = _GENERATED | {
    f"{name}-4-layers": dataclasses.replace(shape, num_hidden_layers=4)
    for name, shape in _GENERATED.items()
}
"""Shapes whose weights are not stored: every rank makes its own (models/generated.py). With 4
layers, a reference model fits beside them.
"""

DIGESTS: dict[str, str] = json.loads(
    Path(__file__).with_name("digests.json").read_text(encoding="utf-8")
)
"""checkpoint_digest of every preset. A build with another digest is refused. In a file, as reports read it without torch."""

TOKENIZER_DIGEST = "cb44929f9b08385f6c4d4ca2f351f7cdbc1184f2a5deb59702de290037c54a98"
"""tokenizer_digest of the presets' tokenizer. A preset is not built where it differs."""
MERGES = Path(__file__).with_name("merges.txt")

# byte-level BPE tokens of every preset; larger vocabularies hold ids that have no text
TEXT_SIZE = 2045
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = TEXT_SIZE


def ensure_checkpoint(preset: str, *, cache_dir: Path | str | None = None, **changes: Any) -> Path:
    """The folder of a preset's checkpoint, built if it is not in the cache yet. changes: fields of
    Preset to replace.

    The cache is $NANOVLLM_CACHE, else .cache/nanovllm in the repository, or in the working
    directory of an installed package. Two processes may build the same checkpoint: each builds in a
    folder of its own, and the first to finish wins.

    Raises ValueError for an unknown preset or field, OSError where the cache cannot be written,
    RuntimeError where the weights of an unchanged preset do not have the digest of DIGESTS.
    """
    known = PRESETS | GENERATED
    if preset not in known:
        raise ValueError(f"preset {preset!r} is unknown; known are {', '.join(known)}")
    fields = {field.name for field in dataclasses.fields(Preset)}
    if unknown := sorted(set(changes) - fields):
        raise ValueError(
            f"a preset has no {', '.join(unknown)}; it has {', '.join(sorted(fields))}"
        )
    recipe = dataclasses.replace(known[preset], **changes)
    # with the digests, as another recipe makes another checkpoint
    made_of = f"{recipe} {DIGESTS} {TOKENIZER_DIGEST}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    cache = Path(cache_dir or cache_folder())
    folder = cache / "-".join(
        [
            preset,
            *(f"{name}={value}" for name, value in sorted(changes.items()) if name != "gains"),
            key,
        ]
    )
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".building-{preset}-", dir=cache))
    except OSError as error:
        raise OSError(
            error.errno,
            f"{preset} cannot be built in {cache} ({error.strerror}): set NANOVLLM_CACHE to a folder "
            "that can be written",
        ) from error
    try:
        build_checkpoint(recipe, aside, weights=preset in PRESETS)
        if (
            not changes
            and preset in DIGESTS
            and (digest := checkpoint_digest(aside)) != DIGESTS[preset]
        ):
            raise RuntimeError(
                f"{preset} built here has digest {digest}, expected is {DIGESTS[preset]}: its recipe has changed "
                "(update digests.json) or torch computes differently here (weights differ from other machines')"
            )
        aside.chmod(0o755)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first
                raise
    finally:
        if aside.exists():
            shutil.rmtree(aside)
    return folder


def checkpoint_digest(folder: Path | str) -> str:
    """SHA-256 over config.json and every tensor (name, dtype, shape, bytes) of a folder's model,
    however it is split into files. Raises FileNotFoundError where there are no weights, ValueError
    where its files contradict each other.
    """
    folder = Path(folder)
    digest = hashlib.sha256(
        json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True).encode()
    )
    places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for file in weight_files(folder, warn=False):
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_size))
        places |= {
            name: (file, 8 + header_size, meta)
            for name, meta in header.items()
            if name != "__metadata__"
        }
    if not places:
        if not (generated := folder / RECIPE).is_file():
            raise FileNotFoundError(f"{folder} holds no *.safetensors")
        digest.update(generated.read_bytes())
    for name, (file, start, meta) in sorted(places.items()):
        digest.update(json.dumps([name, meta["dtype"], meta["shape"]]).encode())
        begin, end = meta["data_offsets"]
        with file.open("rb") as stream:
            stream.seek(start + begin)
            for offset in range(begin, end, 1 << 24):
                digest.update(stream.read(min(1 << 24, end - offset)))
    return digest.hexdigest()


def build_checkpoint(recipe: Preset, folder: Path, weights: bool = True) -> None:
    """Writes config.json, generation_config.json, the tokenizer and the weights (or what to
    generate them from) into `folder`.
    """
    _write_json(folder / "config.json", _config(recipe))
    _write_json(
        folder / "generation_config.json",
        {"eos_token_id": EOS_TOKEN_ID, "pad_token_id": EOS_TOKEN_ID},
    )
    _tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": SPECIAL_TOKENS[0],
            "pad_token": SPECIAL_TOKENS[0],
            "model_max_length": recipe.max_position_embeddings,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        },
    )
    if not weights:
        _write_json(folder / RECIPE, {"seed": recipe.seed})
        return
    dtype = getattr(torch, recipe.dtype)
    shards: list[dict[str, Tensor]] = [{}]
    room = recipe.max_shard_bytes or math.inf
    for name, weight in _weights(recipe):
        tensor = weight.to(torch.bfloat16).to(dtype)
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = recipe.max_shard_bytes or math.inf
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        _save(shards[0], folder / "model.safetensors")
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _save(shard, folder / name)
    _write_json(
        folder / "model.safetensors.index.json",
        {
            "metadata": {
                "total_size": sum(tensor.nbytes for shard in shards for tensor in shard.values())
            },
            "weight_map": {
                tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
            },
        },
    )


# architecture -> what its config.json holds beside the recipe's shape, as transformers 5 writes it
_SETTINGS: dict[str, Any] = {
    "Qwen3ForCausalLM": {
        "model_type": "qwen3",
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "Qwen2ForCausalLM": {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "LlamaForCausalLM": {"model_type": "llama", "attention_bias": False, "mlp_bias": False},
    "MistralForCausalLM": {"model_type": "mistral", "sliding_window": None},
}
_SETTINGS["Qwen3MoeForCausalLM"] = _SETTINGS["Qwen3ForCausalLM"] | {"model_type": "qwen3_moe"}


def _config(recipe: Preset) -> dict[str, Any]:
    """config.json as transformers 5 writes it."""
    shape = dataclasses.asdict(recipe)
    for own in ("architecture", "seed", "gains", "max_shard_bytes", "rope_theta", "rope_scaling"):
        del shape[own]
    experts = shape.pop("experts") or {}
    rope = recipe.rope_scaling or {"rope_type": "default"}
    layers = {
        "layer_types": ["full_attention"] * recipe.num_hidden_layers,
        "max_window_layers": recipe.num_hidden_layers,
    }
    return {
        "architectures": [recipe.architecture],
        **shape,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_theta": recipe.rope_theta, **rope},
        **_SETTINGS[recipe.architecture],
        **(layers if recipe.architecture.startswith("Qwen") else {}),
        **experts,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": EOS_TOKEN_ID,
    }


def _weights(recipe: Preset) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of every weight, in the order of the model."""
    gains, hidden, head_dim = recipe.gains, recipe.hidden_size, recipe.head_dim
    has_norms = recipe.architecture.startswith("Qwen3")
    has_bias = recipe.architecture.startswith("Qwen2")

    def linear(name: str, outputs: int, inputs: int, gain: float) -> Tensor:
        return _noise((outputs, inputs), name, recipe.seed).mul_(gain / math.sqrt(inputs))

    def norm(name: str, size: int, gain: float = 1.0) -> Tensor:
        spread = gains.norm_spread
        return (
            _noise((size,), name, recipe.seed)
            .mul_(spread)
            .add_(1.0)
            .mul_(gain / math.sqrt(1.0 + spread**2))
        )

    def bias(name: str, heads: int, size: float) -> tuple[str, Tensor]:
        return name, _noise((heads * head_dim,), name, recipe.seed).mul_(gains.bias * size)

    def mean_square(layer: int) -> float:
        """Expected, of the residual stream's channels before `layer`."""
        embedding = gains.embedding**2 * (1.0 + gains.constant**2 / hidden)
        return embedding + layer * (gains.attention**2 + gains.mlp**2)

    def content_share(layer: int) -> float:
        """The share of that mean square outside channel 0."""
        return 1.0 - (gains.constant * gains.embedding) ** 2 / hidden / mean_square(layer)

    embedding = linear(
        "model.embed_tokens.weight", recipe.vocab_size, hidden, gains.embedding * math.sqrt(hidden)
    )
    embedding[:, 0] = gains.constant * gains.embedding
    yield "model.embed_tokens.weight", embedding
    for layer in range(recipe.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        input_norm = norm(prefix + "input_layernorm.weight", hidden)
        yield prefix + "input_layernorm.weight", input_norm

        # Channel 0 as the projections see it: normalized and weighted.
        constant = (
            float(input_norm[0]) * gains.constant * gains.embedding / math.sqrt(mean_square(layer))
        )
        positional = gains.positional * gains.query_key * math.sqrt(content_share(layer)) / constant
        for part, heads in (("q", recipe.num_attention_heads), ("k", recipe.num_key_value_heads)):
            weight = linear(
                f"{attention}{part}_proj.weight", heads * head_dim, hidden, gains.query_key
            )
            distances = _distances(recipe, layer) if part == "q" else [0] * heads
            weight[:, 0] = (
                torch.cat([_rotary_vector(-distance, recipe) for distance in distances])
                * positional
            )
            if not has_norms:  # what the norms of heads would do
                size = gains.query_key * math.sqrt(
                    content_share(layer) * (1.0 + gains.positional**2)
                )
                weight *= math.sqrt(gains.scores) / size
            yield f"{attention}{part}_proj.weight", weight
            if has_norms:
                yield (
                    f"{attention}{part}_norm.weight",
                    norm(f"{attention}{part}_norm.weight", head_dim, math.sqrt(gains.scores)),
                )
            if has_bias:
                yield bias(f"{attention}{part}_proj.bias", heads, math.sqrt(gains.scores))
        value = linear(
            attention + "v_proj.weight", recipe.num_key_value_heads * head_dim, hidden, 1.0
        )
        value[:, 0] = 0.0  # the constant carries no content
        yield attention + "v_proj.weight", value
        if has_bias:
            yield bias(attention + "v_proj.bias", recipe.num_key_value_heads, 1.0)
        attention_width = recipe.num_attention_heads * head_dim
        yield (
            attention + "o_proj.weight",
            linear(attention + "o_proj.weight", hidden, attention_width, gains.attention),
        )

        yield (
            prefix + "post_attention_layernorm.weight",
            norm(prefix + "post_attention_layernorm.weight", hidden),
        )
        mlps, width = {mlp: gains.mlp}, recipe.intermediate_size
        if recipe.experts is not None:
            mlps = {
                f"{mlp}experts.{number}.": gains.mlp
                for number in range(recipe.experts["num_experts"])
            }
            width = recipe.experts["moe_intermediate_size"]
            router = linear(f"{mlp}gate.weight", len(mlps), hidden, gains.router)
            router[:, 0] = 0.0
            yield f"{mlp}gate.weight", router
        for place, gain in mlps.items():
            for part in ("gate_proj", "up_proj"):
                weight = linear(f"{place}{part}.weight", width, hidden, 1.0)
                weight[:, 0] = 0.0
                yield f"{place}{part}.weight", weight
            # silu(x) * y of independent unit normals has root mean square 0.6
            yield (
                place + "down_proj.weight",
                linear(place + "down_proj.weight", hidden, width, gain / 0.6),
            )

    depth = recipe.num_hidden_layers
    final = norm(
        "model.norm.weight",
        hidden,
        gains.logits / gains.embedding / math.sqrt(hidden * content_share(depth)),
    )
    final *= torch.where(
        _noise((hidden,), "signs of model.norm.weight", recipe.seed) < 0.0, -1.0, 1.0
    )
    final[0] = 0.0  # channel 0 is the same in every embedding: it would add the same to every logit
    yield "model.norm.weight", final
    if not recipe.tie_word_embeddings:
        yield (
            "lm_head.weight",
            linear(
                "lm_head.weight", recipe.vocab_size, hidden, gains.embedding * math.sqrt(hidden)
            ),
        )


def _noise(shape: tuple[int, ...], name: str, seed: int) -> Tensor:
    """Noise of mean 0 and variance 1 (float32): the sum of a Philox word's two halves, a triangle
    between -2.45 and 2.45.

    Element i is word i % 4 of counter i // 4, under the key (seed, CRC-32 of name).
    """
    count = math.prod(shape)
    flat = torch.empty(-(-count // 4), 4)
    # Half a minute of integer arithmetic takes a second on a GPU and gives the same bits; rounding is
    # left to the CPU.
    device = (
        "cuda"
        if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        else "cpu"
    )
    seed_key, name_key = (
        torch.tensor([key], device=device) for key in (seed & 0xFFFFFFFF, zlib.crc32(name.encode()))
    )
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    # small enough for the processor's cache; 100 MB of a GPU
    chunk = 1 << 13 if device == "cpu" else 1 << 20
    for start in range(0, len(flat), chunk):
        counter = torch.arange(start, min(start + chunk, len(flat)), device=device)
        for lane, word in enumerate(philox4x32(seed_key, name_key, counter, zero, zero, zero)):
            flat[start : start + chunk, lane] = (word & 0xFFFF) + (word >> 16) - 0xFFFF
    return flat.flatten()[:count].view(shape).mul_(math.sqrt(6.0) / 65536.0)


def _distances(recipe: Preset, layer: int) -> list[int]:
    """How far back each query head of a layer looks: one distance in each equal part of [1,
    max_distance], where in it depends on the layer, or on its set (golden ratio, so that they cover
    different ones).
    """
    heads, gains = recipe.num_attention_heads, recipe.gains
    count = min(heads, gains.distances)
    within = (
        0.1 + (layer % (gains.distance_sets or recipe.num_hidden_layers)) * 0.6180339887
    ) % 1.0
    distances = [1 + int(gains.max_distance * (part + within) / count) for part in range(count)]
    return [distances[head * count // heads] for head in range(heads)]


def _rotary_vector(position: int, recipe: Preset) -> Tensor:
    """A vector [head_dim] of root mean square 1 in the fastest sixth of the rotary frequencies,
    rotated to `position`.

    Such vectors of two tokens, rotated to their places, have their largest product where the places
    agree, and soon less around.
    """
    half = recipe.head_dim // 2
    pairs = max(1, recipe.head_dim // 12)
    frequencies = [recipe.rope_theta ** (-i / half) for i in range(pairs)]
    if recipe.rope_scaling is not None:
        shape = {"max_position_embeddings": recipe.max_position_embeddings}
        scaled = read_scaled_rope(dict(recipe.rope_scaling), shape, "the preset")["scaled_rope"]
        every = torch.tensor([recipe.rope_theta ** (-i / half) for i in range(half)]).double()
        frequencies = scaled(every, recipe.rope_theta)[0][:pairs].tolist()
    angles = [position * frequency for frequency in frequencies]
    vector = torch.zeros(2, half)
    vector[0, :pairs] = torch.tensor([math.cos(angle) for angle in angles])
    vector[1, :pairs] = torch.tensor([math.sin(angle) for angle in angles])
    return vector.flatten() * math.sqrt(recipe.head_dim / pairs)


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of TEXT_SIZE tokens and Qwen's special tokens, split like Qwen's. Its merges
    are part of the package: they were learned once, from modules of Python's standard library,
    which differ between Python versions.
    """
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    merges = [
        (left, right)
        for left, right in map(str.split, MERGES.read_text(encoding="utf-8").splitlines())
    ]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


train_tokenizer = make_tokenizer  # its name while every Python trained its own


def _tokenizer() -> Tokenizer:
    """The presets' tokenizer. Raises RuntimeError where it differs from that of TOKENIZER_DIGEST."""
    tokenizer = make_tokenizer()
    if (digest := tokenizer_digest(tokenizer)) != TOKENIZER_DIGEST:
        raise RuntimeError(
            f"the presets' tokenizer has digest {digest} here, expected is {TOKENIZER_DIGEST}: this version of the "
            "tokenizers library splits text otherwise, and prompts would be other prompts"
        )
    return tokenizer


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 over what the tokenizer does, independent of how a library version serializes it: its
    vocabulary and its ids of a text.
    """
    odd = " Hello,  W\u00f6rld e\u0301!\n\n don't 12345 <|im_start|>user\t\u4f60\u597d\U0001f600"
    said = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.encode(MERGES.read_text(encoding="utf-8") + odd).ids,
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes it readable only for its owner


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Builds a preset and prints its folder and digest."""
    parser = argparse.ArgumentParser(
        prog="python -m nanovllm.models.checkpoint", description="Build a seeded checkpoint."
    )
    parser.add_argument("preset", choices=[*PRESETS, *GENERATED])
    parser.add_argument("--cache-dir", help="default: $NANOVLLM_CACHE, else .cache/nanovllm")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--num-hidden-layers",
        type=int,
        help="a cut variant: the first layers, and a final norm scaled to them",
    )
    given = vars(parser.parse_args())
    folder = ensure_checkpoint(
        **{name: value for name, value in given.items() if value is not None}
    )
    print(folder, checkpoint_digest(folder), sep="\n")


if __name__ == "__main__":
    main()
