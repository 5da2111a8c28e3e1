"""YAML files validated by pydantic models. Errors name the file, the key, what was given and what is
allowed.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from experiments.records.types import JsonObject

M = TypeVar("M", bound=BaseModel)


class SpecError(Exception):
    """An invalid file; the message names the file, the key and what is allowed."""


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys of a mapping, of which PyYAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # merged keys may be overridden
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, (str, int, float, bool, type(None))) and key in lines:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"duplicate key {key!r} in lines {lines[key]} and {line}: keep one",
                    None,
                )
            if isinstance(key, (str, int, float, bool, type(None))):
                lines[key] = line
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """Parses YAML and rejects duplicate keys. Raises yaml.YAMLError, also for too deep nesting."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


Place = tuple[str, ...]
"""The keys that lead to a value."""


def places(text: str) -> dict[Place, tuple[int, yaml.Node]]:
    """The line and the node of every key and list item of a YAML text that can be parsed. What an
    alias repeats has the place of its anchor, so that a node that holds itself ends.
    """
    found: dict[Place, tuple[int, yaml.Node]] = {}
    seen: set[int] = set()

    def walk(node: yaml.Node, place: Place) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[(*place, str(key.value))] = (key.start_mark.line + 1, value)
                walk(value, (*place, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                found[(*place, str(index))] = (item.start_mark.line + 1, item)
                walk(item, (*place, str(index)))

    if (top := yaml.compose(text, yaml.SafeLoader)) is not None:
        walk(top, ())
    return found


def names(folder: Path) -> list[str]:
    """The names of the YAML files in a folder, without suffix."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find(source: str | Path, folder: Path, what: str) -> Path:
    """The path of a file, given by path or by its name in `folder`. Raises SpecError."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{source}.yaml"
    if not path.is_file():
        known = ", ".join(names(folder)) or "(none)"
        raise SpecError(
            f"{source}: no such {what}{suggest(str(source), names(folder))}; "
            f"give the path of a YAML file, or a name from {_shown(folder)}: {known}"
        )
    return path


def load(model: type[M], path: Path, overrides: Iterable[str] = ()) -> tuple[M, JsonObject]:
    """The validated content of a file with `overrides` ("a.b=value") applied, and the overrides as a
    mapping. Raises SpecError.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = parse(text)
    # ValueError: 2026-99-99 is read as a date
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise SpecError(f"{_shown(path)}: not valid YAML: {error}") from error
    except OSError as error:
        raise SpecError(f"{_shown(path)}: cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise SpecError(f"{_shown(path)}: the file must be a mapping of keys to values")
    applied = _override(raw, overrides)
    try:
        return model.model_validate(raw), applied
    except ValidationError as error:
        where = places(text)
        lines = []
        for problem in error.errors():
            line = _line(where, problem, list(applied))
            lines.append(f"{named(path, applied, line)}: {_explain(model, problem)}")
        raise SpecError("\n".join(lines)) from error


def named(path: Path, applied: Iterable[str], line: int | None = None) -> str:
    """The name, in messages, of a file that was read with overrides, and of a line in it."""
    given = ", ".join(applied)
    return (
        _shown(path)
        + (f":{line}" if line else "")
        + (f" (with overrides {given})" if given else "")
    )


def _line(
    where: dict[Place, tuple[int, yaml.Node]], problem: Any, overridden: list[str]
) -> int | None:
    """The line of a validation error. None where the value comes from an override, and where the
    error is about the whole file.
    """
    place = tuple(map(str, problem["loc"]))
    # our own checks of several keys begin with the key, such as "cells.all.levels: ..."
    message = problem["msg"].removeprefix("Value error, ")
    for key in message.partition(":")[0].split("."):
        if (*place, key) not in where and ".".join((*place, key)) not in overridden:
            break
        place = (*place, key)
    for key in overridden:
        if (".".join(place) + ".").startswith(f"{key}."):
            return None
    while place and place not in where:
        place = place[:-1]
    if not place:
        return None
    line, _ = where[place]
    if quoted := re.search(r": '([^']*)'", message):
        # of a factor whose level is wrong: the line of the level
        for inner, (inner_line, value) in where.items():
            if inner[: len(place)] == place and getattr(value, "value", None) == quoted[1]:
                return inner_line
    return line


def suggest(name: str, allowed: Iterable[str]) -> str:
    """ " (did you mean ...?)" if `name` is close to something allowed, else ""."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _override(raw: JsonObject, overrides: Iterable[str]) -> JsonObject:
    """Sets `a.b.c=value` (value is YAML) in place and returns what was set. Unknown keys are left to
    the validation.
    """
    applied: JsonObject = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not re.fullmatch(r"[\w+-]+(\.[\w+-]+)*", key):
            raise SpecError(
                f"override {text!r}: write KEY=VALUE with a dotted key, e.g. design.blocks=2"
            )
        *parents, last = key.split(".")
        target = raw
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise SpecError(f"override {text!r}: {parent!r} is not a mapping")
        try:
            target[last] = applied[key] = parse(value)
        except (yaml.YAMLError, ValueError) as error:
            raise SpecError(f"override {text!r}: the value is not valid YAML: {error}") from error
    return applied


def _explain(model: type[BaseModel], problem: Any) -> str:
    """A validation error of pydantic as key, what was given and what is allowed."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        owner = _owner(model, problem["loc"][:-1])
        allowed = list(owner.model_fields) if owner else []
        return f"{key}: unknown key{suggest(str(problem['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], (dict, list)) else f" (given: {problem['input']!r})"
    return f"{key}: {message}{shown}" if key else message


def _owner(model: type[BaseModel], location: tuple[Any, ...]) -> type[BaseModel] | None:
    """The model that holds a location, through mappings, lists and optional fields."""
    annotation: Any = model
    for part in location:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = annotation.model_fields[str(part)].annotation
        else:
            annotation = typing.get_args(annotation)[-1]
        if typing.get_origin(annotation) in (typing.Union, types.UnionType):
            annotation = typing.get_args(annotation)[0]
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    )


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
