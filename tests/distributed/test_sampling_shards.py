"""The best of every part of the vocabulary, then the best of all parts: the token that one sampler
over all of it takes.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch

from nanovllm.kernels.torch.sampling import sample

pytestmark = pytest.mark.filterwarnings(  # of Triton's interpreter, which computes with NumPy
    "ignore:Conversion of an array with ndim:DeprecationWarning",
    "ignore:invalid value encountered:RuntimeWarning",
    "ignore:overflow encountered:RuntimeWarning",
    "ignore:divide by zero:RuntimeWarning",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def shards(request: pytest.FixtureRequest) -> ModuleType:
    return import_module(f"nanovllm.kernels.{request.param}.sampling_shards")


def choose(
    shards: ModuleType, logits: torch.Tensor, parts: int, *args: Any, all_greedy: bool
) -> torch.Tensor:
    n = logits.shape[1] // parts
    best = [
        shards.best_of_shard(logits[:, i * n : (i + 1) * n], *args, i * n, all_greedy=all_greedy)
        for i in range(parts)
    ]
    return shards.best_of_shards(torch.stack(best))


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 5])
def test_parts_choose_what_the_whole_chooses(shards: ModuleType, parts: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    vocab_size = 4 * 700  # neither of parts nor of tiles
    logits = torch.randn(rows, vocab_size, generator=generator).to(DEVICE)
    temperatures = torch.tensor([0.0, 0.3, 1.0, 2.5, 0.7][:rows], device=DEVICE)
    seeds = (torch.arange(rows, device=DEVICE) + 7) * (2**61 // 3)
    positions = torch.arange(rows, device=DEVICE) * 31 + 2
    unused = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    expected = sample(
        logits,
        temperatures,
        unused,
        temperatures,
        seeds,
        positions,
        all_greedy=False,
        any_top_k_top_p=False,
    )
    assert torch.equal(
        choose(shards, logits, parts, temperatures, seeds, positions, all_greedy=False), expected
    )
    greedy = torch.zeros_like(temperatures)
    assert torch.equal(
        choose(shards, logits, parts, greedy, seeds, positions, all_greedy=True),
        logits.argmax(dim=-1),
    )


def test_the_lowest_token_wins_a_tie_between_parts(shards: ModuleType) -> None:
    logits = torch.zeros(2, 64, device=DEVICE)
    logits[0, 21] = logits[0, 40] = logits[1, 63] = logits[1, 62] = 3.0
    zeros = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    chosen = choose(shards, logits, 4, torch.zeros(2, device=DEVICE), zeros, zeros, all_greedy=True)
    assert chosen.tolist() == [21, 62]


def test_both_implementations_give_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 512, generator=generator).to(DEVICE)
    args = (
        torch.tensor([0.5, 1.0, 2.0], device=DEVICE),
        torch.arange(3, device=DEVICE),
        torch.arange(3, device=DEVICE) + 9,
    )
    found = [
        import_module(f"nanovllm.kernels.{level}.sampling_shards").best_of_shard(
            logits, *args, 1024, all_greedy=False
        )
        for level in ("torch", "triton")
    ]
    assert found[1].shape == (2, 3, 1)  # one slice: the part is shorter than a tile
    assert torch.equal(*found)
