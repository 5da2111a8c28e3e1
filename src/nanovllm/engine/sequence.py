"""The state of one request inside the engine. No torch."""

from dataclasses import dataclass, field

from nanovllm.outputs import RequestMetrics
from nanovllm.sampling_params import SamplingParams

# log-probability and rank of the chosen token; the largest log-probabilities, and their token ids
TokenLogprobs = tuple[float, int, list[float], list[int]]


@dataclass(slots=True, eq=False)
class Sequence:
    """A request. What is *known* (token_ids) and what is *scheduled* (num_scheduled, pending) are
    separate, so that a step can be planned before the tokens of the last one have been read.

        token_ids      [prompt ....... | sampled tokens that were committed]
        pending                                                             [sampled on the device, not yet committed]
        num_scheduled  [KV computed or being computed          ]
    """

    request_id: str
    token_ids: list[int]  # the prompt, then every committed token
    params: SamplingParams
    seed: int = 0
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(arrival_time=0.0))
    stop_token_ids: frozenset[int] = frozenset()
    prompt: str | None = None
    row: int = -1  # in the runner's batch; -1 while waiting
    block_table: list[int] = field(default_factory=list)
    num_scheduled: int = 0
    num_lost: int = 0  # num_scheduled at its last preemption
    pending: int = 0  # sampled tokens in flight
    in_flight: int = 0  # planned steps, not yet committed, that this sequence takes part in
    # leading blocks that are in the prefix cache; -1: no more of its blocks can be added
    num_published: int = 0
    published_tail: object | None = None  # the cache entry of the last of them
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    # what requests/logit_processors.py does to its logits; None: nothing
    processors: object = None
    # one per committed token, where they were asked for
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_to_schedule(self) -> int:
        """Tokens, known or still on the device, whose KV no step has been planned for."""
        return len(self.token_ids) + self.pending - self.num_scheduled

    @property
    def wants_more(self) -> bool:
        """False once every token that it may produce has been planned."""
        return self.num_output_tokens + self.pending < self.params.max_tokens

    def append(self, token_id: int) -> bool:
        """Adds a committed token; True if the request is finished by it."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            self.finish_reason, self.stop_reason = (
                "stop",
                token_id if token_id in self.params.stop_token_ids else None,
            )
        elif self.num_output_tokens >= self.params.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None
