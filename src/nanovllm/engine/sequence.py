"""The state of one request inside the engine. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.outputs import RequestMetrics
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.prefix_cache import CachedBlock

TokenLogprobs = tuple[float, int, list[float], list[int]]
"""Log-probability and rank of the chosen token; the largest log-probabilities and their tokens."""


class Sequence:
    """A request. What is *known* (token_ids) and what is *scheduled* (num_scheduled, pending) are kept apart, so that a
    step can be planned before the tokens of the last one have been read.

        token_ids      [prompt ....... | sampled tokens that were committed]
        pending                                                             [sampled on the device, not yet committed]
        num_scheduled  [KV computed or being computed          ]
    """

    __slots__ = (
        "block_table", "cached_tail", "finish_reason", "in_flight", "index", "logprobs", "metrics",
        "num_cached_blocks", "num_cached_tokens", "num_prompt_tokens", "num_scheduled", "params", "pending", "prompt",
        "request_id", "row", "seed", "stop_reason", "stop_token_ids", "token_ids",
    )  # fmt: skip

    def __init__(self, request_id: str, token_ids: list[int], params: SamplingParams, *, seed: int = 0, arrival_time: float = 0.0,
                 stop_token_ids: frozenset[int] = frozenset(), prompt: str | None = None) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.token_ids = token_ids  # prompt, then every committed token
        self.num_prompt_tokens = len(token_ids)
        self.params = params
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        self.row = -1  # in the runner's batch; -1 while waiting
        self.block_table: list[int] = []
        self.num_scheduled = 0
        self.pending = 0  # sampled tokens in flight
        self.in_flight = 0  # launched steps, not yet committed, that this sequence takes part in
        self.num_cached_blocks = 0  # leading blocks that the prefix cache knows
        self.cached_tail: CachedBlock | None = None  # the last of them
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | None = None
        self.logprobs: list[TokenLogprobs] = []  # one a committed token, where they were asked for
        self.metrics = RequestMetrics(arrival_time)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_to_schedule(self) -> int:
        """Tokens, known or on the device, whose KV no step was planned for."""
        return len(self.token_ids) + self.pending - self.num_scheduled

    @property
    def wants_more(self) -> bool:
        """False once every token that it may produce has been planned."""
        return self.num_output_tokens + self.pending < self.params.max_tokens

    def append(self, token_id: int) -> bool:
        """Adds a committed token; True when the request is finished by it."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            self.finish_reason = "stop"
            self.stop_reason = token_id if token_id in self.params.stop_token_ids else None
        elif self.num_output_tokens >= self.params.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None
