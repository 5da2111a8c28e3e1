"""Log-probabilities as vLLM returns them. Loaded when a request asks for them."""

from tokenizers import Tokenizer

from nanovllm.engine.sequence import Sequence, TokenLogprobs
from nanovllm.outputs import CompletionOutput, Logprob


def attach_logprobs(
    completion: CompletionOutput, seq: Sequence, tokenizer: Tokenizer | None
) -> None:
    """Sets the log-probabilities of a completion: for each token, itself and the `logprobs` most
    likely ones, by token id.
    """

    def decode(token: int) -> str | None:
        return tokenizer.decode([token]) if tokenizer is not None else None

    def entry(token: int, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        chosen, rank, largest, ids = logprobs
        count = seq.params.logprobs
        found = {
            i: Logprob(lp, k, decode(i))
            for k, (lp, i) in enumerate(zip(largest[:count], ids[:count], strict=True), 1)
        }
        found.setdefault(token, Logprob(chosen, rank, decode(token)))
        return found

    completion.logprobs = [
        entry(token, lp) for token, lp in zip(completion.token_ids, seq.logprobs, strict=True)
    ]
    completion.cumulative_logprob = sum(lp[0] for lp in seq.logprobs)
