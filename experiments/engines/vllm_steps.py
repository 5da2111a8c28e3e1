"""Requests over time through vLLM's LLMEngine: add_request, step, abort_request.

vLLM's core computes in a process of its own and starts the next step by itself; `step` waits for the
outputs of the next one that ends. A request that becomes due meanwhile is handed over at the next
return, so it may wait for one step in the client; that wait counts as latency, as it does for every
engine (experiments/load/driving.py).
"""

from __future__ import annotations

from typing import Any

from experiments.load.driving import Progress
from experiments.records.types import Served


class VllmServing:
    """Requests that arrive one by one (experiments.engines.Serving). engine: a vLLM LLMEngine;
    params: SamplingParams of each prompt, whose outputs are cumulative, which is vLLM's default.
    """

    def __init__(
        self, engine: Any, prompts: list[Any], params: list[Any], steps: list[list[float]]
    ) -> None:
        self._engine, self._prompts, self._params = engine, prompts, params
        self._steps = steps
        self._last: dict[int, Any] = {}

    def submit(self, index: int) -> None:
        self._engine.add_request(_id(index), self._prompts[index], self._params[index])

    def advance(self) -> list[Progress]:
        progress = []
        for output in self._engine.step():
            index = int(output.request_id.removeprefix(_id("")))
            self._last[index] = output.outputs[0]
            progress.append((index, len(output.outputs[0].token_ids), bool(output.finished)))
        return progress

    def abort(self, index: int) -> None:
        self._engine.abort_request([_id(index)])

    def output(self, index: int) -> list[int]:
        return list(self._last[index].token_ids)

    def set_prompt(self, index: int, prompt_token_ids: list[int]) -> None:
        self._prompts[index] = {"prompt_token_ids": prompt_token_ids}

    def served(self) -> Served:
        found = [self._last.get(index) for index in range(len(self._prompts))]
        return {
            "outputs": [[] if last is None else list(last.token_ids) for last in found],
            "finish_reasons": [
                "abort" if last is None else last.finish_reason or "abort" for last in found
            ],
            "step_times_s": self._steps,
        }


def _id(index: int | str) -> str:
    return f"due-{index}"
