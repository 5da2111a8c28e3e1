"""Files beside tokenizer.json that change how HF and vLLM tokenize. Loaded where a folder says more
than a preset does.

Here a tokenizer is its tokenizer.json. HF also reads tokenizer_config.json, special_tokens_map.json
and added_tokens.json. What they say must be in tokenizer.json as well; otherwise it is refused by
name, or warned about (docs/checkpoints.md lists the keys).
"""

import warnings
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers

from nanovllm.models.config import read_if_there

QWEN = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
AS_IT_IS = (*QWEN, "PreTrainedTokenizerFast", "TokenizersBackend")
"""Values of tokenizer_class with which HF uses tokenizer.json as it is, except for the normalizer
of QWEN, which is always NFC.
"""
REFUSED = ("add_prefix_space", "split_special_tokens")
"""If true, HF splits a text differently."""
NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "image_token",
    "additional_special_tokens",
    "extra_special_tokens",
)


def check_tokenizer(
    folder: Path, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...] | None
) -> None:
    """Warns where one of HF's versions would tokenize differently, about an end-of-sequence token
    that ends no answer, and where the model has no end of sequence at all.

    Raises ValueError for settings with which HF would make other token ids of a text.
    """
    if eos_token_ids == ():
        warnings.warn(
            f"{folder}: neither generation_config.json nor config.json names an eos_token_id, so that no answer ends "
            "before its max_tokens; give stop_token_ids or stop strings, or add eos_token_id to one of the files",
            stacklevel=2,
        )
    config, names, added = (
        read_if_there(folder / f"{name}.json")
        for name in ("tokenizer_config", "special_tokens_map", "added_tokens")
    )
    if on := [name for name in REFUSED if config.get(name)]:
        raise ValueError(
            f"{folder}/tokenizer_config.json has {on[0]}={config[on[0]]!r}; this engine computes False only: write it "
            "into tokenizer.json, or give prompts as token ids and skip_tokenizer_init=True"
        )
    decoder = {
        _content(token): int(token_id)
        for token_id, token in config.get("added_tokens_decoder", {}).items()
    }
    for token, token_id in {
        **dict.fromkeys([*_named(config), *_named(names)]),
        **added,
        **decoder,
    }.items():
        if (found := tokenizer.token_to_id(token)) is None or token_id not in (None, found):
            says = (
                "has no such token" if found is None else f"gives it the id {found}, not {token_id}"
            )
            raise ValueError(
                f"{folder}: the files beside tokenizer.json name the token {token!r}, and tokenizer.json {says}; save "
                "the tokenizer again with transformers (save_pretrained), or give prompts as token ids and "
                "skip_tokenizer_init=True"
            )
    kind = config.get("tokenizer_class")
    if kind not in (None, *AS_IT_IS):
        warnings.warn(
            f"{folder}: tokenizer_class is {kind!r}, of which transformers 5 builds its own tokenizer; here "
            "tokenizer.json is taken as it is: compare the token ids of a prompt",
            stacklevel=2,
        )
    elif kind in QWEN and not isinstance(tokenizer.normalizer, normalizers.NFC):
        warnings.warn(
            f"{folder}: tokenizer.json has another normalizer than NFC and is taken as it is; transformers 5 puts NFC "
            f"in its place for tokenizer_class {kind!r}",
            stacklevel=2,
        )
    for token in _named({"eos_token": config.get("eos_token")}):
        if eos_token_ids and (eos := tokenizer.token_to_id(token)) not in eos_token_ids:
            warnings.warn(
                f"{folder}: no answer ends at {token!r}, the tokenizer's eos_token (id {eos}), as the model's files name "
                f"{list(eos_token_ids)}. HF does the same; vLLM ends there: for that, give stop_token_ids=[{eos}]",
                stacklevel=2,
            )


def no_tokenizer(file: Path, error: Exception) -> FileNotFoundError | ValueError:
    """The error of a tokenizer.json that is missing or cannot be read, and what to do."""
    if file.is_file():
        return ValueError(f"{file} is not a tokenizer: {error}")
    return FileNotFoundError(
        f"{file} is missing: transformers makes it from tokenizer.model or vocab.json, if one is there, by "
        f"AutoTokenizer.from_pretrained({str(file.parent)!r}).save_pretrained({str(file.parent)!r}); otherwise give "
        "`tokenizer`, or skip_tokenizer_init=True and prompts as token ids"
    )


def _named(settings: dict[str, Any]) -> list[str]:
    """The tokens that settings name."""
    found: list[Any] = []
    for name in NAMED:
        value = settings.get(name)
        listed = (
            list(value.values()) if isinstance(value, dict) and "content" not in value else value
        )
        found += listed if isinstance(listed, list) else [listed]
    return [_content(token) for token in found if token is not None]


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)
