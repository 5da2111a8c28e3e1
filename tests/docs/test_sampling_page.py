"""The examples of docs/chat-and-sampling.md, run as they stand there, one after another."""

from __future__ import annotations

from typing import Any

import pytest

from tests.docs.pages import blocks


def test_the_example_of_the_quick_start_runs(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    for code in blocks("docs/quick-start.md", "python"):
        exec(compile(code, "quick-start.md", "exec"), scope)
    assert capsys.readouterr().out.startswith("[")


def test_the_examples_run_and_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    for code in blocks("docs/chat-and-sampling.md", "python"):
        exec(compile(code, "chat-and-sampling.md", "exec"), scope)
    said = capsys.readouterr().out
    assert said.startswith("256\n")
    assert "<|system|>Answer briefly.\n<|user|>Why is the sky blue?\n<|assistant|>\n" in said
    assert "\n0 " in said
    assert "\n2 " in said
    assert "True stop True\n[77, 77, 77, 77]\nFalse\n" in said
    assert "prompt tokens have a log-probability" in said
