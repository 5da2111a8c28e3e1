"""Sampling where each rank holds the logits of a part of the vocabulary: the best of a part, then
the best of all parts.
"""

import torch
from torch import Tensor

from nanovllm.kernels.torch.sampling import gumbel_noise


def best_of_shard(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first_token: int,
    *,
    all_greedy: bool,
) -> Tensor:
    """logits: [n, tokens of this part], the first of them of token first_token (a multiple of 4);
    the others [n], as in sample.

    -> [2, n, 1] int32: the bits of the largest perturbed logit (float32), and its token (the lowest
    of a tie).
    """
    perturbed = logits.float()
    if not all_greedy:
        greedy = temperatures == 0.0
        noise = gumbel_noise(seeds, positions, logits.shape[1], first_token).masked_fill_(
            greedy[:, None], 0.0
        )
        perturbed = (perturbed / torch.where(greedy, 1.0, temperatures)[:, None]).add_(noise)
    tokens = perturbed.argmax(dim=-1, keepdim=True)
    return torch.stack(
        (perturbed.gather(-1, tokens).view(torch.int32), (tokens + first_token).int())
    )


def best_of_shards(gathered: Tensor) -> Tensor:
    """gathered: [parts, 2, n, m] int32, every part's best_of_shard -> token ids: [n] int64, the
    lowest in a tie.
    """
    # [n, parts * m]
    values, tokens = (part.movedim(0, 1).flatten(1) for part in gathered.unbind(1))
    values = values.contiguous().view(torch.float32)
    return (
        tokens.masked_fill(values < values.amax(dim=-1, keepdim=True), torch.iinfo(torch.int32).max)
        .amin(dim=-1)
        .long()
    )
