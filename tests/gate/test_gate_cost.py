"""What the gate costs, against the two HF forwards over prompts and outputs (reference and engine's
dtype) that it rests on.

    python -m pytest tests/gate/test_gate_cost.py -m slow -s        prints the figures of docs/methodology.md
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import workloads
from experiments.gate.rescoring import Rescorer, batches_of_similar_length
from nanovllm import LLM, SamplingParams

pytestmark = pytest.mark.slow
GOAL, PAIRS = 1.2, 7
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 1, top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "temperature 1, top-k 100, top-p 0.9": {"temperature": 1.0, "top_k": 100, "top_p": 0.9},
}


def cpu_s(work: Callable[[], Any]) -> float:
    gc.collect()
    begin = time.process_time()
    work()
    return time.process_time() - begin


def generate(model: Path, dtype: str, requests: list[Any]) -> list[list[int]]:
    """The engine's own tokens: what differs from the reference is what a correct engine differs by."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos")
    params = [SamplingParams(**{name: request[name] for name in names}) for request in requests]
    with LLM(
        str(model),
        dtype=dtype,
        device="cpu",
        skip_tokenizer_init=True,
        max_num_seqs=32,
        max_model_len=512,
        kv_cache_memory_bytes=2**26,
    ) as llm:
        results = llm.generate(
            [{"prompt_token_ids": r["prompt_token_ids"]} for r in requests], params, use_tqdm=False
        )
    return [result.outputs[0].token_ids for result in results]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("unknown_noise", [False, True])
@torch.inference_mode()
def test_the_gate_costs_little_more_than_its_forwards(
    tiny: Path, dtype: str, sampling: str, unknown_noise: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if unknown_noise and sampling == "greedy":
        pytest.skip("a greedy token has no generator")
    work = workloads.build("cost", "random", {"num_requests": 24, **SAMPLING[sampling]})
    requests = [request for wave in work["waves"] for request in wave]
    rescorer = Rescorer(tiny, dtype)
    outputs = generate(tiny, dtype, requests)
    sequences = [
        r["prompt_token_ids"] + output for r, output in zip(requests, outputs, strict=True)
    ]
    batches = []
    for batch in batches_of_similar_length([len(s) for s in sequences], rescorer.batch_tokens):
        ids = torch.zeros(len(batch), max(len(sequences[i]) for i in batch) - 1, dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : len(sequences[i]) - 1] = torch.tensor(sequences[i][:-1])
        batches.append(ids)

    def forwards() -> None:
        for ids in batches:
            for model in (rescorer.reference, rescorer.hf):
                model(input_ids=ids, use_cache=False)

    def gate() -> None:
        rescorer._known.clear()
        rescorer.score(requests, outputs, unknown_noise=unknown_noise)

    forwards(), gate()
    ratios = []
    for pair in range(PAIRS):
        first, second = (forwards, gate) if pair % 2 else (gate, forwards)
        a, b = cpu_s(first), cpu_s(second)
        ratios.append(b / a if pair % 2 else a / b)
    ratio = statistics.median(ratios)
    with capsys.disabled():
        generator = "another generator" if unknown_noise else "our generator"
        print(
            f"\n{dtype}, {sampling}, {generator}: {ratio:.2f} times two forwards ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    assert ratio <= GOAL, f"{ratio:.2f} times two forwards; the gate may cost {GOAL} times"
