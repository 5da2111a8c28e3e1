"""Recorded traces of arrivals: JSON lines, and converters of three published formats.

A line is one request, in order of time:

    {"time_s": 0.25, "prompt_tokens": 812, "output_tokens": 64, "hash_ids": [7, 8]}

`hash_ids` may be left out. Each stands for a block of `block_tokens` prompt tokens (512 in Mooncake's
traces); equal ids are equal blocks, so requests share prefixes as they did when the trace was recorded.

    python -m experiments.load.traces azure     AzureLLMInferenceTrace_conv.csv  trace.jsonl
    python -m experiments.load.traces burstgpt  BurstGPT_1.csv                   trace.jsonl
    python -m experiments.load.traces mooncake  conversation_trace.jsonl         trace.jsonl

Azure (Azure Public Dataset, LLM inference traces): TIMESTAMP, ContextTokens, GeneratedTokens.
BurstGPT: Timestamp in seconds, Request tokens, Response tokens; failed requests, which have no
response tokens, are left out. Mooncake: timestamp in milliseconds, input_length, output_length,
hash_ids. Times are counted from the first request.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NotRequired, TypedDict


class TraceLine(TypedDict):
    """One request of a trace."""

    time_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: NotRequired[list[int]]


class TraceError(ValueError):
    """A trace that cannot be read; the message names the file, the line and what is allowed."""


def read(path: str | Path, most: int | None = None) -> tuple[list[TraceLine], str]:
    """The first `most` requests of a trace, and the SHA-256 of the whole file. Raises TraceError."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise TraceError(
            f"{path}: {error.strerror or error}; give the path of a trace as JSON lines "
            "(python -m experiments.load.traces converts published ones)"
        ) from error
    lines: list[TraceLine] = []
    for number, text in enumerate(content.decode(errors="replace").splitlines(), start=1):
        if most is not None and len(lines) == most:
            break
        if text.strip():
            lines.append(_line(text, f"{path}, line {number}"))
            if len(lines) > 1 and lines[-1]["time_s"] < lines[-2]["time_s"]:
                raise TraceError(
                    f"{path}, line {number}: time_s is {lines[-1]['time_s']}, earlier than the line before, "
                    f"{lines[-2]['time_s']}; sort the lines by time"
                )
    if not lines:
        raise TraceError(f"{path}: no requests; a trace has one JSON object a line")
    return lines, hashlib.sha256(content).hexdigest()


def _line(text: str, where: str) -> TraceLine:
    try:
        given = json.loads(text)
    except ValueError as error:
        raise TraceError(f"{where}: not JSON ({error})") from error
    allowed = {"time_s", "prompt_tokens", "output_tokens", "hash_ids"}
    needed = allowed - {"hash_ids"}
    if not isinstance(given, dict) or set(given) - allowed or needed - set(given):
        raise TraceError(
            f"{where}: {text[:80]!r} is not allowed; allowed: an object with {', '.join(sorted(needed))} and, if known, hash_ids"
        )
    time_s, ids = given["time_s"], given.get("hash_ids", [])
    if isinstance(time_s, bool) or not isinstance(time_s, (int, float)) or not 0 <= time_s < 1e9:
        raise TraceError(f"{where}: time_s is {time_s!r}; allowed: seconds, 0 or more")
    for name in ("prompt_tokens", "output_tokens"):
        if type(given[name]) is not int or given[name] < 1:
            raise TraceError(f"{where}: {name} is {given[name]!r}; allowed: a whole number above 0")
    if not isinstance(ids, list) or any(type(each) is not int for each in ids):
        raise TraceError(f"{where}: hash_ids is {ids!r}; allowed: a list of whole numbers")
    return given  # type: ignore[return-value]


def azure(rows: Iterable[str]) -> Iterator[TraceLine]:
    """The rows of an Azure LLM inference trace, header first."""
    for row in csv.DictReader(rows):
        # seven digits of a second in the published files; Python reads six
        date, _, fraction = row["TIMESTAMP"].partition(".")
        digits = "".join(c for c in fraction if c.isdigit())
        moment = datetime.fromisoformat(date.split("+")[0])
        yield {
            "time_s": (moment - datetime(1970, 1, 1)).total_seconds() + float(f"0.{digits or 0}"),
            "prompt_tokens": int(row["ContextTokens"]),
            "output_tokens": int(row["GeneratedTokens"]),
        }


def burstgpt(rows: Iterable[str]) -> Iterator[TraceLine]:
    """The rows of a BurstGPT trace, header first."""
    for row in csv.DictReader(rows):
        yield {
            "time_s": float(row["Timestamp"]),
            "prompt_tokens": int(row["Request tokens"]),
            "output_tokens": int(row["Response tokens"]),
        }


def mooncake(rows: Iterable[str]) -> Iterator[TraceLine]:
    """The lines of a Mooncake trace."""
    for row in filter(str.strip, rows):
        given = json.loads(row)
        yield {
            "time_s": given["timestamp"] / 1000,
            "prompt_tokens": given["input_length"],
            "output_tokens": given["output_length"],
            "hash_ids": given.get("hash_ids", []),
        }


FORMATS: dict[str, Callable[[Iterable[str]], Iterator[TraceLine]]] = {
    "azure": azure,
    "burstgpt": burstgpt,
    "mooncake": mooncake,
}


def convert(format_name: str, rows: Iterable[str]) -> list[TraceLine]:
    """A published trace as lines of ours: sorted, timed from its first request, without requests
    that have no prompt or no output. Raises TraceError for a file of another format.
    """
    try:
        lines = sorted(FORMATS[format_name](rows), key=lambda line: line["time_s"])
    except (KeyError, ValueError, TypeError) as error:
        raise TraceError(
            f"not a trace of format {format_name}: {type(error).__name__} {error}; formats: {', '.join(FORMATS)}"
        ) from error
    lines = [line for line in lines if line["prompt_tokens"] > 0 and line["output_tokens"] > 0]
    for line in lines[::-1]:
        line["time_s"] = round(line["time_s"] - lines[0]["time_s"], 6)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.load.traces",
        description="Converts a published trace to JSON lines.",
    )
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    try:
        with given.source.open(newline="", encoding="utf-8-sig") as source:
            lines = convert(given.format, source)
    except (TraceError, OSError) as error:
        parser.error(f"{given.source}: {error}")
    given.target.write_text(
        "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines), encoding="utf-8"
    )
    print(f"{len(lines)} requests over {lines[-1]['time_s'] if lines else 0:.1f} s: {given.target}")


if __name__ == "__main__":
    main()
