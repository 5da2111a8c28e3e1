"""The engine's Gumbel noise for the gate: the same bits as
`nanovllm.kernels.torch.sampling.gumbel_noise`, at lower cost.

A rescorer needs the noise at every position, which would cost more than a small model's forward
pass. So Philox runs in place, on as many rows at a time as fit into the CPU's cache, and
logarithms, half of the cost, are only taken for tokens that can win or that are named.
tests/gate/test_gate.py compares both with the engine's bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.torch import sampling

_LOW32 = 0xFFFFFFFF
_BLOCK = 2**15
"""The number of counters per call of Philox on a CPU: six tables of 256 KiB."""


def uniform_bits(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The random 32 bits of every token [n, vocab_size], as float32, the input of `gumbel`. seeds,
    positions: int64 [n].
    """
    counters = torch.arange((vocab_size + 3) // 4, device=seeds.device)
    bits = torch.empty(len(seeds), len(counters), 4, device=seeds.device)
    step = max(1, _BLOCK // len(counters)) if seeds.device.type == "cpu" else max(1, len(seeds))
    for i in range(0, len(seeds), step):
        words = _philox(seeds[i : i + step, None], positions[i : i + step, None], counters[None])
        for lane, word in enumerate(words):
            bits[i : i + step, :, lane] = word
    return bits.flatten(1)[:, :vocab_size]


def noise_of(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel noise [n, m], float32, of the tokens `token_ids` [n, m]; seeds, positions: int64 [n]."""
    words = _philox(seeds[:, None], positions[:, None], token_ids >> 2)
    lanes = torch.stack(words, dim=-1).gather(-1, (token_ids & 3)[..., None])[..., 0]
    return gumbel(lanes.float())


def gumbel(bits: Tensor) -> Tensor:
    """-log(-log1p(-u)) of u = bits * 2^-32 [...], float32: the steps of `gumbel_noise`, one by one."""
    uniform = bits.clamp(0.5, 2.0**32 - 2.0**8).mul_(2.0**-32)
    rest = 1.0 - uniform
    exponential = sampling._log(rest).mul_(uniform).div_(rest.sub_(1.0))
    return sampling._log(torch.where(rest == 0.0, uniform, exponential)).neg_()


def _philox(
    seeds: Tensor, positions: Tensor, counters: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """philox4x32(key = seed, counter = (counters, position, 0, 0)) of seeds, positions [n, 1] and
    counters [1 or n, m].
    """
    multiplier0, multiplier1 = sampling._PHILOX_MULTIPLIERS
    step0, step1 = sampling._PHILOX_KEY_STEPS
    rounds = torch.arange(10, device=seeds.device)[:, None, None]
    keys0 = (((seeds & _LOW32) + rounds * step0) & _LOW32).unbind()
    keys1 = ((((seeds >> 32) & _LOW32) + rounds * step1) & _LOW32).unbind()
    # The first two rounds are written out: half of the counter is 0 and a quarter is one number per
    # row, so most of their words are, too.
    first = counters * multiplier0
    c2 = ((first >> 32) ^ keys1[0]).bitwise_and_(_LOW32)  # [n, m]
    product0 = ((positions & _LOW32) ^ keys0[0]) * multiplier0  # [n, 1]
    product1 = c2 * multiplier1
    c0 = (product1 >> 32).bitwise_xor_(keys0[1]).bitwise_and_(_LOW32)
    c1, c2, c3 = product1, (first ^ (product0 >> 32) ^ keys1[1]).bitwise_and_(_LOW32), product0
    product0, product1, spare = torch.empty_like(c0), torch.empty_like(c0), torch.empty_like(c0)
    # in place; bits above 32 are masked away before they matter
    for key0, key1 in zip(keys0[2:], keys1[2:], strict=True):
        torch.mul(c0, multiplier0, out=product0)
        torch.mul(c2, multiplier1, out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(
            key0
        ).bitwise_and_(_LOW32)
        torch.bitwise_right_shift(product0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(
            key1
        ).bitwise_and_(_LOW32)
        c1, product1 = product1, c1
        c3, product0 = product0, c3 if c3.shape == c0.shape else spare
    return c0, c1.bitwise_and_(_LOW32), c2, c3.bitwise_and_(_LOW32)
