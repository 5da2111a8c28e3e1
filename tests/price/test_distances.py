"""Distances between distributions, against their definitions."""

from __future__ import annotations

import math
import random

import pytest
import torch

from experiments.price.distances import Distances, distances


def plain(reference: list[float], other: list[float], token: int) -> tuple[float, bool, float]:
    """The oracle: KL divergence, whether the top choice is lost, and the difference of log
    probabilities, of one position.
    """
    tops = max(reference), max(other)
    logs = [
        [z - top - math.log(math.fsum(math.exp(y - top) for y in logits)) for z in logits]
        for logits, top in zip((reference, other), tops, strict=True)
    ]
    kl = math.fsum(math.exp(a) * (a - b) for a, b in zip(*logs, strict=True))
    lost = reference.index(tops[0]) != other.index(tops[1])
    return kl, lost, logs[0][token] - logs[1][token]


def drawn(seed: int, rows: int, vocab: int, noise: float) -> tuple[torch.Tensor, ...]:
    rng = random.Random(seed)
    reference = [[rng.gauss(0, 3) for _ in range(vocab)] for _ in range(rows)]
    other = [[z + rng.gauss(0, noise) for z in row] for row in reference]
    tokens = [rng.randrange(vocab) for _ in range(rows)]
    return torch.tensor(reference).double(), torch.tensor(other).double(), torch.tensor(tokens)


@pytest.mark.parametrize("noise", [1e-3, 0.1, 2.0])
def test_distances_are_those_of_the_definition(noise: float) -> None:
    reference, other, tokens = drawn(1, 20, 50, noise)
    found = distances(reference, other, tokens)
    for i in range(20):
        kl, lost, log_perplexity = plain(reference[i].tolist(), other[i].tolist(), int(tokens[i]))
        assert float(found.kl[i]) == pytest.approx(kl, rel=1e-7, abs=1e-15)
        assert bool(found.lost[i]) == lost
        assert float(found.log_perplexity[i]) == pytest.approx(log_perplexity, rel=1e-9)
    assert noise < 1 or found.lost.any()


def test_equal_logits_have_no_distance() -> None:
    reference, _, tokens = drawn(2, 5, 40, 1.0)
    found = distances(reference, reference.clone(), tokens)
    assert not found.kl.any()
    assert not found.lost.any()
    assert not found.log_perplexity.any()


def test_distances_below_the_rounding_of_a_sum_are_not_lost() -> None:
    """KL is half the variance of a small change of the logits: 5e-15 here, where terms of both signs
    that cancel would leave 1e-16 times the vocabulary.
    """
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(4, 50_000, generator=generator, dtype=torch.float64)
    change = 1e-7 * torch.randn(4, 50_000, generator=generator, dtype=torch.float64)
    p = reference.softmax(-1)
    variance = (p * change**2).sum(-1) - (p * change).sum(-1) ** 2
    found = distances(reference, reference + change, torch.zeros(4, dtype=torch.int64))
    assert torch.allclose(found.kl, variance / 2, rtol=1e-3, atol=0)


def test_a_token_that_the_reference_rules_out_costs_what_the_other_gives_it() -> None:
    reference = torch.tensor([[0.0, -2000.0]]).double()
    other = torch.tensor([[0.0, 0.0]]).double()
    found = distances(reference, other, torch.tensor([0]))
    assert float(found.kl) == pytest.approx(math.log(2))


def test_the_order_of_the_two_matters_and_shifts_of_logits_do_not() -> None:
    reference, other, tokens = drawn(3, 8, 30, 1.0)
    there, back = distances(reference, other, tokens), distances(other, reference, tokens)
    assert not torch.allclose(there.kl, back.kl)
    shifted = distances(reference + 5, other - 3, tokens)
    assert torch.allclose(shifted.kl, there.kl)
    assert torch.allclose(shifted.log_perplexity, there.log_perplexity)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_distribution_are_refused(bad: float) -> None:
    reference, other, tokens = drawn(4, 3, 10, 0.1)
    other[1, 4] = bad
    with pytest.raises(ValueError, match="at position 1 are not finite"):
        distances(reference, other, tokens)


def test_another_vocabulary_is_refused() -> None:
    reference, other, tokens = drawn(5, 3, 10, 0.1)
    with pytest.raises(ValueError, match="one vocabulary"):
        distances(reference, other[:, :9], tokens)


def test_totals_are_sums_over_positions_in_parts_as_in_one() -> None:
    reference, other, tokens = drawn(6, 12, 20, 1.0)
    whole = distances(reference, other, tokens)
    parts = Distances.cat(
        [distances(reference[part], other[part], tokens[part]) for part in (slice(5), slice(5, 12))]
    )
    assert len(parts) == 12
    assert parts.totals() == pytest.approx(whole.totals())
    assert whole.totals()["top_choice"] == int(whole.lost.sum())
