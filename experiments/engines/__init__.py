"""The engines under test, each behind the same small interface. Standard library only; an engine is
imported by `load`.

To add an engine, write one module with a class `Adapter`; a study names it by its file (`nanovllm`)
or, outside this package, by its dotted module path (`tests.support.fake_engine`).
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

ENGINES = ("nanovllm", "hf", "vllm")
"""The adapters in this package."""


class Adapter(Protocol):
    """What the runner needs of an engine; see docs/adr/0002-plans-records-adapters.md for the
    shapes.
    """

    name: str
    allowed: tuple[str, ...]
    """The keys of its config. A plan fills in those that all engines share; `seed` is given by the launch."""

    def __init__(self, model: str, config: dict[str, Any]) -> None:
        """model: a folder. config: what is asked for; raises ValueError for an unknown key."""

    def load(self) -> dict[str, Any]:
        """Imports and starts the engine; the resolved config."""
        ...

    def serve(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        """Serves requests that arrive together: duration_s, outputs, finish_reasons,
        request_times_s, step_times_s.
        """
        ...

    def reset(self) -> None:
        """Forgets cached prefixes."""

    def counters(self) -> dict[str, int]:
        """Cumulative counts of what the engine did."""
        ...

    def toggles(self) -> dict[str, dict[str, Any]]:
        """{factor: {"level", "baseline", "engaged", "opportunity"}}, cumulative; {} for an engine
        without toggles.
        """
        ...

    def close(self) -> None:
        """Gives memory and processes back."""


class WithLogprobs(Protocol):
    """What an adapter may offer beside: the gate compares log-probabilities of those that do, in a
    pass that is not timed.
    """

    def logprobs(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        """Serves requests: {"outputs": [[int]], "logprobs": [[float]]}, log softmax(logits)[token]
        of every output token.
        """
        ...


def load_adapter(engine: str) -> type[Adapter]:
    """Raises ValueError for an engine that has no adapter."""
    module = f"{__name__}.{engine}" if "." not in engine else engine
    if "." not in engine and engine not in ENGINES:
        raise ValueError(
            f"engine {engine!r} has no adapter; allowed: {', '.join(ENGINES)}, or the dotted path of a module with one"
        )
    return importlib.import_module(module).Adapter  # type: ignore[no-any-return]


def check_config(engine: str, config: dict[str, Any], allowed: tuple[str, ...]) -> None:
    """Raises ValueError for a key that an engine does not know."""
    if unknown := sorted(set(config) - set(allowed)):
        raise ValueError(
            f"{engine}: unknown config key {', '.join(unknown)}; allowed: {', '.join(allowed)}"
        )
