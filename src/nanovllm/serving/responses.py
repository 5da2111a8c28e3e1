"""What the server answers: OpenAI's JSON, for whole answers and for the chunks of a stream."""

import json
import time
from collections.abc import Iterable
from typing import Any

from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput

DONE = b"data: [DONE]\n\n"


class Usage:
    """Counts the tokens of a request, over all its prompts."""

    def __init__(self) -> None:
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0
        self._seen: set[int] = set()

    def add(self, prompt: int, output: RequestOutput) -> None:
        """prompt: which of the prompts. output: what is new of it."""
        if prompt not in self._seen:
            self._seen.add(prompt)
            self.prompt_tokens += len(output.prompt_token_ids)
            self.cached_tokens += output.num_cached_tokens
        self.completion_tokens += sum(len(c.token_ids) for c in output.outputs)

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Writer:
    """Makes the JSON of one request. chunks: whether it is a stream. num_answers: n."""

    kinds = ("", "")  # `object` of a whole answer, and of a chunk

    def __init__(self, request_id: str, model: str, chunks: bool, num_answers: int) -> None:
        self.usage = Usage()
        self._num_answers, self._is_chunk = num_answers, chunks
        self._head = {
            "id": request_id,
            "object": self.kinds[chunks],
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, outputs: Iterable[tuple[int, RequestOutput]]) -> dict[str, Any]:
        """The response to a request that is no stream; outputs: the last of each prompt."""
        choices = []
        for prompt, output in sorted(outputs, key=lambda pair: pair[0]):
            self.usage.add(prompt, output)
            choices += self._choices(prompt, output)
        return {**self._head, "choices": choices, "usage": self.usage.as_json()}

    def chunk(self, prompt: int, output: RequestOutput, with_usage: bool) -> bytes:
        """Events of a stream, one for each answer that has advanced, as clients look at the first
        choice of an event only. output: a delta.
        """
        self.usage.add(prompt, output)
        choices = self._choices(prompt, output)
        return b"".join(self.event([choice], with_usage) for choice in choices)

    def event(self, choices: list[dict[str, Any]], with_usage: bool) -> bytes:
        usage = {"usage": self.usage.as_json()} if with_usage else {}
        return event({**self._head, "choices": choices, **usage})

    def choice(self, index: int, completion: CompletionOutput) -> dict[str, Any]:
        raise NotImplementedError

    def begin(self, num_prompts: int) -> list[bytes]:
        """The events before the first token."""
        return []

    def _choices(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]:
        return [self.choice(self._index(prompt, c), c) for c in output.outputs]

    def _index(self, prompt: int, completion: CompletionOutput) -> int:
        return prompt * self._num_answers + completion.index


class CompletionWriter(Writer):
    kinds = ("text_completion", "text_completion")

    with_token_ids = False
    """Whether choices hold the ids of their tokens and, the first of each answer, of the prompt's."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._offsets: dict[int, int] = {}
        self._told: set[int] = set()

    def choice(self, index: int, completion: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "text": completion.text,
            "logprobs": self._logprobs(index, completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def _choices(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]:
        choices = super()._choices(prompt, output)
        if self.with_token_ids:
            for choice, completion in zip(choices, output.outputs, strict=True):
                is_new = choice["index"] not in self._told
                self._told.add(choice["index"])
                choice["token_ids"] = list(completion.token_ids)
                choice["prompt_token_ids"] = list(output.prompt_token_ids) if is_new else None
        return choices

    def _logprobs(self, index: int, completion: CompletionOutput) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        tokens, chosen, most, offsets = [], [], [], []
        at = self._offsets.get(index, 0)
        for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
            own = entry[token_id]
            tokens.append(own.decoded_token or "")
            chosen.append(own.logprob)
            most.append({(lp.decoded_token or ""): lp.logprob for lp in entry.values()})
            offsets.append(at)
            at += len(tokens[-1])
        self._offsets[index] = at
        return {
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": most,
            "text_offset": offsets,
        }


class ChatWriter(Writer):
    kinds = ("chat.completion", "chat.completion.chunk")

    def choice(self, index: int, completion: CompletionOutput) -> dict[str, Any]:
        message = {"content": completion.text}
        if not self._is_chunk:
            message = {"role": "assistant", **message}
        return {
            "index": index,
            "delta" if self._is_chunk else "message": message,
            "logprobs": self._logprobs(completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def begin(self, num_prompts: int) -> list[bytes]:
        delta = {"role": "assistant", "content": ""}
        return [
            self.event(
                [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}], False
            )
            for i in range(self._num_answers)
        ]

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        content = []
        for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
            # the chosen token comes last where it is not among the most likely ones that were asked for
            most = [_token(lp) for lp in sorted(entry.values(), key=lambda lp: lp.rank)]
            content.append({**_token(entry[token_id]), "top_logprobs": most})
        return {"content": content}


def _token(found: Logprob) -> dict[str, Any]:
    text = found.decoded_token or ""
    return {"token": text, "logprob": found.logprob, "bytes": list(text.encode())}


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
