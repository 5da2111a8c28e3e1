"""`nanovllm chat MODEL`: a conversation on the terminal, every token as it is generated.

The checkpoint's own chat template makes the prompt, as in `LLM.chat`. With the prefix cache, which is
on by default, a turn computes only what is new in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanovllm.engine.llm_engine import LLM
from nanovllm.models.checkpoint import PRESETS
from nanovllm.models.loader import resolve_model
from nanovllm.requests import chat
from nanovllm.requests.chat import conversations_of, render, special_tokens, template_of

Message = dict[str, str]


class ChatError(Exception):
    """A conversation that cannot begin or go on; the message says what to do."""


class Conversation:
    """Messages and the engine that answers them. Raises ChatError for a model that cannot be loaded or
    has no chat template.

    template: the text of a Jinja template; None takes the checkpoint's. settings: fields of
    SamplingParams that replace the checkpoint's recommendations. engine: arguments of LLM.
    """

    def __init__(
        self,
        model: str,
        *,
        system: str | None = None,
        template: str | None = None,
        settings: dict[str, Any] | None = None,
        engine: dict[str, Any] | None = None,
    ) -> None:
        try:
            folder = resolve_model(model)
            self._template = template if template is not None else _own_template(model, folder)
            self._values = {**special_tokens(folder), "tools": None, "documents": None}
            self._llm = LLM(model, **(engine or {}))
            self._params = dataclasses.replace(
                self._llm.get_default_sampling_params(), **(settings or {})
            )
        except (ValueError, TypeError, OSError) as error:
            raise ChatError(str(error)) from error
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def close(self) -> None:
        """Frees the engine."""
        self._llm.close()

    def answer(self, text: str) -> Iterator[str]:
        """The answer to a user's message, in pieces as they are generated. Afterwards both are part of
        the conversation. Raises ChatError, and leaves the conversation as it was, if the template
        refuses the message or the conversation has outgrown the context.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        request, said = f"message-{len(asked)}", ""
        try:
            prompt = render(
                self._template,
                conversations_of(asked)[0],
                {**self._values, "add_generation_prompt": True},
            )
            tokenizer = self._llm.tokenizer
            assert tokenizer is not None, "an engine has one unless it was told to do without"
            ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            self._llm.add_request(request, {"prompt_token_ids": ids}, self._params)
        except (ValueError, TypeError) as error:
            raise ChatError(str(error)) from error
        try:
            while self._llm.has_unfinished_requests():
                for output in self._llm.step():
                    grown = output.outputs[0].text
                    if len(grown) > len(said):
                        yield grown[len(said) :]
                        said = grown
        finally:
            self._llm.abort(request)  # of an answer that nobody reads on
        self.messages = [*asked, {"role": "assistant", "content": said}]


def _own_template(model: str, folder: Path) -> str:
    """The template of a checkpoint; where it has none, an error that says what this command can do."""
    try:
        return template_of(folder, False)
    except ValueError as error:
        if "no chat template" not in str(error):
            raise
        presets = f"the presets {', '.join(PRESETS)} have none, as their weights are random"
        raise ChatError(
            f"{model} has no chat template, which makes a prompt of a conversation; {presets}. Give one, a file in Jinja, "
            "with --chat-template FILE; or talk with a model that has one: smollm2 (`make real-weights` fetches it), or a "
            "checkpoint that was trained to chat, such as Qwen/Qwen3-0.6B"
        ) from error


def converse(
    conversation: Conversation, read: Callable[[], str], write: Callable[[str], object]
) -> None:
    """Answers what `read` returns until it raises EOFError; empty lines are passed over."""
    while True:
        try:
            text = read().strip()
        except EOFError:
            return
        if not text:
            continue
        try:
            for piece in conversation.answer(text):
                write(piece)
            write("\n")
        except ChatError as error:
            write(f"{error}\n")


def read_template(file: Path | None) -> str | None:
    """The text of a template's file. Raises ChatError."""
    try:
        return chat.read_template(file) if file else None
    except ValueError as error:
        raise ChatError(str(error)) from error
