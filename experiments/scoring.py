"""What two models say of every token that an engine produced, from a few rows of their logits at a time.

The gate has to cost little more than the two forward passes it rests on, and with random numbers for the whole vocabulary, or
a sort of it, at each position it would not. So each kind of row does no more than its answer needs:

- sampled by our generator: the noise of token i cannot exceed -log(u_i), its bits as a number in (0, 1), so only tokens with
  u_i < p_i e^c can reach a score of logsumexp(scores) - c: some fifty of them, and the best score is hardly ever below that.
  Exact noise is computed of those alone; where a row turns out otherwise, of the whole vocabulary;
- truncated by top-k or top-p: values sorted without their places give the least score that is kept. Masks of the whole
  vocabulary are never used to select: on a CPU that costs more than to sort it;
- not the reference's choice, with top-k or top-p: the search for a margin takes all such rows of a batch together.

property_tests/test_gate_properties.py compares all of it with the plain computation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.margins import Rows, smallest_explaining_noise
from experiments.noise import gumbel, noise_of, uniform_bits

CANDIDATES = 5
REACH = 5.0
"""c above: how far below logsumexp(scores) a score still counts. At most e^c tokens, on average, come that far."""
_ROUNDING = 1e-4
_MOST_LIKELY = 1024
"""Tokens among which the threshold of top-p is looked for, where the vocabulary is larger by far."""
_FAR = 1e18
"""A score less this has a probability of 0."""
_CACHE_BYTES = 2**21
"""On a CPU, tables of logits of this size are scored at a time: they stay in its cache, which doubles the speed."""


@dataclass(frozen=True)
class Scores:
    """What the two models say of one request's n output tokens; CPU tensors. "Score" is a logit over temperature plus noise.

    tokens: the engine's. agrees, margin: see `margins`. error: of HF in the engine's dtype, in logits: the largest, over the
    five best scores of the reference (top-k and top-p aside), of |(score_hf[i] - score_hf[best]) - (score_ref[i] -
    score_ref[best])| times temperature. hf_agrees: HF in the engine's dtype chooses what the reference chooses. scale: largest
    |logit| of those five. best, best_scores, hf_best, hf_best_scores: [n, 5], the top candidates of both.
    logprob, hf_logprob: log softmax(logits)[token]; no temperature.
    foreign: sampled by another generator; then, of the distribution that was sampled (0 elsewhere): log_p of the token (0 if
    outside what is kept), entropy, variance of log p, root_sum = log sum_i sqrt(p_i), and drift: the mean of log p + entropy if
    tokens were drawn from HF's distribution in the engine's dtype instead.
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
    foreign: Tensor
    log_p: Tensor
    entropy: Tensor
    variance: Tensor
    root_sum: Tensor
    drift: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Tensor) -> Scores:
        return Scores(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @staticmethod
    def cat(parts: Sequence[Scores]) -> Scores:
        return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in Scores.__dataclass_fields__))

    def split(self, lengths: Sequence[int]) -> list[Scores]:
        columns = [getattr(self, name).split(list(lengths)) for name in Scores.__dataclass_fields__]
        return [Scores(*row) for row in zip(*columns, strict=True)]


def score_rows(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """Compares both models at n positions. logits: [n, V] of the reference; hf_logits: [n, V] in the engine's dtype.

    Raises FloatingPointError for logits that are not finite.
    """
    step = max(1, len(tokens))
    if logits.device.type == "cpu":
        step = max(1, _CACHE_BYTES // (logits.shape[1] * logits.dtype.itemsize))
    cuts = [slice(i, i + step) for i in range(0, len(tokens), step)]
    scores = Scores.cat([_score_some(logits[cut], hf_logits[cut].float(), rows[cut], tokens[cut]) for cut in cuts])
    if bool((truncated := rows.truncated).any()):
        _search_margins(scores, logits, rows, tokens, truncated)
    if not all(bool(x.isfinite().all()) for x in (scores.best_scores[:, 0], scores.error, scores.margin, scores.hf_logprob)):
        raise FloatingPointError("HF's logits, as reference or in the engine's dtype, are not finite; check the checkpoint")
    return scores


def _score_some(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """`score_rows` of a few rows, all but the margins that take a search. hf_logits: float32 here and below."""
    noisy = ~rows.greedy & ~rows.foreign
    kinds = [(noisy & ~rows.truncated, _noisy), (noisy & rows.truncated, _noisy), (~noisy, _noiseless)]
    if only := next((score for mask, score in kinds if bool(mask.all())), None):
        return only(logits, hf_logits, rows, tokens)
    indices = [(mask.nonzero().flatten(), score) for mask, score in kinds]
    parts = [score(logits[i], hf_logits[i], rows[i], tokens[i]) for i, score in indices if len(i)]
    return Scores.cat(parts)[torch.cat([i for i, _ in indices]).argsort().cpu()]


def _search_margins(scores: Scores, logits: Tensor, rows: Rows, tokens: Tensor, truncated: Tensor) -> None:
    """Puts in the margins of tokens that the reference would not have chosen, where top-k or top-p is in force."""
    search = (~scores.agrees.to(truncated.device) & truncated).nonzero().flatten()
    for part in search.split(max(1, 2**24 // logits.shape[1])) if len(search) else ():  # a few tables at a time
        some = rows[part]
        scaled = logits[part] / some.divisor[:, None].to(logits.dtype)
        margin = smallest_explaining_noise(scaled, some, tokens[part]).double() * some.divisor
        scores.margin[part.cpu()] = margin.cpu()


def _noiseless(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """Greedy rows, and those of another generator: there `agrees` says that the token is kept at all."""
    scaled, hf_scaled = over_temperature(logits, hf_logits, rows)
    foreign = rows.foreign & ~rows.greedy
    least, hf_least = least_kept(scaled, rows), least_kept(hf_scaled, rows)
    own = scaled.gather(1, tokens[:, None])[:, 0]
    candidates, candidate_scores = _five(scaled)
    hf_best, hf_best_scores = _five(hf_scaled)
    error = _error(candidate_scores, hf_scaled.gather(1, candidates), rows)
    possible, best_scores = foreign, candidate_scores
    if least is not None and hf_least is not None:  # no token that is kept lies below one that is dropped
        possible = foreign & (own >= least[:, 0])
        best_scores = candidate_scores.masked_fill(candidate_scores < least, -torch.inf)
        hf_best_scores = hf_best_scores.masked_fill(hf_best_scores < hf_least, -torch.inf)
    agrees = possible | (~foreign & (candidates[:, 0] == tokens))
    distance = torch.where(agrees, 0.0, best_scores[:, 0] - own)
    terms = None
    if bool(foreign.any()):
        terms = _distribution(scaled, hf_scaled, least, torch.where(possible, own, torch.nan), foreign)
    return _scores(logits, hf_logits, rows, tokens, agrees, distance, error, candidates, best_scores, hf_best, hf_best_scores,
                   candidates, terms)  # fmt: skip


def _noisy(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """Rows sampled by our generator: exact noise for those tokens alone that can win."""
    scaled, hf_scaled = over_temperature(logits, hf_logits, rows)
    n, vocab_size = logits.shape
    least, hf_least = least_kept(scaled, rows), least_kept(hf_scaled, rows)
    bits = uniform_bits(rows.seed, rows.position, vocab_size)
    p = scaled.float().softmax(-1)
    total = (scaled.amax(-1) - p.amax(-1).log()) + _ROUNDING  # logsumexp(scaled), at most a little more
    # Of rounding, in the noise and in float32 here, the last factor takes more than care.
    row, token = _where_less(bits, p.mul_(math.exp(REACH + 2 * _ROUNDING) * 2.0**32))
    counts = row.bincount(minlength=n)
    width = max(min(CANDIDATES, vocab_size), int(counts.max()))
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    ids = torch.zeros(n, width, dtype=torch.int64, device=row.device)
    ids[row, column] = token
    noise = torch.full((n, width), -torch.inf, device=row.device)
    noise[row, column] = gumbel(bits[row, token])

    here, hf_here = scaled.gather(1, ids), hf_scaled.gather(1, ids)
    scores, hf_scores = here + noise, hf_here + noise
    at, best_scores, candidates_at, candidate_scores = _five_best(scores, None if least is None else here >= least)
    hf_at, hf_best_scores, _, _ = _five_best(hf_scores, None if hf_least is None else hf_here >= hf_least)
    error = _error(candidate_scores, hf_scores.gather(1, candidates_at), rows)
    best, hf_best, candidates = (ids.gather(1, i) for i in (at, hf_at, candidates_at))
    # Whatever is not among the candidates scores less than this, in the reference and in HF.
    limit = total - REACH
    hf_limit = limit + (hf_scaled - scaled).amax(-1)
    complete = (candidate_scores[:, -1] > limit) & (best_scores[:, 0] > limit) & (hf_best_scores[:, 0] > hf_limit)
    good, rest = complete.nonzero().flatten(), (~complete).nonzero().flatten()

    agrees = (best[:, 0] == tokens) | ~complete  # the others are judged below
    distance = torch.zeros_like(total)
    if len(others := (~agrees).nonzero().flatten()):
        own = tokens[others, None]
        own_score = scaled[others].gather(1, own) + noise_of(rows.seed[others], rows.position[others], own)
        distance[others] = best_scores[others, 0] - own_score[:, 0]
    result = _scores(
        logits, hf_logits, rows, tokens, agrees, distance, error, best, best_scores, hf_best, hf_best_scores, candidates
    )
    if len(rest):
        whole = _whole_vocabulary(logits[rest], hf_logits[rest], rows[rest], tokens[rest])
        result = Scores.cat([result[good.cpu()], whole])[torch.cat([good, rest]).argsort().cpu()]
    return result


def _whole_vocabulary(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """`_noisy` without short cuts, for the rows where those do not reach."""
    scaled, hf_scaled = over_temperature(logits, hf_logits, rows)
    least, hf_least = least_kept(scaled, rows), least_kept(hf_scaled, rows)
    noise = rows.noise(logits.shape[1])
    scores, hf_scores = scaled + noise, hf_scaled + noise
    best, best_scores, candidates, candidate_scores = _five_best(scores, None if least is None else scaled >= least)
    hf_best, hf_best_scores, _, _ = _five_best(hf_scores, None if hf_least is None else hf_scaled >= hf_least)
    agrees = best[:, 0] == tokens
    distance = torch.where(agrees, 0.0, best_scores[:, 0] - scores.gather(1, tokens[:, None])[:, 0])
    error = _error(candidate_scores, hf_scores.gather(1, candidates), rows)
    return _scores(
        logits, hf_logits, rows, tokens, agrees, distance, error, best, best_scores, hf_best, hf_best_scores, candidates
    )


def _five(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(where, score) of the five best: [n, 5]."""
    values, places = scores.topk(min(CANDIDATES, scores.shape[1]))
    return places, values


def _five_best(scores: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(where, score) of the five best that are kept, and of the five best of all: what HF's error is taken over, as what top-k
    and top-p keep may be a single token. All [n, 5]."""
    candidates, all_scores = _five(scores)
    best, best_scores = (candidates, all_scores) if keep is None else _five(scores.masked_fill(~keep, -torch.inf))
    return best, best_scores, candidates, all_scores


def _where_less(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of the places where a < b, [n, m] both, in order. On a CPU NumPy does that in a third of torch's time."""
    if a.device.type != "cpu":
        row, column = (a < b).nonzero().unbind(-1)
        return row, column
    place = torch.from_numpy(np.flatnonzero(np.less(a.numpy(), b.numpy())))
    row = place // a.shape[1]
    return row, place - row * a.shape[1]


def over_temperature(logits: Tensor, hf_logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Both tables over temperature. HF's in float32: so an engine samples, and that rounding is part of the noise measured."""
    divisor = rows.divisor[:, None]
    if bool((divisor == 1).all()):
        return logits, hf_logits
    return logits / divisor.to(logits.dtype), hf_logits / divisor.float()


def least_kept(scaled: Tensor, rows: Rows) -> Tensor | None:
    """The least of the logits over temperature [n, V] that top-k, then top-p on what is left, keep: [n, 1]; None: all are kept.

    Tokens as likely as the last one that is kept are kept as well.
    """
    if not bool(rows.truncated.any()):
        return None
    vocab_size = scaled.shape[1]
    k, p = rows.limits(vocab_size)
    width = int(torch.where(k < vocab_size, k, _MOST_LIKELY).max())
    if 4 * width >= vocab_size:
        return _least_of(descending(scaled), scaled, k, p)[0]
    least, found = _least_of(descending(scaled, width), scaled, k, p)
    if len(rest := (~found).nonzero().flatten()):
        least[rest], _ = _least_of(descending(scaled[rest]), scaled[rest], k[rest], p[rest])
    return least


def _least_of(ordered: Tensor, scaled: Tensor, k: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """(`least_kept` [n, 1], whether it is among the most likely tokens [n]), whose logits over temperature are `ordered` [n, w]."""
    vocab_size, width = scaled.shape[1], ordered.shape[1]
    mass = (ordered - ordered[:, :1]).exp_().cumsum(-1)  # of the first 1, 2, ... tokens
    total = mass.gather(1, k.clamp(max=width) - 1)
    if width < vocab_size and bool((k > width).any()):
        total = torch.where(k > width, (scaled - ordered[:, :1]).exp_().sum(-1, keepdim=True), total)
    count = torch.searchsorted(mass, (p * total).to(mass.dtype)) + 1  # the first that reach p
    count = torch.minimum(count, k)
    everything = (k == vocab_size) & p.isinf()
    least = ordered.gather(1, count.clamp(max=width) - 1).masked_fill_(everything, -torch.inf)
    return least, ((count <= width) | everything)[:, 0]


def descending(values: Tensor, width: int | None = None) -> Tensor:
    """The `width` largest (all) of values [n, V], sorted, without their places: on a CPU NumPy does that ten times as fast as
    torch."""
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True).values if width is None else values.topk(width).values
    negative = (-values).numpy()
    if width is not None:
        negative.partition(width - 1, axis=-1)
        negative = negative[:, :width].copy()
    negative.sort(axis=-1)
    return torch.from_numpy(negative).neg_()


def _error(scores: Tensor, hf_scores: Tensor, rows: Rows) -> Tensor:
    """HF's error [n], in logits, from the scores of both for the same candidates [n, 5], the reference's best first."""
    differences = scores - scores[:, :1]
    hf_scores = hf_scores.to(scores.dtype)
    return (hf_scores - hf_scores[:, :1] - differences).abs().amax(-1) * rows.divisor


def _distribution(scaled: Tensor, hf_scaled: Tensor, least: Tensor | None, own: Tensor, foreign: Tensor) -> tuple[Tensor, ...]:
    """log_p, entropy, variance, root_sum, drift of Scores, [n] each, over the tokens whose logit over temperature [n, V] is `least`
    [n, 1] or more; 0 where not foreign.

    own [n]: the token's logit over temperature; NaN if it is not kept.
    """
    highest = scaled.amax(-1, True)
    shifted = scaled - highest
    roots = (shifted / 2).exp_()  # of the weights; a table of 0 and 1, and products with it: see the module's docstring
    if least is not None:
        keep = torch.ge(scaled, least, out=torch.empty_like(scaled))
        roots.mul_(keep)
        hf_scaled = hf_scaled + keep.sub_(1).mul_(_FAR)
    weights = roots.square()
    weight = weights.sum(-1)
    mean = (weights * shifted).sum(-1) / weight  # of log p + log weight
    log_weight = weight.log()
    centred = shifted.sub_(mean[:, None])
    columns = (
        (own - highest[:, 0] - log_weight).nan_to_num(0.0),
        log_weight - mean,
        (weights * centred * centred).sum(-1) / weight,
        roots.sum(-1).log() - log_weight / 2,
        (hf_scaled.softmax(-1) * centred).sum(-1),
    )
    return tuple(torch.where(foreign, column, 0.0) for column in columns)


def _scores(
    logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor, agrees: Tensor, distance: Tensor, error: Tensor,
    best: Tensor, best_scores: Tensor, hf_best: Tensor, hf_best_scores: Tensor, candidates: Tensor,
    terms: tuple[Tensor, ...] | None = None,
) -> Scores:  # fmt: skip
    """distance [n]: of the token's score from the best, 0 where it agrees: the margin over temperature if nothing truncates."""
    own = tokens[:, None]
    log_p, entropy, variance, root_sum, drift = terms or (torch.zeros_like(error),) * 5
    in_double = {"margin": distance.double() * rows.divisor, "error": error,
                 "best_scores": best_scores, "hf_best_scores": hf_best_scores,
                 "scale": logits.gather(1, candidates).abs().amax(-1),
                 "logprob": logits.log_softmax(-1).gather(1, own)[:, 0],
                 "hf_logprob": hf_logits.log_softmax(-1).gather(1, own)[:, 0],
                 "log_p": log_p, "entropy": entropy, "variance": variance, "root_sum": root_sum, "drift": drift}  # fmt: skip
    as_it_is = {"tokens": tokens, "agrees": agrees, "hf_agrees": hf_best[:, 0] == best[:, 0], "best": best, "hf_best": hf_best,
                "foreign": rows.foreign & ~rows.greedy}  # fmt: skip
    columns = {name: column.double() for name, column in in_double.items()} | as_it_is
    return Scores(**{name: column.cpu() for name, column in columns.items()})
