"""What two models say of every token that an engine produced, from a few rows of their logits at a time.

The gate has to cost little more than the two forward passes it rests on, and with random numbers for the whole vocabulary, or
a sort of it, at each position it would not. So each kind of row does no more than its answer needs:

- greedy, and foreign without top-k and top-p: the five best logits;
- sampled by our generator: the noise of token i cannot exceed -log(u_i), its bits as a number in (0, 1), so only tokens with
  u_i < p_i e^c can reach a score of logsumexp(scores) - c: some thirty of them, and the best score is below that once in 10^14
  rows. Exact noise is computed of those alone; where a row turns out otherwise, of the whole vocabulary;
- truncated by top-k or top-p: the most likely tokens, as many as hold all that is kept, and noise for those.

tests/test_equivalence.py compares the last two with the plain computation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.margins import Rows, smallest_explaining_noise
from experiments.noise import gumbel, noise_of, uniform_bits

CANDIDATES = 5
REACH = 3.5
"""c above: how far below logsumexp(scores) a score still counts. e^c tokens, on average, come that far."""
FIRST_GUESS = 128
"""So many of the most likely tokens are looked at first where top-k or top-p is in force."""


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
    noisy = ~rows.greedy & ~rows.truncated & ~rows.foreign
    kinds = [(noisy, _noisy), (rows.truncated, _truncated), (~noisy & ~rows.truncated, _plain)]
    if only := next((score for mask, score in kinds if bool(mask.all())), None):
        scores = only(logits, hf_logits, rows, tokens)
    else:
        indices = [(mask.nonzero().flatten(), score) for mask, score in kinds]
        parts = [score(logits[i], hf_logits[i], rows[i], tokens[i]) for i, score in indices if len(i)]
        scores = Scores.cat(parts)[torch.cat([i for i, _ in indices]).argsort().cpu()]
    if not all(bool(x.isfinite().all()) for x in (scores.best_scores[:, 0], scores.error, scores.margin, scores.hf_logprob)):
        raise FloatingPointError("HF's logits, as reference or in the engine's dtype, are not finite; check the checkpoint")
    return scores


def _plain(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    scaled, hf_scaled = over_temperature(logits, hf_logits, rows)
    best_scores, best = scaled.topk(min(CANDIDATES, logits.shape[1]))
    hf_best_scores, hf_best = hf_scaled.topk(best.shape[1])
    foreign = rows.foreign & ~rows.greedy
    agrees = (best[:, 0] == tokens) | foreign  # without top-k and top-p any token may be sampled
    own = scaled.gather(1, tokens[:, None])[:, 0]
    margin = torch.where(agrees, 0.0, (best_scores[:, 0] - own) * rows.divisor)
    error = _error(best_scores, hf_scaled.gather(1, best), rows)
    everything = torch.ones_like(foreign)[:, None]
    terms = _distribution(scaled, hf_scaled, everything, own, foreign) if bool(foreign.any()) else None
    return _scores(logits, hf_logits, rows, tokens, agrees, margin, error, best, best_scores, hf_best, hf_best_scores, best, terms)


def _noisy(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    scaled, hf_scaled = over_temperature(logits, hf_logits, rows)
    n, vocab_size = logits.shape
    total = scaled.logsumexp(-1)
    bits = uniform_bits(rows.seed, rows.position, vocab_size)
    # Of rounding, in the noise and here, the last factor takes more than care.
    reachable = bits < (scaled - total[:, None]).float().exp_().mul_(math.exp(REACH) * 2.0**32 * (1 + 1e-4))
    row, token = reachable.nonzero().unbind(-1)
    counts = reachable.sum(-1)
    width = max(CANDIDATES, int(counts.max()))
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    candidates = torch.zeros(n, width, dtype=torch.int64, device=row.device)
    candidates[row, column] = token
    noise = torch.full((n, width), -torch.inf, device=row.device)
    noise[row, column] = gumbel(bits[row, token])
    scores, hf_scores = (table.gather(1, candidates) + noise for table in (scaled, hf_scaled))
    best_scores, at = scores.topk(min(CANDIDATES, vocab_size))
    hf_best_scores, hf_at = hf_scores.topk(at.shape[1])
    # Whatever is not a candidate scores less than this, in the reference and in HF.
    limit = total - REACH
    hf_limit = limit + (hf_scaled - scaled).amax(-1)
    complete = (best_scores[:, -1] > limit) & (hf_best_scores[:, 0] > hf_limit)
    best, hf_best = candidates.gather(1, at), candidates.gather(1, hf_at)
    agrees = best[:, 0] == tokens
    margin = torch.zeros_like(total)
    if len(others := (~agrees).nonzero().flatten()):
        own = scaled[others].gather(1, tokens[others, None]) + noise_of(
            rows.seed[others], rows.position[others], tokens[others, None]
        )
        margin[others] = (best_scores[others, 0] - own[:, 0]) * rows.divisor[others]
    error = _error(best_scores, hf_scores.gather(1, at), rows)
    result = _scores(logits, hf_logits, rows, tokens, agrees, margin, error, best, best_scores, hf_best, hf_best_scores, best)
    if len(rest := (~complete).nonzero().flatten()):
        whole = _whole_vocabulary(logits[rest], hf_logits[rest], rows[rest], tokens[rest])
        result = Scores.cat([result[complete.nonzero().flatten().cpu()], whole])
        result = result[torch.cat([complete.nonzero().flatten(), rest]).argsort().cpu()]
    return result


def _whole_vocabulary(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    """`_noisy` without short cuts, and the oracle of its test."""
    noise = rows.noise(logits.shape[1])
    scores, hf_scores = (table + noise for table in over_temperature(logits, hf_logits, rows))
    best_scores, best = scores.topk(min(CANDIDATES, logits.shape[1]))
    hf_best_scores, hf_best = hf_scores.topk(best.shape[1])
    agrees = best[:, 0] == tokens
    margin = torch.where(agrees, 0.0, (best_scores[:, 0] - scores.gather(1, tokens[:, None])[:, 0]) * rows.divisor)
    error = _error(best_scores, hf_scores.gather(1, best), rows)
    return _scores(logits, hf_logits, rows, tokens, agrees, margin, error, best, best_scores, hf_best, hf_best_scores, best)


def _truncated(logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor) -> Scores:
    scaled, hf_scaled = over_temperature(logits, hf_logits, rows)
    likely, ids, keep = most_likely(scaled, rows)
    hf_likely, hf_ids, hf_keep = most_likely(hf_scaled, rows)
    ours = (~rows.foreign)[:, None]
    noise = torch.where(ours, noise_of(rows.seed, rows.position, ids), 0.0)
    scores, hf_scores = likely + noise, hf_likely + torch.where(ours, noise_of(rows.seed, rows.position, hf_ids), 0.0)
    number = min(CANDIDATES, logits.shape[1])
    best_scores, at = scores.masked_fill(~keep, -torch.inf).topk(number)
    hf_best_scores, hf_at = hf_scores.masked_fill(~hf_keep, -torch.inf).topk(number)
    best, hf_best = ids.gather(1, at), hf_ids.gather(1, hf_at)
    # HF's error is taken over what could have won without top-k and top-p: what they leave may be a single token.
    candidate_scores, candidates = scores.topk(number)
    hf_candidates = hf_scaled.gather(1, ids.gather(1, candidates)) + noise.gather(1, candidates)
    error = _error(candidate_scores, hf_candidates, rows)
    is_own = (ids == tokens[:, None]) & keep
    agrees = torch.where(rows.foreign, is_own.any(-1), best[:, 0] == tokens)
    margin = torch.zeros_like(error)
    others = (~agrees).nonzero().flatten()
    for part in others.split(max(1, 2**24 // logits.shape[1])) if len(others) else ():  # a few tables at a time
        margin[part] = (smallest_explaining_noise(scaled[part], rows[part], tokens[part]) * rows.divisor[part]).to(margin.dtype)
    terms = None
    if bool(rows.foreign.any()):
        own = torch.where(is_own.any(-1), scaled.gather(1, tokens[:, None])[:, 0], torch.nan)
        terms = _distribution(likely, hf_scaled.gather(1, ids), keep, own, rows.foreign)
    return _scores(
        logits, hf_logits, rows, tokens, agrees, margin, error, best, best_scores, hf_best, hf_best_scores,
        ids.gather(1, candidates), terms,
    )  # fmt: skip


def over_temperature(logits: Tensor, hf_logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Both tables over temperature. HF's in float32: so an engine samples, and that rounding is part of the noise measured."""
    if bool(rows.greedy.all()):
        return logits, hf_logits.float()
    divisor = rows.divisor[:, None]
    return logits / divisor.to(logits.dtype), hf_logits.float() / divisor.float()


def most_likely(scaled: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """(logits over temperature, token ids, bool: kept by top-k and then top-p), all [n, m], the most likely token first.

    m is large enough to hold all that is kept of every row.
    """
    vocab_size = scaled.shape[1]
    k, p = rows.limits(vocab_size)
    limited = torch.where(k < vocab_size, k, 0)
    m = min(vocab_size, max(FIRST_GUESS, int(limited.max())))
    whole = scaled.logsumexp(-1, keepdim=True)
    while True:
        values, ids = scaled.topk(m)
        within_k = torch.arange(m, device=scaled.device) < k
        of_k = values.masked_fill(~within_k, -torch.inf)
        mass = (of_k - torch.where(k <= m, of_k.logsumexp(-1, keepdim=True), whole)).exp()
        before = mass.cumsum(-1) - mass
        keep = within_k & (before < p)
        keep[:, 0] = True
        if m == vocab_size or bool(((k <= m) | ~keep[:, -1:]).all()):
            return values, ids, keep
        m = min(vocab_size, 4 * m)


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
                 "logprob": logits.gather(1, own)[:, 0] - logits.logsumexp(-1),
                 "hf_logprob": hf_logits.gather(1, own)[:, 0] - hf_logits.logsumexp(-1),
                 "log_p": log_p, "entropy": entropy, "variance": variance, "root_sum": root_sum, "drift": drift}  # fmt: skip
    as_it_is = {"tokens": tokens, "agrees": agrees, "hf_agrees": hf_best[:, 0] == best[:, 0], "best": best, "hf_best": hf_best,
                "foreign": rows.foreign & ~rows.greedy}  # fmt: skip
    columns = {name: column.double() for name, column in in_double.items()} | as_it_is
    return Scores(**{name: column.cpu() for name, column in columns.items()})
