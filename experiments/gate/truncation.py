"""Min-p, top-k and top-p truncation of a vocabulary, and statistics of the truncated distribution.

On a CPU, an irregular mask (`masked_fill`, `where`) costs 3.5 ns per element, a sort 1.7 ns and an
exponential 0.2 ns. So what is kept is described by a threshold, and masks are applied by
multiplying with 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from experiments.gate.logit_margins import Rows

_MOST_LIKELY = 640
"""The number of most likely tokens in which the threshold of top-p is searched first, in a much larger vocabulary."""
_FAR = 1e18
"""Subtracted from a score, gives a probability of 0."""


def least_kept(
    tables: Sequence[Tensor], rows: Rows, masses: Sequence[Tensor] | None = None
) -> list[Tensor] | None:
    """For each table of logits over temperature [n, V], the smallest value [n, 1] that min-p, top-k,
    then top-p on what is left, keep. None if all tokens are kept.

    Tokens as likely as the last one that is kept are kept as well. masses: the sums [n, 1] of
    `exponentials` of each table, if known.
    """
    if not bool(rows.truncated.any()):
        return None
    vocab_size = tables[0].shape[1]
    k, p = rows.limits(vocab_size)
    width = int(torch.where(k < vocab_size, k, _MOST_LIKELY).max())
    if bool((rows.min_p > 0).any()):
        return [
            _least_of(descending(table), table, within_depth(table, rows, k), p)[0]
            for table in tables
        ]
    if 3 * width >= vocab_size:
        return [_least_of(descending(table), table, k, p)[0] for table in tables]
    result = []
    for i, table in enumerate(tables):
        least, found = _least_of(descending(table, width), table, k, p, masses and masses[i])
        if len(rest := (~found).nonzero().flatten()):
            least[rest], _ = _least_of(descending(table[rest]), table[rest], k[rest], p[rest])
        result.append(least)
    return result


def mass_near(scaled: Tensor, least: Tensor, rows: Rows, noise: Tensor) -> Tensor:
    """The probability [n] of the tokens that are not kept and that `noise` [n] on logits over
    temperature could bring in, of all that is kept then. least: of `least_kept`.

    A token may be kept under noise d if those more than d above it are fewer than k and have less
    than p of the mass, when they all move down by d and the rest up: that is, less than
    p e^d / (p e^d + 1 - p) of the mass as it is. Min-p reaches d deeper.
    """
    p = rows.top_p.double()
    odds = p / (1 - p) * noise.exp()  # infinite where nothing is filtered
    wider = replace(
        rows,
        top_p=torch.where(p < 1, odds / (odds + 1), p).nan_to_num(1.0),
        min_p=rows.min_p.double() * (-noise).exp(),
    )
    found = least_kept((scaled,), wider)
    if found is None:
        return torch.zeros_like(noise)
    weights = exponentials(scaled)[1]
    possible = (weights * (scaled >= found[0] - noise[:, None])).sum(-1)
    kept = (weights * (scaled >= least)).sum(-1)
    return ((possible - kept) / possible).clamp(min=0.0)


def within_depth(scaled: Tensor, rows: Rows, k: Tensor) -> Tensor:
    """k [n, 1], where min-p keeps fewer tokens of scaled [n, V]: how many. What is kept are always
    the most likely ones, so that min-p is a top-k whose k depends on the logits.
    """
    deep = scaled.amax(-1, True) - scaled > rows.depth
    return torch.minimum(k, (~deep).sum(-1, keepdim=True))


def _least_of(
    ordered: Tensor, scaled: Tensor, k: Tensor, p: Tensor, whole: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(`least_kept` [n, 1], whether it is among the most likely tokens [n]). ordered [n, w]: the
    logits over temperature of the most likely tokens. whole: the mass of all tokens, if known.
    """
    vocab_size, width = scaled.shape[1], ordered.shape[1]
    mass = (ordered - ordered[:, :1]).exp_().cumsum(-1)  # of the first 1, 2, ... tokens
    total = mass.gather(1, k.clamp(max=width) - 1)
    if width < vocab_size and bool((k > width).any()):
        total = torch.where(k > width, exponentials(scaled)[2] if whole is None else whole, total)
    count = torch.searchsorted(mass, (p * total).to(mass.dtype)) + 1  # the first that reach p
    count = torch.minimum(count, k)
    everything = (k == vocab_size) & p.isinf()
    least = ordered.gather(1, count.clamp(max=width) - 1).masked_fill_(everything, -torch.inf)
    return least, ((count <= width) | everything)[:, 0]


def exponentials(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum of table [n, V] over tokens [n, 1], exp(table - maximum) [n, V], and its sum
    [n, 1].
    """
    highest = table.amax(-1, True)
    weights = (table - highest).exp_()
    return highest, weights, weights.sum(-1, True)


def descending(values: Tensor, width: int | None = None) -> Tensor:
    """The `width` largest (by default, all) of values [n, V], sorted, without indices. On a CPU
    NumPy is ten times as fast at this as torch.
    """
    if values.device.type != "cpu":
        return (
            values.sort(dim=-1, descending=True).values
            if width is None
            else values.topk(width).values
        )
    negative = (-values).numpy()
    if width is not None:
        negative.partition(width - 1, axis=-1)
        negative = negative[:, :width].copy()
    negative.sort(axis=-1)
    return torch.from_numpy(negative).neg_()


def distribution(
    scaled: Tensor, hf_scaled: Tensor, least: Tensor | None, own: Tensor, unknown_noise: Tensor
) -> tuple[Tensor, ...]:
    """log_p, entropy, variance, root_sum, drift of Scores, [n] each, over the tokens whose logit
    over temperature [n, V] is `least` [n, 1] or more; 0 where the noise is known.

    own [n]: the token's logit over temperature; NaN if it is not kept.
    """
    highest = scaled.amax(-1, True)
    shifted = scaled - highest
    roots = (shifted / 2).exp_()  # of the weights; see the module's docstring
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
    return tuple(torch.where(unknown_noise, column, 0.0) for column in columns)
