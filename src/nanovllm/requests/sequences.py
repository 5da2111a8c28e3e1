"""A request with options: when it stops, what its text is, and what its logits go through. Loaded
when a request has some. No torch.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanovllm.engine.sequence import Sequence
from nanovllm.requests.options import SamplingParamsWithOptions
from nanovllm.requests.stop_strings import StopStrings


@dataclass(slots=True, eq=False)
class SequenceWithOptions(Sequence):
    """A Sequence whose params are SamplingParamsWithOptions. watch: finds stop strings; None where
    there are none to find. hides_logprobs: they were not asked for, but those of the prompt were,
    which come with the first of them (as a fifth element).
    """

    watch: StopStrings | None = None
    num_prompt_logprobs: int | None = None
    prompt_logprobs: list[Any] | None = None
    hides_logprobs: bool = False

    @property
    def skips_cache(self) -> bool:
        """Whether every token of the prompt must be computed."""
        return self.num_prompt_logprobs is not None and not self.logprobs

    def append(self, token_id: int) -> bool:
        """Adds a committed token; True if the request is finished by it, or by a stop string that its
        text completes.
        """
        Sequence.append(self, token_id)
        if self.watch is not None and self.finish_reason != "stop":
            found = self.watch.add(token_id)
            if found is not None:
                self.finish_reason, self.stop_reason = "stop", found
        return self.finish_reason is not None

    def text_of(self, tokenizer: Any) -> str:
        """The text of the answer so far, without what a later token may still take back."""
        params: Any = self.params
        if tokenizer is None or not params.detokenize:
            return ""
        if self.watch is not None and self.watch.found is not None:
            return self.watch.text
        if self.watch is not None and self.finish_reason is None:
            return self.watch.settled_text
        by_token = self.finish_reason == "stop" and not params.include_stop_str_in_output
        return str(
            tokenizer.decode(
                self.output_token_ids[: -1 if by_token else None],
                skip_special_tokens=params.skip_special_tokens,
            )
        )


def maker(tokenizer: Any, model_config: Any) -> Callable[..., SequenceWithOptions]:
    """Makes sequences for an engine with this tokenizer (None without one) and model. Raises
    ValueError for options that name unknown tokens, or need a tokenizer.
    """
    return functools.partial(_make, tokenizer, model_config)


def _make(
    tokenizer: Any,
    model_config: Any,
    request_id: str,
    token_ids: list[int],
    params: SamplingParamsWithOptions,
    *rest: Any,
) -> SequenceWithOptions:
    if params.n > 1:
        raise ValueError(
            f"request {request_id!r} has n={params.n}; LLM.generate and LLM.chat serve that: give add_request one "
            "request for each answer"
        )
    if tokenizer is None and (params.stop or params.bad_words):
        raise ValueError(
            f"request {request_id!r} has stop strings or bad_words, which need a tokenizer: leave skip_tokenizer_init out"
        )
    hides = params.prompt_logprobs is not None and params.logprobs is None
    if hides:
        params = dataclasses.replace(params, logprobs=0)
    seq = SequenceWithOptions(request_id, token_ids, params, *rest)
    seq.num_prompt_logprobs, seq.hides_logprobs = params.prompt_logprobs, hides
    edits = edits_of(params, model_config, tokenizer)
    named = [
        *edits.get("logit_bias", ()),
        *(t for word in edits.get("bad_words", ()) for t in word),
    ]
    if unknown := [token for token in named if token >= model_config.vocab_size]:
        raise ValueError(
            f"request {request_id!r} has logit_bias or bad_words for token id {unknown[0]}; allowed are integers from 0 to "
            f"{model_config.vocab_size - 1}"
        )
    if edits:
        seq.processors = edits, seq.num_prompt_tokens, seq.token_ids
    if params.stop:
        seq.watch = StopStrings(
            tokenizer,
            tuple(params.stop),
            include=params.include_stop_str_in_output,
            ignored_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
        )
    return seq


def edits_of(
    params: SamplingParamsWithOptions, model_config: Any, tokenizer: Any
) -> dict[str, Any]:
    """What logit_processors.py does for such a request: those of its options that change logits, as
    plain values (tensor-parallel ranks get them over a socket). {} where none does.
    """
    edits: dict[str, Any] = {}
    if params.bad_words:
        edits["bad_words"] = tokens_of_words(tuple(params.bad_words), tokenizer)
    ends = {*params.stop_token_ids, *model_config.eos_token_ids}
    if params.min_tokens and ends:
        # a stop token outside the vocabulary can never be sampled
        edits["not_yet"] = params.min_tokens, sorted(t for t in ends if t < model_config.vocab_size)
    if params.logit_bias:
        edits["logit_bias"] = params.logit_bias
    penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
    if penalties != (1.0, 0.0, 0.0):
        edits["penalties"] = penalties
    if params.prompt_logprobs is not None:
        edits["prompt_logprobs"] = params.prompt_logprobs
    if params.min_p > 0 and params.temperature > 0:
        edits["min_p"] = params.min_p, params.temperature
    return edits


def tokens_of_words(words: tuple[str, ...], tokenizer: Any) -> list[list[int]]:
    """The token ids of each word, as vLLM finds them: at the beginning of a text, and after a space
    where that begins with another token and has as many.
    """
    found: list[list[int]] = []
    for word in words:
        bare, spaced = (
            tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False).ids
            for prefix in ("", " ")
        )
        found.append(bare)
        if spaced[:1] != bare[:1] and len(spaced) == len(bare):
            found.append(spaced)
    return [word for word in found if word]
