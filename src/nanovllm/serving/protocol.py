"""The requests of OpenAI's API as this server takes them, with vLLM's additional fields.

A field that would change the answer and is not built is refused by name; so is an unknown one.
Nothing that a client asks for is silently left out.
"""

import dataclasses
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nanovllm.sampling_params import SamplingParams

MOST_LOGPROBS = 20
"""OpenAI's limit, and vLLM's default."""
MOST_BAD_WORDS = 128
"""Each costs time in every step, which all requests in the batch wait for."""
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "audio": (None,),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "length_penalty": (None, 1.0),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "prompt_logprobs": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "return_token_ids": (None, False),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}
"""Fields of OpenAI's and vLLM's API that are not built, with the values that ask for nothing."""
WITHOUT_EFFECT = (
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
)
"""Fields that change no token of an answer here, whatever their value."""
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "bad_words",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
"""Fields that go to SamplingParams under their own names."""
NEUTRAL = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "min_p": 0,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
}
"""Values of options that ask for nothing: a request with none other stays a plain one."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(BaseModel):
    """What completions and chat completions have in common. None is "not given" everywhere."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    best_of: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = Field(default=None, max_length=MOST_BAD_WORDS)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None

    @model_validator(mode="before")
    @classmethod
    def only_what_is_built(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, allowed in NOT_BUILT.items():
            if name in given and name not in cls.model_fields and given[name] not in allowed:
                raise ValueError(
                    f"{name}={shown(given[name])} is not built in this server, and without it the answer would differ; "
                    "leave it out"
                )
        dropped = {*NOT_BUILT, *WITHOUT_EFFECT} - cls.model_fields.keys()
        kept = {name: value for name, value in given.items() if name not in dropped}
        if unknown := sorted(set(kept) - cls.model_fields.keys()):
            raise ValueError(
                f"unknown field {', '.join(map(repr, unknown))}; known are {', '.join(cls.model_fields)}"
            )
        return kept

    @model_validator(mode="after")
    def fields_agree(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError(f"best_of={self.best_of} is not built in this server; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream=true")
        return self

    @property
    def wants_usage(self) -> tuple[bool, bool]:
        """At the end of a stream, and in each of its chunks."""
        options = self.stream_options or StreamOptions()
        return options.include_usage, options.include_usage and options.continuous_usage_stats

    def sampling_params(
        self, defaults: SamplingParams, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """defaults: what the checkpoint recommends, for fields that are not given. Raises ValueError
        or TypeError.
        """
        given: dict[str, Any] = {
            f.name: getattr(defaults, f.name) for f in dataclasses.fields(defaults)
        }
        given |= {"max_tokens": max_tokens, "logprobs": logprobs}
        for name in SAMPLING:
            value = getattr(self, name)
            if value is None or (name in NEUTRAL and value == NEUTRAL[name] and name not in given):
                continue
            given[name] = value
        if self.logit_bias:
            try:
                given["logit_bias"] = {int(t): bias for t, bias in self.logit_bias.items()}
            except ValueError:
                raise ValueError(
                    f"logit_bias={shown(self.logit_bias)} is not allowed; its keys must be token ids"
                ) from None
        return SamplingParams(**given)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    return_token_ids: bool | None = None

    def prompts(self) -> list[Any]:
        """Each as AsyncLLM takes it."""
        one = isinstance(self.prompt, str) or all(isinstance(t, int) for t in self.prompt)
        every = [self.prompt] if one else list(self.prompt)
        return [p if isinstance(p, str) else {"prompt_token_ids": p} for p in every]

    def params(self, defaults: SamplingParams) -> SamplingParams:
        most = 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default
        return self.sampling_params(defaults, most, self.logprobs)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def logprobs_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is allowed only with logprobs=true")
        return self

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """max_tokens None: as much as the context leaves."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling_params(
            defaults, most, (self.top_logprobs or 0) if self.logprobs else None
        )


def shown(value: Any) -> str:
    """A value in an error message, not longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
