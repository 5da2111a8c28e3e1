"""Checks of a launch record against itself and its plan: a record that contradicts itself is no
evidence.

A failed *hard* check excludes the launch (the identities below hold by definition, whatever the
engine). A failed soft
one is printed beside the result: it rests on what the adapter chose to count, and points at the
adapter first.

Little's law (L = lambda W, Little 1961) in the form that needs no steady state: the time integral
of the number of requests in the system equals the sum of their residence times. Both sides are
measured apart: residence times by the request clock, the integral by the step clock, for the decode
phase, where a step of d decode tokens holds at least d requests.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.records.types import ServedWorkload

# Two clocks are read at different moments of a step; 2 % of the run, and 5 ms on top, is what that
# may cost.
CLOCK_RELATIVE = 0.02
CLOCK_ABSOLUTE_S = 0.005


@dataclass(frozen=True)
class Check:
    """The outcome of one check on one workload of one launch."""

    name: str
    hard: bool
    ok: bool
    detail: str


def check_workload(
    name: str, work: ServedWorkload, planned: Mapping[str, Any], resolved: Mapping[str, Any]
) -> Iterator[Check]:
    """Every check that applies to the part of a launch record that belongs to one workload of the
    plan.
    """
    yield _equal("fingerprint", work["fingerprint"], planned["fingerprint"])
    if "requests_digest" in planned:  # not in plans of older versions
        yield _equal("requests", work.get("requests_digest"), planned["requests_digest"])
    for count in ("num_requests", "prompt_tokens"):
        yield _equal(count, work[count], planned[count])
    asked, served = planned["output_tokens"], work["output_tokens"]
    stopped = work["finish_reasons"].get("stop", 0)
    fine = served == asked if not stopped else 0 < served <= asked
    yield Check(
        "output tokens",
        True,
        fine,
        f"{served} served, {asked} asked, {stopped} requests stopped by a token",
    )
    finished = sum(work["finish_reasons"].values())
    yield Check(
        "every request finished",
        True,
        finished == planned["num_requests"],
        f"{finished} of {planned['num_requests']}",
    )
    yield Check("positive duration", True, work["duration_s"] > 0, f"{work['duration_s']} s")

    duration_s = work["duration_s"]
    slack_s = CLOCK_RELATIVE * duration_s + CLOCK_ABSOLUTE_S
    times = np.array(work["request_times_s"], dtype=np.float64).reshape(-1, 3)
    if len(times):
        ordered = bool((np.diff(times, axis=1) >= 0).all()) and bool((times[:, 0] >= 0).all())
        yield Check("arrival <= first token <= finish", True, ordered, f"{len(times)} requests")
        last_s = float(np.max(times[:, 2]))
        yield Check(
            "last finish within the duration",
            True,
            last_s <= duration_s + slack_s,
            f"{last_s:.3f} of {duration_s:.3f} s",
        )
        yield from _check_concurrency(times, duration_s, resolved)
    yield from _check_steps(work, times, duration_s, slack_s)
    for counter, value in sorted(work.get("counters", {}).items()):
        if value < 0:
            yield Check("counters are not negative", True, False, f"{counter} = {value}")
    yield from _check_counters(work)


def _equal(name: str, got: Any, want: Any) -> Check:
    return Check(name, True, got == want, f"{got}, planned {want}")


def _check_concurrency(
    times: np.ndarray, duration_s: float, resolved: Mapping[str, Any]
) -> Iterator[Check]:
    """The mean number of requests being decoded (residence over duration) cannot exceed what the
    engine may run at once.
    """
    limit = resolved.get("max_num_seqs")
    if not isinstance(limit, int):
        return
    running = float((times[:, 2] - times[:, 1]).sum()) / duration_s
    # A preempted request counts as decoding while it waits, so this holds for an engine without
    # preemption only: soft.
    yield Check(
        "Little's law: mean running <= max_num_seqs",
        False,
        running <= limit * (1 + CLOCK_RELATIVE),
        f"{running:.1f} of {limit}",
    )


def _check_steps(
    work: ServedWorkload, times: np.ndarray, duration_s: float, slack_s: float
) -> Iterator[Check]:
    """The step clock against the request clock; an engine that reports no steps is not checked."""
    steps = np.array(work.get("step_times_s") or [], dtype=np.float64).reshape(
        -1, 3
    )  # [steps, (duration, prefill, decode tokens)]
    if not len(steps):
        return
    step_s = float(steps[:, 0].sum())
    yield Check(
        "steps fit in the duration",
        False,
        step_s <= duration_s + slack_s,
        f"{step_s:.3f} of {duration_s:.3f} s",
    )
    # Every token after a request's first comes from a decode step, or from the prefill that follows
    # a preemption. There may be more decode tokens than that: a static batch goes on computing rows
    # that have ended (hf).
    decoded = int(steps[:, 2].sum())
    needed = (
        work["output_tokens"]
        - work["num_requests"]
        - work.get("counters", {}).get("preemptions", 0)
    )
    yield Check(
        "decode tokens account for the output",
        False,
        decoded >= needed,
        f"{decoded}, at least {needed} needed",
    )
    if len(times):
        decodes = steps[:, 2]
        if work.get("counters", {}).get("overlapped_steps"):
            # What a step is written to is what was launched in its time; on a GPU its time was that
            # of the step before.
            decodes = np.minimum(decodes, np.concatenate((decodes[:1], decodes[:-1])))
        integral_s = float((steps[:, 0] * decodes).sum())
        residence_s = float((times[:, 2] - times[:, 1]).sum())
        fine = integral_s <= residence_s * (1 + CLOCK_RELATIVE) + slack_s * len(times)
        yield Check(
            "Little's law: decode integral <= residence",
            False,
            fine,
            f"{integral_s:.2f} of {residence_s:.2f} request seconds",
        )


def _check_counters(work: ServedWorkload) -> Iterator[Check]:
    """The engine's own counters (nanovllm.engine.stats) against the work; an engine without them is
    not checked.
    """
    counters = work.get("counters", {})
    if not {"prefill_tokens", "prefix_hit_tokens", "preemptions", "admissions", "steps"} <= set(
        counters
    ):
        return
    # A prompt token is computed or found in the cache, once; once more only after a preemption.
    found = counters["prefix_hit_tokens"] + counters.get("prefix_refound_tokens", 0)
    known, prompt = counters["prefill_tokens"] + found, work["prompt_tokens"]
    fine = known >= prompt if counters["preemptions"] else known == prompt
    yield Check(
        "prompt tokens are computed or found",
        False,
        fine,
        f"{known} of {prompt}, {counters['preemptions']} preemptions",
    )
    entered, wanted = counters["admissions"], work["num_requests"] + counters["preemptions"]
    yield Check(
        "admissions are requests and preemptions",
        False,
        entered == wanted,
        f"{entered} of {wanted}",
    )
    hits, looked = counters["prefix_hit_tokens"], counters.get("prefix_lookup_tokens", 0)
    yield Check("hits among what was looked up", False, hits <= looked, f"{hits} of {looked}")
    timed = len(work.get("step_times_s") or [])
    if timed:
        yield Check(
            "every step has a time",
            False,
            timed == counters["steps"],
            f"{timed} of {counters['steps']}",
        )
