"""Conversations: the chat template of a checkpoint turns them into prompts. Loaded by LLM.chat and
LLM.get_tokenizer.

A template is a Jinja program that comes with the checkpoint, so it runs in Jinja's sandbox, which
gives it no access to Python. Names and filters are those that transformers gives templates; the
tests compare the result with transformers' apply_chat_template.
"""

import datetime
import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanovllm.models.config import read_if_there
from nanovllm.models.loader import resolve_model
from nanovllm.outputs import RequestOutput

Message = Mapping[str, Any]
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "lora_request": (None,),
    "mm_processor_kwargs": (None, {}),
    "chat_template_content_format": ("auto", "string"),
}
"""Arguments of vLLM's chat, with the values that ask for nothing."""
ROLES = ("system", "developer", "user", "assistant", "tool")
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def chat(
    llm: Any,
    messages: SequenceOf[Message] | SequenceOf[SequenceOf[Message]],
    sampling_params: Any = None,
    use_tqdm: bool = True,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: SequenceOf[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **others: Any,
) -> list[RequestOutput]:
    """Answers one conversation, or each of a list; one output for each. As vLLM's LLM.chat.

    messages: {"role": one of ROLES, "content": a text, or a list of {"type": "text", "text": ...}}.
    chat_template: the text of a Jinja template; None takes the checkpoint's.
    add_generation_prompt: ends the prompt with what begins an answer. continue_final_message: leaves
    the last message open instead, and the answer continues it (give add_generation_prompt=False).
    tools: JSON schemas of functions. chat_template_kwargs: more values for the template, such as
    enable_thinking. others: vLLM's arguments that are not built, with the values of NOT_BUILT.

    Raises ValueError for a checkpoint without a template, for messages that are not as above, and
    for what the template refuses; TypeError for arguments that are not of these types or unknown.
    """
    for name, value in others.items():
        if name not in NOT_BUILT:
            raise TypeError(f"unknown argument {name} of LLM.chat")
        if value not in NOT_BUILT[name]:
            raise ValueError(
                f"{name}={value!r} is not built in this engine; leave it out, or give {NOT_BUILT[name][0]!r}"
            )
    found = prompts_of(
        llm,
        messages,
        chat_template=chat_template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
    )
    prompts = [{"prompt_token_ids": token_ids} for _, token_ids in found]
    outputs: list[RequestOutput] = llm.generate(prompts, sampling_params, use_tqdm=use_tqdm)
    for output, (text, _) in zip(outputs, found, strict=True):
        output.prompt = text
    return outputs


def prompts_of(
    llm: Any,
    messages: Any,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: SequenceOf[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[tuple[str, list[int]]]:
    """The prompt of each conversation: its text and its tokens. llm: what has the tokenizer and the
    config of an engine. The arguments and errors are those of `chat`.
    """
    if continue_final_message and add_generation_prompt:
        raise ValueError(
            "continue_final_message=True continues the last message, add_generation_prompt=True begins another: "
            "set one of them to False"
        )
    if llm.tokenizer is None:
        raise ValueError("LLM.chat needs a tokenizer: leave skip_tokenizer_init out")
    folder = resolve_model(llm.config.tokenizer or llm.config.model)
    template = chat_template if chat_template is not None else template_of(folder, bool(tools))
    values = {
        **special_tokens(folder),
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **(chat_template_kwargs or {}),
    }
    found = []
    for conversation in conversations_of(messages):
        text = render(template, conversation, values)
        if continue_final_message:
            text = without_end(text, conversation[-1]["content"])
        found.append((text, llm.tokenizer.encode(text, add_special_tokens=False).ids))
    return found


def hf_tokenizer(config: Any) -> Any:
    """The tokenizer of an engine's checkpoint, as transformers loads it. Runs no code of the
    checkpoint.
    """
    from transformers import AutoTokenizer

    folder = resolve_model(config.tokenizer or config.model)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def conversations_of(messages: Any) -> list[list[dict[str, Any]]]:
    """Checks one conversation or several, and joins the parts of contents."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, SequenceOf):
        raise TypeError(
            f"messages is a {type(messages).__name__}; give a list of {{'role': ..., 'content': ...}}, or a list of such lists"
        )
    several = bool(messages) and all(isinstance(one, (list, tuple)) for one in messages)
    found = [
        [_message(message, place) for place, message in enumerate(one)]
        for one in (messages if several else [messages])
    ]
    if not all(found):
        raise ValueError("a conversation is empty; give at least one message")
    return found


def _message(message: Any, place: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(
            f"message {place} is a {type(message).__name__}; give {{'role': ..., 'content': ...}}"
        )
    if message.get("role") not in ROLES:
        raise ValueError(
            f"message {place} has role={message.get('role')!r}; allowed are {', '.join(ROLES)}"
        )
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise ValueError(
                    f"message {place} has content of type {kind!r}; this engine reads text only"
                )
            if not isinstance(part.get("text"), str):
                raise ValueError(
                    f"message {place} has a part of type 'text' with text={part.get('text')!r}; give a text"
                )
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(
            f"message {place} has content={content!r}; give a text, or a list of {{'type': 'text', 'text': ...}}"
        )
    return {**message, "content": content}


def template_of(folder: Path, with_tools: bool) -> str:
    """The chat template of a checkpoint: chat_template.jinja, or that of tokenizer_config.json, of
    which there may be several by name. Raises ValueError where there is none.
    """
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    template = read_if_there(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("tool_use" if with_tools else "default", named.get("default"))
    if not isinstance(template, str):
        raise ValueError(
            f"{folder.name} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), as base "
            "models have none: give chat_template, a text in Jinja (`nanovllm serve`: --chat-template FILE), or use "
            "LLM.generate (/v1/completions)"
        )
    return template


def read_template(file: Path) -> str:
    """The chat template in a file, for the option --chat-template. Raises ValueError for a file that
    cannot be read, and for what is no template.
    """
    try:
        template = file.read_text(encoding="utf-8")
        _environment().from_string(template)
    except FileNotFoundError:
        why = "there is no such file"
    except OSError as error:
        why = error.strerror or str(error)
    except UnicodeDecodeError:
        why = "not UTF-8 text"
    except TemplateError as error:
        why = f"not a Jinja template ({error})"
    else:
        return template
    raise ValueError(
        f"--chat-template {file}: {why}; give the path of a template in Jinja, or leave the option out, which takes the "
        "checkpoint's own"
    )


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that the files beside tokenizer.json name, as templates use them."""
    found = {
        **read_if_there(folder / "special_tokens_map.json"),
        **read_if_there(folder / "tokenizer_config.json"),
    }
    return {
        name: str(token["content"] if isinstance(token, Mapping) else token)
        for name in SPECIAL_TOKENS
        if (token := found.get(name)) is not None
    }


def render(template: str, conversation: list[dict[str, Any]], values: Mapping[str, Any]) -> str:
    """The prompt of a conversation. Raises ValueError with the template's own words where it refuses
    the messages, and where it is no template.
    """
    try:
        return _environment().from_string(template).render(messages=conversation, **values)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    return environment


def without_end(text: str, content: str) -> str:
    """The prompt up to the end of its last message's content, with what the template put after it
    cut off.
    """
    at = text.rfind(content.strip())
    if not content.strip() or at < 0:
        raise ValueError(
            "continue_final_message=True, but the chat template does not show the last message as it is, so that it "
            "cannot be continued"
        )
    whole = (
        content if text[at : at + len(content.lstrip())] == content.lstrip() else content.rstrip()
    )
    return text[: at + len(whole.lstrip())]


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks answers for training; here it shows what is inside."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, **how: Any) -> str:
    """Jinja's own filter escapes characters for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **how})
