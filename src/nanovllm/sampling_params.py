"""How the tokens of one request are chosen: the subset of vLLM's SamplingParams that this engine has."""

from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Raises ValueError for a value outside its range, with what is allowed. Numbers of other libraries become Python's.

    temperature: 0 is greedy, else 1e-5 or more. top_k: 0 or -1 keeps all. top_p: 1e-30 to 1. max_tokens: at least 1.
    seed: of the request's random numbers, any 64-bit integer; None draws one from the engine's seed and the request's
    number of arrival. logprobs: how many of the most likely tokens are reported beside the chosen one; None: none at all.
    stop_token_ids: at which the answer ends; None, as in vLLM, is taken as none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, text: str, low: float, high: float, kind: type = Integral, also: object = ...) -> None:
            value = getattr(self, name)  # the classes of `numbers` have an order that mypy does not know
            in_range = isinstance(value, kind) and (low <= value <= high or value == also)  # type: ignore[operator]
            if not in_range and not (value is None and also is None):
                raise ValueError(f"{name}={value!r} is not allowed; it must be {text}")
            object.__setattr__(self, name, value if value is None else (int if isinstance(value, Integral) else float)(value))

        check("temperature", "0 (greedy), or a number from 1e-5 to 1e30", 1e-5, 1e30, Real, also=0)
        check("top_k", "a whole number below 2**31, 1 or more, or 0 or -1 for all tokens", -1, 2**31 - 1)
        check("top_p", "in (0, 1], no less than 1e-30", 1e-30, 1, Real)
        check("max_tokens", "a whole number, 1 or more", 1, 2**63)
        check("seed", "None or an integer of 64 bits", -(2**63), 2**63 - 1, also=None)
        check("logprobs", "None or a whole number, 0 or more", 0, 2**63, also=None)
        given = () if self.stop_token_ids is None else self.stop_token_ids
        is_list = isinstance(given, (list, tuple, set, frozenset, range))
        if not is_list or not all(isinstance(token, Integral) and token >= 0 for token in given):  # type: ignore[operator]
            raise ValueError(f"stop_token_ids={given!r} is not allowed; it must be None or a list of token ids, whole numbers")
        object.__setattr__(self, "stop_token_ids", tuple(map(int, given)))
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos={self.ignore_eos!r} is not allowed; it must be True or False")
