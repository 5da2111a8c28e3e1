"""Sampling parameters beyond the common ones, under vLLM's names and with its meaning. Loaded when
one is given.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from nanovllm.sampling_params import SamplingParams

MOST_ANSWERS = 16_384
"""vLLM's own limit of n."""


def _whole(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Integral) and low <= value <= high  # type: ignore[operator]


def _real(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Real) and low <= value <= high  # type: ignore[operator]


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _texts(given: Any) -> bool:
    """One text or several, none of them empty; None is none."""
    return (
        given is None
        or (isinstance(given, str) and given != "")
        or (
            isinstance(given, (list, tuple))
            and all(isinstance(text, str) and text != "" for text in given)
        )
    )


def _as_texts(given: Any) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _biases(given: Any) -> bool:
    return given is None or (
        isinstance(given, Mapping)
        and all(isinstance(token, Integral) and token >= 0 for token in given)  # type: ignore[operator]
        and all(isinstance(bias, Real) and math.isfinite(bias) for bias in given.values())
    )


# What each value must be, what becomes of it, and how an error says it.
ALLOWED: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any], str]] = {
    "n": (_whole(1, MOST_ANSWERS), int, f"a whole number from 1 to {MOST_ANSWERS}"),
    "presence_penalty": (_real(-2, 2), float, "from -2 to 2"),
    "frequency_penalty": (_real(-2, 2), float, "from -2 to 2"),
    "repetition_penalty": (_real(1e-5, 1e5), float, "from 1e-5 to 1e5; 1 penalizes nothing"),
    "min_p": (_real(0, 1), float, "from 0 to 1"),
    "stop": (_texts, _as_texts, "a text or a list of texts, none of them empty"),
    "bad_words": (_texts, _as_texts, "a list of texts, none of them empty"),
    "include_stop_str_in_output": (_is_bool, bool, "True or False"),
    "min_tokens": (_whole(0), int, "a whole number, 0 or more"),
    "prompt_logprobs": (
        lambda value: value is None or _whole(0)(value),
        lambda value: None if value is None else int(value),
        "None or a whole number, 0 or more",
    ),
    "detokenize": (_is_bool, bool, "True or False"),
    "skip_special_tokens": (_is_bool, bool, "True or False"),
    "logit_bias": (
        _biases,
        lambda given: None if not given else {int(t): float(bias) for t, bias in given.items()},
        "None or {token id: number}",
    ),
}


@dataclass(frozen=True, kw_only=True)
class SamplingParamsWithOptions(SamplingParams):
    """What `SamplingParams(...)` makes where an argument is one of these. Raises ValueError for a
    value out of range, and for values that contradict each other.

    n: answers to one prompt. With a seed, answer i has seed + i.

    stop: texts that end the answer, wherever tokens begin and end. The text ends before the one
    found, or with it where include_stop_str_in_output; the token ids are left whole.

    min_tokens: before so many tokens, the end of sequence and stop_token_ids have probability 0,
    and stop strings are not looked for.

    Of the logits z of a token, in this order and before the temperature:

        bad_words           z = -inf for the token that would complete one of them (of output tokens alone)
        min_tokens          z = -inf for tokens that would end the answer
        logit_bias          z = z + bias
        repetition_penalty  z = z / penalty where z > 0, else z * penalty; for tokens of the prompt or the answer
        frequency_penalty   z = z - penalty * (how often the answer has the token)
        presence_penalty    z = z - penalty, for tokens that the answer has

    min_p: after the temperature and before top-k and top-p, drops tokens with less than min_p times
    the probability of the most likely one (Nguyen et al., 2024). Greedy sampling ignores it.

    prompt_logprobs: how many of the most likely tokens are reported beside each prompt token, in
    RequestOutput.prompt_logprobs; the prefix cache is then not read.

    detokenize=False leaves texts empty. skip_special_tokens=False shows special tokens in them.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    stop: str | tuple[str, ...] | list[str] | None = ()
    bad_words: tuple[str, ...] | list[str] | None = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (fits, of_python, allowed) in ALLOWED.items():
            value = getattr(self, name)
            if not fits(value):
                raise ValueError(f"{name}={value!r} is not allowed; it must be {allowed}")
            object.__setattr__(self, name, of_python(value))
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={self.n} with temperature=0 would give the same answer {self.n} times; give n=1 or a temperature"
            )
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}, which is what is asked for "
                "or what the context leaves; lower min_tokens"
            )
        if self.stop and not self.detokenize:
            raise ValueError(
                "stop strings are found in the text, which detokenize=False does not make; leave one of them out"
            )
