"""The errors of prompts that cannot be served. Loaded when there is one."""

from collections.abc import Sequence
from typing import Any


def bad_prompt(
    request_id: str, token_ids: Sequence[Any], vocab_size: int, max_model_len: int
) -> ValueError:
    """The error of a prompt that is empty, too long, or holds something that is no token."""
    if not token_ids:
        return ValueError(f"request {request_id!r} has an empty prompt; give at least one token")
    if bad := [t for t in token_ids if not isinstance(t, int) or not 0 <= t < vocab_size]:
        return ValueError(
            f"request {request_id!r} holds token id {bad[0]!r}; allowed are integers from 0 to {vocab_size - 1}"
        )
    return ValueError(
        f"request {request_id!r} has {len(token_ids)} prompt tokens, which leaves no room for an answer within "
        f"max_model_len={max_model_len}: shorten it or raise max_model_len"
    )


def not_a_prompt(prompt: object) -> TypeError | ValueError:
    """The error of a prompt of another type, or of a text without a tokenizer."""
    if isinstance(prompt, dict):
        return TypeError(
            f"a prompt has keys {sorted(prompt)}; give {{'prompt_token_ids': [...]}} or {{'prompt': text}}"
        )
    if not isinstance(prompt, str):
        return TypeError(
            f"a prompt is a {type(prompt).__name__}; give a string, a list of token ids, or a dict that holds one of them"
        )
    return ValueError("skip_tokenizer_init=True: give prompts as {'prompt_token_ids': [...]}")
