"""The engine without its runner: requests are served by the real scheduler, admission, prefix cache and
block manager, and a clock is moved by what each step would take.

    host     plan | issue ......... | wait | commit and plan | issue ...
    device        | step n ..............| step n+1 ....

A step's plan costs the host `plan_s`. Then the host issues its work for `issue_s`. The device begins
`first_s` after the host began to issue, or when it has finished the step before, and works for
`device_s`; it cannot finish before the host has issued everything. Only the time is modelled: what a step
computes is decided by the engine's own code, with the engine's own step loops (with overlap, the next
step is planned and issued before the host waits for the last one).

Sampled tokens are placeholders that are in no vocabulary and unlike each other, so no text ends early and no
generated text is found in the prefix cache. A request's answer has its max_tokens, as `ignore_eos` makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from experiments.records.types import Request, Schedule
from nanovllm.config import Optimizations
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler, StepPlan
from nanovllm.engine.sequence import Sequence as EngineSequence
from nanovllm.engine.stats import StepStats
from nanovllm.outputs import RequestMetrics
from nanovllm.sampling_params import SamplingParams

FIRST_PLACEHOLDER = 1 << 30
"""Above every vocabulary, and within the 32 bits in which the prefix cache packs tokens."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step; see the drawing above."""

    plan_s: float
    issue_s: float = 0.0
    first_s: float = 0.0
    device_s: float = 0.0


StepClock = Callable[[StepPlan], StepTime]
"""What a step takes. It is called once for each plan, in their order."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the scheduler reads of a resolved configuration, and the size of one rank's KV cache."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_kv_blocks: int
    optimizations: Optimizations


@dataclass(frozen=True)
class Served:
    """What serving requests took. request_times_s: (arrival, first token, finish) of each, in their
    order; step_times_s: (seconds, prefill tokens, decode tokens) of each step, as the engine reports them.
    """

    duration_s: float
    request_times_s: list[tuple[float, float, float]]
    step_times_s: list[tuple[float, int, int]]


class VirtualRunner:
    """The interface of a model runner, on a clock of its own. now_s: the time of the host."""

    def __init__(self, step_clock: StepClock) -> None:
        self.step_clock = step_clock
        self.now_s = self.device_free_s = 0.0
        self._placeholders = count(FIRST_PLACEHOLDER)

    def submit(self, plan: StepPlan) -> tuple[float, list[int]]:
        """Issues a step. The handle: when its results are on the host, and its tokens."""
        time = self.step_clock(plan)
        begin = self.now_s + time.plan_s
        self.now_s = begin + time.issue_s
        # nobody reads it before the host's own clock has passed the end of issuing
        self.device_free_s = max(begin + time.first_s, self.device_free_s) + time.device_s
        return self.device_free_s, list(islice(self._placeholders, sum(plan.samples)))

    def collect(self, handle: tuple[float, list[int]]) -> tuple[list[int], None]:
        """Waits for a step."""
        done_s, tokens = handle
        self.now_s = max(self.now_s, done_s)
        return tokens, None


class VirtualEngine:
    """Serves requests in virtual time. Raises what the scheduler raises for a request that can never
    run.
    """

    def __init__(self, settings: Settings, step_clock: StepClock) -> None:
        on = settings.optimizations
        self.stats = StepStats()
        self.runner = VirtualRunner(step_clock)
        self.scheduler = _scheduler(settings, self.stats)
        if on.overlap:
            from nanovllm.engine.overlap import OverlappedStepLoop

            self.loop: Any = OverlappedStepLoop(self.scheduler, self.runner)
        else:
            self.loop = _StepLoop(self.scheduler, self.runner)
        self._numbers = count()

    def serve(
        self, requests: Sequence[Request], schedule: Schedule | None = None, set_up_s: float = 0.0
    ) -> Served:
        """Serves requests that arrive together, `set_up_s` after the beginning, or each when the
        schedule says.
        """
        begin_s = self.runner.now_s
        self.runner.now_s += set_up_s
        offsets = [0.0] * len(requests) if schedule is None else schedule["offset_s"]
        after = [None] * len(requests) if schedule is None else schedule["after"]
        due_s = {
            i: begin_s + set_up_s + offsets[i]
            for i in range(len(requests))
            if after[i] is None  # type: ignore[index]
        }
        followers: dict[int, list[int]] = {}
        for i, other in enumerate(after):  # type: ignore[arg-type]
            if other is not None:
                followers.setdefault(other, []).append(i)
        index_of: dict[str, int] = {}
        arrived: list[EngineSequence | None] = [None] * len(requests)
        steps: list[tuple[float, int, int]] = []
        unfinished = len(requests)
        while unfinished:
            if not self.scheduler.num_unfinished and due_s:  # idle: the next arrival ends it
                self.runner.now_s = max(self.runner.now_s, min(due_s.values()))
            for i in [i for i, due in due_s.items() if due <= self.runner.now_s]:
                seq = self._sequence(requests[i], due_s.pop(i))
                arrived[i], index_of[seq.request_id] = seq, i
                self.scheduler.add(seq)
            start_s = self.runner.now_s
            plan, advanced = self.loop.step()
            now_s = self.runner.now_s
            if plan is not None:
                steps.append((now_s - start_s, len(plan.token_ids), plan.num_decodes))
            elif not advanced and not due_s:
                raise RuntimeError(
                    "requests wait and no step can be planned: the KV cache is too small"
                )
            for seq in advanced:
                seq.metrics.first_token_time = seq.metrics.first_token_time or now_s
                if seq.finish_reason is not None:
                    seq.metrics.finished_time = now_s
                    unfinished -= 1
                    for i in followers.get(index_of[seq.request_id], ()):
                        due_s[i] = now_s + offsets[i]
        return Served(
            self.runner.now_s - begin_s,
            [_times(seq, begin_s) for seq in arrived if seq is not None],
            steps,
        )

    def forget_prefixes(self) -> None:
        """Empties the prefix cache, as a launch does between two workloads."""
        self.scheduler.blocks.forget_prefixes()

    def _sequence(self, request: Request, arrival_s: float) -> EngineSequence:
        return EngineSequence(
            str(next(self._numbers)),
            list(request["prompt_token_ids"]),
            SamplingParams(
                max_tokens=request["max_tokens"],
                temperature=request["temperature"],
                top_k=request["top_k"],
                top_p=request["top_p"],
            ),
            metrics=RequestMetrics(arrival_time=arrival_s),
        )


class _StepLoop:
    """llm_engine.StepLoop, which cannot be imported without torch (a test compares the two)."""

    def __init__(self, scheduler: Scheduler, runner: VirtualRunner) -> None:
        self.scheduler, self.runner = scheduler, runner

    def step(self) -> tuple[StepPlan | None, list[EngineSequence]]:
        if (plan := self.scheduler.schedule()) is None:
            return None, []
        return plan, self.scheduler.commit(plan, *self.runner.collect(self.runner.submit(plan)))


def _scheduler(settings: Settings, stats: StepStats) -> Scheduler:
    on: Any = settings.optimizations
    make_blocks: Any = BlockManager
    if on.prefix_cache:
        from nanovllm.engine.prefix_cache import CachingBlockManager

        make_blocks = CachingBlockManager
    make: Any = Scheduler
    if on.batching != "static":
        from nanovllm.engine.continuous_batching import ContinuousScheduler

        make = ContinuousScheduler
    blocks = make_blocks(settings.num_kv_blocks, settings.block_size, stats)
    return make(settings, blocks, stats)  # type: ignore[no-any-return]


def _times(seq: EngineSequence, begin_s: float) -> tuple[float, float, float]:
    first, end = seq.metrics.first_token_time, seq.metrics.finished_time
    assert first is not None
    assert end is not None
    return seq.metrics.arrival_time - begin_s, first - begin_s, end - begin_s


def recorded(step_times_s: Sequence[Sequence[float]], *, waits: bool) -> StepClock:
    """A clock that gives each step the time it took in a record, whatever it does. With overlap, the
    last tokens are read in a call that plans no step and that records leave out. waits: whether it lasts as
    long as the step before it, as where the device decides the time of a step; where the host does, nothing
    is left to wait for. Raises IndexError where more steps are planned than were recorded.
    """
    last = len(step_times_s) - 1
    numbers = count()

    def clock(plan: StepPlan) -> StepTime:
        if (number := next(numbers)) > last:
            raise IndexError(
                f"step {number} is planned: {len(plan.token_ids)} prefill and {plan.num_decodes} decode tokens; the record "
                f"ends with step {last}"
            )
        seconds = step_times_s[number][0]
        return StepTime(seconds, device_s=seconds if waits and number == last else 0.0)

    return clock
