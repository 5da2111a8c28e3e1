"""Feeds requests to an engine when they are due, and notes the time of every token.

The generator runs in the engine's own loop: between two steps it submits what has become due. A
request that becomes due during a step is submitted after it, which is the earliest moment at which a
scheduler could look at it; its clock has started at its due time all the same, so this wait counts as
latency (open loop, no coordinated omission). What the generator adds by itself is noted apart, as
its own lateness: the time from the moment when a request was due and the engine had returned from its
step, whichever came last, to the moment when it was submitted. An engine behind a network connection
(RemoteFace) computes whatever the generator does; the generator then waits for tokens and due times
together, and all of its lateness is its own.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from experiments.records.types import Schedule

Progress = tuple[int, int, bool]
"""A request, the number of its output tokens so far, and whether it has finished."""
Watch = Callable[[int, float, list[float]], bool]
"""Told of each finished request (index, due time, token times); True ends the drive."""


class Face(Protocol):
    """What the driver needs of an engine."""

    def submit(self, index: int) -> None:
        """Queues a request."""

    def advance(self) -> Iterable[Progress]:
        """Runs a step, or waits for the next one to end; the requests that got tokens. Called only
        while a request is unfinished.
        """
        ...

    def abort(self, index: int) -> None:
        """Ends an unfinished request."""


class RemoteFace(Face, Protocol):
    """An engine in another process. The generator does not wait for its steps, so a request that is
    sent late is late by the generator's own fault.
    """

    def advance_within(self, seconds: float | None) -> Iterable[Progress]:
        """Waits until tokens come, or for so long (None: however long it takes)."""
        ...


@dataclass
class Timeline:
    """What happened, in seconds since the drive began, by request. None: it never came to that.

    lateness_s: of the generator itself. token_s: the time of each output token.
    """

    due_s: list[float | None]
    sent_s: list[float | None]
    lateness_s: list[float | None]
    token_s: list[list[float]]
    finished: list[bool]
    duration_s: float = 0.0
    stopped: bool = False
    _followers: dict[int, list[int]] = field(default_factory=dict, repr=False)


def drive(
    face: Face,
    schedule: Schedule,
    *,
    watch: Watch | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Timeline:
    """Drives an engine until every request has finished, or until `watch` returns True: the
    unfinished requests are then aborted, and those not yet due are never sent.
    """
    count = len(schedule["offset_s"])
    line = Timeline(
        [None] * count,
        [None] * count,
        [None] * count,
        [[] for _ in range(count)],
        [False] * count,
    )
    waiting: list[tuple[float, int]] = []
    for index, (offset, after) in enumerate(
        zip(schedule["offset_s"], schedule["after"], strict=True)
    ):
        if after is None:
            line.due_s[index] = offset
            waiting.append((offset, index))
        else:
            line._followers.setdefault(after, []).append(index)
    heapq.heapify(waiting)
    running: set[int] = set()
    advance_within = getattr(face, "advance_within", None)
    begin, free_since = clock(), 0.0
    while (waiting or running) and not line.stopped:
        now = clock() - begin
        while waiting and waiting[0][0] <= now:
            due, index = heapq.heappop(waiting)
            line.sent_s[index] = now
            line.lateness_s[index] = now - max(due, free_since)
            face.submit(index)
            running.add(index)
            now = clock() - begin
        if not running:
            sleep(max(0.0, waiting[0][0] - now))
            continue
        if advance_within is None:
            progress = face.advance()
            free_since = now = clock() - begin
        else:
            progress = advance_within(max(0.0, waiting[0][0] - now) if waiting else None)
            now = clock() - begin
        for index, tokens, finished in progress:
            line.token_s[index] += [now] * (tokens - len(line.token_s[index]))
            if not finished:
                continue
            running.discard(index)
            line.finished[index] = True
            for follower in line._followers.get(index, ()):
                due = now + schedule["offset_s"][follower]
                line.due_s[follower] = due
                heapq.heappush(waiting, (due, follower))
            due_s = line.due_s[index]
            assert due_s is not None
            if watch is not None and watch(index, due_s, line.token_s[index]):
                line.stopped = True
    for index in sorted(running):
        face.abort(index)
    line.duration_s = max((times[-1] for times in line.token_s if times), default=0.0)
    return line
