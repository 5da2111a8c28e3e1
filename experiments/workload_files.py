"""Prompts that come from a file of JSON lines (workloads of kind `file`). Standard library only.

    {"prompt": "Why is the sky blue?", "output_tokens": 64}
    {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    {"prompt_token_ids": [504, 2, 19], "output_tokens": 8}

A plan has to be complete without the file, and texts need a model's tokenizer. So `read` packs the
lines into one string, the parameter `content`, and planning replaces its texts by token ids
(`experiments.study.prompts`). From then on, requests are made from `content` alone.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import zlib
from pathlib import Path
from typing import Any

Line = dict[str, Any]

PROMPTS = Path(__file__).with_name("prompts")
"""The sets that come with the project: prompts/NAME.jsonl."""
MOST_TOKENS = 4_000_000
"""Of all prompts of a file together, because a plan holds them."""
MOST_BYTES = 2**26
"""Of a file of prompts."""
_IGNORED = {"kind", "id"}
"""Keys that are allowed and change nothing."""


def find(path: str) -> Path:
    """A file, or the file of a set of PROMPTS by its name. Raises ValueError with what is there."""
    if (file := Path(path).expanduser()).is_file():
        return file
    if (known := PROMPTS / f"{path}.jsonl").is_file():
        return known
    names = sorted(file.stem for file in PROMPTS.glob("*.jsonl"))
    close = difflib.get_close_matches(path, names, n=1)
    raise ValueError(
        f"path: {path!r} is no file here and no set of prompts{f' (did you mean {close[0]}?)' if close else ''}; "
        f"allowed: a file of JSON lines, or one of {', '.join(names)}"
    )


def read(path: str, num_requests: int | None, most: int) -> str:
    """The first lines of a file, checked and packed. num_requests: how many; None for all of them. most: the
    largest number allowed anywhere.

    Raises ValueError that names the file and the line, what was given and what is allowed.
    """
    file = find(path)
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ValueError(
            f"path: {file} has {size:,} bytes; allowed: at most {MOST_BYTES:,}; give the first lines in a file of their own"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors write a mark at its start
    except UnicodeDecodeError as error:
        raise ValueError(
            f"path: {file} is no text in UTF-8 ({error}); allowed: a file of JSON lines"
        ) from error
    lines: list[Line] = []
    # not splitlines, which also ends lines at characters that JSON allows in texts
    for number, written in enumerate(text.split("\n"), 1):
        if len(lines) == num_requests:
            break
        if not written.strip():
            continue
        try:
            line = json.loads(written)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{file}, line {number}: no JSON ({error}); allowed: one JSON object a line"
            ) from error
        try:
            lines.append(_checked(line, most))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    if not lines:
        raise ValueError(f"path: {file} holds no line; allowed: a JSON object in each of its lines")
    if num_requests is not None and len(lines) < num_requests:
        raise ValueError(
            f"num_requests: {num_requests} is not allowed; allowed: at most the {len(lines)} lines of {file}, or null for all"
        )
    return pack(lines)


def pack(lines: list[Line]) -> str:
    """Lines as one string: JSON, compressed, in base64."""
    text = json.dumps(lines, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpack(content: str) -> list[Line]:
    """The lines of `pack`. Raises ValueError where `content` is something else."""
    try:
        return json.loads(zlib.decompress(base64.b64decode(content, validate=True)))  # type: ignore[no-any-return]
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(
            f"content: not what a plan holds ({error}); leave it out, and it is read from path"
        ) from error


def has_texts(content: str) -> bool:
    """Whether prompts are still to be tokenized."""
    return any("prompt_token_ids" not in line for line in unpack(content))


def prompts_of_file(content: str, output_tokens: int) -> tuple[list[list[int]], list[int]]:
    """(token ids, lengths of outputs) of the lines of a tokenized file. output_tokens: for lines that name
    none. Raises ValueError for texts.
    """
    lines = unpack(content)
    if has_texts(content):
        raise ValueError(
            "content: its prompts are texts; they become token ids when a plan is made for a model"
        )
    return [line["prompt_token_ids"] for line in lines], [
        line.get("output_tokens", output_tokens) for line in lines
    ]


def _checked(line: Any, most: int) -> Line:
    if not isinstance(line, dict):
        raise ValueError(f"a {type(line).__name__}; allowed: a JSON object")
    try:
        json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            "half of a character (a lone \\ud800 to \\udfff); allowed: whole characters"
        ) from error
    return _check_prompt({key: value for key, value in line.items() if key not in _IGNORED}, most)


def _check_prompt(line: Line, most: int) -> Line:
    kinds = ("prompt", "messages", "prompt_token_ids")
    if unknown := sorted(set(line) - {*kinds, "output_tokens"}):
        raise ValueError(
            f"{unknown[0]}: unknown key; allowed: one of {', '.join(kinds)}, and output_tokens"
        )
    given = [key for key in kinds if key in line]
    if len(given) != 1:
        raise ValueError(
            f"{' and '.join(given) or 'no prompt'}; allowed: exactly one of {', '.join(kinds)}"
        )
    prompt = line[given[0]]
    if given[0] == "prompt":
        _require(isinstance(prompt, str) and prompt != "", "prompt", prompt, "a text")
    elif given[0] == "messages":
        _require(
            isinstance(prompt, list)
            and prompt != []
            and all(
                isinstance(message, dict)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)
                for message in prompt
            ),
            "messages",
            prompt,
            'a list of {"role": "user", "content": "..."}',
        )
    else:
        _require(
            isinstance(prompt, list)
            and prompt != []
            and all(type(token) is int and 0 <= token < 2**31 for token in prompt),
            "prompt_token_ids",
            prompt,
            "a list of token ids",
        )
    if "output_tokens" in line:
        _require_length("output_tokens", line["output_tokens"], most)
    return line


def _require_length(name: str, value: Any, most: int) -> None:
    _require(
        type(value) is int and 1 <= value <= most, name, value, f"a whole number from 1 to {most}"
    )


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        shown = json.dumps(value, ensure_ascii=False)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ValueError(f"{name}: {shown} is not allowed; allowed: {allowed}")
