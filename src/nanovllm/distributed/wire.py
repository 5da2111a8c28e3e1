"""Messages between the engine's process and its ranks: plans out, tokens back, over anonymous
socket pairs. No torch.

    SAME      the rows of the last step, each one token further: only the kind is sent (some 30 bytes)
    DECODES   other rows, one token each
    FULL      prompts as well
"""

import marshal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.config import ResolvedConfig
from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.stats import StepStats
from nanovllm.models.config import ModelConfig

SAME, DECODES, FULL = range(3)
Counts = tuple[int, dict[str, int], dict[str, int], dict[str, int]]


@dataclass(frozen=True, slots=True)
class Job:
    """What a process needs to become a rank."""

    rank: int
    rendezvous: str  # a file that does not exist yet
    progress: str  # a file with 2 uint64 per rank: steps submitted, collective operations entered
    num_threads: int
    timeout_s: float
    resolved: ResolvedConfig
    model_config: ModelConfig
    folder: Path


def counts_of(stats: StepStats) -> Counts:
    """The counters of a rank; all others are counted where steps are planned."""
    return (
        stats.graph_replays,
        dict(stats.all_reduces),
        dict(stats.attention_calls),
        dict(stats.kernel_calls),
    )


class PlanCoder:
    """StepPlan <-> bytes. Writer and reader each remember the last step, so every plan must pass,
    in order.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._starts: list[int] = []

    def encode(self, plan: StepPlan) -> bytes:
        shared = (
            plan.step,
            plan.new_blocks,
            plan.new_rows,
            plan.greedy_only,
            plan.filtered,
            plan.num_logprobs,
        )
        message: tuple[Any, ...]
        if plan.num_decodes < len(plan.rows):
            message = (
                FULL,
                shared,
                plan.num_decodes,
                plan.rows,
                plan.starts,
                plan.query_lens,
                plan.samples,
                plan.token_ids,
            )
        elif plan.rows == self._rows and plan.starts == self._starts:
            message = (SAME, shared)
        else:
            message = (DECODES, shared, plan.rows, plan.starts)
        self._remember(plan)
        return marshal.dumps(message)

    def decode(self, data: bytes) -> StepPlan:
        kind, (step, new_blocks, new_rows, greedy_only, filtered, num_logprobs), *rest = (
            marshal.loads(data)
        )
        if kind == FULL:
            num_decodes, rows, starts, query_lens, samples, token_ids = rest
        else:
            rows, starts = rest if kind == DECODES else (self._rows, self._starts)
            num_decodes, query_lens, samples, token_ids = (
                len(rows),
                [1] * len(rows),
                [True] * len(rows),
                [],
            )
        plan = StepPlan(
            step,
            num_decodes,
            rows,
            starts,
            query_lens,
            samples,
            token_ids,
            new_blocks,
            new_rows,
            greedy_only,
            filtered,
            num_logprobs,
        )
        self._remember(plan)
        return plan

    def _remember(self, plan: StepPlan) -> None:
        decodes = plan.num_decodes == len(plan.rows)
        self._rows, self._starts = (
            (plan.rows, [start + 1 for start in plan.starts]) if decodes else ([], [])
        )


class Channel:
    """Whole messages over a stream socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._received = bytearray()

    def send(self, message: bytes, timeout_s: float | None = None) -> None:
        """Raises TimeoutError where the other end does not read, OSError where it is gone."""
        self._socket.settimeout(timeout_s)
        self._socket.sendall(len(message).to_bytes(4, "little") + message)

    def receive(self, timeout_s: float | None = None) -> bytes:
        """The next message. Raises TimeoutError where there is none yet (call it again), EOFError
        where the other end is gone.
        """
        self._socket.settimeout(timeout_s)
        received = self._received
        while len(received) < 4 or len(received) < 4 + int.from_bytes(received[:4], "little"):
            try:
                part = self._socket.recv(1 << 16)
            except (BlockingIOError, TimeoutError):
                raise TimeoutError from None
            except ConnectionError:
                part = b""
            if not part:
                raise EOFError
            received += part
        end = 4 + int.from_bytes(received[:4], "little")
        message = bytes(received[4:end])
        del received[:end]
        return message

    def close(self) -> None:
        self._socket.close()
