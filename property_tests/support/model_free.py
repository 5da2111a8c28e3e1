"""A runner without a model: a number stands in the paged cache where the real one keeps K and V.

As K and V do, that number depends on the token and on everything before it, as read back through
the block table; and what is sampled depends on all of them. So a wrong slot, a stale or wrongly
shared block, a lost token or a wrong position changes the output; `oracle` says what each request
must produce.
"""

from __future__ import annotations

import zlib
from array import array
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from nanovllm.config import Optimizations, ResolvedConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.continuous_batching import ContinuousScheduler
from nanovllm.engine.overlap import OverlappedStepLoop
from nanovllm.engine.prefix_cache import CachingBlockManager
from nanovllm.engine.scheduler import Scheduler, StepPlan
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats
from property_tests.support.strategies import Shape

VOCAB = 7


def extend(kv: list[int], tokens: list[int]) -> list[int]:
    """The numbers of `tokens`, which come after those whose numbers are `kv`."""
    result = list(kv)
    for token in tokens:
        result.append(_next(tuple(result), token))
    return result[len(kv) :]


@cache
def _next(past: tuple[int, ...], token: int) -> int:
    return zlib.crc32(array("q", [*past, token]).tobytes())


@cache
def numbers_of(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Of a text from its beginning."""
    return tuple(extend([], list(tokens)))


def oracle(prompt: list[int], max_tokens: int, stops: frozenset[int]) -> list[int]:
    """What the request produces when it runs alone."""
    output: list[int] = []
    kv = extend([], prompt)
    while len(output) < max_tokens:
        output.append(kv[-1] % VOCAB)
        if output[-1] in stops:
            break
        kv += extend(kv, output[-1:])
    return output


class ModelFreeRunner:
    """launch / collect as ModelRunner. A step reads what earlier steps wrote, never what the same
    step writes elsewhere.
    """

    def __init__(self, config: ResolvedConfig, num_blocks: int) -> None:
        self.block_size = config.block_size
        self.memory: list[list[int | None]] = [
            [None] * config.block_size for _ in range(num_blocks)
        ]
        self.tables: list[dict[int, int]] = [{} for _ in range(config.max_num_seqs)]
        self.last_tokens = [-1] * config.max_num_seqs

    def submit(self, plan: StepPlan) -> list[int]:
        for row, *_ in plan.new_rows:
            self.tables[row] = {}
        for row, index, block in plan.new_blocks:
            self.tables[row][index] = block
        prefill = iter(plan.token_ids)
        sampled_from, writes = [], []
        for i, (row, start, length) in enumerate(
            zip(plan.rows, plan.starts, plan.query_lens, strict=True)
        ):
            new = (
                [self.last_tokens[row]]
                if i < plan.num_decodes
                else [next(prefill) for _ in range(length)]
            )
            assert len(new) == length > 0, "an entry computes nothing"
            past = [
                page[offset]
                for page, offset in (self._slot(row, position) for position in range(start))
            ]
            assert None not in past, f"row {row} reads a slot that no step has written"
            kv = extend([number for number in past if number is not None], new)
            sampled_from.append(kv[-1])
            writes += [(self._slot(row, start + j), number) for j, number in enumerate(kv)]
        assert next(prefill, None) is None, (
            "the plan holds more prefill tokens than its entries compute"
        )
        slots = [(id(page), offset) for (page, offset), _ in writes]
        assert len(set(slots)) == len(slots), "two tokens of a step are written to one slot"
        for (page, offset), number in writes:
            page[offset] = number
        sampled = []
        for row, number, samples in zip(plan.rows, sampled_from, plan.samples, strict=True):
            if samples:
                self.last_tokens[row] = number % VOCAB
                sampled.append(self.last_tokens[row])
        return sampled

    def collect(self, handle: list[int]) -> tuple[list[int], None]:
        return handle, None

    def _slot(self, row: int, position: int) -> tuple[list[int | None], int]:
        return self.memory[
            self.tables[row][position // self.block_size]
        ], position % self.block_size


def expect(scheduler: Scheduler, shape: Shape) -> None:
    """Tells admission, where it foresees the peak of the KV cache, that nothing will be needed."""
    if not shape.foresees and hasattr(scheduler, "forecast"):
        scheduler.forecast.asked = 1 << 40


@dataclass
class ModelFreeEngine:
    """Scheduler, blocks and prefix cache around that runner. Commit lag 0, 1 (the engine's own
    loop), or more.
    """

    shape: Shape
    stats: StepStats = field(default_factory=StepStats)

    def __post_init__(self) -> None:
        shape = self.shape
        config = ResolvedConfig(
            model="none",
            dtype="float32",
            device="cpu",
            seed=0,
            max_model_len=1 << 20,
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            block_size=shape.block_size,
            optimizations=Optimizations(
                batching=shape.batching,
                prefix_cache=shape.prefix_cache,
                overlap=shape.lag == 1,
                cuda_graphs=shape.graphs,
            ),
        )
        if shape.prefix_cache:
            blocks: BlockManager = CachingBlockManager(
                shape.num_blocks, shape.block_size, self.stats
            )
        else:
            blocks = BlockManager(shape.num_blocks, shape.block_size, self.stats)
        make = Scheduler if shape.batching == "static" else ContinuousScheduler
        self.scheduler = make(config, blocks, self.stats)
        expect(self.scheduler, shape)
        self.runner = ModelFreeRunner(config, shape.num_blocks)
        self.loop: Any = (
            OverlappedStepLoop(self.scheduler, self.runner)
            if shape.lag == 1
            else _Loop(self.scheduler, self.runner, shape.lag)
        )

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.num_unfinished or self.scheduler.in_flight)

    def step(self) -> list[Sequence]:
        """The sequences that got a token."""
        in_flight = len(self.scheduler.in_flight)
        plan, advanced = self.loop.step()
        assert plan is not None or in_flight or not self.scheduler.num_unfinished, (
            "requests wait and nothing is planned"
        )
        return advanced


@dataclass
class _Loop:
    scheduler: Scheduler
    runner: ModelFreeRunner
    lag: int
    in_flight: list[tuple[StepPlan, list[int]]] = field(default_factory=list)

    def step(self) -> tuple[StepPlan | None, list[Sequence]]:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.in_flight.append((plan, self.runner.submit(plan)))
        if not self.in_flight or (plan is not None and len(self.in_flight) <= self.lag):
            return plan, []
        oldest, handle = self.in_flight.pop(0)
        return plan, self.scheduler.commit(oldest, *self.runner.collect(handle))
