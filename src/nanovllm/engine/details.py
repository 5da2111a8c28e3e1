"""What an output has beyond its tokens and their text: log-probabilities as vLLM returns them, the
text of a request that still runs, or that has options. Loaded where an output has one of these.
"""

from tokenizers import Tokenizer

from nanovllm.engine.sequence import Sequence, TokenLogprobs
from nanovllm.outputs import CompletionOutput, Logprob

INCOMPLETE = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""


def complete(completion: CompletionOutput, seq: Sequence, tokenizer: Tokenizer | None) -> None:
    """Sets the parts of a completion that most outputs do not have. A text never ends in a part of
    a character while more tokens are to come.
    """
    if hasattr(seq, "text_of"):  # requests.sequences.SequenceWithOptions
        completion.text = seq.text_of(tokenizer)
    if seq.finish_reason is None:
        completion.text = completion.text.rstrip(INCOMPLETE)
    if seq.params.logprobs is not None:
        attach_logprobs(completion, seq, tokenizer)


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
