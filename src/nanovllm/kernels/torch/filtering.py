"""Top-k and top-p (Holtzman et al., 2020). Loaded when a request asks for them."""

import torch
from torch import Tensor

ROWS = 128
"""Rows that are filtered at a time: 256 rows of a large vocabulary would take 1.5 GB at once, which
a GPU of 8 GB does not have left.
"""


def filtered_logits(logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """The logits [n, vocab] (float32) of the distribution that is sampled: `logits / temperature`,
    -inf where filtered out.

    Top-k keeps the k largest and every tie with the k-th; of those, top-p keeps the smallest set of
    largest probabilities whose sum reaches top_p (ties: lower ids first), at least one.
    temperatures, top_ps: float32 [n]; top_ks: int64 [n], 0 or
    -1 keeps all. A row of temperature 0 (greedy) is not scaled; no filter ever removes its largest
    logit.
    """
    if len(logits) > ROWS:
        columns = (column.split(ROWS) for column in (logits, temperatures, top_ks, top_ps))
        return torch.cat([filtered_logits(*part) for part in zip(*columns, strict=True)])
    scaled = logits.float() / torch.where(temperatures == 0.0, 1.0, temperatures)[:, None]
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    vocab_size = scaled.shape[-1]
    last_kept = torch.where(top_ks <= 0, vocab_size, top_ks).clamp(max=vocab_size) - 1
    ordered.masked_fill_(ordered < ordered.gather(-1, last_kept[:, None]), -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1).sub_(probabilities)
    # A rounded sum may reach 1 too early: top_p = 1 must keep all.
    ordered.masked_fill_((mass_before >= top_ps[:, None]) & (top_ps[:, None] < 1.0), -torch.inf)
    return torch.empty_like(scaled).scatter_(-1, ids, ordered)
