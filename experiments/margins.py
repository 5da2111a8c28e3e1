"""How far a token is from what the reference would have chosen, in logits.

A sampled token is as deterministic as a greedy one once the random numbers are known (the Gumbel-max trick): with logits z,

    s = z / temperature;  s of tokens outside top-k, then top-p, is dropped;  token = argmax(s + noise).

The *margin* of a token is the smallest noise on the reference's logits that would explain it: the smallest d such that some
change of z, none of whose differences z_i - z_j moves by more than d, makes it the choice. It is 0 where the reference
chooses the token too; for a greedy token it is the best logit minus its own; without top-k and top-p it is the same for
perturbed scores, times the temperature. With top-k or top-p a change of z also moves the boundary of what is kept, and that
can bring a token in, or throw the reference's own choice out, whatever their perturbed scores: `smallest_explaining_noise`
searches d for those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BISECTIONS = 50


@dataclass(frozen=True)
class Rows:
    """How each of n positions was sampled. Everything [n], on the device of the logits.

    temperature: float, 0 is greedy. top_k: int64, 0 or -1 keeps all. top_p: float. seed: int64.
    position: int64, the index in its sequence of the token that was sampled (the number of tokens before it).
    foreign: bool, sampled by another random generator, so that the noise is not known.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    position: Tensor
    foreign: Tensor

    def __getitem__(self, index: Tensor | slice) -> Rows:
        return Rows(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @property
    def greedy(self) -> Tensor:
        return self.temperature == 0

    @property
    def divisor(self) -> Tensor:
        """What the logits are divided by, [n]: 1 for a greedy row."""
        return torch.where(self.greedy, torch.ones_like(self.temperature), self.temperature)

    @property
    def truncated(self) -> Tensor:
        """Rows [n] whose top-k or top-p may drop a token."""
        return ~self.greedy & ((self.top_k > 0) | (self.top_p < 1))

    def limits(self, vocab_size: int) -> tuple[Tensor, Tensor]:
        """(k, p) [n, 1]: at most k tokens are kept, those with less than p of the mass before them; no limit is (V, infinity)."""
        k = torch.where((self.top_k > 0) & ~self.greedy, self.top_k.clamp(max=vocab_size), vocab_size)
        p = torch.where((self.top_p < 1) & ~self.greedy, self.top_p.double(), torch.inf)
        return k[:, None], p[:, None]

    @property
    def has_noise(self) -> bool:
        return bool((~self.greedy & ~self.foreign).any())

    def noise(self, vocab_size: int) -> Tensor:
        """Gumbel noise [n, vocab_size], float32: the engine's own; 0 in greedy and foreign rows."""
        from nanovllm.kernels.torch.sampling import gumbel_noise  # the shared generator; torch is all it loads

        ours = ~self.greedy & ~self.foreign
        if len(ours) and bool(ours.all()):
            return gumbel_noise(self.seed, self.position, vocab_size)
        noise = torch.zeros(len(self.seed), vocab_size, device=self.seed.device)
        if bool(ours.any()):
            noise[ours] = gumbel_noise(self.seed[ours], self.position[ours], vocab_size)
        return noise


def kept(scaled: Tensor, rows: Rows) -> Tensor:
    """Which tokens top-k, then top-p on what is left, keep: bool [n, V] from logits over temperature [n, V]."""
    k, p = rows.limits(scaled.shape[1])
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    within_k = torch.arange(scaled.shape[1], device=scaled.device) < k
    mass = ordered.masked_fill(~within_k, -torch.inf).softmax(-1)
    keep = within_k & (mass.cumsum(-1) - mass < p)
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(1, order, keep)


def truncate(scores: Tensor, scaled: Tensor, rows: Rows) -> Tensor:
    """`scores` [n, V] with -infinity for the tokens that top-k and top-p drop, given logits over temperature `scaled` [n, V]."""
    index = rows.truncated.nonzero().flatten()
    scores = scores.clone()
    scores[index] = scores[index].masked_fill(~kept(scaled[index], rows[index]), -torch.inf)
    return scores


def margins(scaled: Tensor, scores: Tensor, best: Tensor, rows: Rows, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(agrees, margin), both [n]: does the reference choose `tokens` [n], and how far is it from choosing them, in logits.

    scaled: logits over temperature [n, V]; scores: those truncated, plus noise [n, V]; best: argmax of scores [n]. A foreign
    sampled token agrees where the reference keeps it at all, and its margin is its distance from what is kept.
    """
    own = scores.gather(1, tokens[:, None])[:, 0]
    agrees = torch.where(rows.foreign & ~rows.greedy, own > -torch.inf, best == tokens)
    margin = torch.where(agrees, 0.0, scores.gather(1, best[:, None])[:, 0] - own)
    search = (~agrees & rows.truncated).nonzero().flatten()
    step = max(1, 2**24 // scaled.shape[1])  # a few [step, V] tables at a time
    for part in search.split(step) if len(search) else ():
        margin[part] = smallest_explaining_noise(scaled[part], rows[part], tokens[part])
    return agrees, margin * rows.divisor


def smallest_explaining_noise(scaled: Tensor, rows: Rows, tokens: Tensor) -> Tensor:
    """Margin [m] of `tokens` [m] in units of `scaled` [m, V] (logits over temperature), where top-k or top-p is in force.

    A noise d explains token y if
    - y may be kept: fewer than k tokens lie above s_y + d, and their mass, at its smallest (all of them down, the rest up:
      a e^-d / (a e^-d + 1 - a)), is below p; and
    - nothing that is kept for certain beats it by more than d. Kept for certain is a token i for which the others above
      s_i - d are fewer than k and their mass at its largest, b / (b + (1 - b) e^-d), is below p.

    Masses are of the reference's own top-k set. Both conditions grow with d, so d is found by bisection. For foreign rows
    only the first counts.
    """
    k, p = rows.limits(scaled.shape[1])
    noise = rows.noise(scaled.shape[1])
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    ascending = -ordered  # searchsorted wants ascending values
    within_k = torch.arange(scaled.shape[1], device=scaled.device) < k
    mass = ordered.masked_fill(~within_k, -torch.inf).softmax(-1)
    mass_of_first = torch.nn.functional.pad(mass.cumsum(-1), (1, 0)).clamp(max=1.0)  # [m, V + 1]: of the first 0, 1, ... tokens
    best_of_first = (ordered + noise.gather(1, order)).cummax(-1).values  # [m, V]: highest score of the first 1, 2, ... tokens
    own = scaled.gather(1, tokens[:, None])
    own_score = own + noise.gather(1, tokens[:, None])

    def explains(d: Tensor) -> Tensor:  # [m, 1] -> bool [m, 1]
        above = torch.searchsorted(ascending, -(own + d), right=False)
        a = mass_of_first.gather(1, above) * torch.exp(-d)
        may_be_kept = (above < k) & (a / (a + 1 - mass_of_first.gather(1, above)) < p)
        others = torch.searchsorted(ascending, -(ordered - d), right=True) - 1  # [m, V]
        b = mass_of_first.gather(1, others + 1) - mass
        certain = ((others < k) & (b / (b + (1 - b) * torch.exp(-d)) < p)).sum(-1, keepdim=True)  # a prefix of the order
        best = torch.where(certain > 0, best_of_first.gather(1, (certain - 1).clamp(min=0)), -torch.inf)
        return may_be_kept & ((best - own_score <= d) | rows.foreign[:, None])

    low = torch.zeros_like(own)
    high = (ordered[:, :1] - ordered[:, -1:]) + (best_of_first[:, -1:] - own_score) + 1.0  # explains any token
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        enough = explains(middle)
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle)
    return high[:, 0]
