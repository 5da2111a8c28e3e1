"""What `experiments.gate.scoring` says of tokens, computed without any of its short cuts: noise and
probabilities of the whole vocabulary, a sort of every row, and the search for a margin over all
tokens. Slow, and the oracle of its property test.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from experiments.gate.logit_margins import Rows


def kept(scaled: Tensor, rows: Rows, factor: float = 1.0) -> Tensor:
    """Which tokens min-p, top-k, then top-p (times `factor`) on what is left, keep: bool [n, V] from
    logits over temperature [n, V].
    """
    k, p = rows.limits(scaled.shape[1])
    ordered = scaled.sort(dim=-1, descending=True).values
    within_k = torch.arange(scaled.shape[1]) < k
    within_k &= (ordered - ordered[:, :1]).exp() >= (rows.min_p * ~rows.greedy)[:, None] / factor
    mass = ordered.masked_fill(~within_k, -torch.inf).softmax(-1)
    count = (within_k & (mass.cumsum(-1) - mass < p * factor)).sum(-1, keepdim=True).clamp_(min=1)
    return scaled >= ordered.gather(1, count - 1)


def certain(logits: Tensor, rows: Rows) -> Tensor:
    """Rows [n] of which rounding cannot decide what is kept."""
    scaled = logits / rows.divisor[:, None].to(logits.dtype)
    return (kept(scaled, rows, 1 - 1e-5) == kept(scaled, rows, 1 + 1e-5)).all(-1)


def near(scaled: Tensor, rows: Rows, error: Tensor, factor: float = 1.0) -> Tensor:
    """The probability [n] of tokens outside of what is kept that an error [n] (times `factor`), in
    logits, could bring in.
    """
    noise = (factor * error.double() / rows.divisor.double())[:, None]
    p = rows.top_p.double()[:, None]
    widened = torch.where(p < 1, p * noise.exp() / (p * noise.exp() + 1 - p), p)[:, 0]
    wider = replace(rows, top_p=widened, min_p=rows.min_p.double() * (-noise[:, 0]).exp())
    lowest = scaled.masked_fill(~kept(scaled, wider), torch.inf).amin(-1, keepdim=True)
    possible = (scaled >= lowest - noise) & rows.truncated[:, None]
    mass = scaled.double().masked_fill(~(possible | kept(scaled, rows)), -torch.inf).softmax(-1)
    return (mass * (possible & ~kept(scaled, rows))).sum(-1)


def plain_scores(
    logits: Tensor, hf_logits: Tensor, rows: Rows, tokens: Tensor
) -> dict[str, Tensor]:
    """By the names of `Scores`; best_scores and hf_best_scores are of the best token alone. As
    `score_rows` takes them.
    """
    divisor = rows.divisor[:, None]
    scaled, hf_scaled = logits / divisor.to(logits.dtype), hf_logits.float() / divisor.float()
    unknown_noise = rows.unknown_noise & ~rows.greedy
    keep, hf_keep = kept(scaled, rows), kept(hf_scaled, rows)
    noise = rows.noise(logits.shape[1])
    scores, hf_scores = scaled + noise, hf_scaled + noise
    of_kept, hf_of_kept = (
        scores.masked_fill(~keep, -torch.inf),
        hf_scores.masked_fill(~hf_keep, -torch.inf),
    )
    best, hf_best = of_kept.argmax(-1), hf_of_kept.argmax(-1)
    own = tokens[:, None]
    is_kept = keep.gather(1, own)[:, 0]
    agrees = torch.where(unknown_noise, is_kept, best == tokens)
    distance = of_kept.amax(-1) - scores.gather(1, own)[:, 0]
    searched = rows.truncated & ~agrees
    asked = searched.nonzero().flatten()
    explaining = torch.zeros(len(tokens), dtype=torch.float64)
    if len(asked):
        explaining[asked] = explaining_noise(scaled[asked], rows[asked], tokens[asked])
    margin = torch.where(agrees, 0.0, torch.where(searched, explaining, distance))
    candidates = scores.topk(min(5, logits.shape[1])).indices
    differences = [
        table.gather(1, candidates) - table.gather(1, candidates[:, :1])
        for table in (scores, hf_scores)
    ]

    logs = scaled.masked_fill(~keep, -torch.inf).log_softmax(-1)
    p, finite = logs.exp(), logs.masked_fill(~keep, 0.0)
    hf_p = hf_scaled.masked_fill(~keep, -torch.inf).softmax(-1)
    mean = (p * finite).sum(-1)
    of_distribution = {
        "log_p": torch.where(is_kept, finite.gather(1, own)[:, 0], 0.0),
        "entropy": -mean,
        "variance": (p * (finite - mean[:, None]).square()).sum(-1),
        "root_sum": (logs / 2).logsumexp(-1),
        "drift": (hf_p * finite).sum(-1) - mean,
    }
    return {
        "tokens": tokens,
        "agrees": agrees,
        "margin": margin * rows.divisor,
        "error": (differences[1].to(logits.dtype) - differences[0]).abs().amax(-1) * rows.divisor,
        "hf_agrees": best == hf_best,
        "scale": logits.gather(1, candidates).abs().amax(-1),
        "best": best,
        "best_scores": of_kept.amax(-1),
        "hf_best": hf_best,
        "hf_best_scores": hf_of_kept.amax(-1),
        "logprob": logits.log_softmax(-1).gather(1, own)[:, 0],
        "hf_logprob": hf_logits.float().log_softmax(-1).gather(1, own)[:, 0],
        "unknown_noise": unknown_noise,
        **{
            name: torch.where(unknown_noise, column, 0.0)
            for name, column in of_distribution.items()
        },
    }


def explaining_noise(scaled: Tensor, rows: Rows, tokens: Tensor) -> Tensor:
    """`margins.smallest_explaining_noise` as its docstring defines it: every token is asked, at
    every step of the bisection.
    """
    k, p = rows.limits(scaled.shape[1])
    within_k = torch.zeros_like(scaled, dtype=torch.bool)
    order = scaled.argsort(dim=-1, descending=True, stable=True)
    within_k.scatter_(1, order, torch.arange(scaled.shape[1]) < k)
    mass = scaled.masked_fill(~within_k, -torch.inf).double().softmax(-1)
    mass_and_one = torch.stack((mass, torch.ones_like(mass)), dim=-1)
    scores = scaled + rows.noise(scaled.shape[1])
    own, own_score = scaled.gather(1, tokens[:, None]), scores.gather(1, tokens[:, None])

    depth = rows.depth
    # [n, V]: the highest of all other tokens
    alone = torch.eye(scaled.shape[1], dtype=torch.bool)
    others = scaled[:, None, :].masked_fill(alone, -torch.inf).amax(-1)

    def within(d: Tensor) -> Tensor:
        """The mass [n, 1] of the tokens that min-p keeps if its depth is d more."""
        kept_then = scaled.amax(-1, keepdim=True) - scaled <= torch.clamp(depth + d, min=0.0)
        share = (mass * kept_then).sum(-1, keepdim=True)
        return torch.where(depth.isfinite(), share, 1.0)

    def explains(d: Tensor) -> Tensor:  # [n, 1] -> bool [n, 1]
        above = scaled > own + d
        a = (mass * above).sum(-1, keepdim=True)
        a = (a / within(d)).clamp(max=1.0)
        may_be_kept = (above.sum(-1, keepdim=True) < k) & (
            a * (-d).exp() / (a * (-d).exp() + (1 - a)) < p
        )
        may_be_kept &= scaled.amax(-1, keepdim=True) - own <= depth + d
        # [n, V, V]: of token i, the others that may lie above
        above_each = scaled[:, None, :] >= scaled[:, :, None] - d[..., None]
        above_each &= ~torch.eye(scaled.shape[1], dtype=torch.bool)
        share, count = (above_each.double() @ mass_and_one).unbind(-1)
        b = (share / within(-d)).clamp(max=1.0)
        is_certain = (count < k) & (b / (b + (1 - b) * (-d).exp()) < p)
        is_certain &= others - scaled + d <= depth
        beaten = scores.masked_fill(~is_certain, -torch.inf).amax(-1, keepdim=True) - own_score <= d
        return may_be_kept & (beaten | rows.unknown_noise[:, None])

    low = torch.zeros_like(own, dtype=torch.float64)
    high = low + 200.0
    for _ in range(35):  # to 1e-8
        middle = (low + high) / 2
        enough = explains(middle)
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    return high[:, 0]
