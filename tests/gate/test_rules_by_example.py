"""What the gate says beside its verdict, by example; most of these had mutants that survived."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.gate.logit_margins import Rows
from experiments.gate.rules import GateParams, by_position, compare_logprobs, judge
from experiments.gate.same_work import read_vocabulary
from experiments.gate.scoring import Scores, score_rows
from experiments.gate.truncation import descending
from nanovllm.kernels.torch.filtering import filtered_logits
from nanovllm.kernels.torch.sampling import sample
from nanovllm.kernels.torch.sampling_shards import best_of_shard


def scores_of(tokens: int, requests: int = 1) -> list[Scores]:
    """Right in everything, HF's error 0.1."""
    n = tokens * requests
    columns = {name: torch.zeros(n, dtype=torch.float64) for name in Scores.__dataclass_fields__}
    top = {name: torch.zeros(n, 5) for name in ("best", "best_scores", "hf_best", "hf_best_scores")}
    right = {name: torch.ones(n, dtype=torch.bool) for name in ("agrees", "hf_agrees")}
    columns |= top | right | {"unknown_noise": torch.zeros(n, dtype=torch.bool)}
    columns |= {"error": torch.full((n,), 0.1, dtype=torch.float64)}
    return Scores(**columns).split([tokens] * requests)


def test_repeated_tokens_are_a_share_of_pairs() -> None:
    (scores,) = scores_of(2)
    assert judge([scores], "float32", GateParams()).calibration["repeated_tokens"] == 1.0
    scores.tokens[1] = 5
    assert judge([scores], "float32", GateParams()).calibration["repeated_tokens"] == 0.0


def test_ranges_of_positions_double() -> None:
    parts = by_position(scores_of(120))
    assert [(part["first"], part["last"]) for part in parts] == [
        (0, 15),
        (16, 47),
        (48, 111),
        (112, 119),
    ]


def test_the_offender_is_the_largest_margin_where_none_is_beyond_the_bound() -> None:
    scores = scores_of(100, requests=40)
    for s in scores:  # many small ones, which rule 4 sees
        s.agrees[:9], s.margin[:9] = False, 0.01
    scores[7].margin[3] = 0.15
    result = judge(scores, "float32", GateParams())
    assert result.status == "fail"
    assert result.max_margin < result.bound
    assert result.first_offender is not None
    assert (result.first_offender["request"], result.first_offender["position"]) == (7, 3)
    assert result.duration_s == 0.0


def test_the_floor_of_log_probabilities_is_that_of_the_largest_logits() -> None:
    (scores,) = scores_of(8)
    scores.scale[0], eps = 100.0, torch.finfo(torch.float32).eps
    found = compare_logprobs([scores], [[0.0] * 8], "float32", GateParams())
    assert found.bound["max"] == pytest.approx(100 * eps)


@pytest.mark.parametrize(("eos", "ids"), [(7, {7}), ([7, 9], {7, 9}), (None, set())])
def test_the_vocabulary_of_a_checkpoint(tmp_path: Path, eos: object, ids: set[int]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos, "vocab_size": 40}))
    assert read_vocabulary(tmp_path) == (ids, 40)


@pytest.mark.parametrize("width", [1, 2, 640, 3000])
def test_the_largest_values_are_sorted(width: int) -> None:
    values = torch.randn(9, 3000, generator=torch.Generator().manual_seed(width))
    assert torch.equal(
        descending(values, width), values.sort(-1, descending=True).values[:, :width]
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_choices_of_sampled_rows(temperature: float) -> None:
    """Of rows that were sampled by our generator, at temperature 1 as at another."""
    n, vocab_size = 24, 300
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(n, vocab_size, generator=generator, dtype=torch.float64) * 3
    hf_logits = (logits + 0.5 * torch.randn(n, vocab_size, generator=generator)).float()
    rows = Rows(
        temperature=torch.full((n,), temperature),
        top_k=torch.zeros(n, dtype=torch.int64),
        top_p=torch.ones(n),
        seed=torch.arange(n),
        position=torch.arange(n),
        unknown_noise=torch.zeros(n, dtype=torch.bool),
        min_p=torch.zeros(n),
    )
    noise = rows.noise(vocab_size)
    choices, hf_choices = ((x / temperature + noise).argmax(-1) for x in (logits, hf_logits))
    assert (choices != hf_choices).any()
    scores = score_rows(logits, hf_logits, rows, choices)
    assert scores.agrees.all()
    assert torch.equal(scores.hf_agrees, choices == hf_choices)
    expected = logits.log_softmax(-1).gather(1, choices[:, None])[:, 0]
    torch.testing.assert_close(scores.logprob, expected, rtol=1e-6, atol=1e-6)


def test_a_greedy_row_beside_a_sampled_one_keeps_its_bits() -> None:
    """Logits that differ by less than one unit in the last place of 1."""
    logits = torch.tensor([[1e-9, 3e-9, 2e-9, 0.0], [0.0] * 4])
    temperatures, zeros = torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.int64)
    flags = {"all_greedy": False, "any_top_k_top_p": False}
    assert sample(logits, temperatures, zeros, torch.ones(2), zeros, zeros, **flags)[0] == 1
    values, tokens = best_of_shard(logits, temperatures, zeros, zeros, 0, all_greedy=False)
    assert int(tokens[0]) == 1
    assert values[0].view(torch.float32) == logits[0, 1]


def test_top_p_that_is_reached_exactly_keeps_no_more() -> None:
    ones = torch.ones(1)
    kept = filtered_logits(torch.zeros(1, 4), ones, torch.zeros(1, dtype=torch.int64), 0.5 * ones)
    assert (kept > -torch.inf).tolist() == [[True, True, False, False]]
