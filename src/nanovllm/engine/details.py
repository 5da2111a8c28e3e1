"""What an output has beyond its tokens and their text: log-probabilities as vLLM returns them, the
text of a request that still runs, or that has options. Loaded where an output has one of these.
"""

from typing import Any

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
    if getattr(seq, "num_prompt_logprobs", None) is not None:
        attach_prompt_logprobs(seq, tokenizer)
    if seq.params.logprobs is not None and not getattr(seq, "hides_logprobs", False):
        attach_logprobs(completion, seq, tokenizer)


def attach_logprobs(
    completion: CompletionOutput, seq: Sequence, tokenizer: Tokenizer | None
) -> None:
    """Sets the log-probabilities of a completion: for each token, itself and the `logprobs` most
    likely ones, by token id.
    """

    count = seq.params.logprobs or 0
    completion.logprobs = [
        entry(token, lp, count, tokenizer)
        for token, lp in zip(completion.token_ids, seq.logprobs, strict=True)
    ]
    completion.cumulative_logprob = sum(lp[0] for lp in seq.logprobs)


def attach_prompt_logprobs(seq: Any, tokenizer: Tokenizer | None) -> None:
    """Sets those of the prompt (requests.sequences.SequenceWithOptions), which came with the first
    token of the answer.
    """
    if not seq.logprobs or seq.prompt_logprobs is not None:
        return
    seq.prompt_logprobs = [None]
    for place in range(1, seq.num_prompt_tokens):
        chosen, rank, *most = seq.logprobs[0][4][place - 1]
        half, count = len(most) // 2, min(seq.num_prompt_logprobs, len(most) // 2)
        found = chosen, int(rank), most[:count], [int(token) for token in most[half : half + count]]
        seq.prompt_logprobs.append(entry(seq.token_ids[place], found, count, tokenizer))


def entry(
    token: int, logprobs: TokenLogprobs, count: int, tokenizer: Tokenizer | None
) -> dict[int, Logprob]:
    """A token's own log-probability and the `count` largest, by token id."""

    def decode(token: int) -> str | None:
        return tokenizer.decode([token]) if tokenizer is not None else None

    chosen, rank, largest, ids, *_ = logprobs
    found = {
        i: Logprob(lp, k, decode(i))
        for k, (lp, i) in enumerate(zip(largest[:count], ids[:count], strict=True), 1)
    }
    found.setdefault(token, Logprob(chosen, rank, decode(token)))
    return found
