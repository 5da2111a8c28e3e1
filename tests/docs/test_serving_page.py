"""The examples of docs/serving.md, and what its tables say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nanovllm.serving import command
from tests.docs.pages import blocks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()


def test_the_asyncio_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("docs/serving.md", "python")[0]
    exec(compile(code, "serving.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.startswith("[")


def test_the_table_has_every_option() -> None:
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(command.serve)
    known = {p.opts[0] for p in typer.main.get_command(app).params if p.param_type_name == "option"}
    told = set(re.findall(r"`(--[a-z-]+)", PAGE))
    own = {
        "--help",
        "--install-completion",
        "--show-completion",
    }  # of typer, in some of its versions
    assert known - own == told


def test_the_metrics_of_the_page_exist() -> None:
    code = (ROOT / "src/nanovllm/serving/metrics.py").read_text()
    told = set(re.findall(r"`((?:vllm|nanovllm):[a-z0-9_]+)`", PAGE))
    assert told == set(re.findall(r'"((?:vllm|nanovllm):[a-z0-9_]+)"', code))
