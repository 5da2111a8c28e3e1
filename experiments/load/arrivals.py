"""Arrival processes: from the parameters in a study to a schedule of due times.

`arrivals` of a workload is a mapping with `process` and that process's parameters:

    {process: poisson, rate: 4}                     independent users; gaps are exponential
    {process: gamma, rate: 4, burstiness: 0.5}      gaps are Gamma distributed with this shape, as in
                                                    `vllm bench serve --burstiness`: below 1 bursty, 1
                                                    Poisson, above 1 more even; their coefficient of
                                                    variation is 1 / sqrt(burstiness)
    {process: constant, rate: 4}                    equal gaps
    {process: closed, users: 8, think_s: 1}         each user sends the next request when the last one
                                                    was answered and the time to think is over

`rate` is in requests per second, times are in seconds. Gaps are drawn at rate 1 from `seed` and then
divided by the rate: two rates differ in scale alone (common random numbers), and every cell and every
engine of a study gets the same due times. In workloads of kind `conversation`, an open process gives
the first turn of each conversation; the next turn is due `think_s` after the answer to the one before.
`answers: own` puts the engine's own answers into the turns that follow, instead of drawn ones of the
same length (own_answers.py).

`search: {low, high, within, most}` in place of `rate` makes each launch search for the highest rate at
which the study's objective holds (searching.py).
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

from experiments.records.types import Params, Schedule

_OPEN = {"seed": 0, "think_s": 0.0}
DEFAULTS: dict[str, Params] = {
    "poisson": {"rate": None, **_OPEN},
    "gamma": {"rate": None, "burstiness": None, **_OPEN},
    "constant": {"rate": None, "think_s": 0.0},
    "closed": {"users": None, "think_s": 0.0, "think": "constant", "seed": 0},
}
"""The parameters of each process, with defaults; None: has to be given. Open processes also take `search`."""
SEARCH: Params = {"low": None, "high": None, "within": 1.1, "most": 10}
"""The parameters of a search, with defaults."""
ANSWERS = ("drawn", "own")
"""What the turns of a conversation hold where an answer was given; the first is the default."""
MOST_RATE, MOST_S, MOST_USERS, MOST_TRIALS = 1e6, 1e6, 1_000_000, 50


def check(given: Any, sessions: bool) -> Params:
    """The parameters of `arrivals`, completed with defaults. Raises ValueError that names what was
    given, what is allowed and what to do.

    sessions: whether the workload has requests that follow the answers of others.
    """
    shown = given.get("process") if isinstance(given, dict) else given
    if not isinstance(given, dict) or not isinstance(shown, str) or shown not in DEFAULTS:
        raise ValueError(
            f"arrivals: {shown!r} is not allowed; allowed: a mapping with `process` ({', '.join(DEFAULTS)}) and its "
            "parameters. Leave `arrivals` out to send all requests at once"
        )
    process = given["process"]
    defaults, is_open = DEFAULTS[process], process != "closed"
    allowed = [*defaults, *(["search"] if is_open else [])]
    allowed += ["answers"] if is_open and sessions else []
    rest = {name: value for name, value in given.items() if name != "process"}
    if unknown := sorted(set(rest) - set(allowed), key=str):
        raise ValueError(
            f"arrivals.{unknown[0]}: unknown parameter of process {process}; allowed: {', '.join(allowed)}"
        )
    full: Params = {"process": process, **defaults, **rest}
    if "search" in rest:
        if "rate" in rest:
            raise ValueError(
                f"arrivals.rate: {rest['rate']!r} was given beside `search`, which tries rates itself; remove one of them"
            )
        full["search"] = _check_search(rest["search"])
        del full["rate"]
    if full.get("answers", ANSWERS[0]) not in ANSWERS:
        raise ValueError(
            f"arrivals.answers: {full['answers']!r} is not allowed; allowed: {', '.join(ANSWERS)}"
        )
    if full.get("answers") == ANSWERS[0]:
        del full["answers"]  # plans that say nothing of it are the same
    for name, value in full.items():
        if name in ("process", "search", "answers"):
            continue
        if value is None:
            also = " (or `search`)" if name == "rate" else ""
            raise ValueError(
                f"arrivals.{name}: missing; process {process} needs it{also}: {_range_of(name)}"
            )
        _check_value(name, value)
    if full.get("think_s") and is_open and not sessions:
        raise ValueError(
            f"arrivals.think_s: {full['think_s']!r} has no effect here: only workloads of kind conversation have turns. "
            "Remove it, or use process: closed for users who wait for their answers"
        )
    if process == "closed" and sessions:
        raise ValueError(
            "arrivals.process: closed is not allowed for kind conversation, whose turns follow each other anyway; allowed: "
            f"{', '.join(name for name in DEFAULTS if name != 'closed')}, with think_s between turns"
        )
    return full


def schedule(params: Params, num_requests: int, sessions: int = 0) -> Schedule:
    """When each of `num_requests` requests is due. params: checked ones.

    sessions: the number of conversations; request i then follows request i - sessions. A search is
    scheduled at its lowest rate; `scaled` gives the others.
    """
    process = params["process"]
    rng = random.Random(f"arrivals/{params.get('seed', 0)}")
    if process == "closed":
        users = params["users"]
        return {
            "rate": None,
            "offset_s": [
                0.0 if index < users else _think(params, rng) for index in range(num_requests)
            ],
            "after": [None if index < users else index - users for index in range(num_requests)],
        }
    rate = params["search"]["low"] if "search" in params else params["rate"]
    first = sessions or num_requests
    unit = unit_times(process, first, rng, params.get("burstiness", 1.0))
    made: Schedule = {
        "rate": float(rate),
        "offset_s": [moment / rate for moment in unit]
        + [float(params["think_s"])] * (num_requests - first),
        "after": [None] * first + list(range(num_requests - first)),
    }
    if "answers" in params:
        made["answers"] = params["answers"]
    return made


def scaled(given: Schedule, rate: float) -> Schedule:
    """The same arrivals at another rate: due times shrink or stretch, times to think stay. Raises
    ValueError for a closed loop, which has no rate.
    """
    if given["rate"] is None:
        raise ValueError(
            "a closed loop has no rate to change; use a process with a rate, or change its users"
        )
    factor = given["rate"] / rate
    return {
        **given,
        "rate": rate,
        "offset_s": [
            offset * factor if after is None else offset
            for offset, after in zip(given["offset_s"], given["after"], strict=True)
        ],
    }


def unit_times(process: str, count: int, rng: random.Random, burstiness: float) -> list[float]:
    """`count` arrival times of an open process at rate 1. Rounded to 1e-9, so that the last bits of
    a platform's logarithm do not show in a fingerprint.
    """
    if process == "constant":
        gaps = [1.0] * count
    elif process == "poisson":
        gaps = [_exponential(rng) for _ in range(count)]
    else:
        gaps = [rng.gammavariate(burstiness, 1 / burstiness) for _ in range(count)]
    return [round(moment, 9) for moment in itertools.accumulate(gaps)]


def _exponential(rng: random.Random) -> float:
    return -math.log(1.0 - rng.random())


def _think(params: Params, rng: random.Random) -> float:
    think_s = float(params["think_s"])
    return think_s if params["think"] == "constant" else round(think_s * _exponential(rng), 9)


def _check_search(given: Any) -> Params:
    if not isinstance(given, dict) or (set(given) - set(SEARCH)):
        raise ValueError(
            f"arrivals.search: {given!r} is not allowed; allowed: a mapping of {', '.join(SEARCH)}"
        )
    full = {**SEARCH, **given}
    for name, allowed, fine in (
        ("low", f"a rate above 0, up to {MOST_RATE:g}", _is_number(full["low"], MOST_RATE)),
        ("high", "a rate above `low`", _is_number(full["high"], MOST_RATE)),
        ("within", "a number from 1.005 to 4", _is_number(full["within"], 4)),
        ("most", f"a whole number from 2 to {MOST_TRIALS}", _is_whole(full["most"], MOST_TRIALS)),
    ):
        if (
            not fine
            or (name == "high" and full["high"] <= full["low"])
            or (name == "within" and full["within"] < 1.005)
            or (name == "most" and full["most"] < 2)
        ):
            raise ValueError(
                f"arrivals.search.{name}: {full[name]!r} is not allowed; allowed: {allowed}"
            )
    return full


def _range_of(name: str) -> str:
    return {
        "rate": f"requests per second, above 0, up to {MOST_RATE:g}",
        "burstiness": "a number from 0.01 to 1e6",
        "think_s": f"seconds, from 0 to {MOST_S:g}",
        "think": "constant or exponential",
        "users": f"a whole number from 1 to {MOST_USERS}",
        "seed": "a whole number from 0 to 2**63 - 1",
    }[name]


def _check_value(name: str, value: Any) -> None:
    fine = {
        "rate": _is_number(value, MOST_RATE),
        "burstiness": _is_number(value, 1e6) and value >= 0.01,
        "think_s": _is_number(value, MOST_S) or value == 0,
        "think": value in ("constant", "exponential"),
        "users": _is_whole(value, MOST_USERS) and value >= 1,
        "seed": _is_whole(value, 2**63 - 1),
    }[name]
    if not fine or isinstance(value, bool):
        raise ValueError(f"arrivals.{name}: {value!r} is not allowed; allowed: {_range_of(name)}")


def _is_number(value: Any, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= most


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
