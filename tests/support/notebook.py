"""Writes docs/records.ipynb, the page docs/pandas.md as a notebook: python -m tests.support.notebook"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE, NOTEBOOK = ROOT / "docs" / "pandas.md", ROOT / "docs" / "records.ipynb"
_FIRST = """\
# from docs/, where this notebook lies, to the root of the clone
import os
from pathlib import Path

here = Path.cwd()
os.chdir(next(p for p in (here, *here.parents) if (p / "pyproject.toml").is_file()))
"""
_BLOCK = re.compile(r"```python\n(.*?)```\n", re.DOTALL)


def notebook(page: str) -> str:
    """The text of a notebook (nbformat 4.5) with a page's words and Python blocks, in their order."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, source: str) -> None:
        if not source.strip():
            return
        more = {"execution_count": None, "outputs": []} if kind == "code" else {}
        cells.append(
            {
                "cell_type": kind,
                "id": f"cell-{len(cells)}",
                "metadata": {},
                "source": source.strip().splitlines(keepends=True),
                **more,
            }
        )

    heading, words = page.split("\n\n", 1)
    add("markdown", heading)
    add("code", _FIRST)
    for number, part in enumerate(_BLOCK.split(words)):
        add("code" if number % 2 else "markdown", part)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
