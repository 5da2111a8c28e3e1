"""The engine process of a launch: starts an engine and serves every workload. Needs only the
standard library and that engine.

The order matters: all workloads are drawn before the engine is imported, and the engine is warmed
up and its prefix cache emptied before anything is timed. Memory, clocks and other processes are
monitored from outside, by the runner.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

from experiments import workloads
from experiments.engines import Adapter, load_adapter
from experiments.host import provenance, telemetry
from experiments.host.validity import wrong_toggles
from experiments.launch import over_time
from experiments.load import delivered
from experiments.load.driving import Watch
from experiments.load.searching import Judge
from experiments.records.factor_levels import level_name
from experiments.records.types import (
    Answer,
    LaunchResult,
    Load,
    LoadRules,
    Measured,
    Plan,
    PlannedMeasurement,
    Request,
    Schedule,
    ServedWorkload,
    Toggles,
    Tokens,
    Workload,
)

MOST_SERVINGS, MOST_DISCARDED = 15, 3
"""Limits for a workload that is served repeatedly (`measurement.least_timed_s`)."""


def main(plan: Plan, launch_id: str, model: str, spawned_at: float, result: Path) -> None:
    """Runs one launch and writes its LaunchResult to `result`. Errors end the process."""
    process_start_s = time.time() - spawned_at
    die_with_runner()
    outcome = serve_launch(plan, launch_id, model, spawned_at)
    outcome["record"]["process_start_s"] = process_start_s
    # Written to another file and renamed, so that the runner never sees a partial result.
    partial = result.with_name(result.name + ".partial")
    partial.write_text(json.dumps(outcome))
    partial.rename(result)


def die_with_runner() -> None:
    """Ends this process and its workers when the runner ends, so that they do not disturb the next
    launch. Works even if the runner is killed: it holds the other end of our standard input, to
    which it never writes.
    """

    def watch() -> None:
        while os.read(0, 1):
            pass
        # the runner starts us as the leader of a process group that holds only our workers
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="die-with-runner", daemon=True).start()


def serve_launch(
    plan: Plan, launch_id: str, model: str, spawned_at: float | None = None
) -> LaunchResult:
    """The measured part of a record (times, counters, toggles, digests) and the tokens by digest.
    spawned_at: when the process was started, by time.time(); now, if not given.
    """
    started_at = time.time() if spawned_at is None else spawned_at
    launch = next(entry for entry in plan["launches"] if entry["launch"] == launch_id)
    cell = plan["cells"][launch["cell"]]
    work = {
        name: workloads.rebuild(name, plan["workloads"][name]) for name in launch["workload_order"]
    }

    begin = time.perf_counter()
    adapter = load_adapter(cell["engine"])(model, {**cell["config"], "seed": launch["seed"]})
    resolved = adapter.load()
    loaded = time.perf_counter()
    warm_up(adapter, work, plan["study"]["measurement"])
    warm = time.perf_counter()

    toggles_before = named(adapter.toggles())
    served: dict[str, ServedWorkload] = {}
    tokens: Tokens = {}
    problems: list[str] = []
    rules = plan["study"].get("load")
    for name in launch["workload_order"]:
        served_from = time.time()
        served[name], outputs = serve(adapter, work[name], plan["study"]["measurement"], rules)
        served[name]["window_s"] = [
            round(moment - started_at, 3) for moment in (served_from, time.time())
        ]
        if rules is not None and "load" in served[name]:
            problems += [
                f"workload {name}: {broken}"
                for broken in delivered.objections(served[name]["load"], rules)
            ]
        problems += [f"workload {name}: {problem}" for problem in wrong_work(work[name], outputs)]
        packed = zlib.compress(json.dumps(outputs, separators=(",", ":")).encode(), 6)
        tokens[served[name]["tokens_digest"]] = base64.b64encode(packed).decode()
    toggles = increase(toggles_before, named(adapter.toggles()))
    problems += wrong_toggles(toggles, cell["config"])
    adapter.close()
    record: Measured = {
        "status": "invalid" if problems else "ok",
        "reason": "; ".join(problems) or None,
        "resolved": resolved,
        "load_s": loaded - begin,
        "warm_up_s": warm - loaded,
        "workloads": served,
        "toggles": toggles,
        "provenance": provenance.of_interpreter(),
    }
    return {"record": record, "tokens": tokens}


def warm_up(adapter: Adapter, work: dict[str, Workload], measurement: PlannedMeasurement) -> None:
    """Serves the first requests of every wave with short outputs, for everything that happens on
    first use: compilation, page faults, memory allocation.
    """
    for workload in work.values():
        for wave in workload["waves"]:
            head = wave[: measurement["warm_up_requests"]]
            short: list[Request] = [
                {**r, "max_tokens": min(r["max_tokens"], measurement["warm_up_tokens"])}
                for r in head
            ]
            adapter.serve(short)
    adapter.reset()


def serve(
    adapter: Adapter,
    workload: Workload,
    measurement: PlannedMeasurement,
    rules: LoadRules | None,
) -> tuple[ServedWorkload, list[list[int]]]:
    """Serves a workload as the plan says; returns the record and the outputs. Requests that arrive
    over time are served once, or once for each rate of a search; again if a kernel was loaded or
    compiled meanwhile.
    """
    if "arrivals" not in workload:
        return serve_steadily(adapter, workload, measurement.get("least_timed_s", 0.0))
    first_uses = getattr(adapter, "kernels_loaded", lambda: 0)
    discarded: list[float] = []

    def serve_once(schedule: Schedule, judge: Judge | None) -> over_time.Serving:
        while True:
            before = first_uses()
            watch = None if judge is None else judge.restarted()
            serving = serve_workload(adapter, workload, schedule, watch)
            if first_uses() == before or len(discarded) == MOST_DISCARDED:
                return serving
            discarded.append(round(serving[0]["duration_s"], 6))

    record, outputs = over_time.as_asked(workload, rules, serve_once)
    if discarded:
        record["rehearsals_s"] = discarded
    return record, outputs


def serve_steadily(
    adapter: Adapter, workload: Workload, least_timed_s: float
) -> tuple[ServedWorkload, list[list[int]]]:
    """Serves a workload once or, with `least_timed_s`, repeatedly until the counted repetitions took
    that long in total. Returns the record and the outputs of the repetition of median duration (the
    shorter of the middle two for an even number).

    A repetition is discarded if a kernel was loaded or compiled during it. The first one is also
    discarded if it is shorter than `least_timed_s`, or if the engine runs in other processes and
    cannot tell whether kernels were loaded.
    """
    if not least_timed_s:
        return serve_workload(adapter, workload)
    first_uses = getattr(adapter, "kernels_loaded", lambda: 0)
    before = first_uses()
    servings: list[tuple[ServedWorkload, list[list[int]]]] = []
    discarded: list[float] = []
    while not servings or (
        sum(s["duration_s"] for s, _ in servings) < least_timed_s and len(servings) < MOST_SERVINGS
    ):
        serving = serve_workload(adapter, workload)
        after = first_uses()
        is_first = not servings and not discarded
        unsteady = (
            after is None or after > before or serving[0]["duration_s"] < least_timed_s
            if is_first
            else after != before
        )
        before = after
        if unsteady and len(discarded) < MOST_DISCARDED:
            discarded.append(serving[0]["duration_s"])
        else:
            servings.append(serving)
    order = sorted(range(len(servings)), key=lambda n: servings[n][0]["duration_s"])
    record, outputs = servings[order[(len(order) - 1) // 2]]
    counted = [round(s["duration_s"], 6) for s, _ in servings]
    record["servings_s"] = counted
    record["rehearsals_s"] = [round(seconds, 6) for seconds in discarded]
    return record, outputs


def serve_workload(
    adapter: Adapter,
    workload: Workload,
    schedule: Schedule | None = None,
    watch: Watch | None = None,
) -> tuple[ServedWorkload, list[list[int]]]:
    """Serves all waves, or with a `schedule` all requests when they are due. Returns the record and
    the outputs. Request times of later waves are offset by the duration of the waves before.
    """
    adapter.reset()
    counters, toggles = adapter.counters(), named(adapter.toggles())
    cpu_before = telemetry.tree_cpu_s(os.getpid())
    duration_s, outputs, request_times, step_times, reasons = 0.0, [], [], [], []
    waits: list[float | None] = []
    answers: Iterable[Answer] = map(adapter.serve, workload["waves"])
    if schedule is not None:
        requests = [request for wave in workload["waves"] for request in wave]
        answers = [over_time.answer(adapter, requests, schedule, watch)]
    load: Load | None = None
    for answer in answers:
        load = answer.get("load")
        request_times += [
            [moment + duration_s for moment in moments] for moments in answer["request_times_s"]
        ]
        duration_s += answer["duration_s"]
        outputs += answer["outputs"]
        reasons += answer["finish_reasons"]
        step_times += answer["step_times_s"]
        waits.append(answer.get("device_wait_s"))
    cpu_after = telemetry.tree_cpu_s(os.getpid())
    counters_after = adapter.counters()
    record: ServedWorkload = {
        "fingerprint": workload["fingerprint"],
        "requests_digest": workloads.requests_digest(workload["waves"], workload.get("arrivals")),
        "duration_s": duration_s,
        "num_requests": len(outputs),
        "prompt_tokens": sum(
            len(r["prompt_token_ids"]) for wave in workload["waves"] for r in wave
        ),
        "output_tokens": sum(map(len, outputs)),
        "request_times_s": [[round(moment, 6) for moment in moments] for moments in request_times],
        "step_times_s": [[round(step[0], 6), *step[1:]] for step in step_times],
        "counters": {name: value - counters.get(name, 0) for name, value in counters_after.items()},
        "toggles": increase(toggles, named(adapter.toggles())),
        "tokens_digest": workloads.tokens_digest(outputs),
        "finish_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "device_wait_s": None if None in waits else round(sum(filter(None, waits)), 6),
        "host_cpu_s": None if cpu_before is None or cpu_after is None else cpu_after - cpu_before,
    }
    if load is not None:
        record["load"] = load
    return record, outputs


def wrong_work(workload: Workload, outputs: list[list[int]]) -> list[str]:
    """How the outputs differ in number and length from what was requested; empty if they do not."""
    requests = [request for wave in workload["waves"] for request in wave]
    if len(outputs) != len(requests):
        return [f"{len(requests)} requests, but {len(outputs)} outputs"]
    for index, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        exact = request["ignore_eos"]
        if (
            len(output) > request["max_tokens"]
            or (exact and len(output) != request["max_tokens"])
            or not output
        ):
            return [
                f"request {index} asked for {request['max_tokens']} tokens but got {len(output)}"
            ]
    return []


def named(toggles: Toggles) -> Toggles:
    """An adapter's toggles, with levels written as in plans (on, off)."""
    return {
        factor: {
            **toggle,
            "level": level_name(toggle["level"]),
            "baseline": level_name(toggle["baseline"]),
        }
        for factor, toggle in toggles.items()
    }


def increase(before: Toggles, after: Toggles) -> Toggles:
    """`after` with cumulative counters replaced by their increase since `before`."""
    result: Toggles = {}
    for factor, toggle in after.items():
        old = before[factor]
        opportunity = (
            None
            if toggle["opportunity"] is None
            else toggle["opportunity"] - (old["opportunity"] or 0)
        )
        result[factor] = {
            **toggle,
            "engaged": toggle["engaged"] - old["engaged"],
            "opportunity": opportunity,
        }
    return result
