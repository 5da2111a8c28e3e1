"""A long run of the server under load: does it lose a request, and does its memory grow?

    make soak MINUTES=60
    python benchmarks/soak.py --minutes 5 --share 0.8

Starts `nanovllm serve` on a free port of 127.0.0.1, measures how many requests a second it serves
when 32 clients never pause, then sends requests at random times (a Poisson process) at 80 % of that
rate. Most are streams that are read to their end, some are whole answers, and some clients leave in
the middle. Ends with status 1 if a request that was not left was lost, if the resident memory grows by
more than 1 %, or if KV blocks are in use at the end. How fast memory grows is the slope of Theil and Sen
over all readings after the first quarter: the median of the slopes between every two of them, which a
few high readings do not move (P. K. Sen, "Estimates of the regression coefficient based on Kendall's tau",
Journal of the American Statistical Association 63, 1968).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
CODE = "import typer; from nanovllm.serving.command import serve; typer.run(serve)"
CALIBRATION_S = 20.0
MOST_OPEN = 900
"""Connections at once: below the usual limit of 1,024 open files."""
LEAVE, WHOLE = 0.1, 0.2
"""Shares of clients that leave in the middle, and that ask for a whole answer."""
GROWTH = 0.01


@dataclass
class Tally:
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, resident bytes."""


async def request(port: int, rng: random.Random, tally: Tally, leaves: bool) -> None:
    """One client. Counts what became of it: served, left, or lost."""
    stream = leaves or rng.random() > WHOLE
    max_tokens = rng.randint(4, 32)
    body = {
        "prompt": [rng.randrange(10, 2000) for _ in range(rng.randint(4, 48))],
        "max_tokens": max_tokens,
        "temperature": rng.choice([0, 0.8]),
        "ignore_eos": True,
        "stream": stream,
    }
    data = json.dumps(body).encode()
    writer = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        if leaves:
            await reader.read(rng.choice([1, 400]))
            tally.counts["left"] += 1
            return
        said = await asyncio.wait_for(reader.read(-1), 120)
        chunks = said.count(b'"text"')
        whole = b'"finish_reason": "length"' in said or b'"finish_reason":"length"' in said
        ended = (b"data: [DONE]" in said and chunks > 0) if stream else chunks == 1
        if said.startswith(b"HTTP/1.1 200") and whole and ended:
            tally.counts["served"] += 1
        else:
            tally.counts["lost"] += 1
            tally.errors.append(said[:300].decode(errors="replace"))
    except (OSError, TimeoutError) as error:
        tally.counts["lost"] += 1
        tally.errors.append(f"{type(error).__name__}: {error}")
    finally:
        if writer is not None:
            writer.close()


async def measured_rate(port: int, rng: random.Random) -> float:
    """Requests a second with 32 clients that never pause."""
    tally, begin = Tally(), time.monotonic()

    async def client() -> None:
        while time.monotonic() - begin < CALIBRATION_S:
            await request(port, rng, tally, leaves=False)

    await asyncio.gather(*(client() for _ in range(32)))
    return tally.counts["served"] / (time.monotonic() - begin)


async def load(port: int, rate: float, minutes: float, rng: random.Random) -> Tally:
    """Poisson arrivals at `rate` for so long, then until every client has ended."""
    tally, begin = Tally(), time.monotonic()
    open_requests: set[asyncio.Task[None]] = set()
    next_at, next_look = begin, begin
    while (now := time.monotonic()) < begin + 60 * minutes:
        if now >= next_look:
            used = await metric(port, "process_resident_memory_bytes")
            tally.memory.append((now - begin, used))
            next_look += max(5.0, 60 * minutes / 120)
        if now >= next_at and len(open_requests) < MOST_OPEN:
            leaves = rng.random() < LEAVE
            task = asyncio.ensure_future(request(port, rng, tally, leaves))
            open_requests.add(task)
            task.add_done_callback(open_requests.discard)
            tally.counts["sent"] += 1
            next_at += rng.expovariate(rate)
        else:
            await asyncio.sleep(max(0.0, min(next_at, next_look, now + 0.05) - now))
    await asyncio.gather(*open_requests)
    return tally


async def metric(port: int, name: str) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read(-1)).decode()
    writer.close()
    found = re.search(rf"(?m)^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text)
    if found is None:
        raise SystemExit(f"/metrics has no {name}")
    return float(found[1])


@dataclass(frozen=True)
class Growth:
    """share: by how much memory grew from the end of the first quarter to the end, relative to its
    median. Slopes in bytes per second, with a 95 % interval.
    """

    share: float
    slope: float
    low: float
    high: float


def growth(memory: list[tuple[float, float]]) -> Growth:
    """memory: seconds and resident bytes. Raises ValueError for fewer than 8 readings."""
    if len(memory) < 8:
        raise ValueError(f"{len(memory)} readings of memory are too few to see growth; run longer")
    seconds, used = zip(*memory[len(memory) // 4 :], strict=True)
    found = stats.theilslopes(used, seconds, alpha=0.95)
    share = float(found.slope) * (seconds[-1] - seconds[0]) / statistics.median(used)
    return Growth(share, float(found.slope), float(found.low_slope), float(found.high_slope))


def per_hour(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 3600 / 2**20:+.1f}"


async def soak(port: int, minutes: float, share: float, seed: int) -> bool:
    rng = random.Random(seed)
    most = await measured_rate(port, rng)
    rate = share * most
    print(f"{most:.1f} requests/s at most; now {rate:.1f}/s for {minutes:g} minutes", flush=True)
    tally = await load(port, rate, minutes, rng)
    for _ in range(100):  # the server hears of clients that left a moment later
        in_use = await metric(port, "vllm:kv_cache_usage_perc")
        running = await metric(port, "vllm:num_requests_running")
        if in_use == running == 0:
            break
        await asyncio.sleep(0.1)
    counts, grown = tally.counts, growth(tally.memory)
    print(
        f"sent {counts['sent']}, served {counts['served']}, left {counts['left']}, lost {counts['lost']}\n"
        f"memory {tally.memory[0][1] / 2**20:.1f} MiB at first, {tally.memory[-1][1] / 2**20:.1f} MiB at last; after the first "
        f"quarter {grown.share:+.2%}: {per_hour(grown.slope)} MiB per hour (95 % interval {per_hour(grown.low)} to "
        f"{per_hour(grown.high)}, {len(tally.memory)} readings)\n"
        f"at the end: {running:.0f} requests running, {in_use:.1%} of the KV blocks in use"
    )
    for error in tally.errors[:5]:
        print(f"lost: {error}")
    good = counts["lost"] == 0 and counts["served"] > 0 and grown.share <= GROWTH and in_use == 0
    print("flat, and nothing lost" if good else "NOT as it should be")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--share", type=float, default=0.8, help="of the measured rate")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.minutes < 1:
        parser.error(f"--minutes {given.minutes:g}: too short to see memory grow; at least 1")
    # a small cache: all of its memory is in use before the second quarter begins
    engine = ("max_model_len=256", "kv_cache_memory_bytes=33554432")
    arguments = [given.model, "--port", "0", "--json-logs"]
    arguments += [part for pair in engine for part in ("--engine", pair)]
    paths = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    server = subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert server.stderr is not None
    try:
        port = 0
        for line in server.stderr:
            if line.startswith("{") and "port" in (said := json.loads(line)):
                port = said["port"]
                break
            print(line, end="", file=sys.stderr)
        if not port:
            raise SystemExit("the server did not start")
        # its log is not read any more: a pipe that nobody empties would stop it
        drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        try:
            return 0 if asyncio.run(soak(port, given.minutes, given.share, given.seed)) else 1
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
            drain.wait(10)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
        server.stderr.close()


if __name__ == "__main__":
    sys.exit(main())
