"""Conversations whose next turn holds the engine's own answer.

A workload of kind `conversation` draws each turn as history, answer of the length asked for, and what
the user says next. With `arrivals: {answers: own}` the drawn answers only stand for their length: the
prompt of the next turn is the prompt of the last one as it was served, the tokens that the engine
answered, and the user's next words. Prompts are then a function of the outputs, so the gate builds
them again from the tokens of each engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from experiments.load.driving import Progress
from experiments.records.types import Request, Schedule


def wanted(schedule: Schedule | None) -> bool:
    """Whether the requests of a schedule hold the engine's own answers."""
    return schedule is not None and schedule.get("answers") == "own"


def new_words(requests: Sequence[Request], after: Sequence[int | None], index: int) -> list[int]:
    """The tokens of the user in a turn: what a drawn prompt has behind the turn before it and the
    answer drawn to that.
    """
    earlier = after[index]
    if earlier is None:
        return requests[index]["prompt_token_ids"]
    before = requests[earlier]
    return requests[index]["prompt_token_ids"][
        len(before["prompt_token_ids"]) + before["max_tokens"] :
    ]


def as_served(
    requests: Sequence[Request], after: Sequence[int | None], outputs: Sequence[Sequence[int]]
) -> list[Request]:
    """The requests of all turns with the prompts that an engine with these outputs was given.

    requests: as drawn, a turn after the one that it follows. outputs: one for each request.
    """
    prompts: list[list[int]] = []
    for index, earlier in enumerate(after):
        history = [] if earlier is None else [*prompts[earlier], *outputs[earlier]]
        prompts.append(history + new_words(requests, after, index))
    return [
        {**request, "prompt_token_ids": prompt}
        for request, prompt in zip(requests, prompts, strict=True)
    ]


class OwnAnswers:
    """Stands between the driver and an engine (a driving.Face): gives each turn its prompt when it
    is submitted. serving: an engines.Serving with `output` and `set_prompt`.
    """

    def __init__(self, serving: Any, requests: Sequence[Request], schedule: Schedule) -> None:
        self._serving, self._requests, self._after = serving, requests, schedule["after"]
        self._prompts: dict[int, list[int]] = {}
        if hasattr(serving, "advance_within"):
            self.advance_within = serving.advance_within

    def submit(self, index: int) -> None:
        prompt = list(new_words(self._requests, self._after, index))
        earlier = self._after[index]
        if earlier is not None:
            prompt = [*self._prompts[earlier], *self._serving.output(earlier), *prompt]
            self._serving.set_prompt(index, prompt)
        self._prompts[index] = prompt
        self._serving.submit(index)

    def advance(self) -> Iterable[Progress]:
        progress: Iterable[Progress] = self._serving.advance()
        return progress

    def abort(self, index: int) -> None:
        self._serving.abort(index)
