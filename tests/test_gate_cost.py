"""What the gate costs, against the two HF forwards over prompts and outputs (reference and engine's dtype) that it rests on.

    python -m pytest tests/test_gate_cost.py -m slow -s        prints the table of docs/methodology.md
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
from experiments.margins import Rows
from experiments.rescoring import Rescorer, batches_of_similar_length, rows_of

pytestmark = pytest.mark.slow
LIMIT, PAIRS = 1.2, 3
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


def tokens_of_hf(rescorer: Rescorer, requests: list[Any]) -> list[list[int]]:
    """A token a position as HF in the engine's dtype would sample it after random tokens: what a correct engine differs by."""
    from experiments.scoring import kept, over_temperature

    generator = torch.Generator().manual_seed(0)
    outputs = []
    for request in requests:
        tail = torch.randint(2048, (request["max_tokens"],), generator=generator).tolist()
        ids = torch.tensor([request["prompt_token_ids"] + tail])[:, :-1]
        logits = rescorer.hf(input_ids=ids, use_cache=False).logits[0, -len(tail) :]
        rows: Rows = rows_of([request], [tail], False, "cpu")
        scaled = over_temperature(logits, logits, rows)[1]
        keep = kept(scaled, rows)
        scaled = scaled if keep is None else scaled.masked_fill(~keep, -torch.inf)
        outputs.append((scaled + rows.noise(2048)).argmax(-1).tolist())
    return outputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("foreign", [False, True])
@torch.inference_mode()
def test_the_gate_costs_at_most_a_fifth_more_than_its_forwards(
    tiny: Path, dtype: str, sampling: str, foreign: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if foreign and sampling == "greedy":
        pytest.skip("a greedy token has no generator")
    work = workloads.build("cost", "random", {"num_requests": 24, **SAMPLING[sampling]})
    requests = [request for wave in work["waves"] for request in wave]
    rescorer = Rescorer(tiny, dtype)
    # The tokens of the next position are given, so each output is one forward: generated text would take minutes here.
    outputs = tokens_of_hf(rescorer, requests)
    sequences = [r["prompt_token_ids"] + output for r, output in zip(requests, outputs, strict=True)]
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
        rescorer.score(requests, outputs, foreign=foreign)

    forwards(), gate()
    ratios = []
    for pair in range(PAIRS):
        first, second = (forwards, gate) if pair % 2 else (gate, forwards)
        a, b = cpu_s(first), cpu_s(second)
        ratios.append(b / a if pair % 2 else a / b)
    ratio = statistics.median(ratios)
    with capsys.disabled():
        generator = "foreign" if foreign else "our generator"
        print(f"\n{dtype}, {sampling}, {generator}: {ratio:.2f} times two forwards ({min(ratios):.2f} to {max(ratios):.2f})")
    assert ratio <= LIMIT, f"{ratio:.2f} times two forwards; the gate may cost {LIMIT} times"
