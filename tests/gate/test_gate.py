"""The gate: HF against itself passes, every broken engine fails, and what is judged is what was
recorded.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from experiments import workloads
from experiments.gate import logit_margins, scoring, truncation
from experiments.gate.chance.event_counts import evidence_of_count
from experiments.gate.chance.significance import (
    binomial_limit,
    dispersion,
    evidence_of_ends,
    normal_limit,
)
from experiments.gate.gumbel_noise import gumbel, noise_of, uniform_bits
from experiments.gate.judge import describe, judge_outputs, main
from experiments.gate.logit_margins import Rows, smallest_explaining_noise
from experiments.gate.negative_controls import (
    change_norm_epsilon,
    scale_rope_theta,
    swap_kv_slots,
    tamper,
)
from experiments.gate.reference_model import check_decomposition
from experiments.gate.rescoring import DTYPE, Request, Rescorer, batches_of_similar_length
from experiments.gate.rules import GateParams, GateResult, compare_logprobs, judge
from experiments.gate.same_work import same_work
from experiments.gate.scoring import Scores, score_rows
from experiments.records import store
from nanovllm.kernels.torch.sampling import gumbel_noise
from nanovllm.models.checkpoint import checkpoint_digest, ensure_checkpoint
from reports.page import evidence
from tests.support.hf_names import CACHE

DTYPES = ["float32", "bfloat16"]
PARAMS = GateParams()
GREEDY, SAMPLED, TRUNCATED = (
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9},
)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def rescorers(tiny: Path) -> Callable[[str], Rescorer]:
    known: dict[str, Rescorer] = {}

    def get(dtype: str) -> Rescorer:
        if dtype not in known:
            known[dtype] = Rescorer(tiny, dtype)
        return known[dtype]

    return get


SHORT = (6, 9)
"""Lengths of prompts where only the answers matter: both models read all of it."""


def make_requests(
    *sampling: dict[str, float],
    each: int = 8,
    max_tokens: int = 24,
    vocab_size: int = 2048,
    lengths: tuple[int, int] = (40, 64),
) -> list[Request]:
    """`each` requests with every one of the sampling parameters, with prompts of two lengths."""
    rng = random.Random(0)
    defaults = {"max_tokens": max_tokens, "top_k": 0, "top_p": 1.0, "ignore_eos": True}
    return [
        {
            "prompt_token_ids": [rng.randrange(vocab_size) for _ in range(lengths[i % 2])],
            "seed": rng.getrandbits(31),
            **defaults,
            **parameters,
        }
        for parameters in sampling
        for i in range(each)
    ]


def rows_of(requests: list[Request], positions: list[int], unknown_noise: bool = False) -> Rows:
    columns = {
        "temperature": torch.float32,
        "top_k": torch.int64,
        "top_p": torch.float32,
        "seed": torch.int64,
    }
    return Rows(
        **{
            name: torch.tensor([r[name] for r in requests], dtype=dtype)
            for name, dtype in columns.items()
        },
        position=torch.tensor(positions),
        unknown_noise=torch.full((len(positions),), unknown_noise),
        min_p=torch.tensor([r.get("min_p", 0.0) for r in requests]),
    )


def kept(scaled: Tensor, rows: Rows) -> Tensor:
    """Which tokens min-p, top-k, then top-p on what is left, keep: bool [n, V] from logits over
    temperature [n, V].
    """
    k, p = rows.limits(scaled.shape[1])
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    within_k = torch.arange(scaled.shape[1], device=scaled.device) < k
    within_k &= ordered[:, :1] - ordered <= rows.depth
    mass = ordered.masked_fill(~within_k, -torch.inf).softmax(-1)
    keep = within_k & (mass.cumsum(-1) - mass < p)
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(1, order, keep)


def truncate(scores: Tensor, scaled: Tensor, rows: Rows) -> Tensor:
    """`scores` [n, V] with -infinity for the tokens that min-p, top-k and top-p drop, given logits over
    temperature `scaled` [n, V].
    """
    index = rows.truncated.nonzero().flatten()
    scores = scores.clone()
    scores[index] = scores[index].masked_fill(~kept(scaled[index], rows[index]), -torch.inf)
    return scores


def choose(logits: Tensor, rows: Rows, generator: torch.Generator | None = None) -> Tensor:
    """Tokens [n] of logits [n, V]: by our generator, or by torch's."""
    scaled = logits.float() / rows.divisor[:, None]
    scores = truncate(scaled, scaled, rows)
    if generator is None:
        return (scores + rows.noise(scores.shape[1])).argmax(-1)
    drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
    return torch.where(rows.greedy, scores.argmax(-1), drawn)


Generated = tuple[list[list[int]], list[list[float]]]
_GENERATED: dict[str, Generated] = {}


def generate(
    model_dir: Path,
    dtype: str,
    requests: list[Request],
    *,
    batch_size: int = 8,
    break_it: Callable[[Any], None] | None = None,
    unknown_noise: bool = False,
) -> Generated:
    """An engine made of HF and its KV cache: (tokens, log-probabilities), in batches of prompts of
    one length. What several tests judge is generated once.
    """
    key = json.dumps([str(model_dir), dtype, requests, batch_size, unknown_noise])
    if break_it is None and key in _GENERATED:
        return copy.deepcopy(_GENERATED[key])
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=DTYPE[dtype]).eval()
    if break_it is not None:
        break_it(model)
        return run_model(model, requests, batch_size, unknown_noise)
    _GENERATED[key] = run_model(model, requests, batch_size, unknown_noise)
    return copy.deepcopy(_GENERATED[key])


@torch.inference_mode()
def run_model(
    model: Any, requests: list[Request], batch_size: int, unknown_noise: bool
) -> Generated:
    generator = torch.Generator().manual_seed(1) if unknown_noise else None
    outputs: list[list[int]] = [[] for _ in requests]
    logprobs: list[list[float]] = [[] for _ in requests]
    lengths = [len(request["prompt_token_ids"]) for request in requests]
    for length in sorted(set(lengths)):
        same_length = [i for i, other in enumerate(lengths) if other == length]
        for start in range(0, len(same_length), batch_size):
            batch = same_length[start : start + batch_size]
            members = [requests[i] for i in batch]
            ids, cache = torch.tensor([r["prompt_token_ids"] for r in members]), None
            for step in range(members[0]["max_tokens"]):
                result = model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
                logits, cache = result.logits[:, -1], result[CACHE]
                tokens = choose(logits, rows_of(members, [length + step] * len(batch)), generator)
                values = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
                for i, token, value in zip(batch, tokens.tolist(), values.tolist(), strict=True):
                    outputs[i].append(token)
                    logprobs[i].append(value)
                ids = tokens[:, None]
    return outputs, logprobs


def judged(
    rescorer: Rescorer,
    requests: list[Request],
    outputs: list[list[int]],
    unknown_noise: bool = False,
) -> GateResult:
    return judge_outputs(rescorer, requests, outputs, PARAMS, unknown_noise=unknown_noise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_hf_passes_whatever_its_batch_size(
    tiny: Path, rescorers: Any, dtype: str, batch_size: int
) -> None:
    requests = make_requests(GREEDY, SAMPLED, TRUNCATED, each=4)
    outputs, logprobs = generate(tiny, dtype, requests, batch_size=batch_size)
    rescorer = rescorers(dtype)
    result = judged(rescorer, requests, outputs)
    assert result.passed, result.reason
    assert result.tokens_checked == 12 * 24
    assert result.max_margin <= result.bound
    assert result.mismatches == result.within_bound
    assert 0 < result.calibration["hf_error"]["q50"] <= result.calibration["hf_error"]["max"]
    assert result.calibration["repeated_tokens"] < 0.2
    if dtype == "float32":
        assert result.mismatches == 0  # sampled tokens too: the generator is the engine's own
        assert result.bound < 1e-4
    compared = compare_logprobs(rescorer.score(requests, outputs), logprobs, dtype, PARAMS)
    assert compared.status == "pass", compared.reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(scale_rope_theta, id="rope_theta"),
        pytest.param(change_norm_epsilon, id="norm-epsilon"),
        pytest.param(partial(swap_kv_slots, layer=1, first=30, second=31), id="kv-slots"),
    ],
)
def test_broken_engines_fail(
    tiny: Path, rescorers: Any, dtype: str, break_it: Callable[[Any], None]
) -> None:
    requests = make_requests(GREEDY, each=16)
    outputs, logprobs = generate(tiny, dtype, requests, batch_size=16, break_it=break_it)
    result = judged(rescorers(dtype), requests, outputs)
    assert result.status == "fail"
    assert result.max_margin > result.bound
    offender = result.first_offender
    assert offender is not None
    assert offender["margin"] > result.bound
    assert offender["token"] == outputs[offender["request"]][offender["position"]]
    assert len(offender["reference_top5"]) == len(offender["hf_top5"]) == 5
    compared = compare_logprobs(rescorers(dtype).score(requests, outputs), logprobs, dtype, PARAMS)
    assert compared.status == "fail"


@pytest.mark.parametrize("dtype", DTYPES)
def test_tampered_token_is_found(tiny: Path, rescorers: Any, dtype: str) -> None:
    requests = make_requests(GREEDY, SAMPLED, each=4, max_tokens=12)
    outputs, _ = generate(tiny, dtype, requests)
    _, tampered = tamper(rescorers(dtype), requests, outputs, PARAMS)
    changed = [
        (i, j)
        for i, (a, b) in enumerate(zip(outputs, tampered, strict=True))
        for j in range(len(a))
        if a[j] != b[j]
    ]
    assert len(changed) == 1
    result = judged(rescorers(dtype), requests, tampered)
    assert result.status == "fail"
    assert result.first_offender is not None
    assert (result.first_offender["request"], result.first_offender["position"]) == changed[0]


def test_another_seed_fails(tiny: Path, rescorers: Any) -> None:
    requests = make_requests(SAMPLED, TRUNCATED, each=4)
    outputs, _ = generate(tiny, "bfloat16", requests)
    assert judged(rescorers("bfloat16"), requests, outputs).passed
    reseeded = [request | {"seed": request["seed"] + 1} for request in requests]
    assert judged(rescorers("bfloat16"), reseeded, outputs).status == "fail"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampling", [SAMPLED, TRUNCATED])
def test_another_generator_is_judged_by_its_distribution(
    tiny: Path, rescorers: Any, dtype: str, sampling: dict[str, float]
) -> None:
    requests = make_requests(sampling, each=24, lengths=SHORT)
    outputs, _ = generate(tiny, dtype, requests, batch_size=16, unknown_noise=True)
    # they are not our generator's, as few of them show
    assert judged(rescorers(dtype), requests[:6], outputs[:6]).status == "fail"
    result = judged(rescorers(dtype), requests, outputs, unknown_noise=True)
    assert result.passed, result.reason
    assert result.calibration["distribution"]["tokens"] >= 0.95 * 24 * 24
    hotter = [request | {"temperature": request["temperature"] * 1.33} for request in requests]
    assert judged(rescorers(dtype), hotter, outputs, unknown_noise=True).status == "fail"


def test_one_wrong_request_among_many_is_incredible(tiny: Path, rescorers: Any) -> None:
    """Ville's bound looks at each request alone, where the z-test looks at all tokens."""
    requests = make_requests(SAMPLED, each=32, lengths=SHORT)
    outputs, _ = generate(tiny, "float32", requests, batch_size=16, unknown_noise=True)
    rng = random.Random(1)
    outputs[7] = [rng.randrange(2048) for _ in range(24)]
    result = judged(rescorers("float32"), requests, outputs, unknown_noise=True)
    assert "request 7: its tokens are too unlikely" in str(result.reason)


def test_a_garbled_end_of_one_answer_is_incredible(tiny: Path, rescorers: Any) -> None:
    """However credible what came before it was."""
    requests = make_requests(SAMPLED, each=16, max_tokens=150, lengths=SHORT)
    outputs, _ = generate(tiny, "float32", requests, batch_size=16, unknown_noise=True)
    assert judged(rescorers("float32"), requests, outputs, unknown_noise=True).passed
    outputs[7][-12:] = random.Random(0).sample(range(2000), 12)
    result = judged(rescorers("float32"), requests, outputs, unknown_noise=True)
    assert "request 7: its tokens are too unlikely" in str(result.reason)


def test_parameters_that_requests_exchange_are_seen_by_the_dispersion(
    tiny: Path, rescorers: Any
) -> None:
    """One half is too unlikely and the other too likely: the sum over all tokens shows nothing."""
    cold, hot = {"temperature": 0.6}, {"temperature": 0.7}
    requests = make_requests(cold, hot, each=36, max_tokens=64, lengths=SHORT)
    outputs, _ = generate(tiny, "float32", requests, batch_size=16, unknown_noise=True)
    assert judged(rescorers("float32"), requests, outputs, unknown_noise=True).passed
    exchanged = [
        request | {"temperature": 1.3 - request["temperature"]}  # 0.7 for 0.6
        for request in requests
    ]
    result = judged(rescorers("float32"), exchanged, outputs, unknown_noise=True)
    assert "some requests are too likely and others too unlikely" in str(result.reason)
    assert "do not follow" not in str(result.reason)


def filtered_otherwise(n: int, of_engine: dict[str, float], asked: dict[str, float]) -> GateResult:
    """What the gate says of `n` tokens of an engine in bfloat16 that filters as it likes. Made-up
    logits, of which top-p 0.9 keeps some 90 of 500.
    """
    torch.manual_seed(3)
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    logits = 2 * torch.randn(n, 500, dtype=torch.float64)
    engines = logits + 0.02 * torch.randn_like(logits)
    hf = (logits + 0.02 * torch.randn_like(logits)).bfloat16()
    draw = rows_of([defaults | of_engine] * n, [0] * n, unknown_noise=True)
    tokens = choose(engines, draw, torch.Generator().manual_seed(5))
    rows = rows_of([defaults | asked] * n, [0] * n, unknown_noise=True)
    return judge([score_rows(logits.float(), hf, rows, tokens)], "bfloat16", PARAMS)


@pytest.mark.parametrize(
    ("asked", "of_engine"),
    [
        ({"top_p": 0.9}, {"top_p": 0.93}),
        ({"top_k": 40}, {"top_k": 45}),
        ({"min_p": 0.05}, {"min_p": 0.04}),
        ({"top_k": 200, "top_p": 0.9, "temperature": 1.3}, {"top_k": 200, "top_p": 0.93}),
    ],
)
def test_a_filter_that_is_a_little_off_is_seen_by_what_it_lets_through(
    asked: dict[str, float], of_engine: dict[str, float]
) -> None:
    """In bfloat16, where each of these tokens is within the bound."""
    of_engine = asked | of_engine
    right = filtered_otherwise(2000, asked, asked)
    assert right.passed, right.reason
    drawn = right.calibration["distribution"]
    # HF's error explains several times what an error of that size brings in
    assert 0 < 2 * drawn["outside"] < drawn["outside_explained"] < 0.1 * 2000
    off = filtered_otherwise(2000, of_engine, asked)
    assert "lie outside of what min-p, top-k and top-p keep" in str(off.reason)
    assert off.max_margin <= off.bound
    assert "exceed" not in str(off.reason)


def test_the_evidence_of_a_count_has_a_mean_of_one_at_most() -> None:
    """Exactly, over all outcomes of twelve events whose probabilities differ."""
    chances = [0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
    of_count = [1.0]  # the distribution of their number
    for p in chances:
        of_count = [
            a * (1 - p) + b * p for a, b in zip([*of_count, 0.0], [0.0, *of_count], strict=True)
        ]
    mean = sum(
        q * math.exp(evidence_of_count(k, sum(chances))) for k, q in enumerate(of_count) if q
    )
    assert mean <= 1.0
    assert evidence_of_count(0, 0.0) == pytest.approx(0.0, abs=1e-12)
    # 32 of 1,000 tokens, where 9 are explained; and a single one, where next to nothing is
    assert evidence_of_count(32, 9.0) > 13.8 > evidence_of_count(20, 9.0)
    assert evidence_of_count(1, 1e-6) < 13.8 < evidence_of_count(3, 1e-6)


def test_a_random_last_token_of_many_answers_is_seen(tiny: Path, rescorers: Any) -> None:
    """Of one answer, a random token proves nothing."""
    requests = make_requests(SAMPLED, each=24, lengths=SHORT)
    outputs, _ = generate(tiny, "float32", requests, batch_size=16, unknown_noise=True)
    rng = random.Random(0)
    one = [list(output) for output in outputs]
    one[5][-1] = rng.randrange(2048)
    assert judged(rescorers("float32"), requests, one, unknown_noise=True).passed
    every = [output[:-1] + [rng.randrange(2048)] for output in outputs]
    result = judged(rescorers("float32"), requests, every, unknown_noise=True)
    assert "the last tokens of many answers are too unlikely" in str(result.reason)


def test_the_evidence_of_ends_has_a_mean_of_one_at_most() -> None:
    """So it exceeds 1 / level with a probability of at most that level, for any number of requests.
    Tokens of three kinds with known factors; exactly, over all outcomes of two requests.
    """
    p = [0.9, 0.09, 0.01]
    factors = [q**-0.5 / sum(r**0.5 for r in p) for q in p]
    assert sum(q * f for q, f in zip(p, factors, strict=True)) == pytest.approx(1.0)
    mean = 0.0
    for drawn in itertools.product(range(3), repeat=4):  # two tokens of each of two requests
        chance = math.prod(p[i] for i in drawn)
        steps = torch.tensor([math.log(factors[i]) for i in drawn], dtype=torch.float64)
        mean += chance * math.exp(evidence_of_ends([steps[:2], steps[2:]], [2, 3]))
    assert mean == pytest.approx(1.0)
    # none came to its end
    assert evidence_of_ends([steps[:2], steps[2:]], [40, 50]) == pytest.approx(0.0, abs=1e-12)


def test_the_dispersion_is_about_what_it_should_be() -> None:
    generator = torch.Generator().manual_seed(0)
    variances = [2.0] * 400
    right = (torch.randn(400, generator=generator) * 2**0.5).tolist()
    none = [0.0] * 400
    assert abs(dispersion(right, variances, none, 2.0)) < 3
    assert dispersion([1.5 * x for x in right], variances, none, 2.0) > 5
    # what HF's own error explains is allowed, and nothing is known where nothing varies
    assert dispersion([1.0, -3.0], [1.0, 4.0], [0.5, 1.5], 2.0) == pytest.approx(-(2**0.5))
    assert dispersion([0.0, 1.0], [0.0, 1.0], [0.0, 0.0], 2.0) == 0.0


@pytest.mark.parametrize(
    ("sampling", "unknown_noise"), [(GREEDY, False), (SAMPLED, False), (SAMPLED, True)]
)
def test_permuted_outputs_fail(
    tiny: Path, rescorers: Any, sampling: dict[str, float], unknown_noise: bool
) -> None:
    requests = make_requests(sampling, each=4)
    outputs, _ = generate(tiny, "bfloat16", requests, unknown_noise=unknown_noise)
    assert judged(rescorers("bfloat16"), requests, outputs, unknown_noise).passed
    assert (
        judged(rescorers("bfloat16"), requests, outputs[1:] + outputs[:1], unknown_noise).status
        == "fail"
    )


def test_scores_do_not_depend_on_how_they_are_batched(tiny: Path, rescorers: Any) -> None:
    requests = make_requests(GREEDY, TRUNCATED, each=4)
    outputs, _ = generate(tiny, "float32", requests)
    alone = Rescorer(tiny, "float32", batch_tokens=1, logits_bytes=1).score(requests, outputs)
    for a, b in zip(alone, rescorers("float32").score(requests, outputs), strict=True):
        assert torch.equal(a.best[:, 0], b.best[:, 0])
        # the reference's own noise
        torch.testing.assert_close(a.logprob, b.logprob, rtol=0, atol=1e-12)


def test_only_what_was_asked_for_last_is_remembered(tiny: Path) -> None:
    """A study with many distinct outputs must not fill the memory; what outputs have in common is
    still computed once.
    """
    requests = make_requests(SAMPLED, each=4, max_tokens=8)
    rescorer = Rescorer(tiny, "float32", known_tokens=40)
    computed: list[int] = []

    def score(*tokens: int) -> list[int]:
        computed.clear()
        outputs = [[token] * 8 for token in tokens]
        scores = rescorer.score(
            requests, outputs, progress=lambda done, total: computed.append(total)
        )
        assert [s.tokens.tolist() for s in scores] == outputs
        assert sum(map(len, rescorer._known.values())) <= 40
        return computed[:1]

    whole = sum(len(request["prompt_token_ids"]) + 8 for request in requests)
    assert score(1, 2, 3, 4) == [whole]
    assert score(1, 2, 3, 5) == [len(requests[3]["prompt_token_ids"]) + 8], "the rest is known"
    assert score(1, 2, 3, 4) == [], "and so is this, still"
    assert score(6, 7, 8, 9) == [whole]
    assert score(1, 2, 3, 4) == [whole - len(requests[3]["prompt_token_ids"]) - 8], (
        "what came last stayed"
    )


def test_reference_holds_the_weights_of_the_engine(tiny: Path, tmp_path: Path) -> None:
    """Stored in float32, run in bfloat16: the rounding of weights is the engine's model, not its
    noise.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1 + 2**-12)  # no longer exact in bfloat16
    model.save_pretrained(tmp_path)
    rescorer = Rescorer(tmp_path, "bfloat16")
    for ours, theirs in zip(rescorer.reference.parameters(), rescorer.hf.parameters(), strict=True):
        assert (ours.dtype, theirs.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(ours, theirs.float())


def test_norms_and_angles_of_the_reference_are_exact(rescorers: Any) -> None:
    """HF's own compute in float32 in a float64 model; a reference must not."""
    model = rescorers("float32").reference.base_model
    x = torch.randn(5, len(model.norm.weight), dtype=torch.float64)
    exact = (
        model.norm.weight
        * x
        / (x.square().mean(-1, keepdim=True) + model.norm.variance_epsilon).sqrt()
    )
    torch.testing.assert_close(model.norm(x), exact, rtol=1e-14, atol=0)
    assert not torch.allclose(type(model.norm).forward(model.norm, x), exact, rtol=1e-14, atol=0)

    position, head_dim = 4000, model.config.head_dim
    angles = [
        position * model.config.rope_parameters["rope_theta"] ** (-2 * i / head_dim)
        for i in range(head_dim // 2)
    ]
    cosines = torch.tensor([math.cos(angle) for angle in angles * 2], dtype=torch.float64)
    torch.testing.assert_close(
        model.rotary_emb(x, torch.tensor([[position]]))[0][0, 0], cosines, rtol=0, atol=1e-11
    )
    hf = type(model.rotary_emb).forward(model.rotary_emb, x, torch.tensor([[position]]))[0][0, 0]
    assert not torch.allclose(hf, cosines, rtol=0, atol=1e-6)


def test_models_that_treat_their_logits_are_refused(rescorers: Any) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.base_model, self.device, self.get_output_embeddings = (
                model.base_model,
                model.device,
                model.get_output_embeddings,
            )
            self._whole = [model]

        def forward(self, **inputs: Any) -> Any:
            result = self._whole[0](**inputs)
            result.logits = result.logits / 2
            return result

    with pytest.raises(NotImplementedError, match="the gate cannot rescore Scaled"):
        check_decomposition(Scaled(rescorers("float32").reference))


# --- margins
# ------------------------------------------------------------------------------------------------------------------


def test_margin_never_exceeds_the_noise_that_was_there() -> None:
    """Tokens chosen from logits moved by at most d/2 each have a margin of at most d, also where
    top-k and top-p cut.
    """
    torch.manual_seed(0)
    n, vocab_size = 4000, 24
    parameters = [
        {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": 0}
        for temperature, top_k, top_p in itertools.product(
            (0.0, 0.5, 1.5), (0, 1, 4), (0.3, 0.8, 1.0)
        )
    ]
    rows = rows_of([parameters[i % len(parameters)] for i in range(n)], list(range(n)))
    logits = torch.randn(n, vocab_size, dtype=torch.float64)
    d = torch.rand(n, 1, dtype=torch.float64)
    moved = logits + d * (torch.rand_like(logits) - 0.5).sign() / 2
    moved_scaled = moved / rows.divisor[:, None]
    tokens = (truncate(moved_scaled, moved_scaled, rows) + rows.noise(vocab_size)).argmax(-1)
    scores = score_rows(logits, logits.float(), rows, tokens)
    assert 0.1 < float(scores.agrees.double().mean()) < 0.9
    assert (scores.margin[scores.agrees] == 0).all()
    assert (scores.margin <= d[:, 0] * (1 + 1e-6)).all()
    assert (scores.margin[~scores.agrees] > 0).all()


def test_margin_at_the_edges_of_top_k_and_top_p() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.99, -5.0]], dtype=torch.float64)

    def margin(token: int, **parameters: float) -> float:
        rows = rows_of(
            [{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0} | parameters],
            [0],
            unknown_noise=True,
        )
        return float(score_rows(logits, logits.float(), rows, torch.tensor([token])).margin)

    assert margin(1, top_k=2) == 0
    assert margin(2, top_k=2) == pytest.approx(0.01, abs=1e-9)  # it would have to overtake token 1
    assert margin(3, top_k=2) == pytest.approx(7.0, abs=1e-9)
    # in logits, whatever the temperature
    assert margin(2, top_k=2, temperature=0.5) == pytest.approx(0.01, abs=1e-9)
    p = logits.softmax(-1)[0]
    assert margin(1, top_p=float(p[0]) + 1e-3) == 0
    # the first token's mass is a hair above top_p
    assert 0 < margin(1, top_p=float(p[0]) - 1e-3) < 0.01
    assert margin(3, top_p=0.5) > 1


def test_noise_is_the_engines_bit_for_bit() -> None:
    torch.manual_seed(0)
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (40,)), torch.randint(0, 2**20, (40,))
    for vocab_size in (1, 7, 2048):
        expected = gumbel_noise(seeds, positions, vocab_size)
        assert torch.equal(gumbel(uniform_bits(seeds, positions, vocab_size)), expected)
        token_ids = torch.randint(0, vocab_size, (40, 9))
        assert torch.equal(noise_of(seeds, positions, token_ids), expected.gather(1, token_ids))
    extremes = torch.tensor([0.0, 0.5, 1.0, 2.0**31, 2.0**32 - 256, 2.0**32])
    assert gumbel(extremes).isfinite().all()


def random_rows(
    n: int, vocab_size: int, *parameters: dict[str, float]
) -> tuple[Tensor, Tensor, Rows, Tensor]:
    """Logits of a reference, HF's with errors as of bfloat16, how they are sampled, and tokens of
    which a third is wrong.
    """
    torch.manual_seed(1)
    defaults = {"temperature": 0.7, "top_k": 0, "top_p": 1.0}
    requests = [{**defaults, "seed": 1000 + i, **parameters[i % len(parameters)]} for i in range(n)]
    rows = rows_of(requests, list(range(n)))
    logits = 3 * torch.randn(n, vocab_size, dtype=torch.float64)
    hf_logits = (logits + 0.05 * torch.randn_like(logits)).bfloat16()
    tokens = choose(logits, rows)
    tokens[::3] = torch.randint(0, vocab_size, tokens[::3].shape)
    return logits, hf_logits, rows, tokens


@pytest.mark.parametrize("reach", [scoring.REACH, 2.0])
@pytest.mark.parametrize("parameters", [({},), ({"top_k": 5}, {"top_p": 0.7}, {"top_k": 1})])
def test_a_few_candidates_tell_what_the_whole_vocabulary_tells(
    reach: float, parameters: tuple[dict[str, float], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reach so short that most rows have too few candidates, the rest of the vocabulary is
    looked at.
    """
    monkeypatch.setattr(scoring, "REACH", reach)
    logits, hf_logits, rows, tokens = random_rows(300, 500, *parameters)
    ours, plain = (
        score(logits, hf_logits.float(), rows, tokens)
        for score in (scoring._noisy, scoring._whole_vocabulary)
    )
    for name in ("agrees", "margin", "error", "hf_agrees", "scale", "logprob", "hf_logprob"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=0, atol=1e-12)
    assert torch.equal(ours.hf_best[:, 0], plain.hf_best[:, 0])
    # where the token agrees, those that top-k and top-p keep are shown if they are candidates
    for which in ("best", "hf_best"):
        seen = plain.agrees[:, None].logical_not() | (
            torch.arange(5) < (5 if parameters == ({},) and which == "best" else 1)
        )
        found, expected = (getattr(x, f"{which}_scores").where(seen, 0.0) for x in (ours, plain))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        seen &= plain.best_scores.isfinite() if which == "best" else plain.hf_best_scores.isfinite()
        assert torch.equal(getattr(ours, which)[seen], getattr(plain, which)[seen])
    assert 0.2 < float((~ours.agrees).double().mean()) < 0.4


@pytest.mark.parametrize("unknown_noise", [False, True])
def test_what_is_kept_is_what_a_sort_of_tokens_keeps(unknown_noise: bool) -> None:
    parameters = (
        {"top_k": 5},
        {"top_p": 0.5},
        {"top_p": 0.99, "temperature": 2.0},
        {"top_k": 50, "top_p": 0.8},
        {"top_k": 1},
        {},
    )
    logits, hf_logits, rows, tokens = random_rows(300, 500, *parameters)
    scaled = logits / rows.divisor[:, None]
    least = truncation.least_kept((scaled,), rows)
    assert least is not None
    keep = scaled >= least[0]
    assert torch.equal(keep, kept(scaled, rows))
    rows = dataclasses.replace(rows, unknown_noise=torch.full((300,), unknown_noise))
    scores = score_rows(logits, hf_logits, rows, tokens)
    expected = (truncate(scaled, scaled, rows) + rows.noise(500)).argmax(-1)
    assert torch.equal(scores.best[:, 0], expected)
    own = keep.gather(1, tokens[:, None])[:, 0]
    assert torch.equal(scores.agrees, own if unknown_noise else expected == tokens)
    if unknown_noise:
        logs = scaled.masked_fill(~keep, -torch.inf).log_softmax(-1)
        p, logs_or_0 = logs.exp(), logs.masked_fill(~keep, 0.0)
        torch.testing.assert_close(scores.entropy, -(p * logs_or_0).sum(-1), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            scores.log_p[own], logs.gather(1, tokens[:, None])[own, 0], rtol=0, atol=1e-12
        )
        mean = -scores.entropy
        torch.testing.assert_close(
            scores.variance, (p * (logs_or_0 - mean[:, None]) ** 2).sum(-1), rtol=0, atol=1e-9
        )


def test_the_search_for_a_margin_needs_the_most_likely_tokens_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, _, rows, tokens = random_rows(
        300, 500, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 50, "top_p": 0.8}
    )
    scaled = logits / rows.divisor[:, None]
    whole = smallest_explaining_noise(scaled, rows, tokens)
    monkeypatch.setattr(logit_margins, "_WIDTH", 60)
    narrow, exact = logit_margins._explaining_noise(scaled, rows, tokens, 60)
    assert 0.3 < float(exact.double().mean()) < 1
    torch.testing.assert_close(
        smallest_explaining_noise(scaled, rows, tokens), whole, rtol=0, atol=1e-8
    )
    torch.testing.assert_close(narrow[exact], whole[exact], rtol=0, atol=1e-8)


def test_rows_of_every_kind_may_be_mixed() -> None:
    logits, hf_logits, rows, tokens = random_rows(60, 100, {}, {"temperature": 0.0}, {"top_k": 5})
    together = score_rows(logits, hf_logits, rows, tokens)
    for i in range(60):
        alone = score_rows(
            logits[i : i + 1], hf_logits[i : i + 1], rows[i : i + 1], tokens[i : i + 1]
        )
        for name in ("tokens", "agrees", "margin", "error", "best_scores", "logprob"):
            torch.testing.assert_close(
                getattr(alone, name)[0], getattr(together, name)[i], rtol=0, atol=1e-12
            )
        shown = alone.best_scores[0].isfinite()
        assert torch.equal(alone.best[0][shown], together.best[i][shown])


@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.0}, {"top_k": 5}])
def test_logits_that_are_not_finite_are_an_error(parameters: dict[str, float]) -> None:
    logits, hf_logits, rows, tokens = random_rows(4, 100, parameters)
    for table in (logits, hf_logits):
        broken = [x.clone() for x in (logits, hf_logits)]
        broken[0 if table is logits else 1][2, 50] = torch.nan
        with pytest.raises(FloatingPointError, match="not finite"):
            score_rows(*broken, rows, tokens)


def test_kept_is_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, expected in ((0.01, 1), (0.49, 1), (0.6, 2), (0.9, 3), (0.97, 4), (1.0, 4)):
        rows = rows_of([{"temperature": 1.0, "top_k": 0, "top_p": top_p, "seed": 0}], [0])
        assert int(kept(logits, rows).sum()) == expected, top_p
    rows = rows_of([{"temperature": 1.0, "top_k": 2, "top_p": 0.7, "seed": 0}], [0])
    # top-p on the softmax of what top-k left: 0.625, 0.375
    assert kept(logits, rows).tolist() == [[True, True, False, False]]


# --- rules
# --------------------------------------------------------------------------------------------------------------------


def synthetic_scores(
    requests: int, tokens: int, differing: float, hf_differing: float, margin: float
) -> list[Scores]:
    """Scores whose tokens differ from the reference's at the given rates and are then `margin`
    logits away; HF errs by 0 to 1.
    """
    torch.manual_seed(0)
    n = requests * tokens
    differs = torch.rand(n) < differing
    columns = {name: torch.zeros(n, dtype=torch.float64) for name in Scores.__dataclass_fields__}
    top = {name: torch.zeros(n, 5) for name in ("best", "best_scores", "hf_best", "hf_best_scores")}
    flags = {
        "agrees": ~differs,
        "hf_agrees": torch.rand(n) >= hf_differing,
        "unknown_noise": torch.zeros(n, dtype=torch.bool),
    }
    measured = {"margin": differs * margin, "error": torch.linspace(0, 1, n, dtype=torch.float64)}
    return Scores(**columns | top | flags | measured).split([tokens] * requests)


def test_errors_below_the_bound_are_seen_by_their_number() -> None:
    """Every margin is within the bound of twice HF's largest error; that there are so many gives a
    bad engine away.
    """

    def verdict(differing: float) -> GateResult:
        return judge(
            synthetic_scores(200, 20, differing, hf_differing=0.02, margin=0.5), "bfloat16", PARAMS
        )

    assert verdict(0.0).passed
    assert verdict(0.03).passed  # a third more than HF, which `factor` allows
    result = verdict(0.1)
    assert result.max_margin < result.bound
    assert "differ from the reference's choice, more than 2 times the 84 of HF in bfloat16" in str(
        result.reason
    )


def test_one_request_that_repeats_a_near_tie_is_no_alarm() -> None:
    scores = synthetic_scores(200, 20, 0.02, hf_differing=0.02, margin=0.5)
    scores[3] = synthetic_scores(1, 1000, 1.0, hf_differing=0.0, margin=0.5)[0]
    assert judge(scores, "bfloat16", PARAMS).passed


def test_many_tokens_beyond_the_typical_bound_fail() -> None:
    """HF errs by 1 in one token of 10,000 and by 0.1 in the others; here 100 tokens are off by 1."""
    scores = synthetic_scores(100, 100, 0.01, hf_differing=0.02, margin=1.0)
    for i, s in enumerate(scores):
        s.error.fill_(0.1)
        s.error[0] = 1.0 if i == 0 else 0.1
    result = judge(scores, "bfloat16", PARAMS)
    assert result.max_margin < result.bound
    assert "tokens exceed the typical bound of 0.2 logits; 28 are allowed" in str(result.reason)


def test_errors_are_told_by_position() -> None:
    scores = synthetic_scores(50, 40, 0.0, hf_differing=0.02, margin=0.5)
    for s in scores:
        s.agrees[33:], s.margin[33:] = False, 0.25
    parts = judge(scores, "bfloat16", PARAMS).calibration["by_position"]
    assert [(part["first"], part["last"], part["tokens"]) for part in parts] == [
        (0, 15, 800),
        (16, 39, 1200),
    ]
    assert [part["mismatches"] for part in parts] == [0, 50 * 7]
    assert [part["margin"]["max"] for part in parts] == [0.0, 0.25]
    assert (
        sum(part["hf_mismatches"] for part in parts)
        == judge(scores, "bfloat16", PARAMS).calibration["hf_mismatches"]
    )


def test_the_report_shows_the_first_offender_and_errors_by_position() -> None:
    scores = synthetic_scores(50, 40, 0.0, hf_differing=0.02, margin=0.5)
    scores[7].agrees[3], scores[7].margin[3] = False, 99.0
    row = {
        "workload": "small",
        "tokens_digest": "f" * 64,
        **dataclasses.asdict(judge(scores, "bfloat16", PARAMS)),
    }
    (offender,) = evidence._first_offenders([row, {**row, "first_offender": None}])
    assert "request 7, output position 3: token 0, margin 99.00 logits" in offender.caption
    assert len(offender.rows) == 5
    by_position = evidence._errors_by_position([row, {**row, "calibration": None}])
    assert [line[2:5] for line in by_position.rows] == [
        ["0 to 15", "800", "1"],
        ["16 to 39", "1,200", "0"],
    ]


def test_same_work() -> None:
    request = {"prompt_token_ids": [1], "max_tokens": 3, "ignore_eos": True}
    stops = request | {"ignore_eos": False}

    def check(requests: list[Request], outputs: list[list[int]], **reasons: int) -> str:
        return "; ".join(same_work(requests, outputs, reasons, {9}, 10))

    assert not check([request, request], [[9, 9, 9], [1, 2, 3]], length=2)
    assert not check([stops, stops], [[1, 9], [1, 2, 3]], length=1, stop=1)
    assert not check([stops], [[1, 2, 9]], stop=1)
    assert "1 outputs for 2 requests" in check([request, request], [[1, 2, 3]], length=2)
    assert "2 tokens instead of exactly 3" in check([request], [[1, 2]], length=1)
    assert "2 tokens instead of 3" in check([stops], [[1, 2]], length=1)
    assert "3 tokens instead of 2" in check([stops], [[1, 9, 2]], stop=1)
    assert "finish reasons" in check([request], [[1, 2, 3]], stop=1)
    assert "outside the vocabulary" in check([request], [[1, 2, 10]], length=1)


def test_limits_of_chance() -> None:
    assert binomial_limit(1000, 0.001, 1e-6) == 9  # P(X > 8) = 1.1e-6, P(X > 9) = 1.0e-7
    assert binomial_limit(10, 0.5, 1e-6) == 10
    assert normal_limit(0.025) == pytest.approx(1.959964, abs=1e-6)
    assert normal_limit(1e-6) == pytest.approx(4.753424, abs=1e-6)


def test_batches_fit() -> None:
    lengths = [random.Random(0).randint(1, 50) for _ in range(100)] + [500]
    batches = list(batches_of_similar_length(lengths, 200))
    assert sorted(i for batch in batches for i in batch) == list(range(101))
    assert all(
        len(batch) * max(lengths[i] for i in batch) <= 200 for batch in batches if len(batch) > 1
    )


def test_refusals(rescorers: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown gate parameter 'fctor'.*allowed: factor"):
        GateParams.from_plan({"fctor": 3})
    with pytest.raises(ValueError, match=r"factor=0.5; it must be 1 or more"):
        GateParams(factor=0.5)
    with pytest.raises(
        ValueError, match=r"dtype='float64' cannot be rescored; allowed: float32, bfloat16, float16"
    ):
        Rescorer(tmp_path, "float64")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Rescorer(tmp_path, "float32")
    with pytest.raises(ValueError, match="output of request 1 is empty"):
        rescorers("float32").score(make_requests(GREEDY, each=2), [[1], []])
    with pytest.raises(ValueError, match="no output token to judge"):
        judge([], "float32", PARAMS)


# --- the process
# --------------------------------------------------------------------------------------------------------------


class Study:
    """A folder as experiments.launch leaves it: one workload, launches added by hand."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        params = {"num_requests": 4, "prompt_tokens": 40, "output_tokens": 16, "temperature": 0.0}
        self.workload = workloads.build("small", "random", params)
        self.requests = [request for wave in self.workload["waves"] for request in wave]
        self.plan: dict[str, Any] = {
            "plan_version": 1,
            "study": {"name": "test"},
            "workloads": {"small": workloads.summarize(self.workload)},
            "model": {"preset": None, "path": str(model_dir), "dtype": "float32"},
            "gate": {"control_tokens": 64},
        }
        self.plan["plan_hash"] = store.plan_hash(self.plan)
        self.folder = folder
        (folder / "plan.json").write_text(json.dumps(self.plan))

    def add(
        self,
        launch: str,
        outputs: list[list[int]],
        *,
        engine: str = "nanovllm",
        keep_tokens: bool = True,
        **served: Any,
    ) -> None:
        digest = workloads.tokens_digest(outputs)
        tokens = (
            {digest: base64.b64encode(zlib.compress(json.dumps(outputs).encode())).decode()}
            if keep_tokens
            else {}
        )
        served = {
            "fingerprint": self.workload["fingerprint"],
            "num_requests": len(outputs),
            "tokens_digest": digest,
            "finish_reasons": {"length": len(outputs)},
        } | served
        with store.Folder(self.folder) as folder:
            folder.append(
                {
                    "kind": "launch",
                    "schema": 1,
                    "study": "test",
                    "plan_hash": self.plan["plan_hash"],
                    "launch": launch,
                    "attempt": 0,
                    "status": "ok",
                    "engine": engine,
                    "workloads": {"small": served},
                },
                tokens,
            )

    def gate(self, *options: str) -> int:
        return main(["--plan", str(self.folder / "plan.json"), "--out", str(self.folder), *options])

    def verdicts(self) -> list[store.Record]:
        return [record for record in store.read(self.folder) if record["kind"] == "gate"]


@pytest.fixture
def study(tmp_path: Path, tiny: Path) -> Study:
    return Study(tmp_path, tiny)


def test_every_distinct_output_is_judged_once(
    study: Study, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs, _ = generate(tiny, "float32", study.requests)
    study.add("b00-o00-a", outputs)
    study.add("b00-o01-b", outputs, engine="hf")
    assert study.gate() == 0
    said = capsys.readouterr().err
    assert "1 of 1 distinct outputs pass" in said
    assert "(hf, nanovllm): the same tokens in 2 of 2 launches; " in said
    (record,) = study.verdicts()
    assert list(record) == [
        "kind",
        "schema",
        "study",
        "plan_hash",
        "workload",
        "tokens_digest",
        "dtype",
        "status",
        "reason",
        "tokens_checked",
        "mismatches",
        "within_bound",
        "max_margin",
        "bound",
        "calibration",
        "first_offender",
        "duration_s",
        "is_negative_control",
    ]
    assert record["status"] == "pass"
    assert record["tokens_checked"] == 64
    assert study.gate("--resume") == 0
    assert len(study.verdicts()) == 1

    broken = [list(output) for output in outputs]
    broken[2][5] = (broken[2][5] + 1) % 2048
    study.add("b01-o00-a", broken)
    assert study.gate("--resume") == 1
    assert [record["status"] for record in study.verdicts()] == ["pass", "fail"]
    assert study.verdicts()[1]["first_offender"]["request"] == 2
    assert study.verdicts()[1]["first_offender"]["position"] == 5


def test_negative_controls_are_caught_and_recorded(
    study: Study, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, _ = generate(tiny, "float32", study.requests)
    study.add("b00-o00-a", outputs)
    assert study.gate("--negative-control") == 0
    assert len(study.verdicts()) == 4
    assert all(
        record["is_negative_control"] and record["status"] == "fail" for record in study.verdicts()
    )
    assert study.gate("--resume") == 0  # controls are no verdict on the launch, which passes

    monkeypatch.setattr(
        "experiments.gate.negative_controls.controls",
        lambda requests: {"nothing broken": lambda model: None},
    )
    assert study.gate("--negative-control") == 1
    assert "NOT CAUGHT" in study.verdicts()[-2]["reason"]


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"keep_tokens": False}, "error", "no tokens with digest"),
        ({"fingerprint": "another"}, "fail", "workload fingerprint is another"),
        ({"finish_reasons": {"stop": 4}}, "fail", "finish reasons"),
        ({"num_requests": 3}, "fail", "3 of 4 requests were served"),
    ],
)
def test_other_work_is_refused(
    study: Study, change: dict[str, Any], status: str, reason: str
) -> None:
    study.add("b00-o00-a", [[1] * 16] * 4, **change)
    assert study.gate() == 1
    (record,) = study.verdicts()
    assert record["status"] == status
    assert reason in record["reason"]


def test_altered_tokens_are_an_error(study: Study) -> None:
    study.add("b00-o00-a", [[1] * 16] * 4)
    line = json.loads((study.folder / "tokens.jsonl").read_text())
    line["tokens"] = base64.b64encode(zlib.compress(json.dumps([[2] * 16] * 4).encode())).decode()
    (study.folder / "tokens.jsonl").write_text(json.dumps(line) + "\n")
    assert study.gate() == 1
    assert "was modified" in study.verdicts()[0]["reason"]


def test_other_weights_than_the_plans_are_refused(
    study: Study, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs, _ = generate(tiny, "float32", study.requests)
    study.plan["model"] |= {"path": str(tmp_path / "absent"), "digest": checkpoint_digest(tiny)}
    study.plan["plan_hash"] = store.plan_hash(
        {k: v for k, v in study.plan.items() if k != "plan_hash"}
    )
    (study.folder / "plan.json").write_text(json.dumps(study.plan))
    study.add("b00-o00-a", outputs)
    assert study.gate() == 2
    assert "not a folder with a config.json" in capsys.readouterr().err
    assert study.gate("--model", str(tiny)) == 0
    other = ensure_checkpoint("tiny", cache_dir=tmp_path, num_hidden_layers=1)
    assert study.gate("--model", str(other)) == 2
    assert "but the plan was made for" in capsys.readouterr().err


def test_nothing_to_judge_is_no_pass(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.gate() == 2
    assert "no finished launch" in capsys.readouterr().err


def test_gate_needs_no_laboratory() -> None:
    code = (
        "import sys, experiments.gate, experiments.gate.negative_controls; "
        "sys.exit(', '.join({'pydantic', 'mlflow', 'typer'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{root}:{root / 'src'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_params_are_all_in_the_record() -> None:
    """What decides is recorded with the verdict; the rest only sizes memory."""
    assert {field.name for field in dataclasses.fields(GateParams)} == {
        "factor",
        "floor_ulps",
        "quantile",
        "alpha",
        "batch_tokens",
        "logits_bytes",
        "control_tokens",
    }


def test_no_margin_is_told_of_tokens_that_another_generator_drew() -> None:
    judged = {"status": "pass", "reason": None, "tokens_checked": 9, "duration_s": 1.0}
    judged |= {"mismatches": 0, "max_margin": 0.0, "bound": 1e-5}
    replayed = describe({**judged, "calibration": {"distribution": None}})
    assert (
        replayed
        == "9 tokens, 0 differ from the reference, largest margin 0 logits (bound 1e-05), 1.0 s"
    )
    drawn = {"distribution": {"tokens": 9, "z": -1.25, "z_limit": 4.0}}
    assert (
        describe({**judged, "calibration": drawn})
        == "9 tokens, sampled by its own generator, z = -1.25 (limit 4.00), 1.0 s"
    )
