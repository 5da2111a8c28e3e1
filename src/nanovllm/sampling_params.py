"""How the tokens of one request are chosen: the subset of vLLM's SamplingParams that this engine has."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Raises ValueError for a value outside its range, with what is allowed.

    temperature: 0 is greedy. top_k: 0 or -1 keeps all. top_p: in (0, 1]. max_tokens: at least 1.
    seed: of the request's random numbers, any 64-bit integer; None draws one from the engine's seed and the request's
    number of arrival. logprobs: how many of the most likely tokens are reported beside the chosen one; None: none at all.
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
        checks = {
            "temperature": (self.temperature >= 0 and self.temperature != float("inf"), "0 (greedy) or a positive number"),
            "top_k": (self.top_k >= -1, "at least 1, or 0 or -1 for all tokens"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "max_tokens": (isinstance(self.max_tokens, int) and self.max_tokens >= 1, "a whole number, 1 or more"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "None or an integer of 64 bits"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "None or a whole number, 0 or more"),
        }
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; it must be {allowed}")
