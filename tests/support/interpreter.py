"""Triton's interpreter, made faster for tests and otherwise the same.

Most of its time on our kernels goes into two things that do not depend on what a kernel computes:

- at every call of a device function it looks through all of triton.language for builtins to replace,
  although the launch has replaced them already (InterpretedFunction.__call__ in triton/runtime/interpreter.py)
- at every operation it builds a table of NumPy's dtypes anew (_get_np_dtype there)

Here the first is done once a launch, the second once a dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def make_faster() -> None:
    """May be called again. Changes nothing where a later Triton has no such functions."""
    from triton.runtime import interpreter

    for name, faster in (("_patch_lang", _once_a_launch), ("_get_np_dtype", _once_a_dtype)):
        slow = getattr(interpreter, name, None)
        if slow is not None and slow.__module__ == interpreter.__name__:
            setattr(interpreter, name, faster(interpreter, slow))


def _once_a_launch(interpreter: Any, patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A launch calls it first, then its device functions do; at its end the launch restores what was
    replaced. What is replaced depends on the modules that a function sees.
    """
    modules = interpreter.tl, interpreter.tl.core
    replaced: set[tuple[bool, ...]] = set()

    def patch(fn: Any) -> Any:
        visible = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        seen = tuple(any(value is module for value in visible) for module in modules)
        if seen in replaced:
            return interpreter._LangPatchScope()
        scope, is_launch = patch_lang(fn), not replaced
        replaced.add(seen)
        if is_launch:
            restore = scope.restore
            scope.restore = lambda: (replaced.clear(), restore())
        return scope

    return patch


def _once_a_dtype(interpreter: Any, np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def of(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, interpreter.tl.block_type) else dtype
        if element.name not in known:
            known[element.name] = np_dtype(element)
        return known[element.name]

    return of
