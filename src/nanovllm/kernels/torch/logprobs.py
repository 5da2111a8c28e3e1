"""Log-probabilities of sampled tokens. Loaded when a request asks for them."""

import torch
from torch import Tensor


def logprobs(
    logits: Tensor, token_ids: Tensor, num_logprobs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the raw logits [n, vocab] (before temperature and filters, as vLLM's
    default), in float32.

    Returns those of token_ids (int64 [n]) as [n], their ranks [n] (1 = most likely; ties count
    against the token), and the `num_logprobs` largest with their token ids, both [n, num_logprobs]
    (or [n, vocab], where that is fewer).
    """
    all_logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
    chosen = all_logprobs.gather(-1, token_ids[:, None])
    ranks = (all_logprobs >= chosen).sum(dim=-1)
    top_values, top_ids = all_logprobs.topk(min(num_logprobs, all_logprobs.shape[-1]), dim=-1)
    return chosen.squeeze(-1), ranks, top_values, top_ids
