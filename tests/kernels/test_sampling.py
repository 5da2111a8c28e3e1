"""The counter-based generator (bit for bit) and the sampler (in distribution)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from nanovllm.kernels.torch import filtering
from nanovllm.kernels.torch.filtering import filtered_logits
from nanovllm.kernels.torch.logprobs import logprobs
from nanovllm.kernels.torch.sampling import gumbel_noise, philox4x32, sample

VECTORS = json.loads(
    (Path(__file__).parents[1] / "support" / "data" / "gumbel_vectors.json").read_text()
)
# of every statistical test here; the seeds are fixed, so a test that passes keeps passing
LEVEL = 1e-4


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def draw(
    logits: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    num_samples: int,
    seed: int = 0,
) -> torch.Tensor:
    """`num_samples` tokens of one row of logits [vocab], at positions 0, 1, 2 ..."""
    n = num_samples
    return sample(
        logits.expand(n, -1),
        torch.full((n,), temperature),
        torch.full((n,), top_k),
        torch.full((n,), top_p),
        torch.full((n,), seed),
        torch.arange(n),
        all_greedy=False,
        any_top_k_top_p=top_k > 0 or top_p < 1.0,
    )


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, examples/kat_vectors, philox4x32 10
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], expected: str
) -> None:
    words = philox4x32(*(ints(value) for value in (*key, *counter)))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
def test_noise_has_the_committed_bits(device: str) -> None:
    for case in VECTORS["cases"]:
        noise = gumbel_noise(
            ints(case["seed"]).to(device), ints(case["position"]).to(device), case["vocab_size"]
        )
        bits = (
            noise[0, torch.tensor(VECTORS["token_ids"][str(case["vocab_size"])])]
            .cpu()
            .view(torch.int32)
        )
        assert [f"{int(b) & 0xFFFFFFFF:08x}" for b in bits] == case["noise"], case


def test_noise_is_within_four_ulp_of_the_formula() -> None:
    positions, vocab_size = torch.arange(64), 4001
    noise = gumbel_noise(torch.full((64,), 2**62 + 12345), positions, vocab_size).double()
    token_ids = torch.arange(vocab_size)
    key = (ints((2**62 + 12345) & 0xFFFFFFFF), ints((2**62 + 12345) >> 32))
    words = philox4x32(*key, token_ids[None] >> 2, positions[:, None], ints(0), ints(0))
    bits = torch.stack(words, -1).gather(-1, (token_ids & 3).expand(64, -1)[..., None])[..., 0]
    uniform = bits.float().clamp(0.5, 2.0**32 - 2.0**8).double() * 2.0**-32
    exact = -torch.log(-torch.log1p(-uniform))
    # absolute below 0.5
    ulp = torch.from_numpy(np.spacing(exact.abs().clamp(min=0.5).float().numpy())).double()
    assert ((noise - exact).abs() / ulp).max() < 4.0


def test_extreme_words_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (ints(0), ints(1), ints(0xFFFFFFFF), ints(0x80000000))
    monkeypatch.setattr(
        "nanovllm.kernels.torch.sampling.philox4x32", lambda *_: tuple(w[:, None] for w in words)
    )
    noise = gumbel_noise(ints(0), ints(0), 4)[0]
    uniform = torch.tensor([2.0**-33, 2.0**-32, 1 - 2.0**-24, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        noise.double(), -torch.log(-torch.log1p(-uniform)), rtol=1e-6, atol=1e-7
    )
    assert noise[0] > 22.8
    assert noise[2] > -2.82


def test_noise_follows_the_gumbel_distribution() -> None:
    noise = gumbel_noise(torch.arange(40) * 7919, torch.arange(40), 5000)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > LEVEL
    assert stats.kstest(noise[:, ::97].flatten().numpy(), "gumbel_r").pvalue > LEVEL
    neighbours = np.corrcoef(noise[:, :-1].flatten(), noise[:, 1:].flatten())[0, 1]
    assert abs(neighbours) < 4.0 / np.sqrt(noise.numel())


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    seeds, positions = ints(3, -1, 3, 2**40, 2**62), ints(0, 17, 5, 5, 2**31)
    noise = gumbel_noise(seeds, positions, 103)
    for row in range(5):
        alone = gumbel_noise(seeds[row : row + 1], positions[row : row + 1], 1000)
        assert torch.equal(alone[0, :103], noise[row])
    order = torch.randperm(5)
    assert torch.equal(gumbel_noise(seeds[order], positions[order], 103), noise[order])
    assert len({row.numpy().tobytes() for row in noise}) == 5
    # Each half of the seed, and the position, change every token's noise.
    for seed, position in [(3 + 2**32, 0), (4, 0), (3, 1)]:
        assert not (gumbel_noise(ints(seed), ints(position), 103) == noise[0]).any()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.6, -1, 1.0),
        (1.7, 5, 1.0),
        (1.0, 0, 0.8),
        (0.9, 7, 0.7),
        (1.3, 1000, 0.5),
        (1.0, 0, 1e-6),
    ],
)
def test_frequencies_follow_the_filtered_softmax(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(23, generator=torch.Generator().manual_seed(1)) * 2
    num_samples = 20_000
    tokens = draw(logits, temperature, top_k, top_p, num_samples, seed=99)
    expected = (
        reference_probabilities(logits.double().numpy() / temperature, top_k, top_p) * num_samples
    )
    counts = np.bincount(tokens.numpy(), minlength=23)
    assert counts[expected == 0].sum() == 0
    rare = (expected > 0) & (expected < 5)
    observed = np.append(counts[expected >= 5], counts[rare].sum())
    wanted = np.append(expected[expected >= 5], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    if len(wanted) > 1:
        assert stats.chisquare(observed, wanted).pvalue > LEVEL
    else:
        assert observed[0] == num_samples


def reference_probabilities(scaled: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The definition, in float64 and in words: k largest with ties, then the smallest set of the
    largest reaching top_p.
    """
    probabilities = np.exp(scaled - scaled.max())
    if 0 < top_k < len(scaled):
        probabilities[scaled < np.sort(scaled)[-top_k]] = 0.0
    probabilities /= probabilities.sum()
    if top_p < 1.0:
        kept, mass = [], 0.0
        for token in np.argsort(-probabilities, kind="stable"):
            kept.append(token)
            mass += probabilities[token]
            if mass >= top_p:
                break
        mask = np.isin(np.arange(len(scaled)), kept)
        probabilities = np.where(mask, probabilities, 0.0)
    return probabilities / probabilities.sum()


def test_filters_keep_what_they_say() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1, 0.0]))

    def kept(temperature: float, top_k: int, top_p: float) -> list[int]:
        row = filtered_logits(
            logits[None], torch.tensor([temperature]), ints(top_k), torch.tensor([top_p])
        )[0]
        return torch.nonzero(row > -torch.inf).flatten().tolist()

    assert kept(1.0, 0, 1.0) == [0, 1, 2, 3, 4]
    assert kept(1.0, -1, 1.0) == [0, 1, 2, 3, 4]
    assert kept(1.0, 100, 1.0) == [0, 1, 2, 3, 4]
    assert kept(1.0, 1, 1.0) == [1]
    assert kept(1.0, 2, 1.0) == [1, 2, 3]  # the tie with the 2nd is kept
    assert kept(1.0, 0, 0.39) == [1]
    assert kept(1.0, 0, 1e-9) == [1]  # at least one
    assert kept(1.0, 0, 0.55) == [1, 2]  # ties: lower ids first
    assert kept(1.0, 0, 0.75) == [1, 2, 3]
    assert kept(1.0, 2, 0.7) == [1, 2]  # top-p of what top-k left: 0.5, 0.25, 0.25
    assert kept(0.0, 2, 0.45) == [1]


def test_no_filter_means_no_change() -> None:
    logits = torch.randn(3, 1000) * 20
    temperatures = torch.tensor([0.0, 1.0, 0.5])
    result = filtered_logits(logits, temperatures, ints(0, -1, 1000), torch.ones(3))
    assert torch.equal(result, logits / torch.tensor([1.0, 1.0, 0.5])[:, None])


def test_filters_take_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.randn(10, 50), torch.rand(10) + 0.5, torch.arange(10), torch.linspace(0.1, 1, 10)
    at_once = filtered_logits(*given)
    monkeypatch.setattr(filtering, "ROWS", 4)
    assert torch.equal(filtered_logits(*given), at_once)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 311, generator=generator) * 3
    temperatures = torch.tensor([0.0, 1.0, 0.6, 2.0, 0.0, 1.0])
    top_ks, top_ps = ints(0, 5, 0, -1, 3, 0), torch.tensor([1.0, 1.0, 0.5, 1.0, 0.2, 1.0])
    seeds, positions = ints(1, 2, 3, 4, 5, 6), ints(10, 20, 30, 40, 50, 60)
    together = sample(
        logits,
        temperatures,
        top_ks,
        top_ps,
        seeds,
        positions,
        all_greedy=False,
        any_top_k_top_p=True,
    )
    for row in range(6):
        one = slice(row, row + 1)
        filters = bool(top_ks[row] > 0 or top_ps[row] < 1)
        alone = sample(
            logits[one],
            temperatures[one],
            top_ks[one],
            top_ps[one],
            seeds[one],
            positions[one],
            all_greedy=bool(temperatures[row] == 0),
            any_top_k_top_p=filters,
        )
        assert alone[0] == together[row]
    assert torch.equal(together[temperatures == 0], logits.argmax(-1)[temperatures == 0])


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(2, 5000, dtype=torch.bfloat16)
    logits[:, [4000, 1234]] = 1.0
    zeros, ones = torch.zeros(2), torch.ones(2)
    for all_greedy in (True, False):
        for filters in (True, False):
            tokens = sample(
                logits,
                zeros,
                ints(0, 0),
                ones,
                ints(0, 1),
                ints(0, 0),
                all_greedy=all_greedy,
                any_top_k_top_p=filters,
            )
            assert tokens.tolist() == [1234, 1234]


def test_logprobs_are_the_raw_log_softmax() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)).bfloat16()
    token_ids = ints(0, 7, 49, int(logits[3].argmax()))
    chosen, ranks, top_values, top_ids = logprobs(logits, token_ids, 5)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(
        chosen.double(), exact.gather(-1, token_ids[:, None])[:, 0], rtol=0, atol=1e-6
    )
    assert ranks.tolist() == [
        int((logits[i] >= logits[i, t]).sum()) for i, t in enumerate(token_ids)
    ]
    assert ranks[3] == int((logits[3] == logits[3].max()).sum())
    torch.testing.assert_close(top_values.double(), exact.topk(5).values, rtol=0, atol=1e-6)
    assert torch.equal(logits.gather(-1, top_ids), logits.topk(5).values)
    assert logprobs(logits, token_ids, 0)[2].shape == (4, 0)
