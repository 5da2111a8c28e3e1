"""The sampler in two kernels: temperature, noise and argmax over slices of the vocabulary, then
over the slices.

Gives the same bits as kernels/torch/sampling.py, which defines the noise and the order of its
operations: every launch must pass `fp_fusion=False`, and divisions must be `div_rn`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.torch.filtering import filtered_logits
from nanovllm.kernels.triton.launch import pdl, wait_for_inputs

_TILE = 1024  # tokens per iteration
# roughly the number of programs for a batch: several per multiprocessor
_PROGRAMS = 1024


@triton.jit
def _log(x):
    """Cephes' logf, step by step as in the torch twin."""
    bits = x.to(tl.int32, bitcast=True)
    exponent_bits = (bits - 0x3F3504F3) & -0x800000
    exponent = exponent_bits.to(tl.float32) * 1.1920928955078125e-07  # 2^-23
    fraction = (bits - exponent_bits).to(tl.float32, bitcast=True) - 1.0
    square = fraction * fraction
    y = fraction * 7.0376836292e-2
    y = (y + -1.1514610310e-1) * fraction
    y = (y + 1.1676998740e-1) * fraction
    y = (y + -1.2420140846e-1) * fraction
    y = (y + 1.4249322787e-1) * fraction
    y = (y + -1.6668057665e-1) * fraction
    y = (y + 2.0000714765e-1) * fraction
    y = (y + -2.4999993993e-1) * fraction
    y = (y + 3.3333331174e-1) * fraction
    y = y * square
    y = y + exponent * -2.12194440e-4
    y = y + square * -0.5
    y = y + fraction
    return y + exponent * 0.693359375


@triton.jit
def _philox4x32(key0, key1, c0, c1):
    """Ten rounds on the counter (c0, c1, 0, 0). Like tl.philox, but with one wide multiplication
    instead of two halves.
    """
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform_tile(seed, position, first_token, TILE: tl.constexpr):
    """The uniform numbers of tokens first_token .. first_token + TILE - 1 (first_token a multiple
    of 4): [TILE] float32.
    """
    c0 = (first_token // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    c1 = tl.zeros([TILE // 4], tl.uint32) + position.to(tl.uint32)
    w0, w1, w2, w3 = _philox4x32(seed.to(tl.uint32), (seed >> 32).to(tl.uint32), c0, c1)
    # lane l of counter c is token 4 c + l
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [TILE])
    # 2^-32
    return tl.minimum(tl.maximum(words.to(tl.float32), 0.5), 4294967040.0) * 2.3283064365386963e-10


@triton.jit
def gumbel(uniform):
    """-log(-log1p(-uniform)), with the twin's bits."""
    rest = 1.0 - uniform
    minus_uniform = rest - 1.0
    exponential = tl.div_rn(_log(rest) * uniform, minus_uniform)
    exponential = tl.where(minus_uniform == 0.0, uniform, exponential)
    return -_log(exponential)


@triton.jit(do_not_specialize=["first_token"])
def _best_of_slice_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    values_ptr,
    tokens_ptr,
    vocab_size,
    slice_size,
    row_stride,
    first_token,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Best perturbed logit of row program_id(0) within slice program_id(1), and its token (the
    lowest on a tie). The first column is of token first_token, a multiple of 4.

    The exact noise costs a hundred operations a token, and few tokens have a chance. -log1p(-u) >=
    u, so the noise is at most
    -log(u), and little less where it is large. Read as integers, the bits of u are a piecewise
    linear log2(u) from below, off by at most 0.09: a bound in two operations. A tile none of whose
    bounds (with a margin for rounding) reaches the best value so far cannot change the result and
    is passed over.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * slice_size
    end = tl.minimum(begin + slice_size, vocab_size)
    wait_for_inputs(PDL)
    temperature = tl.load(temperature_ptr + row)
    seed = tl.load(seed_ptr + row)
    position = tl.load(position_ptr + row)
    greedy = temperature == 0.0
    divisor = tl.zeros([TILE], tl.float32) + tl.where(greedy, 1.0, temperature)
    reciprocal = 1.0 / tl.where(greedy, 1.0, temperature)
    less, more = reciprocal * (1.0 - 1e-6), reciprocal * (1.0 + 1e-6)
    best = tl.full([], float("-inf"), tl.float32)
    best_token = begin
    for first in range(begin, end, TILE):
        tokens = first + tl.arange(0, TILE)
        logits = tl.load(
            logits_ptr + row * row_stride + tokens, mask=tokens < end, other=float("-inf")
        ).to(tl.float32)
        if greedy:
            value = tl.max(logits, axis=0)
            if value > best:
                best = value
                best_token = tl.min(tl.where(logits == value, tokens, 0x7FFFFFFF), axis=0)
        else:
            uniform = uniform_tile(seed, position, first_token + first, TILE)
            log2_from_below = (
                uniform.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920929e-07 - 127.0
            )
            bound = tl.maximum(logits * less, logits * more) - log2_from_below * 0.6931472
            if tl.max(bound, axis=0) + 1e-4 > best:
                perturbed = tl.div_rn(logits, divisor) + gumbel(uniform)
                value = tl.max(perturbed, axis=0)
                if value > best:
                    best = value
                    best_token = tl.min(tl.where(perturbed == value, tokens, 0x7FFFFFFF), axis=0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(values_ptr + place, best)
    tl.store(tokens_ptr + place, first_token + best_token)


@triton.jit(do_not_specialize=["num_slices"])
def _best_of_slices_kernel(
    values_ptr, tokens_ptr, out_ptr, num_slices, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slices = tl.arange(0, BLOCK)
    inside = slices < num_slices
    wait_for_inputs(PDL)
    values = tl.load(values_ptr + row * num_slices + slices, mask=inside, other=float("-inf"))
    tokens = tl.load(tokens_ptr + row * num_slices + slices, mask=inside, other=0x7FFFFFFF)
    tl.store(
        out_ptr + row,
        tl.min(tl.where(values == tl.max(values, axis=0), tokens, 0x7FFFFFFF), axis=0).to(tl.int64),
    )


def sample(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    all_greedy: bool,
    any_top_k_top_p: bool,
) -> Tensor:
    """One token id (int64 [n]) per row of logits [n, vocab]; the lowest id wins a tie. Where some
    row has a filter, the torch twin's `filtered_logits` is used. `all_greedy` changes nothing here:
    a greedy row draws no noise anyway.
    """
    if any_top_k_top_p:
        logits = filtered_logits(logits, temperatures, top_ks, top_ps)
        temperatures = (temperatures != 0.0).float()  # already scaled; x / 1 is x
    n = logits.shape[0]
    best, tokens = best_of_slices(logits, temperatures, seeds, positions)
    values = best.view(torch.float32)
    out = torch.empty(n, dtype=torch.int64, device=logits.device)
    block = triton.next_power_of_2(triton.cdiv(logits.shape[1], _TILE))
    _best_of_slices_kernel[(n,)](
        values, tokens, out, values.shape[1], BLOCK=block, num_warps=1, **pdl(logits)
    )
    return out


def best_of_slices(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, first_token: int = 0
) -> Tensor:
    """[2, n, slices] int32: the bits of the best perturbed logit (float32) of each slice of a row,
    and its token.
    """
    n, vocab_size = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    slice_size = triton.cdiv(triton.cdiv(vocab_size, max(1, _PROGRAMS // max(n, 1))), _TILE) * _TILE
    best = torch.empty(
        2, n, triton.cdiv(vocab_size, slice_size), dtype=torch.int32, device=logits.device
    )
    _best_of_slice_kernel[(n, best.shape[2])](
        logits,
        temperatures,
        seeds,
        positions,
        best[0].view(torch.float32),
        best[1],
        vocab_size,
        slice_size,
        logits.stride(0),
        first_token,
        TILE=_TILE,
        num_warps=4,
        **pdl(logits, fp_fusion=False),
    )
    return best
