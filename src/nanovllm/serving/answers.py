"""From the tokens of a step to the output of a request. Runs in the output thread, so that no step
waits for it.

The step thread only counts: `Answer.output` is told how many tokens an answer had after a step, and
reads them from the sequence, whose lists only ever grow. The text grows with them: a token costs
the decoding of a few tokens (`DecodeStream` of the tokenizers library), not of the whole answer.
"""

from typing import Any, Literal

from tokenizers.decoders import DecodeStream

from nanovllm.engine import details
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, Logprob

OutputKind = Literal["cumulative", "delta", "final_only"]
"""vLLM's RequestOutputKind: each output holds all so far, or what is new, or there is only the last."""


class GrowingText:
    """The text of an answer, token by token: only what no later token can change.

    held: how many characters at the end are kept back while the answer grows, as they may turn out
    to be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool, held: int) -> None:
        self.text = ""
        self._decoded = ""
        self._tokenizer, self._held = tokenizer, held
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def add(self, token_ids: list[int]) -> str:
        """Takes tokens; the text that they add, which may be "" (part of a character)."""
        new = [self._stream.step(self._tokenizer, token) or "" for token in token_ids]
        if not any(new):
            return ""
        self._decoded += "".join(new)
        added = self._decoded[len(self.text) : max(0, len(self._decoded) - self._held)]
        self.text += added
        return added


class Answer:
    """One sequence, and how much of it has been handed out. index: which of the n answers to a
    prompt it is. engine: an LLMEngine, asked for the complete output at the end.
    """

    def __init__(self, engine: Any, seq: Sequence, index: int, kind: OutputKind) -> None:
        self.seq, self.index, self.kind = seq, index, kind
        self.stream: Any = None  # where its outputs go
        self.rank = (0, index)  # its priority, and how many answers came before it
        self.last_token_time: float | None = None
        self.num_tokens = 0
        self._engine, self._total = engine, 0.0
        self._logprobs: list[dict[int, Logprob]] = []
        params: Any = seq.params
        self._grows = None
        if engine.tokenizer is not None and getattr(params, "detokenize", True):
            cut = not getattr(params, "include_stop_str_in_output", False)
            stops = (getattr(params, "stop", ()) or ()) if cut else ()
            held = max(map(len, stops), default=1) - 1
            self._grows = GrowingText(
                engine.tokenizer, getattr(params, "skip_special_tokens", True), held
            )

    def output(self, num_tokens: int, reason: str | None) -> CompletionOutput | None:
        """The output after a step, when the answer had `num_tokens` tokens; reason: why it ended
        then, None while it goes on. None where nothing is to be handed out yet.
        """
        if reason is not None:
            return self._last(reason)
        first, self.num_tokens = self.num_tokens, num_tokens
        if self.kind == "final_only":
            return None
        seq = self.seq
        prompt = seq.num_prompt_tokens
        new = seq.token_ids[prompt + first : prompt + num_tokens]
        added = self._grows.add(new) if self._grows is not None else ""
        if getattr(seq, "num_prompt_logprobs", None) is not None:
            details.attach_prompt_logprobs(seq, self._engine.tokenizer)
        wants = seq.params.logprobs is not None and not getattr(seq, "hides_logprobs", False)
        logprobs: list[dict[int, Logprob]] | None = None
        if wants:
            found = seq.logprobs[first:num_tokens]
            self._total += sum(entry[0] for entry in found)
            count, tokenizer = seq.params.logprobs or 0, self._engine.tokenizer
            logprobs = [
                details.entry(token, entry, count, tokenizer)
                for token, entry in zip(new, found, strict=True)
            ]
        if self.kind == "cumulative":
            added = self._grows.text if self._grows is not None else ""
            new = seq.token_ids[prompt : prompt + num_tokens]
            if logprobs is not None:
                self._logprobs += logprobs
                logprobs = list(self._logprobs)
        total = self._total if wants else None
        return CompletionOutput(self.index, added, new, total, logprobs, None)

    def _last(self, reason: str) -> CompletionOutput:
        """The last output. Its text is that of the offline interface, decoded once as a whole."""
        completion: CompletionOutput = self._engine.output_of(self.seq).outputs[0]
        completion.index, completion.finish_reason = self.index, reason
        first, self.num_tokens = self.num_tokens, len(completion.token_ids)
        if self.kind == "delta":
            completion.token_ids = completion.token_ids[first:]
            if self._grows is not None:  # what was handed out cannot be taken back
                completion.text = completion.text[len(self._grows.text) :]
            if completion.logprobs is not None:
                completion.logprobs = completion.logprobs[first:]
        return completion
