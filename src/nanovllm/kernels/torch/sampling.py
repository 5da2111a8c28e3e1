"""Sampling with counter-based randomness in plain torch operations: the reference for every other
implementation.

The noise of a token is a stated function of (seed, position, token id) and of nothing else:

    bits    = Philox4x32-10(key = seed, counter = (token_id // 4, position, 0, 0))[token_id % 4]
    uniform = bits * 2^-32                       in (0, 1): 0 becomes 2^-33, values that would round to 1 become 1 - 2^-24
    noise   = -log(-log1p(-uniform))             Gumbel(0, 1), between -2.82 and 22.88

and `argmax(logits / temperature + noise)` is a sample of `softmax(logits / temperature)` (the
Gumbel-max trick). So a request's tokens do not depend on other requests or on its history, and
another engine's logits can be rescored with the same noise.

Every device and every implementation must give the same bits. So only operations that IEEE 754
defines exactly are used (+, -, *, /, conversions, integer operations), each rounded separately (no
fused multiply-add), in the order written here, and no libm. Torch's eager kernels never fuse across
operations; a compiler must be told not to (Triton: `enable_fp_fusion=False`, `div_rn`).
"""

import torch
from torch import Tensor

_LOW32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

_SQRT_HALF_BITS = 0x3F3504F3  # sqrt(1/2) as float32 bits
_EXPONENT_MASK = -0x800000  # sign and exponent of a float32, as int32
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# (log(1 + x) - x + x^2 / 2) / x^3 on [sqrt(1/2) - 1, sqrt(2) - 1], highest power first (Cephes
# logf)
_LOG_POLYNOMIAL = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def philox4x32(
    key0: Tensor, key1: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit random words for each key and counter: Philox4x32 of Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3" (SC'11).

    All arguments are int64 holding values in [0, 2^32) and broadcast against each other; so do the
    results.
    """
    # Own code instead of torch.Generator: a token's random numbers depend on its request and position alone, whatever is in
    # the batch, and are the same bits on CPUs and GPUs and in every version of torch (docs/adr/0003-random-numbers.md).
    multiplier0, multiplier1 = _PHILOX_MULTIPLIERS
    steps = torch.arange(rounds, device=key0.device).view(-1, *[1] * key0.dim())
    round_keys = (
        ((key + steps * step) & _LOW32).unbind()
        for key, step in zip((key0, key1), _PHILOX_KEY_STEPS, strict=True)
    )
    for key0, key1 in zip(*round_keys, strict=True):
        # The int64 products wrap, yet all their 64 bits are right; bits above 32 are masked away
        # before they can matter.
        product0, product1 = c0 * multiplier0, c2 * multiplier1
        c0 = ((product1 >> 32) ^ c1 ^ key0).bitwise_and_(_LOW32)
        c2 = ((product0 >> 32) ^ c3 ^ key1).bitwise_and_(_LOW32)
        c1, c3 = product1, product0
    return c0, c1 & _LOW32, c2, c3 & _LOW32


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32 [...]: Cephes' logf (S. Moshier) with its steps
    in the same order.
    """
    bits = x.view(torch.int32)
    exponent_bits = (bits - _SQRT_HALF_BITS).bitwise_and_(_EXPONENT_MASK)
    exponent = exponent_bits.to(torch.float32).mul_(2.0**-23)
    # x = (1 + fraction) * 2^exponent, with 1 + fraction in [sqrt(1/2), sqrt(2)). Most steps are in
    # place: on a CPU, getting fresh memory costs more than the arithmetic.
    fraction = torch.sub(bits, exponent_bits, out=exponent_bits).view(torch.float32).sub_(1.0)
    square = fraction * fraction
    y = fraction * _LOG_POLYNOMIAL[0]
    for coefficient in _LOG_POLYNOMIAL[1:]:
        y.add_(coefficient).mul_(fraction)
    y.mul_(square).add_(exponent * _LN2_LOW).add_(square.mul_(-0.5)).add_(fraction)
    return y.add_(exponent.mul_(_LN2_HIGH))


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int, first: int = 0) -> Tensor:
    """Gumbel(0, 1) noise [n, vocab_size] (float32) of each row's seed and position (int64 [n]), on
    their device: that of tokens first (a multiple of 4) to first + vocab_size - 1.

    `positions[i]` is the position that the sampled token will take in its sequence (prompt
    included), below 2^32.
    """
    # a few rows at a time, so that temporary results stay in the CPU's cache
    if seeds.device.type == "cpu" and len(seeds) > 16:
        return torch.cat(
            [
                gumbel_noise(s, p, vocab_size, first)
                for s, p in zip(seeds.split(16), positions.split(16), strict=True)
            ]
        )
    num_counters = (vocab_size + 3) // 4
    counters = torch.arange(num_counters, dtype=torch.int64, device=seeds.device) + first // 4
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    words = philox4x32(
        seeds[:, None] & _LOW32,
        (seeds[:, None] >> 32) & _LOW32,
        counters,
        positions[:, None] & _LOW32,
        zero,
        zero,
    )
    uniform = torch.empty(len(seeds), num_counters, 4, dtype=torch.float32, device=seeds.device)
    for lane, word in enumerate(words):
        uniform[:, :, lane] = word
    uniform = (
        uniform.flatten(1)[:, :vocab_size].contiguous().clamp_(0.5, 2.0**32 - 2.0**8).mul_(2.0**-32)
    )
    # log1p(-u) after D. Goldberg, "What every computer scientist should know about floating-point
    # arithmetic", theorem 4.
    rest = 1.0 - uniform
    exponential = _log(rest).mul_(uniform).div_(rest.sub_(1.0))
    torch.where(rest == 0.0, uniform, exponential, out=exponential)
    return _log(exponential).neg_()


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
    """One token id (int64 [n]) for each row of logits [n, vocab]; the lowest id wins a tie.

    Greedy rows (temperature 0) take the largest logit, the others a sample of
    softmax(filtered_logits) by gumbel_noise. Both kinds may be mixed. temperatures, top_ps: float32
    [n]; top_ks, seeds, positions: int64 [n]. The flags are known on the host, so that work no row
    needs is skipped without waiting for the device: `all_greedy` says that every temperature is 0,
    `any_top_k_top_p` that some row has a filter.
    """
    if all_greedy:
        return logits.argmax(dim=-1)
    if any_top_k_top_p:
        from nanovllm.kernels.torch.filtering import filtered_logits

        scaled = filtered_logits(logits, temperatures, top_ks, top_ps)
    else:
        scaled = logits.float() / torch.where(temperatures == 0.0, 1.0, temperatures)[:, None]
    noise = gumbel_noise(seeds, positions, logits.shape[-1]).masked_fill_(
        (temperatures == 0.0)[:, None], 0.0
    )
    return scaled.add_(noise).argmax(dim=-1)
