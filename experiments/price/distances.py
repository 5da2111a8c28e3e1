"""How far one distribution over the vocabulary is from another, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distances:
    """Of n positions, each tensor [n].

    kl: KL(reference || other) in nats, float64. lost: whether the most likely token is another one.
    log_perplexity: log p(token) - log q(token) in nats, float64, with p the reference's probability of
    the token that follows and q the other one's; its mean is the log of the ratio of perplexities.
    """

    kl: Tensor
    lost: Tensor
    log_perplexity: Tensor

    @classmethod
    def cat(cls, parts: Sequence[Distances]) -> Self:
        return cls(
            torch.cat([part.kl for part in parts]),
            torch.cat([part.lost for part in parts]),
            torch.cat([part.log_perplexity for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.kl)

    def totals(self) -> dict[str, float]:
        """The sum of each metric over the positions, under its name in rules.METRICS."""
        return {
            "kl": float(self.kl.sum()),
            "top_choice": float(self.lost.sum()),
            "log_perplexity": float(self.log_perplexity.sum()),
        }


def distances(reference: Tensor, other: Tensor, token_ids: Tensor) -> Distances:
    """The distances of logits `other` from logits `reference`, both [n, vocab], at the tokens that
    follow, [n] int64. Computed in float64, on the device of `reference`; the result is on the CPU.

    KL is summed as p (exp(-d) - 1 + d) with d = log p - log q. No term is negative, so two
    distributions that differ by rounding are not lost in the rounding of the sum: the usual form,
    p d, has terms of both signs that cancel. The added p (exp(-d) - 1) = q - p sums to zero.

    Raises ValueError where the other distribution is none (NaN, infinite logits), and for another
    vocabulary.
    """
    if reference.shape != other.shape:
        raise ValueError(
            f"the engine's logits have shape {list(other.shape)}, the reference's {list(reference.shape)}: "
            "compare models of one vocabulary at the same positions"
        )
    log_p = reference.double().log_softmax(-1)
    log_q = other.to(reference.device).double().log_softmax(-1)
    if not (finite := log_q.isfinite().all(-1)).all():
        raise ValueError(
            f"the engine's logits at position {int((~finite).nonzero()[0])} are not finite, so they are no distribution"
        )
    token_ids = token_ids.to(reference.device)[:, None]
    p, difference = log_p.exp(), log_p - log_q
    # where p is too small for a float64, what is left of its term is q
    terms = torch.where(p > 0, p * (torch.expm1(-difference) + difference), log_q.exp())
    return Distances(
        terms.sum(-1).cpu(),
        (reference.argmax(-1) != other.to(reference.device).argmax(-1)).cpu(),
        difference.gather(-1, token_ids).squeeze(-1).cpu(),
    )
