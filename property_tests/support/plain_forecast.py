"""Admission's forecast, computed plainly: step by step, from the queues and block tables."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence


def check_forecast(scheduler: Scheduler, asked_before: int, ended: list[Sequence]) -> None:
    """Raises AssertionError where the forecast has learnt anything else than the lengths of `ended`,
    the requests that came to their end (an abort teaches nothing), or says of a waiting request
    something else than the plain definition. asked_before: what it was told at the start.
    """
    forecast = getattr(scheduler, "forecast", None)
    if forecast is None:
        return
    asked = asked_before + sum(seq.params.max_tokens for seq in ended)
    used = sum(seq.num_output_tokens for seq in ended)
    assert (forecast.asked, forecast.used) == (asked, used), (
        f"the forecast has learnt {forecast.used} of {forecast.asked} tokens, "
        f"requests that ended used {used} of {asked}"
    )
    share = used / asked if asked else 1.0
    running = [*scheduler.decoding.values(), *scheduler.prefilling.values()]
    for seq in list(scheduler.waiting.values())[:2]:
        expected = fits(scheduler, share, running, seq)
        assert forecast.fits(running, [seq]) == expected, (
            f"{seq.request_id} {'fits' if expected else 'does not fit'} beside {len(running)} others"
        )
    for seq in running:
        longest = _now(seq) + to_come(seq, share) + scheduler.blocks.block_size // 2
        assert forecast.longest(seq) == longest, f"{seq.request_id} is expected to hold {longest}"


def to_come(seq: Sequence, share: float) -> int:
    """Tokens that a request is expected to get yet: of what it may still use, what others used."""
    return math.ceil(share * (seq.params.max_tokens - seq.num_output_tokens - seq.pending))


def fits(scheduler: Scheduler, share: float, running: list[Sequence], joining: Sequence) -> bool:
    """Whether memory lasts at every step until the last of them ends. A request holds a token more
    after each step until its expected end, and half a block on average that is not full.
    """
    blocks = scheduler.blocks
    size = blocks.block_size
    found = getattr(blocks, "shared_tokens", lambda _: 0)
    # (tokens to come, tokens of its own now)
    requests = [(to_come(seq, share), _now(seq) - seq.num_cached_tokens) for seq in running]
    own = len(joining.token_ids) - found(joining.token_ids)
    requests.append((to_come(joining, share), own))
    in_use = len({block for seq in running for block in seq.block_table})
    own_blocks = sum(len(seq.block_table) - seq.num_cached_tokens // size for seq in running)
    shared = max(0, in_use - own_blocks) * size
    return all(
        shared + _held(requests, step, size // 2) <= blocks.num_blocks * size
        for step in {n for n, _ in requests}  # memory is fullest just before a request ends
    )


def _held(requests: Iterable[tuple[int, int]], step: int, half_block: int) -> int:
    return sum(now + step + half_block for to_come, now in requests if to_come >= step)


def _now(seq: Sequence) -> int:
    return len(seq.token_ids) + seq.pending
