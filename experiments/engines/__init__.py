"""The engines under test, behind one small interface. Standard library only; an engine is imported
by `load`.

To add an engine, write one module with a class `Adapter`; a study names it by its file (`nanovllm`)
or, outside this package, by its dotted module path (`tests.support.fake_engine`).
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Protocol

from experiments.load.driving import Face
from experiments.records.types import (
    Answer,
    Config,
    LogprobAnswer,
    Options,
    Request,
    Served,
    Toggles,
)

ENGINES = ("nanovllm", "hf", "vllm", "nanovllm_server", "vllm_server")
"""The adapters in this package."""
LIBRARIES = {"nanovllm_server": "nanovllm", "vllm_server": "vllm"}
"""The libraries of adapters that are not named like theirs. An interpreter given for a library
(--python vllm=PATH) is that of its server, too.
"""
OPTIONS = (
    "min_p",
    "min_tokens",
    "logit_bias",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
"""Options of a request that nanovllm and vLLM know by the same name and in the same form."""


class Adapter(Protocol):
    """The interface that the runner needs of an engine (docs/adr/0002-plans-records-adapters.md)."""

    name: str
    allowed: tuple[str, ...]
    """The keys of its config. A plan fills in those that all engines share; the launch sets `seed`."""

    def __init__(self, model: str, config: Config) -> None:
        """model: the folder of a checkpoint. config: the requested settings; raises ValueError for
        an unknown key.
        """

    def load(self) -> Config:
        """Imports and starts the engine. Returns the resolved config."""
        ...

    def serve(self, requests: list[Request]) -> Answer:
        """Serves requests that arrive together."""
        ...

    def reset(self) -> None:
        """Empties the prefix cache."""

    def counters(self) -> dict[str, int]:
        """Cumulative counts of what the engine did."""
        ...

    def toggles(self) -> Toggles:
        """The toggles by factor, with cumulative counts; {} for an engine without toggles."""
        ...

    def close(self) -> None:
        """Frees memory and ends processes."""


class WithLogprobs(Protocol):
    """An optional extension of an adapter: the gate then also compares log-probabilities, in a pass
    that is not timed.
    """

    def logprobs(self, requests: list[Request]) -> LogprobAnswer:
        """Serves requests: {"outputs": [[int]], "logprobs": [[float]]}, log softmax(logits)[token]
        of every output token.
        """
        ...


class Serving(Face, Protocol):
    """Requests that an engine takes one by one, while it runs. The index of a request is its place
    in the list given to `start`.
    """

    def served(self) -> Served:
        """What the engine did; called after the last step."""
        ...

    def output(self, index: int) -> list[int]:
        """The tokens of a request that has finished."""
        ...

    def set_prompt(self, index: int, prompt_token_ids: list[int]) -> None:
        """Changes the prompt of a request that was not submitted yet (load/own_answers.py)."""


class OverTime(Protocol):
    """An optional extension of an adapter: workloads whose requests arrive over time. An adapter
    without it says why in `not_over_time`.
    """

    def start(self, requests: list[Request]) -> Serving:
        """Prepares to serve requests, none of which has arrived yet."""
        ...


def why_not_over_time(engine: str) -> str | None:
    """Why an engine cannot take requests over time; None if it can."""
    adapter = load_adapter(engine)
    if hasattr(adapter, "start"):
        return None
    return str(getattr(adapter, "not_over_time", "its adapter has no method `start`"))


def load_adapter(engine: str) -> type[Adapter]:
    """Raises ValueError for an engine that has no adapter."""
    module = f"{__name__}.{engine}" if "." not in engine else engine
    if "." not in engine and engine not in ENGINES:
        raise ValueError(
            f"engine {engine!r} has no adapter; allowed: {', '.join(ENGINES)}, or the dotted path of a module with one"
        )
    return importlib.import_module(module).Adapter  # type: ignore[no-any-return]


def own_cores() -> list[int] | None:
    """The CPUs that this process may run on; None on a system that does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def library(engine: str) -> str:
    """The library that an adapter needs."""
    return LIBRARIES.get(engine, engine)


def check_config(engine: str, config: Config, allowed: tuple[str, ...]) -> None:
    """Raises ValueError for a key that an engine does not know."""
    if unknown := sorted(set(config) - set(allowed)):
        raise ValueError(
            f"{engine}: unknown config key {', '.join(unknown)}; allowed: {', '.join(allowed)}"
        )


def options_of(engine: str, request: Request, known: tuple[str, ...] = OPTIONS) -> dict[str, Any]:
    """The request's options, as arguments of SamplingParams. Raises ValueError for one that is not in
    `known`: left out, it would be served as other work than was asked for.
    """
    given: dict[str, Any] = {
        name: value for name, value in request.items() if name in Options.__annotations__
    }
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"{engine}: a request has {unknown[0]}, which this adapter does not pass on; allowed: {', '.join(known) or 'none'}"
        )
    return given
