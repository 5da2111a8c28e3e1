"""Plans to ranks and messages between processes."""

from __future__ import annotations

import socket
import threading

import pytest

from nanovllm.distributed.wire import Channel, PlanCoder
from nanovllm.engine.scheduler import StepPlan


def decode_plan(step: int, rows: list[int], starts: list[int], **more: object) -> StepPlan:
    n = len(rows)
    return StepPlan(step, n, rows, starts, [1] * n, [True] * n, **more)  # type: ignore[arg-type]


def test_plans_arrive_as_they_were_and_unchanged_steps_are_tiny() -> None:
    rows, starts = list(range(256)), list(range(1000, 1256))
    plans = [
        StepPlan(
            0,
            1,
            [0, 1],
            [7, 0],
            [1, 3],
            [True, False],
            [5, 6, 7],
            [(1, 0, 4)],
            [(1, 0.5, 3, 0.9, 2**63)],
            False,
            True,
            2,
        ),
        decode_plan(1, rows, starts),
        decode_plan(2, rows, [s + 1 for s in starts]),
        decode_plan(3, rows, [s + 2 for s in starts], new_blocks=[(7, 3, 99)]),
        decode_plan(4, rows[1:], [s + 3 for s in starts][1:]),  # one has ended
        StepPlan(5, 0, [0], [0], [2], [True], [8, 9]),
        decode_plan(6, [0], [2]),
        # the same row, another place: a request that was preempted and came back
        decode_plan(7, [0], [9]),
    ]
    writer, reader = PlanCoder(), PlanCoder()
    sizes = []
    for plan in plans:
        message = writer.encode(plan)
        sizes.append(len(message))
        assert reader.decode(message) == plan
    assert max(sizes[2], sizes[3]) < 100 < sizes[1]


def test_a_channel_carries_whole_messages() -> None:
    ours, theirs = (Channel(end) for end in socket.socketpair())
    messages = [b"", b"x", bytes(range(256)) * 4000]
    sender = threading.Thread(target=lambda: [theirs.send(message) for message in messages])
    sender.start()
    assert [ours.receive(5) for _ in messages] == messages
    sender.join()
    with pytest.raises(TimeoutError):
        ours.receive(0.01)
    theirs.close()
    with pytest.raises(EOFError):
        ours.receive(5)
    ours.close()


def test_a_message_that_comes_in_pieces_survives_a_timeout() -> None:
    near, far = socket.socketpair()
    ours = Channel(near)
    far.sendall(b"\x05\x00\x00\x00he")
    with pytest.raises(TimeoutError):
        ours.receive(0.01)
    far.sendall(b"llo")
    assert ours.receive(1) == b"hello"
    far.close()
    ours.close()


def test_a_reader_that_does_not_read_is_noticed() -> None:
    ours, theirs = (Channel(end) for end in socket.socketpair())
    with pytest.raises(TimeoutError):
        ours.send(bytes(10_000_000), 0.05)
    ours.close()
    theirs.close()
