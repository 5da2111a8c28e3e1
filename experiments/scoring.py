"""What two models say of every token that an engine produced, from a few rows of their logits at a time.

The gate has to cost little more than the two forward passes it rests on, and with random numbers for the whole vocabulary, or
a sort of it, at each position it would not. So each kind of row does no more than its answer needs:

- sampled by our generator: the noise of token i cannot exceed -log(u_i), its bits as a number in (0, 1), so only tokens with
  u_i < p_i e^c can reach a score of logsumexp(scores) - c: some fifty of them, and the best score is hardly ever below that.
  Exact noise is computed of those alone; where a row turns out otherwise, of the whole vocabulary;
- truncated by top-k or top-p: a sort of values without their places gives the threshold.

tests/test_equivalence.py compares both with the plain computation.
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
    noisy = ~rows.greedy & ~rows.foreign
    kinds = [(noisy & ~rows.truncated, _noisy), (noisy & rows.truncated, _noisy), (~noisy, _noiseless)]
    if only := next((score for mask, score in kinds if bool(mask.all())), None):
        scores = only(logits, hf_logits, rows, tokens)
    else:
        indices = [(mask.nonzero().flatten(), score) for mask, score in kinds]
        parts = [score(logits[i], hf_logits[i], rows[i], tokens[i]) for i, score in indices if len(i)]
        scores = Scores.cat(parts)[torch.cat([i for i, _ in indices]).argsort().cpu()]
    if not all(bool(x.isfinite().all()) for x in (scores.best_scores[:, 0], scores.error, scores.margin, scores.hf_logprob)):
        raise FloatingPointError("HF's logits, as reference or in the engine's dtype, are not finite; check the checkpoint")
    return scores


def _noiseless(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """Greedy rows, and those of another generator: there `agrees` says that the token is kept at all."""
    scaled, hf_scaled = over_temperature(logits, hf_logits, rows)
    foreign = rows.foreign & ~rows.greedy
    keep, hf_keep = kept(scaled, rows), kept(hf_scaled, rows)
    best, best_scores, candidates, candidate_scores = _five_best(scaled, keep)
    hf_best, hf_best_scores, _, _ = _five_best(hf_scaled, hf_keep)
    own = scaled.gather(1, tokens[:, None])[:, 0]
    possible = foreign if keep is None else foreign & keep.gather(1, tokens[:, None])[:, 0]
    agrees = possible | (~foreign & (best[:, 0] == tokens))
    margin = _margins(agrees, scaled, rows, tokens, best_scores[:, 0] - own)
    error = _error(candidate_scores, hf_scaled.gather(1, candidates), rows)
    terms = None
    if bool(foreign.any()):
        everything = torch.ones_like(foreign)[:, None]
        terms = _distribution(
            scaled, hf_scaled, everything if keep is None else keep, torch.where(possible, own, torch.nan), foreign
        )
    return _scores(
        logits, hf_logits, rows, tokens, agrees, margin, error, best, best_scores, hf_best, hf_best_scores, candidates, terms
    )


def _noisy(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """Rows sampled by our generator: exact noise for those tokens alone that can win."""
    scaled, hf_scaled = over_temperature(logits, hf_logits, rows)
    n, vocab_size = logits.shape
    keep, hf_keep = kept(scaled, rows), kept(hf_scaled, rows)
    bits = uniform_bits(rows.seed, rows.position, vocab_size)
    p = scaled.float().softmax(-1)
    total = (scaled.amax(-1) - p.amax(-1).log()) + _ROUNDING  # logsumexp(scaled), at most a little more
    # Of rounding, in the noise and in float32 here, the last factor takes more than care.
    reachable = bits < p.mul_(math.exp(REACH + 2 * _ROUNDING) * 2.0**32)
    row, token = reachable.nonzero().unbind(-1)
    counts = row.bincount(minlength=n)
    width = max(CANDIDATES, int(counts.max()))
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    ids = torch.zeros(n, width, dtype=torch.int64, device=row.device)
    ids[row, column] = token
    noise = torch.full((n, width), -torch.inf, device=row.device)
    noise[row, column] = gumbel(bits[row, token])

    scores, hf_scores = (table.gather(1, ids) + noise for table in (scaled, hf_scaled))
    here, hf_here = (mask if mask is None else mask.gather(1, ids) for mask in (keep, hf_keep))
    at, best_scores, candidates_at, candidate_scores = _five_best(scores, here)
    hf_at, hf_best_scores, _, _ = _five_best(hf_scores, hf_here)
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
    margin = _margins(agrees, scaled, rows, tokens, distance)
    result = _scores(
        logits, hf_logits, rows, tokens, agrees, margin, error, best, best_scores, hf_best, hf_best_scores, candidates
    )
    if len(rest):
        whole = _whole_vocabulary(logits[rest], hf_logits[rest], rows[rest], tokens[rest])
        result = Scores.cat([result[good.cpu()], whole])[torch.cat([good, rest]).argsort().cpu()]
    return result


def _whole_vocabulary(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """`_noisy` without short cuts: for the rows where those do not reach, and the oracle of its test."""
    scaled, hf_scaled = over_temperature(logits, hf_logits, rows)
    noise = rows.noise(logits.shape[1])
    scores, hf_scores = scaled + noise, hf_scaled + noise
    best, best_scores, candidates, candidate_scores = _five_best(scores, kept(scaled, rows))
    hf_best, hf_best_scores, _, _ = _five_best(hf_scores, kept(hf_scaled, rows))
    agrees = best[:, 0] == tokens
    margin = _margins(agrees, scaled, rows, tokens, best_scores[:, 0] - scores.gather(1, tokens[:, None])[:, 0])
    error = _error(candidate_scores, hf_scores.gather(1, candidates), rows)
    return _scores(
        logits, hf_logits, rows, tokens, agrees, margin, error, best, best_scores, hf_best, hf_best_scores, candidates
    )


def _five_best(scores: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(where, score) of the five best that are kept, and of the five best of all: what HF's error is taken over, as what top-k
    and top-p keep may be a single token. All [n, 5]."""
    number = min(CANDIDATES, scores.shape[1])
    all_scores, candidates = scores.topk(number)
    if keep is None:
        return candidates, all_scores, candidates, all_scores
    best_scores, best = scores.masked_fill(~keep, -torch.inf).topk(number)
    return best, best_scores, candidates, all_scores


def _margins(agrees: Tensor, scaled: Tensor, rows: Rows, tokens: Tensor, distance: Tensor) -> Tensor:
    """Margins [n] in logits; distance [n]: of the token's score from the best, which is the margin where nothing truncates."""
    margin = torch.where(agrees, 0.0, distance).double()
    search = (~agrees & rows.truncated).nonzero().flatten()
    for part in search.split(max(1, 2**24 // scaled.shape[1])) if len(search) else ():  # a few tables at a time
        margin[part] = smallest_explaining_noise(scaled[part], rows[part], tokens[part]).double()
    return margin * rows.divisor


def over_temperature(logits: Tensor, hf_logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Both tables over temperature. HF's in float32: so an engine samples, and that rounding is part of the noise measured."""
    if bool(rows.greedy.all()):
        return logits, hf_logits.float()
    divisor = rows.divisor[:, None]
    return logits / divisor.to(logits.dtype), hf_logits.float() / divisor.float()


def kept(scaled: Tensor, rows: Rows) -> Tensor | None:
    """Which tokens top-k, then top-p on what is left, keep: bool [n, V] from logits over temperature [n, V]; None: all of them.

    Tokens as likely as the last one that is kept are kept as well.
    """
    if not bool(rows.truncated.any()):
        return None
    k, p = rows.limits(scaled.shape[1])
    ordered = descending(scaled)
    within_k = torch.arange(scaled.shape[1], device=scaled.device) < k
    mass = ordered.masked_fill(~within_k, -torch.inf).softmax(-1)
    count = (within_k & (mass.cumsum(-1) - mass < p)).sum(-1, keepdim=True).clamp_(min=1)
    return scaled >= ordered.gather(1, count - 1)


def descending(values: Tensor) -> Tensor:
    """Sorted values [n, V], without their places: on a CPU NumPy does that ten times as fast as torch sorts."""
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort((-values).numpy(), axis=-1)).neg_()


def _error(scores: Tensor, hf_scores: Tensor, rows: Rows) -> Tensor:
    """HF's error [n], in logits, from the scores of both for the same candidates [n, 5], the reference's best first."""
    differences = scores - scores[:, :1]
    hf_scores = hf_scores.to(scores.dtype)
    return (hf_scores - hf_scores[:, :1] - differences).abs().amax(-1) * rows.divisor


def _distribution(scaled: Tensor, hf_scaled: Tensor, keep: Tensor, own: Tensor, foreign: Tensor) -> tuple[Tensor, ...]:
    """log_p, entropy, variance, root_sum, drift of Scores, [n] each, over the kept tokens [n, m]; 0 where not foreign.

    own [n]: the token's logit over temperature; NaN if it is not kept.
    """
    scores = scaled.masked_fill(~keep, -torch.inf)
    total = scores.logsumexp(-1)
    logs = scores - total[:, None]
    p, finite_logs = logs.exp(), logs.masked_fill(~keep, 0.0)
    hf_p = hf_scaled.masked_fill(~keep, -torch.inf).softmax(-1)
    mean = (p * finite_logs).sum(-1)
    columns = (
        (own - total).nan_to_num(0.0),
        -mean,
        (p * (finite_logs - mean[:, None]).square()).sum(-1),
        (logs / 2).logsumexp(-1),
        (hf_p * finite_logs).sum(-1) - mean,
    )
    return tuple(torch.where(foreign, column, 0.0) for column in columns)


def _scores(
    logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor, agrees: Tensor, margin: Tensor, error: Tensor,
    best: Tensor, best_scores: Tensor, hf_best: Tensor, hf_best_scores: Tensor, candidates: Tensor,
    terms: tuple[Tensor, ...] | None = None,
) -> Scores:  # fmt: skip
    own = tokens[:, None]
    hf_logits = hf_logits.float()
    log_p, entropy, variance, root_sum, drift = terms or (torch.zeros_like(error),) * 5
    in_double = {"margin": margin, "error": error, "best_scores": best_scores, "hf_best_scores": hf_best_scores,
                 "scale": logits.gather(1, candidates).abs().amax(-1),
                 "logprob": logits.log_softmax(-1).gather(1, own)[:, 0],
                 "hf_logprob": hf_logits.log_softmax(-1).gather(1, own)[:, 0],
                 "log_p": log_p, "entropy": entropy, "variance": variance, "root_sum": root_sum, "drift": drift}  # fmt: skip
    as_it_is = {"tokens": tokens, "agrees": agrees, "hf_agrees": hf_best[:, 0] == best[:, 0], "best": best, "hf_best": hf_best,
                "foreign": rows.foreign & ~rows.greedy}  # fmt: skip
    columns = {name: column.double() for name, column in in_double.items()} | as_it_is
    return Scores(**{name: column.cpu() for name, column in columns.items()})
