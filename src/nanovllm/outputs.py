"""What a request returns: vLLM's RequestOutput and its parts."""

from dataclasses import dataclass


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token under the model, before temperature, top-k and top-p. rank: 1 is
    the most likely.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds of time.perf_counter(); None until they happen."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One generated text. finish_reason: 'length', 'stop' or 'abort'; None while the request runs.
    stop_reason: the token of stop_token_ids, or the stop string, that ended it.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request. num_cached_tokens: prompt tokens whose KV was found in the prefix
    cache. prompt_logprobs: where asked for, of each prompt token given those before it; None for the
    first.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
