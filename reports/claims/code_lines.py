"""Counts code lines in the same way for every project: lines that hold code, without blanks, comments and
docstrings.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

_NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def count_code_lines(file: Path) -> int:
    """Physical lines of a Python file that carry at least one token of code. Raises SyntaxError for
    a file that is not Python.
    """
    source = file.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for docstring in _docstrings(ast.parse(source)):
        lines.difference_update(
            range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1)
        )
    return len(lines)


def count_statements(file: Path) -> int:
    """Statements of a Python file, docstrings not among them: unlike lines, they do not become
    fewer by writing denser.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - len(_docstrings(tree))


def _docstrings(tree: ast.Module) -> list[ast.stmt]:
    firsts = [
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
    ]
    return [
        first
        for first in firsts
        if isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ]
