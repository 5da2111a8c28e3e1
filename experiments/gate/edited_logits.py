"""What options of a request do to the logits, from their definition: the reference for
`nanovllm.requests.logit_processors`, with which it shares no code.

Logits z of a token, given the tokens before it, in this order:

    bad_words           z = -inf for the last token of a bad word whose other tokens are the last ones of the answer
    min_tokens          z = -inf for tokens that end the answer, while it has fewer tokens
    logit_bias          z = z + bias
    repetition_penalty  z = z / penalty where z > 0, else z * penalty; for every token of the prompt or the answer
    frequency_penalty   z = z - penalty * (how often the answer has the token)
    presence_penalty    z = z - penalty, for every token of the answer

min_p belongs to truncation (`logit_margins.Rows`). Instead of -inf, a token gets a value so far
below all others that its probability is 0, which leaves every difference finite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.records.types import Request

FAR_BELOW = 500.0
"""e^-500 is 0 in float32. A larger number would cost the search for a margin its accuracy."""
NOTHING = {
    "bad_words": [],
    "min_tokens": 0,
    "logit_bias": {},
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
"""The options, with the values at which they change nothing."""


def has_options(request: Request) -> bool:
    """Whether its logits are edited before sampling."""
    options: dict[str, Any] = {**NOTHING, **request}
    return any(options[name] != nothing for name, nothing in NOTHING.items())


def edited(
    logits: Tensor, request: Request, answer: Sequence[int], eos_token_ids: Collection[int]
) -> Tensor:
    """The logits [vocab] from which the token after `answer` is sampled, a new tensor.

    request: bad_words as lists of token ids; stop_token_ids, the tokens that end the answer beside
    eos_token_ids.
    """
    get: dict[str, Any] = {**NOTHING, **request}
    z = logits.clone()
    never: set[int] = set()
    for word in get["bad_words"]:
        *before, last = word
        if len(answer) >= len(before) and list(answer[len(answer) - len(before) :]) == before:
            never.add(last)
    if len(answer) < get["min_tokens"]:
        never |= {*request.get("stop_token_ids", ()), *eos_token_ids}
    for token, bias in get["logit_bias"].items():
        z[int(token)] += bias
    seen = sorted({*request["prompt_token_ids"], *answer})
    penalty = get["repetition_penalty"]
    z[seen] = torch.where(z[seen] > 0, z[seen] / penalty, z[seen] * penalty)
    for token, count in Counter(answer).items():
        z[token] -= get["frequency_penalty"] * count + get["presence_penalty"]
    if banned := [token for token in never if token < len(z)]:
        z[banned] = z.min() - FAR_BELOW
    return z
