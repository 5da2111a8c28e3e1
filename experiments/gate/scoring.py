"""Scores the tokens of an engine from the logits of two models, a few rows at a time.

The gate should cost little more than the two forward passes it needs. Random numbers for the whole
vocabulary, or a sort of it, at each position would be too expensive. So each kind of row computes
only what it needs:

- sampled by our generator: the noise of token i cannot exceed -log(u_i), its bits as a number in
  (0, 1), so only tokens with u_i < p_i e^c can reach a score of logsumexp(scores) - c: about fifty
  of them for c = 4, and the best score is hardly ever below that. Exact noise is computed for those
  only or, in a row where that is not enough, for the whole vocabulary;
- truncated by min-p, top-k or top-p: sorting values without their indices gives the smallest score that is
  kept (`truncation`);
- not the reference's choice, with top-k or top-p: the search for a margin handles all such rows of
  a batch together.

On a CPU, masking the whole vocabulary costs more than sorting it, so masks are applied by
multiplying with 0 and 1.

property_tests/test_gate_properties.py compares the results with the plain computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.gate.gumbel_noise import gumbel, uniform_bits
from experiments.gate.logit_margins import Rows, smallest_explaining_noise
from experiments.gate.truncation import distribution, exponentials, least_kept, mass_near

CANDIDATES = 5
REACH = 3.6
"""c above, if no token has much of the mass: how far below logsumexp(scores) a score still counts. e^c = 37 tokens, on average,
come that far. If one token has nearly all of the mass, the five best lie farther down; see `_reachable`."""
_ROUNDING = 1e-4
_CACHE_BYTES = 2**20
"""The size of the tables of logits that are scored at a time on a CPU: they fit into its cache, which doubles the speed."""


@dataclass(frozen=True)
class Scores:
    """The scores of one request's n output tokens by both models, as CPU tensors. A "score" is a
    logit over temperature plus noise.

    tokens: the engine's. agrees, margin: see `margins`. error: of HF in the engine's dtype, in
    logits: the largest, over the five best scores of the reference (top-k and top-p aside), of
    |(score_hf[i] - score_hf[best]) - (score_ref[i] - score_ref[best])| times temperature.
    hf_agrees: HF in the engine's dtype chooses what the reference chooses. scale: largest
    |logit| of those five. best, best_scores, hf_best, hf_best_scores: [n, 5], the top candidates of both.
    logprob, hf_logprob: log softmax(logits)[token]; no temperature.
    unknown_noise: sampled by another generator; then, of the distribution that was sampled (0 elsewhere):
    log_p of the token (0 if outside what is kept), entropy, variance of log p, root_sum = log sum_i
    sqrt(p_i), drift: the mean of log p + entropy if tokens were drawn from HF's distribution in
    the engine's dtype instead, and near: the probability of tokens outside of what is kept that
    HF's error could bring in (`truncation.mass_near`).
    """

    tokens: Tensor
    agrees: Tensor
    margin: Tensor
    error: Tensor
    hf_agrees: Tensor
    scale: Tensor
    best: Tensor
    best_scores: Tensor
    hf_best: Tensor
    hf_best_scores: Tensor
    logprob: Tensor
    hf_logprob: Tensor
    unknown_noise: Tensor
    log_p: Tensor
    entropy: Tensor
    variance: Tensor
    root_sum: Tensor
    drift: Tensor
    near: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Tensor) -> Scores:
        return Scores(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @staticmethod
    def cat(parts: Sequence[Scores]) -> Scores:
        return Scores(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in Scores.__dataclass_fields__
            )
        )

    def split(self, lengths: Sequence[int]) -> list[Scores]:
        columns = [getattr(self, name).split(list(lengths)) for name in Scores.__dataclass_fields__]
        return [Scores(*row) for row in zip(*columns, strict=True)]


def score_rows(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """Compares both models at n positions. logits: [n, V] of the reference; hf_logits: [n, V] in
    the engine's dtype.

    Raises FloatingPointError for logits that are not finite.
    """
    noisy = ~rows.greedy & ~rows.unknown_noise
    kinds = [
        (noisy & ~rows.truncated, _noisy),
        (noisy & rows.truncated, _noisy),
        (~noisy, _noiseless),
    ]
    if only := next((score for mask, score in kinds if bool(mask.all())), None):
        scores = only(logits, hf_logits, rows, tokens)
    else:
        indices = [(mask.nonzero().flatten(), score) for mask, score in kinds]
        parts = [
            score(logits[i], hf_logits[i], rows[i], tokens[i]) for i, score in indices if len(i)
        ]
        scores = Scores.cat(parts)[torch.cat([i for i, _ in indices]).argsort().cpu()]
    if bool((truncated := rows.truncated).any()):
        _search_margins(scores, logits, rows, tokens, truncated)
    if not all(
        bool(x.isfinite().all())
        for x in (scores.best_scores[:, 0], scores.error, scores.margin, scores.hf_logprob)
    ):
        raise FloatingPointError(
            "HF's logits, as reference or in the engine's dtype, are not finite; check the checkpoint"
        )
    return scores


def _cuts(n: int, logits: Tensor) -> list[slice]:
    """Slices of n rows of logits [_, V], as many rows at a time as fit into a CPU's cache."""
    step = max(
        1,
        n
        if logits.device.type != "cpu"
        else _CACHE_BYTES // (logits.shape[1] * logits.dtype.itemsize),
    )
    return [slice(i, i + step) for i in range(0, n, step)]


def _search_margins(
    scores: Scores, logits: Tensor, rows: Rows, tokens: Tensor, truncated: Tensor
) -> None:
    """Sets the margins of tokens that the reference would not have chosen, in rows with top-k or
    top-p.
    """
    search = (~scores.agrees.to(truncated.device) & truncated).nonzero().flatten()
    # a few tables at a time
    for part in search.split(max(1, 2**24 // logits.shape[1])) if len(search) else ():
        some = rows[part]
        scaled = logits[part] / some.divisor[:, None].to(logits.dtype)
        margin = smallest_explaining_noise(scaled, some, tokens[part]).double() * some.divisor
        scores.margin[part.cpu()] = margin.cpu()


def _noiseless(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """Scores greedy rows, and rows of another generator, for which `agrees` means that top-k and
    top-p keep the token.
    """
    return Scores.cat(
        [
            _noiseless_few(logits[i], hf_logits[i].float(), rows[i], tokens[i])
            for i in _cuts(len(tokens), logits)
        ]
    )


def _noiseless_few(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    scaled, hf_scaled = over_temperature(logits, hf_logits, rows)
    unknown_noise = rows.unknown_noise & ~rows.greedy
    least = least_kept((scaled, hf_scaled), rows)
    own = scaled.gather(1, tokens[:, None])[:, 0]
    candidates, candidate_scores = _five(scaled)
    hf_best, hf_best_scores = _five(hf_scaled)
    error = _error(candidate_scores, hf_scaled.gather(1, candidates), rows)
    possible, best_scores = unknown_noise, candidate_scores
    if least is not None:  # no token that is kept lies below one that is dropped
        possible = unknown_noise & (own >= least[0][:, 0])
        best_scores = candidate_scores.masked_fill(candidate_scores < least[0], -torch.inf)
        hf_best_scores = hf_best_scores.masked_fill(hf_best_scores < least[1], -torch.inf)
    agrees = possible | (~unknown_noise & (candidates[:, 0] == tokens))
    distance = torch.where(agrees, 0.0, best_scores[:, 0] - own)
    terms = None
    if bool(unknown_noise.any()):
        terms = distribution(
            scaled,
            hf_scaled,
            None if least is None else least[0],
            torch.where(possible, own, torch.nan),
            unknown_noise,
        )
        near = torch.zeros_like(error)
        if least is not None and len(cut := (unknown_noise & rows.truncated).nonzero().flatten()):
            noise = error[cut] / rows.divisor[cut]
            near[cut] = mass_near(scaled[cut], least[0][cut], rows[cut], noise.double()).to(near)
        terms = (*terms, near)
    return _scores(
        rows,
        tokens,
        agrees,
        distance,
        error,
        logits.gather(1, candidates),
        candidates,
        best_scores,
        hf_best,
        hf_best_scores,
        logprob(logits, tokens),
        logprob(hf_logits, tokens),
        terms,
    )


def _noisy(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """Scores rows sampled by our generator, with exact noise only for tokens that can win."""
    n, vocab_size = logits.shape
    everyone = [
        _reachable(logits[i], hf_logits[i].float(), rows[i], tokens[i])
        for i in _cuts(len(tokens), logits)
    ]
    reach = _Reachable(
        *(
            torch.cat([getattr(some, name) for some in everyone])
            for name in _Reachable.__dataclass_fields__
        )
    )
    row = torch.arange(n, device=logits.device).repeat_interleave(reach.count)
    width = max(min(CANDIDATES, vocab_size), int(reach.count.max()))
    column = torch.arange(len(row), device=row.device) - (reach.count.cumsum(0) - reach.count)[row]

    def table(values: Tensor, empty: float) -> Tensor:
        result = torch.full((n, width), empty, dtype=values.dtype, device=values.device)
        result[row, column] = values
        return result

    noise = gumbel(reach.bits)
    ids, scaled, hf_scaled = (
        table(reach.token, 0),
        table(reach.scaled, -torch.inf),
        table(reach.hf_scaled, -torch.inf),
    )
    scores, hf_scores = (
        table(reach.scaled + noise, -torch.inf),
        table(reach.hf_scaled + noise, -torch.inf),
    )
    truncated = bool(rows.truncated.any())
    at, best_scores, candidates_at, candidate_scores = _five_best(
        scores, scaled >= reach.least if truncated else None
    )
    hf_at, hf_best_scores, _, _ = _five_best(
        hf_scores, hf_scaled >= reach.hf_least if truncated else None
    )
    error = _error(candidate_scores, hf_scores.gather(1, candidates_at), rows)
    best, hf_best, candidates = (ids.gather(1, i) for i in (at, hf_at, candidates_at))
    agrees = best[:, 0] == tokens
    # Whatever is not among the candidates scores less than this, in the reference and in HF. Of a
    # token that may be shown as an offender all five that are kept must be known.
    limit, hf_limit = reach.limit, reach.limit + reach.rise
    last = torch.where(agrees, 0, best_scores.shape[1] - 1)[:, None]
    complete = (
        (candidate_scores[:, -1] > limit)
        & (best_scores.gather(1, last)[:, 0] > limit)
        & (hf_best_scores.gather(1, last)[:, 0] > hf_limit)
    )
    distance = torch.where(agrees, 0.0, best_scores[:, 0] - (reach.own + gumbel(reach.own_bits)))
    result = _scores(
        rows,
        tokens,
        agrees,
        distance,
        error,
        logits.gather(1, candidates),
        best,
        best_scores,
        hf_best,
        hf_best_scores,
        reach.logprob,
        reach.hf_logprob,
    )
    if len(rest := (~complete).nonzero().flatten()):
        some = [rest[i] for i in _cuts(len(rest), logits)]
        whole = [
            _whole_vocabulary(logits[i], hf_logits[i].float(), rows[i], tokens[i]) for i in some
        ]
        good = complete.nonzero().flatten()
        result = Scores.cat([result[good.cpu()], *whole])[torch.cat([good, rest]).argsort().cpu()]
    return result


@dataclass(frozen=True)
class _Reachable:
    """Statistics over the whole vocabulary, for n rows sampled by our generator.

    Of each row [n]: limit: logsumexp(scaled) - c, or a little more; count: of the tokens that can
    reach it;
    rise: the most by which HF's logits over temperature exceed the reference's; least, hf_least [n,
    1]: see `least_kept`; the engine's own token's logit over temperature (own) and own_bits;
    logprob, hf_logprob. Of the tokens that can, row after
    row: token, bits of its noise, logit over temperature of the reference and of HF.
    """

    count: Tensor
    limit: Tensor
    rise: Tensor
    least: Tensor
    hf_least: Tensor
    own: Tensor
    own_bits: Tensor
    logprob: Tensor
    hf_logprob: Tensor
    token: Tensor
    bits: Tensor
    scaled: Tensor
    hf_scaled: Tensor


def _reachable(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> _Reachable:
    scaled, hf_scaled = over_temperature(logits, hf_logits, rows)
    highest, weights, mass = exponentials(scaled)
    hf_highest, _, hf_mass = exponentials(hf_scaled)
    least = least_kept((scaled, hf_scaled), rows, (mass, hf_mass))
    bits = uniform_bits(rows.seed, rows.position, logits.shape[1])
    first = 1 / mass[:, 0].float()  # the probability of the most likely token
    k, top_p = rows.limits(logits.shape[1])
    # Any reach is right; this one rarely finds too few: the mass r beyond the first token sends r
    # e^c of them, and of what they are top-p keeps top_p at least; of a small k nothing is known.
    kept_mass = torch.maximum(top_p[:, 0].clamp(max=1).float(), first)
    reach = REACH - 1.4 * (1 - first).clamp(min=1e-3).log() - kept_mass.log() + 1.4 * (k[:, 0] < 32)
    total = (highest + mass.log())[:, 0]  # logsumexp(scaled)
    # Of rounding, in the noise and in float32 here, the factor takes more than care.
    at_most = weights.float().mul_(((reach + 2 * _ROUNDING).exp() * first)[:, None] * 2.0**32)
    row, token = _where_less(bits, at_most)
    everything = torch.full_like(total[:, None], -torch.inf)
    own = tokens[:, None]
    own_scaled = scaled.gather(1, own)[:, 0]
    if scaled is logits:  # no temperature but 1
        logprobs = (
            own_scaled - total,
            hf_scaled.gather(1, own)[:, 0] - (hf_highest + hf_mass.log())[:, 0],
        )
    else:
        logprobs = logprob(logits, tokens), logprob(hf_logits, tokens)
    return _Reachable(
        count=row.bincount(minlength=len(tokens)),
        limit=total + _ROUNDING - reach,
        # it has served; fresh memory costs more than the difference
        rise=torch.sub(hf_scaled, scaled, out=at_most).amax(-1),
        least=everything if least is None else least[0],
        hf_least=everything if least is None else least[1],
        own=own_scaled,
        own_bits=bits.gather(1, own)[:, 0],
        logprob=logprobs[0],
        hf_logprob=logprobs[1],
        token=token,
        bits=bits[row, token],
        scaled=scaled[row, token],
        hf_scaled=hf_scaled[row, token],
    )


def _whole_vocabulary(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """`_noisy` without shortcuts, for the rows in which those are not enough."""
    scaled, hf_scaled = over_temperature(logits, hf_logits, rows)
    least = least_kept((scaled, hf_scaled), rows)
    noise = rows.noise(logits.shape[1])
    scores, hf_scores = scaled + noise, hf_scaled + noise
    best, best_scores, candidates, candidate_scores = _five_best(
        scores, None if least is None else scaled >= least[0]
    )
    hf_best, hf_best_scores, _, _ = _five_best(
        hf_scores, None if least is None else hf_scaled >= least[1]
    )
    agrees = best[:, 0] == tokens
    distance = torch.where(agrees, 0.0, best_scores[:, 0] - scores.gather(1, tokens[:, None])[:, 0])
    error = _error(candidate_scores, hf_scores.gather(1, candidates), rows)
    return _scores(
        rows,
        tokens,
        agrees,
        distance,
        error,
        logits.gather(1, candidates),
        best,
        best_scores,
        hf_best,
        hf_best_scores,
        logprob(logits, tokens),
        logprob(hf_logits, tokens),
    )


def logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits [n, V])[tokens [n]]: [n]."""
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def _five(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(token ids, scores) of the five best tokens, [n, 5] each."""
    values, places = scores.topk(min(CANDIDATES, scores.shape[1]))
    return places, values


def _five_best(scores: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token ids, scores) of the five best tokens that are kept, then of the five best of all, over
    which HF's error is computed because top-k and top-p may keep a single token. All [n, 5].
    """
    candidates, all_scores = _five(scores)
    best, best_scores = (
        (candidates, all_scores) if keep is None else _five(scores.masked_fill(~keep, -torch.inf))
    )
    return best, best_scores, candidates, all_scores


def _where_less(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The (row, column) indices where a < b, [n, m] both, in order. On a CPU NumPy takes a third of
    torch's time.
    """
    if a.device.type != "cpu":
        row, column = (a < b).nonzero().unbind(-1)
        return row, column
    place = torch.from_numpy(np.flatnonzero(np.less(a.numpy(), b.numpy())))
    row = place // a.shape[1]
    return row, place - row * a.shape[1]


def over_temperature(logits: Tensor, hf_logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Both tables divided by temperature. HF's in float32, as engines sample: this rounding is part
    of the noise to be measured.
    """
    divisor = rows.divisor[:, None]
    if bool((divisor == 1).all()):
        return logits, hf_logits
    return logits / divisor.to(logits.dtype), hf_logits / divisor.float()


def _error(scores: Tensor, hf_scores: Tensor, rows: Rows) -> Tensor:
    """HF's error [n], in logits, from the scores of both for the same candidates [n, 5], the
    reference's best first.
    """
    differences = scores - scores[:, :1]
    hf_scores = hf_scores.to(scores.dtype)
    return (hf_scores - hf_scores[:, :1] - differences).abs().amax(-1) * rows.divisor


def _scores(
    rows: Rows,
    tokens: Tensor,
    agrees: Tensor,
    distance: Tensor,
    error: Tensor,
    five_logits: Tensor,
    best: Tensor,
    best_scores: Tensor,
    hf_best: Tensor,
    hf_best_scores: Tensor,
    logprob: Tensor,
    hf_logprob: Tensor,
    terms: tuple[Tensor, ...] | None = None,
) -> Scores:
    """distance [n]: of the token's score from the best, 0 where it agrees; without truncation, the
    margin over temperature.
    """
    log_p, entropy, variance, root_sum, drift, near = terms or (torch.zeros_like(error),) * 6
    in_double = {
        "margin": distance.double() * rows.divisor,
        "error": error,
        "scale": five_logits.abs().amax(-1),
        "best_scores": best_scores,
        "hf_best_scores": hf_best_scores,
        "logprob": logprob,
        "hf_logprob": hf_logprob,
        "log_p": log_p,
        "entropy": entropy,
        "variance": variance,
        "root_sum": root_sum,
        "drift": drift,
        "near": near,
    }
    as_it_is = {
        "tokens": tokens,
        "agrees": agrees,
        "hf_agrees": hf_best[:, 0] == best[:, 0],
        "best": best,
        "hf_best": hf_best,
        "unknown_noise": rows.unknown_noise & ~rows.greedy,
    }
    columns = {name: column.double() for name, column in in_double.items()} | as_it_is
    return Scores(**{name: column.cpu() for name, column in columns.items()})
