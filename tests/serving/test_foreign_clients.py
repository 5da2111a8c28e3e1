"""Our harness and clients that others wrote measure the same server: do they find the same latencies and
throughput? docs/serving.md says what they define differently.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import workloads
from experiments.engines.http_streams import HttpServing
from experiments.engines.vllm_server import COMMAND_LINE
from experiments.load.driving import drive
from nanovllm.models.loader import resolve_model
from reports.statistics.intervals import t_interval
from tests.serving.test_serve_command import Process, running

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
VLLM_PYTHON = os.environ.get("VLLM_PYTHON") or str(ROOT / ".venv-vllm" / "bin" / "python")
PROMPT_TOKENS, OUTPUT_TOKENS, RATE = 48, 16, 6.0
TOO_WIDE = 1.6
"""Upper over lower end of an interval."""
Figures = dict[str, float]


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with running() as server:
        yield server


def work(seed: int, num_requests: int) -> Any:
    return workloads.build(
        "w",
        "random",
        {
            "num_requests": num_requests,
            "prompt_tokens": PROMPT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "seed": seed,
            "arrivals": {"process": "poisson", "rate": RATE, "seed": seed},
        },
    )


def body_of(request: Any) -> dict[str, Any]:
    return {
        "prompt": request["prompt_token_ids"],
        "max_tokens": request["max_tokens"],
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def figures(starts: list[float], token_s: list[list[float]]) -> Figures:
    """Medians of TTFT and TPOT, and requests per second from the first start to the last token."""
    return {
        "ttft_s": statistics.median(t[0] - start for start, t in zip(starts, token_s, strict=True)),
        "tpot_s": statistics.median((t[-1] - t[0]) / (OUTPUT_TOKENS - 1) for t in token_s),
        "requests_per_s": len(starts) / (max(t[-1] for t in token_s) - min(starts)),
    }


def by_ours(port: int, seed: int, num_requests: int) -> Figures:
    planned = work(seed, num_requests)
    client = HttpServing(("127.0.0.1", port), [body_of(r) for r in planned["waves"][0]])
    line = drive(client, planned["arrivals"])
    client.served()
    return figures([due for due in line.due_s if due is not None], line.token_s)


def by_openai(port: int, seed: int, num_requests: int) -> Figures:
    """OpenAI's asynchronous client; a chunk's time is when the client hands it out."""
    planned = work(seed, num_requests)
    starts = [0.0] * num_requests
    token_s: list[list[float]] = [[] for _ in range(num_requests)]

    async def ask(client: Any, index: int, begin: float) -> None:
        due = planned["arrivals"]["offset_s"][index]
        await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
        given = body_of(planned["waves"][0][index])
        extra = {"ignore_eos": given.pop("ignore_eos"), "return_token_ids": True}
        del given["return_token_ids"]
        starts[index] = due
        stream = await client.completions.create(model="tiny", **given, extra_body=extra)
        async for chunk in stream:
            new = chunk.choices[0].model_extra["token_ids"]
            token_s[index] += [time.perf_counter() - begin] * len(new)

    async def main() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        ) as client:
            await ask(client, 0, 0.0)  # what a client sets up with its first request
            token_s[0].clear()
            begin = time.perf_counter()
            await asyncio.gather(*(ask(client, index, begin) for index in range(num_requests)))

    asyncio.run(main())
    return figures(starts, token_s)


def by_vllm_bench(folder: Path) -> Callable[[int, int, int], Figures]:
    """`vllm bench serve` in vLLM's own environment."""
    model = str(resolve_model("tiny"))

    def measure(port: int, seed: int, num_requests: int) -> Figures:
        result = f"bench-{seed}.json"
        subprocess.run(
            [
                *(VLLM_PYTHON, "-c", COMMAND_LINE, "bench", "serve"),
                *("--backend", "openai", "--base-url", f"http://127.0.0.1:{port}"),
                *("--model", "tiny", "--tokenizer", model, "--dataset-name", "random"),
                *("--random-input-len", str(PROMPT_TOKENS), "--random-output-len"),
                *(str(OUTPUT_TOKENS), "--num-prompts", str(num_requests), "--seed", str(seed)),
                *("--request-rate", str(RATE), "--ignore-eos", "--temperature", "0"),
                *("--save-result", "--result-dir", str(folder), "--result-filename", result),
            ],
            check=True,
            capture_output=True,
            timeout=300,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        )
        found = json.loads((folder / result).read_text())
        assert found["completed"] == num_requests
        return {
            "ttft_s": found["median_ttft_ms"] / 1000,
            "tpot_s": found["median_tpot_ms"] / 1000,
            "requests_per_s": found["request_throughput"],
        }

    return measure


def compared(
    port: int, theirs: Callable[[int, int, int], Figures], rounds: int, num_requests: int
) -> dict[str, tuple[float, float, float]]:
    """Theirs over ours for each figure: mean ratio and 95 % interval, over rounds in which the two take
    turns to begin.
    """
    pairs: list[tuple[Figures, Figures]] = []
    by_ours(port, 0, num_requests)  # to warm up
    for number in range(1, rounds + 1):
        order = (by_ours, theirs) if number % 2 else (theirs, by_ours)
        found = {measure: measure(port, number, num_requests) for measure in order}
        pairs.append((found[by_ours], found[theirs]))
    ratios = {}
    for name in pairs[0][0]:
        logs = np.log([other[name] / own[name] for own, other in pairs])
        low, high = t_interval(logs, 0.05)
        ratios[name] = tuple(float(np.exp(x)) for x in (logs.mean(), low, high))
        print(f"{name}: ours {[f'{own[name]:.4g}' for own, _ in pairs]}, ratio {ratios[name]}")
    return ratios  # type: ignore[return-value]


def agree(ratio: tuple[float, float, float], least: float, most: float) -> bool:
    """Whether an interval of a ratio reaches the band in which two clients are called equal. An interval
    that is much wider than the band would reach it whatever the clients do: the test is skipped then.
    """
    _, low, high = ratio
    if high / low > TOO_WIDE:
        pytest.skip(
            f"the machine is too noisy to tell: the ratio is between {low:.2f} and {high:.2f}"
        )
    return low <= most and high >= least


def test_openais_client_finds_what_we_find(server: Process) -> None:
    found = compared(server.port, by_openai, rounds=6, num_requests=24)
    assert agree(found["tpot_s"], 0.9, 1.1)
    assert agree(found["requests_per_s"], 0.95, 1.05)
    assert agree(found["ttft_s"], 0.8, 1.5)  # with its own work before and after


@pytest.mark.skipif(
    not Path(VLLM_PYTHON).exists(),
    reason="no vLLM: `make compare-vllm` builds .venv-vllm, or set VLLM_PYTHON",
)
def test_vllm_bench_serve_finds_what_we_find(server: Process, tmp_path: Path) -> None:
    found = compared(server.port, by_vllm_bench(tmp_path), rounds=4, num_requests=30)
    assert agree(found["tpot_s"], 0.9, 1.1)
    assert agree(found["requests_per_s"], 0.9, 1.1)
    assert agree(found["ttft_s"], 0.8, 1.25)
