"""Mutants of a module: the same syntax tree with a single place changed.

The operators are those of the literature (Offutt et al., "An experimental determination of sufficient
mutant operators", TOSEM 1996: arithmetic, relational, logical, absolute value, unary insertion), and
those that Python makes useful: slices, filters of comprehensions, min for max, deleted statements.
Text is not changed: no docstring, no message of an error, no f-string, no annotation; strings are
changed where something is compared with them.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
NAMES = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "ceil": "floor",
    "floor": "ceil",
    "amax": "amin",
    "amin": "amax",
    "argmax": "argmin",
    "argmin": "argmax",
    "cumsum": "cumprod",
    "append": "remove",
    "issubset": "issuperset",
    "startswith": "endswith",
    "takewhile": "filter",
    "log": "log1p",
    "log1p": "log",
    "exp": "expm1",
    "expm1": "exp",
    "popleft": "pop",
}
SAYS = {"print", "warn"}
"""Calls that tell people something."""

BODIES = ("body", "orelse", "finalbody", "handlers", "cases")


@dataclass(frozen=True)
class Mutant:
    """One change. name: stays the same as long as the function around it does, whose digest is
    `function_digest`; statement: number of the statement (or header) that holds it.
    """

    module: str
    name: str
    line: int
    before: str
    after: str
    function_digest: str
    statement: int
    index: int


@dataclass
class _Place:
    """owner.field, or its item number `at`, becomes `new`."""

    operator: str
    owner: Any
    field: str
    at: int | None
    new: Any
    line: int
    statement: ast.stmt
    scope: tuple[str, ...]
    function: ast.AST

    def change(self) -> Any:
        """Returns what was there."""
        if self.at is None:
            old = getattr(self.owner, self.field)
            setattr(self.owner, self.field, self.new)
        else:
            items = getattr(self.owner, self.field)
            old, items[self.at] = items[self.at], self.new
        return old


def mutants_of(module: str, path: Path) -> list[Mutant]:
    """Every mutant of the module, in the order of its text. Of two that read the same, one."""
    source = path.read_text()
    tree = ast.parse(source)
    numbers, digests = _numbers(tree), dict[int, str]()
    counts: Counter[tuple[str, str]] = Counter()
    found, seen = [], set()
    for index, place in enumerate(list(_places(tree))):
        scope = ".".join(place.scope) or "<module>"
        counts[scope, place.operator] += 1
        name = f"{module}:{scope}:{place.operator}:{counts[scope, place.operator]}"
        around = place.statement if isinstance(place.function, ast.Module) else place.function
        if id(around) not in digests:
            # of the text: what is unparsed differs between versions of Python
            text = ast.get_source_segment(source, around) or ""
            digests[id(around)] = hashlib.sha256(text.encode()).hexdigest()[:12]
        before, number = _header(place.statement), numbers[id(place.statement)]
        new, old = place.new, place.change()
        after = _header(new if old is place.statement else place.statement)
        place.new = old
        place.change()
        if before != after and (number, after) not in seen:
            seen.add((number, after))
            found.append(
                Mutant(module, name, place.line, before, after, digests[id(around)], number, index)
            )
    return found


def mutated(source: str, index: int) -> ast.Module:
    """The tree with change number `index` made."""
    tree = ast.parse(source)
    list(_places(tree))[index].change()
    return ast.fix_missing_locations(tree)


def with_probes(source: str, module: str) -> ast.Module:
    """The tree, in which every statement calls `__reached__((module, its number))` before it runs."""
    tree = ast.parse(source)
    numbers = _numbers(tree)
    for node in list(ast.walk(tree)):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                setattr(node, field, list(_probed(module, body, numbers)))
    return ast.fix_missing_locations(tree)


def _probed(module: str, body: list[ast.stmt], numbers: dict[int, int]) -> Iterator[ast.stmt]:
    for i, statement in enumerate(body):
        first_words = i == 0 and _is_text(statement)
        future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        if not first_words and not future:
            name = ast.Name("__reached__", ast.Load())
            place = ast.Constant((module, numbers[id(statement)]))
            probe = ast.Expr(ast.Call(name, [place], []))
            yield ast.copy_location(probe, statement)
        yield statement


def _numbers(tree: ast.Module) -> dict[int, int]:
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return {id(statement): number for number, statement in enumerate(statements)}


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _header(statement: ast.stmt) -> str:
    """A statement without the ones inside it."""
    shallow: Any = copy.copy(statement)
    for field in BODIES:
        if getattr(shallow, field, None):
            setattr(shallow, field, [])
    if hasattr(shallow, "body"):
        shallow.body = [ast.Expr(ast.Constant(...))]
    if hasattr(shallow, "decorator_list"):
        shallow.decorator_list = []
    return ast.unparse(shallow).removesuffix("\n    ...").strip()


# -- where a change is possible --------------------------------------------------------------------


def _places(tree: ast.Module) -> Iterator[_Place]:
    yield from _in_body(tree, "body", (), tree)


def _in_body(owner: Any, field: str, scope: tuple[str, ...], function: ast.AST) -> Iterator[_Place]:
    for at, statement in enumerate(getattr(owner, field)):
        if isinstance(statement, ast.stmt):
            yield from _in_statement(owner, field, at, statement, scope, function)
        else:  # an except or a case
            yield from _in_body(statement, "body", scope, function)


def _in_statement(
    owner: Any,
    field: str,
    at: int,
    statement: Any,
    scope: tuple[str, ...],
    function: ast.AST,
) -> Iterator[_Place]:
    if _is_text(statement) or isinstance(statement, ast.Raise | ast.Import | ast.ImportFrom):
        return
    if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
        return
    inner = scope
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        inner = (*scope, statement.name)
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) and isinstance(
        function, ast.Module
    ):
        function = statement  # methods have a digest each, functions in functions have not

    def place(operator: str, owner: Any, field: str, at: int | None, new: Any) -> _Place:
        line = getattr(owner, "lineno", statement.lineno)
        return _Place(operator, owner, field, at, new, line, statement, inner, function)

    if _can_go(statement):
        yield place("delete", owner, field, at, ast.copy_location(ast.Pass(), statement))
    if isinstance(statement, ast.Break | ast.Continue):
        other = ast.Continue() if isinstance(statement, ast.Break) else ast.Break()
        yield place("loop", owner, field, at, ast.copy_location(other, statement))
    for name, value in ast.iter_fields(statement):
        if name in BODIES or name in ("decorator_list", "annotation", "returns", "msg"):
            continue
        if name == "op" and type(value) in ARITHMETIC:
            yield place("arithmetic", statement, "op", None, ARITHMETIC[type(value)]())
        for number, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                index = number if isinstance(value, list) else None
                yield from _in_expression(statement, name, index, child, place)
    for name in BODIES:
        if getattr(statement, name, None):
            yield from _in_body(statement, name, inner, function)


def _can_go(statement: ast.stmt) -> bool:
    """Whether the statement can be left out without a name becoming unknown."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call) and not _says(statement.value)
    if isinstance(statement, ast.Assign):
        return all(isinstance(x, ast.Attribute | ast.Subscript) for x in statement.targets)
    return isinstance(statement, ast.AugAssign | ast.Delete | ast.Break | ast.Continue)


def _says(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in SAYS


def _in_expression(
    owner: Any, field: str, at: int | None, node: Any, place: Any, compared: bool = False
) -> Iterator[_Place]:
    """compared: the node is an operand of a comparison, so a string in it decides something."""
    if isinstance(node, ast.JoinedStr | ast.arg) or (isinstance(node, ast.Call) and _says(node)):
        return
    match node:
        case ast.Compare():
            for number, op in enumerate(node.ops):
                for other in COMPARISONS[type(op)]:
                    yield place("compare", node, "ops", number, other())
        case ast.BoolOp():
            other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield place("boolean", node, "op", None, other)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield place("unary", owner, field, at, node.operand)
        case ast.BinOp() if type(node.op) in ARITHMETIC and not _is_type(node):
            yield place("arithmetic", node, "op", None, ARITHMETIC[type(node.op)]())
        case ast.Constant():
            for value in _others(node.value, compared):
                yield place(
                    "constant", owner, field, at, ast.copy_location(ast.Constant(value), node)
                )
        case ast.Call():
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", None))
            if name in NAMES:
                attribute = "attr" if isinstance(function, ast.Attribute) else "id"
                yield place("call", function, attribute, None, NAMES[name])
        case ast.Slice():
            for bound in ("lower", "upper", "step"):
                if getattr(node, bound) is not None:
                    yield place("slice", node, bound, None, None)
        case ast.comprehension():
            for number in range(len(node.ifs)):
                yield place("filter", node, "ifs", number, ast.Constant(True))
    if field in ("test", "ifs") and not isinstance(node, ast.Compare | ast.UnaryOp):
        yield place("negate", owner, field, at, ast.UnaryOp(ast.Not(), node))
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        many = isinstance(value, list)
        for number, child in enumerate(value if many else [value]):
            if isinstance(child, ast.AST):
                inside = isinstance(node, ast.Compare) or (
                    compared and isinstance(node, ast.Tuple | ast.Set | ast.List)
                )
                yield from _in_expression(
                    node, name, number if many else None, child, place, inside
                )


def _others(value: Any, compared: bool) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1] if value != 1 else [2, 0]
    if isinstance(value, float):
        return [value * 2 if value else 1.0]
    if isinstance(value, str) and compared:
        return [value + "?"]
    return []


def _is_type(node: ast.BinOp) -> bool:
    """`int | None`."""
    if not isinstance(node.op, ast.BitOr):
        return False
    text = ast.unparse(node)
    return "None" in text or all(
        part.strip() in ("int", "float", "str") for part in text.split("|")
    )
