"""Serves a workload whose requests arrive over time: once as scheduled, or once for each rate of a
search. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.engines import Adapter, why_not_over_time
from experiments.load import delivered, own_answers
from experiments.load.arrivals import scaled
from experiments.load.driving import Face, Watch, drive
from experiments.load.searching import Judge, allowed_misses, search
from experiments.records.types import (
    Answer,
    LoadRules,
    Request,
    Schedule,
    ServedWorkload,
    Trial,
    Workload,
)

Serving = tuple[ServedWorkload, list[list[int]]]
"""The record of a serving, and its outputs."""
Serve = Callable[[Schedule, Judge | None], Serving]


def answer(
    adapter: Adapter, requests: list[Request], schedule: Schedule, watch: Watch | None
) -> Answer:
    """Drives an engine through a schedule. The first of a request's times is when it was due. Raises
    ValueError for an engine that takes no requests over time.
    """
    start: Any = getattr(adapter, "start", None)
    if start is None:
        raise ValueError(
            f"{adapter.name} cannot serve requests that arrive over time: {why_not_over_time(type(adapter).__module__)}"
        )
    serving = start(requests)
    face: Face = serving
    if own_answers.wanted(schedule):
        face = own_answers.OwnAnswers(serving, requests, schedule)
    line = drive(face, schedule, watch=watch)
    served = serving.served()
    return {
        "duration_s": line.duration_s,
        "outputs": served["outputs"],
        "finish_reasons": served["finish_reasons"],
        "request_times_s": [
            [due, tokens[0], tokens[-1]]
            for due, tokens in zip(line.due_s, line.token_s, strict=True)
            if due is not None and tokens
        ],
        "step_times_s": served["step_times_s"],
        "device_wait_s": served.get("device_wait_s"),
        "load": delivered.record(line, schedule),
    }


def as_asked(workload: Workload, rules: LoadRules | None, serve: Serve) -> Serving:
    """Serves a workload at its own rate or, where it has a `search`, at the rates that the search
    asks for. The record of a search is that of the highest rate that passed, or of the lowest rate
    if none did, and lists every trial.
    """
    schedule = workload["arrivals"]
    params = workload["params"].get("arrivals", {}).get("search")
    if params is None:
        return serve(schedule, None)
    if rules is None or rules["slo"] is None:
        raise ValueError(
            f"workload {workload['name']}: a search needs an objective; give the study `load: {{slo: ...}}`"
        )
    allowed = allowed_misses(len(schedule["offset_s"]), rules["attainment"])
    objective = rules["slo"]
    trials: list[Trial] = []
    kept: dict[float, Serving] = {}

    def trial(rate: float) -> bool:
        # the first one is the record if no rate passes, so it runs to its end
        judge = Judge(objective, allowed, may_give_up=bool(trials))
        record, outputs = serve(scaled(schedule, rate), judge)
        trials.append(
            {
                "rate": rate,
                "passed": judge.passes,
                "finished": judge.finished,
                "misses": judge.misses,
                "duration_s": round(record["duration_s"], 6),
            }
        )
        if judge.passes or not kept:
            kept[rate] = (record, outputs)
        return judge.passes

    found = search(trial, params)
    record, outputs = kept[params["low"] if found.rate is None else found.rate]
    record["load"]["search"] = {
        "rate": found.rate,
        "failed": found.failed,
        "stopped": found.stopped,
        "trials": trials,
    }
    return record, outputs
