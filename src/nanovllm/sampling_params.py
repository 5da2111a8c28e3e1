"""How the tokens of one request are chosen: the part of vLLM's SamplingParams that this engine has."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from numbers import Integral, Real
from typing import Any


def _number(
    low: float, high: float, kind: type = Integral, also: object = ...
) -> Callable[[Any], bool]:
    """Checks that a value is a number of type `kind` from `low` to `high`, or equals `also`."""
    return lambda value: (
        (value is None and also is None)
        or (
            isinstance(value, kind) and (low <= value <= high or value == also)  # type: ignore[operator]
        )
    )


def _token_ids(given: Any) -> bool:
    return given is None or (
        isinstance(given, (list, tuple, set, frozenset, range))
        and all(isinstance(token, Integral) and token >= 0 for token in given)  # type: ignore[operator]
    )


# What each value must be, what becomes of it, and how an error says it.
ALLOWED: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any], str]] = {
    "temperature": (
        _number(1e-5, 1e30, Real, also=0),
        float,
        "0 (greedy), or a number from 1e-5 to 1e30",
    ),
    "top_k": (
        _number(-1, 2**31 - 1),
        int,
        "a whole number below 2**31, 1 or more, or 0 or -1 for all tokens",
    ),
    "top_p": (_number(1e-30, 1, Real), float, "in (0, 1], no less than 1e-30"),
    "max_tokens": (
        _number(1, 2**63, also=None),
        lambda value: 2**63 if value is None else int(value),
        "a whole number, 1 or more, or None for what the context leaves",
    ),
    "seed": (
        _number(-(2**63), 2**63 - 1, also=None),
        lambda value: value if value is None else int(value),
        "None or an integer of 64 bits",
    ),
    "logprobs": (
        _number(0, 2**63, also=None),
        lambda value: value if value is None else int(value),
        "None or a whole number, 0 or more",
    ),
    "stop_token_ids": (
        _token_ids,
        lambda given: tuple(map(int, given or ())),
        "None or a list of token ids, whole numbers",
    ),
    "ignore_eos": (lambda value: isinstance(value, bool), bool, "True or False"),
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters. Raises ValueError for a value out of range, with what is allowed.
    Numbers of other libraries, such as numpy, become Python's.

    temperature: 0 is greedy, else 1e-5 or more. top_k: 0 or -1 keeps all tokens. top_p: 1e-30 to 1.
    max_tokens: at least 1; None, or more than the context leaves, is what the context leaves.

    seed: any 64-bit integer; None derives one from the engine's seed and the request's number.

    logprobs: how many of the most likely tokens are reported beside the chosen one; None reports
    none.

    stop_token_ids: tokens that end the answer; None, as in vLLM, means no such tokens.

    More arguments of vLLM's (n, stop, min_p, penalties, logit_bias, ...) are accepted and documented
    in requests.options.SamplingParamsWithOptions, of which the result is then an instance.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    n = 1  # no field: where it is given, the result is of the class with options

    def __new__(cls, **kwargs: Any) -> Any:
        """Where an argument is not a field here, an instance of the class that has more of them."""
        own = cls is not SamplingParams or kwargs.keys() <= cls.__dataclass_fields__.keys()
        return object.__new__(
            cls if own else import_module("nanovllm.requests.options").SamplingParamsWithOptions
        )

    def __post_init__(self) -> None:
        for name, (fits, of_python, allowed) in ALLOWED.items():
            value = getattr(self, name)
            if not fits(value):
                raise ValueError(f"{name}={value!r} is not allowed; it must be {allowed}")
            object.__setattr__(self, name, of_python(value))
