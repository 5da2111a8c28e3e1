"""How far a token is from what the reference would have chosen, in logits.

A sampled token is as deterministic as a greedy one once the random numbers are known (the
Gumbel-max trick): with logits z,

    s = z / temperature;  s of tokens outside min-p, then top-k, then top-p, is dropped;
    token = argmax(s + noise).

The *margin* of a token is the smallest noise on the reference's logits that would explain it: the
smallest d such that some change of z, none of whose differences z_i - z_j moves by more than d,
makes it the choice. It is 0 where the reference chooses the token too; for a greedy token it is the
best logit minus its own; without top-k and top-p it is the same for perturbed scores, times the
temperature. With top-k or top-p a change of z also moves the boundary of what is kept, and that can
bring a token in, or throw the reference's own choice out, whatever their perturbed scores:
`smallest_explaining_noise` searches d for those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.gate.gumbel_noise import noise_of

_BISECTIONS = 36  # of some forty logits: 1e-9
_WIDTH = 640


@dataclass(frozen=True)
class Rows:
    """The sampling parameters of n positions. All [n], on the device of the logits.

    temperature: float, 0 is greedy. top_k: int64, 0 or -1 keeps all. top_p: float. seed: int64.
    min_p: float, 0 keeps all. position: int64, the index in its sequence of the token that was
    sampled (the number of tokens before it).
    unknown_noise: bool, sampled by another random generator, so that the noise is not known.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    position: Tensor
    unknown_noise: Tensor
    min_p: Tensor

    def __getitem__(self, index: Tensor | slice) -> Rows:
        return Rows(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @property
    def greedy(self) -> Tensor:
        return self.temperature == 0

    @property
    def divisor(self) -> Tensor:
        """The temperature [n], or 1 for a greedy row."""
        return torch.where(self.greedy, torch.ones_like(self.temperature), self.temperature)

    @property
    def truncated(self) -> Tensor:
        """Rows [n] whose min-p, top-k or top-p may drop a token."""
        return ~self.greedy & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))

    @property
    def depth(self) -> Tensor:
        """How far [n, 1] a logit over temperature may lie below the largest: -log(min_p), infinity
        where min-p drops nothing.
        """
        drops = (self.min_p > 0) & ~self.greedy
        return torch.where(drops, -self.min_p.double().log(), torch.inf)[:, None]

    def limits(self, vocab_size: int) -> tuple[Tensor, Tensor]:
        """(k, p) [n, 1]: at most k tokens are kept, those with less than p of the mass before them.
        (V, infinity) means no limit. Min-p aside.
        """
        k = torch.where(
            (self.top_k > 0) & ~self.greedy, self.top_k.clamp(max=vocab_size), vocab_size
        )
        p = torch.where((self.top_p < 1) & ~self.greedy, self.top_p.double(), torch.inf)
        return k[:, None], p[:, None]

    def noise(self, vocab_size: int) -> Tensor:
        """Gumbel noise [n, vocab_size], float32: the engine's own; 0 in greedy rows and where it is unknown."""
        # the shared generator; torch is all it loads
        from nanovllm.kernels.torch.sampling import gumbel_noise

        ours = ~self.greedy & ~self.unknown_noise
        if len(ours) and bool(ours.all()):
            return gumbel_noise(self.seed, self.position, vocab_size)
        noise = torch.zeros(len(self.seed), vocab_size, device=self.seed.device)
        if bool(ours.any()):
            noise[ours] = gumbel_noise(self.seed[ours], self.position[ours], vocab_size)
        return noise


def smallest_explaining_noise(scaled: Tensor, rows: Rows, tokens: Tensor) -> Tensor:
    """Margin [m] of `tokens` [m] in units of `scaled` [m, V] (logits over temperature), where top-k
    or top-p is in force.

    A noise d explains token y if
    - y may be kept: fewer than k tokens lie above s_y + d, and their mass, at its smallest (all of
      them down, the rest up:
      a e^-d / (a e^-d + 1 - a)), is below p; and
    - nothing that is kept for certain beats it by more than d. Kept for certain is a token i for
      which the others above
      s_i - d are fewer than k and their mass at its largest, b / (b + (1 - b) e^-d), is below p.

    With min-p, y must moreover lie no deeper than `depth` + d below the largest, and i is kept for
    certain only if no other token lies more than `depth` - d above it; masses are shares of the
    largest, or smallest, set of tokens that min-p may leave.

    Masses are of the reference's own top-k set; the quotients are computed as sigmoid(logit(a) - d)
    and sigmoid(logit(b) + d), of which no underflow makes 0 / 0. Both conditions grow with d, so d
    is found by bisection. Where the noise is unknown, only the first counts. The most likely tokens nearly
    always suffice; where one beyond them could matter, all are looked at.
    """
    vocab_size = scaled.shape[1]
    k, _ = rows.limits(vocab_size)
    width = min(vocab_size, max(_WIDTH, int(torch.where(k < vocab_size, k, 0).max())))
    if bool((rows.min_p > 0).any()):
        width = vocab_size
    margin, exact = _explaining_noise(scaled, rows, tokens, width)
    if len(rest := (~exact).nonzero().flatten()):
        margin[rest], _ = _explaining_noise(scaled[rest], rows[rest], tokens[rest], vocab_size)
    return margin


def _explaining_noise(
    scaled: Tensor, rows: Rows, tokens: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """(noise [m], whether no token beyond the `width` most likely ones could have changed it [m])."""
    k, p = rows.limits(scaled.shape[1])
    ordered, order = scaled.topk(width)
    noise = torch.zeros(len(tokens), width + 1, device=scaled.device)
    if len(ours := (~rows.unknown_noise).nonzero().flatten()):
        named = torch.cat((order, tokens[:, None]), -1)
        noise[ours] = noise_of(rows.seed[ours], rows.position[ours], named[ours])
    ascending = -ordered  # searchsorted wants ascending values
    within_k = torch.arange(width, device=scaled.device) < k
    # In double: a margin of d hangs on 1 - a, about e^-d (1 - p) / p, of which float32 leaves
    # nothing where d is large.
    of_k = ordered.double().masked_fill(~within_k, -torch.inf)
    mass = (
        of_k
        - torch.where(k <= width, of_k.logsumexp(-1, True), scaled.double().logsumexp(-1, True))
    ).exp()
    # [m, width + 1]: of the first 0, 1, ... tokens
    mass_of_first = torch.nn.functional.pad(mass.cumsum(-1), (1, 0)).clamp(max=1.0)
    depth = rows.depth
    bounded = depth.isfinite()
    any_bounded = bool(bounded.any())

    def mass_within(d: Tensor) -> Tensor | float:
        """[m, s]: of the tokens that min-p keeps if the depth is d more; 1 without min-p."""
        if not any_bounded:
            return 1.0
        least = (depth + d) - ordered[:, :1].double()
        count = torch.searchsorted(ascending.double(), least, right=True).clamp(min=1)
        return torch.where(bounded, mass_of_first.gather(1, count), 1.0)

    scores = ordered + noise[:, :-1]
    # [m, width]: highest score of the first 1, 2, ... tokens
    best_of_first = scores.cummax(-1).values
    own = scaled.gather(1, tokens[:, None])
    own_score = own + noise[:, -1:]
    # What is kept for certain is a prefix of the order, so only a token that beats `tokens` and all
    # before it stands in the way.
    rivals = scores > torch.maximum(
        own_score, torch.nn.functional.pad(best_of_first[:, :-1], (1, 0), value=-torch.inf)
    )
    rivals &= ~rows.unknown_noise[:, None]
    count = int(rivals.sum(-1).max())
    # [m, R], and others in the place of rivals that are too few
    at = rivals.byte().topk(max(1, count)).indices
    rival = rivals.gather(1, at)
    rival_value, rival_mass, rival_score = (
        ordered.gather(1, at),
        mass.gather(1, at),
        scores.gather(1, at),
    )

    # how far the highest of the others lies above a rival
    second = ordered[:, 1:2] if width > 1 else ordered
    below = torch.where(at == 0, second, ordered[:, :1]) - rival_value

    def explains(d: Tensor) -> Tensor:  # [m, s] -> bool [m, s]
        above = torch.searchsorted(ascending, -(own + d), right=False)
        a = (mass_of_first.gather(1, above) / mass_within(d)).clamp(max=1.0)
        may_be_kept = (above < k) & (torch.sigmoid(a.logit() - d) < p)
        may_be_kept &= ordered[:, :1] - own <= depth + d
        if not count:
            return may_be_kept
        each = d[:, :, None]
        others = (
            torch.searchsorted(
                ascending, (each - rival_value[:, None]).flatten(1), right=True
            ).view(*d.shape, -1)
            - 1
        )
        b = mass_of_first.gather(1, others.flatten(1) + 1).view(others.shape) - rival_mass[:, None]
        if any_bounded:
            b = b / mass_within(-d)[:, :, None]  # type: ignore[index]
        b = b.clamp(0.0, 1.0)
        certain = (
            (others < k[..., None])
            & (torch.sigmoid(b.logit() + each) < p[..., None])
            & (below[:, None] + each <= depth[..., None])
            & rival[:, None]
        )
        return may_be_kept & ~(certain & (rival_score - own_score)[:, None].gt(each)).any(-1)

    low = torch.zeros_like(own)
    # explains any token
    high = (
        (ordered[:, :1] - scaled.amin(-1, True))
        + (best_of_first[:, -1:] - own_score).clamp(min=0)
        + 1.0
    )
    parts = torch.tensor([0.25, 0.5, 0.75], dtype=own.dtype, device=own.device)
    for _ in range(_BISECTIONS // 2):  # two at a time: what each operation costs is to begin it
        edges = torch.cat((low, low + (high - low) * parts, high), -1)
        first = (~explains(edges[:, 1:-1])).sum(-1, keepdim=True)
        low, high = edges.gather(1, first), edges.gather(1, first + 1)
    # What is certain at any noise is kept without noise: no threshold lies below the last of those,
    # less the noise.
    kept = (within_k & (mass_of_first[:, :-1] < p)).sum(-1, keepdim=True).clamp(min=1)
    last = ordered[:, -1:]
    exact = (own > last) & (ordered.gather(1, kept - 1) - high > last) | (width == scaled.shape[1])
    return high[:, 0], exact[:, 0]
