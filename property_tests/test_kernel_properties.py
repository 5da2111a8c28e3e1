"""The operations of the model against their definitions, written out here without pages, batches or
fused steps; and batches of every size against their rows.
"""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.gate.lossy.reference import dequantized, rounded_activations, rounded_to_e4m3
from nanovllm.config import Optimizations
from nanovllm.kernels import torch as kernels
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.torch import attention, filtering, kv_store, rope, sampling, sampling_shards
from nanovllm.layers.linear import TensorParallel
from nanovllm.quantization.kv_cache import SmallCacheAttention, Stored
from nanovllm.quantization.weights import WEIGHTS
from property_tests.support.profiles import examples, holds
from property_tests.support.strategies import SEEDS, around

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
TEXTS = st.integers(0, 2**20)


def noise(text: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(text)).to(dtype)


def assert_close(found: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    tolerance = 16 * torch.finfo(found.dtype).eps
    error = float(((found.double() - exact) / exact.abs().clamp(min=1.0)).abs().max())
    assert error <= tolerance, (
        f"{what} is off by {error:.2g}, {tolerance:.2g} is allowed in {found.dtype}"
    )


@holds(
    fast=60,
    text=TEXTS,
    rows=st.integers(1, 5),
    n=st.sampled_from([1, 8, 64]),
    dtype=DTYPES,
    eps=st.sampled_from([1e-6, 1e-2]),
)
def test_rms_norm_is_its_definition(
    text: int, rows: int, n: int, dtype: torch.dtype, eps: float
) -> None:
    """RMSNorm and add + RMSNorm equal their formulas in float64, and write to none of their inputs."""
    inputs = [noise(text + i, rows, n, dtype=dtype) for i in range(2)] + [
        noise(text + 2, n, dtype=dtype)
    ]
    before = [tensor.clone() for tensor in inputs]
    x, residual, weight = inputs
    normed = kernels.rms_norm(x, weight, eps)
    total_normed, total = kernels.add_rms_norm(x, residual, weight, eps)
    for name, tensor, old in zip(("x", "residual", "weight"), inputs, before, strict=True):
        assert torch.equal(tensor, old), f"{name} was written to"

    def exact(values: torch.Tensor) -> torch.Tensor:
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight.double()

    assert_close(normed, exact(x.double()), "the norm")
    assert torch.equal(total, x + residual), "the sum is another"
    assert_close(total_normed, exact(total.double()), "the norm of the sum")


@holds(
    fast=40,
    text=TEXTS,
    head_dim=st.sampled_from([2, 8, 64]),
    first=st.integers(0, 50),
    distance=st.integers(0, 50),
)
def test_rope_scores_depend_on_distance_alone(
    text: int, head_dim: int, first: int, distance: int
) -> None:
    """Rotation keeps lengths, and the score of a query and a key depends on their distance and
    nothing else.
    """
    from nanovllm.layers.rotary_embedding import RotaryEmbedding

    table = RotaryEmbedding(head_dim, 128, 1e4)
    x = noise(text, 2, 3, head_dim)
    query, key = (
        rope.apply_rope(
            x[None, i].expand(2, -1, -1), table(torch.tensor([position, position + distance]))
        )
        for i, position in ((0, first), (1, 0))
    )
    assert_close(
        query.norm(dim=-1),
        x[0].double().norm(dim=-1).expand(2, -1),
        "the length of a rotated vector",
    )
    here, there = (query[0] * key[0]).sum(-1), (query[1] * key[1]).sum(-1)
    assert torch.allclose(here, there, atol=2e-4 * math.sqrt(head_dim)), (
        "the score of a query and a key moved with both of them"
    )


@holds(fast=40, text=TEXTS, rows=st.integers(1, 4), n=st.sampled_from([1, 8, 33]), dtype=DTYPES)
def test_swiglu_is_its_definition(text: int, rows: int, n: int, dtype: torch.dtype) -> None:
    """silu(gate) * up, the gate in the first half."""
    x = noise(text, rows, 2 * n, dtype=dtype)
    gate, up = x.double().split(n, dim=-1)
    assert_close(kernels.silu_and_mul(x), gate * torch.sigmoid(gate) * up, "SwiGLU")


@holds(fast=40, text=TEXTS, block_size=st.sampled_from([1, 4, 16]), tokens=st.integers(1, 9))
def test_kv_is_stored_in_its_slots_alone(text: int, block_size: int, tokens: int) -> None:
    """K and V of each token lie in its slot; no other slot changes."""
    blocks, heads, head_dim = 12, 2, 4
    k, v = noise(text, 2, tokens, heads, head_dim)
    caches = noise(text + 1, 2, blocks, heads, block_size, head_dim)
    slots = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(text))[
        :tokens
    ]
    expected = caches.clone()
    for i, slot in enumerate(slots.tolist()):
        (
            expected[0, slot // block_size, :, slot % block_size],
            expected[1, slot // block_size, :, slot % block_size],
        ) = k[i], v[i]
    kv_store.store_kv(k, v, caches[0], caches[1], slots)
    assert torch.equal(caches, expected), "K or V lie elsewhere than in their slots"


ENTRIES = st.lists(
    st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=20
)
"""(decode?, tokens already cached, tokens of the query)"""


@holds(
    fast=60,
    text=TEXTS,
    block_size=st.sampled_from([1, 4, 16]),
    entries=ENTRIES,
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2)]),
)
def test_attention_is_its_definition(
    text: int, block_size: int, entries: list[tuple[bool, int, int]], heads: tuple[int, int]
) -> None:
    """Paged attention of decodes, prompts and chunks in one batch: causal softmax attention over
    each entry's own tokens.
    """
    (q_heads, kv_heads), head_dim = heads, 8
    decodes = [(past, 1) for decode, past, _ in entries if decode]
    shapes = decodes + [(past, length) for decode, past, length in entries if not decode]
    seq_lens = [past + length for past, length in shapes]
    query_lens = [length for _, length in shapes]
    needed = [-(-n // block_size) for n in seq_lens]
    generator = torch.Generator().manual_seed(text)
    pool = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    caches = torch.full((2, len(pool), kv_heads, block_size, head_dim), 1e3)  # what nobody may read
    tables = torch.zeros(len(shapes), max(needed), dtype=torch.int32)
    queries, fresh, expected = [], [], []
    for i, (past, length) in enumerate(shapes):
        table = [pool.pop() for _ in range(needed[i])]
        tables[i, : len(table)] = torch.tensor(table)
        k, v = torch.randn(2, past + length, kv_heads, head_dim, generator=generator)
        for position in range(past + length):
            block, offset = table[position // block_size], position % block_size
            caches[0, block, :, offset], caches[1, block, :, offset] = k[position], v[position]
        q = torch.randn(length, q_heads, head_dim, generator=generator)
        queries.append(q)
        fresh.append((k[past:], v[past:]))
        expected.append(dense_attention(q.double(), k.double(), v.double()))
    batch = ForwardBatch(
        torch.zeros(sum(query_lens), dtype=torch.int64),
        torch.zeros(sum(query_lens), dtype=torch.int64),
        torch.zeros(sum(query_lens), dtype=torch.int64),
        tables,
        torch.tensor(seq_lens, dtype=torch.int32),
        torch.tensor([0, *query_lens]).cumsum(0),
        len(decodes),
        query_lens,
        seq_lens,
    )
    backend: Any = attention.TorchAttention(kv_heads, block_size, head_dim, torch.float32)
    backend.prepare(batch)
    k, v = (torch.cat([kv[part] for kv in fresh]) for part in (0, 1))
    found = backend.attend(torch.cat(queries), k, v, caches[0], caches[1], batch)
    assert_close(found, torch.cat(expected), "attention")


@settings(max_examples=examples(30))
@given(
    text=TEXTS,
    decodes=around(attention.GROUP),
    prefills=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=3),
)
def test_attention_of_a_batch_is_that_of_its_entries(
    text: int, decodes: int, prefills: list[tuple[int, int]]
) -> None:
    """As many decodes as are gathered at a time, fewer and more: attention of each over its own tokens."""
    rng = random.Random(text)
    entries = [(True, rng.randrange(40), 1) for _ in range(decodes)]
    entries += [(False, past, length) for past, length in prefills]
    test_attention_is_its_definition.property.body(text, rng.choice([1, 4, 16]), entries, (4, 2))


# -- quantization ----------------------------------------------------------------------------------


@holds(
    fast=60,
    text=TEXTS,
    level=st.sampled_from(["int8", "int4", "fp8"]),
    outputs=st.integers(1, 6),
    inputs=st.sampled_from([4, 64, 128, 192, 256, 388]),
    experts=st.integers(0, 2),
    ranks=st.sampled_from([1, 2]),
    dtype=DTYPES,
)
def test_a_quantized_weight_is_its_definition(
    text: int,
    level: str,
    outputs: int,
    inputs: int,
    experts: int,
    ranks: int,
    dtype: torch.dtype,
) -> None:
    """int8, int4 and fp8, whole or shared by ranks: weights stand for the numbers of the gate's reference, and a product is that
    of these numbers.
    """
    shape = (experts, outputs, inputs) if experts else (outputs, inputs)
    # each output and each block of 32 inputs in another range, not around 0
    spread = noise(text + 1, *shape[:-1], 1).exp() * noise(text + 2, -(-inputs // 32)).exp()
    ranges = spread.repeat_interleave(32, dim=-1)[..., :inputs]
    weight = ((noise(text, *shape) + noise(text + 3, outputs, 1)) * ranges).to(dtype)
    x = noise(text + 4, 3, inputs, dtype=dtype) * noise(text + 5, 3, 1).exp().to(dtype)
    part = inputs // ranks

    def made(tp: Any) -> tuple[torch.Tensor, torch.Tensor]:
        own = slice(tp.rank * part, (tp.rank + 1) * part)
        stored = WEIGHTS[level](weight[..., own], tp)
        if not experts:
            return stored.dequantized(), stored.product(x[:, own])
        found = [
            (stored.dequantized(number), stored.product(x[:, own], expert=number))
            for number in range(experts)
        ]
        return torch.stack([w for w, _ in found]), torch.stack([y for _, y in found])

    parts, products = zip(*in_step(ranks, made), strict=True)
    exact = dequantized(weight, level, dtype)
    found = torch.cat(parts, dim=-1)
    assert torch.equal(found, exact.to(dtype)), f"{level} weights stand for other numbers"
    inputs_of = (rounded_activations(x.float()) if level == "fp8" else x).double()
    numbers = exact if level == "fp8" else found.double()
    expected = inputs_of @ numbers.mT
    scale = (inputs_of.abs() @ numbers.abs().mT).clamp(min=1e-30)  # of the terms
    total = torch.stack([y.double() for y in products]).sum(0)
    assert_close((total / scale).to(dtype), expected / scale, f"a product of {level} weights")


@holds(
    fast=40,
    text=TEXTS,
    block_size=st.sampled_from([1, 4, 16]),
    entries=ENTRIES,
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2)]),
)
def test_a_small_cache_is_its_definition(
    text: int, block_size: int, entries: list[tuple[bool, int, int]], heads: tuple[int, int]
) -> None:
    """A KV cache in e4m3: attention of decodes, prompts and chunks over keys and values as the gate's reference rounds them, each
    head with its scale, those of the step's own tokens too.
    """
    (q_heads, kv_heads), head_dim = heads, 8
    decodes = [(past, 1) for decode, past, _ in entries if decode]
    shapes = decodes + [(past, length) for decode, past, length in entries if not decode]
    seq_lens = [past + length for past, length in shapes]
    query_lens = [length for _, length in shapes]
    needed = [-(-n // block_size) for n in seq_lens]
    generator = torch.Generator().manual_seed(text)
    pool = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    small = SmallCacheAttention(
        Optimizations(kv_cache_dtype="fp8_e4m3"),
        Counter(),
        num_kv_heads=kv_heads,
        block_size=block_size,
        head_dim=head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    small.key_scales, small.value_scales = torch.rand(2, kv_heads, 1, generator=generator) + 0.5
    caches = torch.zeros(2, len(pool), kv_heads, block_size, head_dim).to(torch.float8_e4m3fn)
    tables = torch.zeros(len(shapes), max(needed), dtype=torch.int32)
    slots, fresh, queries, expected = [], [], [], []
    for i, (past, length) in enumerate(shapes):
        table = torch.tensor([pool.pop() for _ in range(needed[i])])
        tables[i, : len(table)] = table
        places = torch.arange(past + length)
        where = table[places // block_size] * block_size + places % block_size
        k, v = torch.randn(2, past + length, kv_heads, head_dim, generator=generator)
        v[:, :, 0] *= 400  # some of them lie beyond what e4m3 holds
        rounded = []
        for new, cache, scales in zip(
            (k, v), caches, (small.key_scales, small.value_scales), strict=True
        ):
            Stored(cache, scales).store(new[:past], where[:past])
            rounded.append(rounded_to_e4m3(new / scales).double() * scales.double())
        q = torch.randn(length, q_heads, head_dim, generator=generator)
        slots.append(where[past:])
        fresh.append((k[past:], v[past:]))
        queries.append(q)
        expected.append(dense_attention(q.double(), *rounded))
    batch = ForwardBatch(
        torch.zeros(sum(query_lens), dtype=torch.int64),
        torch.zeros(sum(query_lens), dtype=torch.int64),
        torch.cat(slots),
        tables,
        torch.tensor(seq_lens, dtype=torch.int32),
        torch.tensor([0, *query_lens]).cumsum(0),
        len(decodes),
        query_lens,
        seq_lens,
    )
    k, v = (torch.cat([kv[part] for kv in fresh]) for part in (0, 1))

    def qkv_proj(*_: Any) -> tuple[torch.Tensor, ...]:
        return torch.cat(queries), k, v

    small.prepare(batch)
    nothing = torch.zeros(sum(query_lens), 1)
    cache: Any = caches[0], caches[1]
    found = small(qkv_proj, (None, None, 0.0), nothing, nothing, cache, batch)  # type: ignore[arg-type]
    sizes = torch.tensor([600.0] + [4.0] * (head_dim - 1))  # of the values that are averaged
    assert_close(
        found.view(-1, head_dim) / sizes,
        torch.cat(expected).flatten(0, 1) / sizes,
        "attention over a small cache",
    )


class _Step(TensorParallel):
    """A rank in a thread, whose all_gather waits for the others."""

    def __init__(self, rank: int, size: int, parts: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.parts, self.barrier = rank, size, parts, barrier

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.parts[self.rank] = x
        self.barrier.wait()
        found = torch.cat(self.parts, dim=-1)
        self.barrier.wait()
        return found


def in_step(ranks: int, work: Callable[[TensorParallel], Any]) -> list[Any]:
    """`work` of each rank, in threads."""
    parts: list[Any] = [None] * ranks
    barrier = threading.Barrier(ranks, timeout=20)
    with ThreadPoolExecutor(ranks) as threads:
        members = [_Step(rank, ranks, parts, barrier) for rank in range(ranks)]
        return list(threads.map(work, members))


# -- batches of sizes around the numbers of rows that are computed at a time -----------------------

NOISE_ROWS = 16
"""Rows of noise that a CPU computes at a time."""


@settings(max_examples=examples(40))
@given(
    seed=SEEDS,
    rows=around(NOISE_ROWS),
    vocab_size=st.sampled_from([1, 3, 4, 5, 8, 31, 32, 33, 100]),
    first=st.sampled_from([0, 0, 4, 8, 400]),
)
def test_noise_of_a_batch_is_that_of_its_rows(
    seed: int, rows: int, vocab_size: int, first: int
) -> None:
    """And that of a part of the vocabulary is a part of the whole."""
    seeds, positions = seed // 2 + torch.arange(rows), 5 * torch.arange(rows)
    together = sampling.gumbel_noise(seeds, positions, vocab_size, first)
    assert together.shape == (rows, vocab_size)
    for i in range(rows):
        whole = sampling.gumbel_noise(seeds[i : i + 1], positions[i : i + 1], first + vocab_size)
        assert torch.equal(together[i], whole[0, first:]), (
            f"row {i} of {rows} has other noise alone"
        )


@settings(max_examples=examples(30))
@given(
    text=TEXTS,
    rows=around(filtering.ROWS),
    vocab_size=st.sampled_from([1, 2, 7, 40]),
    top_k=st.sampled_from([-1, 0, 1, 3, 100]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
)
def test_filters_of_a_batch_are_those_of_its_rows(
    text: int, rows: int, vocab_size: int, top_k: int, top_p: float
) -> None:
    logits = noise(text, rows, vocab_size) * 3
    temperatures = 0.25 * (torch.arange(rows) % 4)
    top_ks, top_ps = torch.full((rows,), top_k), torch.full((rows,), top_p)
    top_ks[::3], top_ps[1::3] = 2, 0.5
    together = filtering.filtered_logits(logits, temperatures, top_ks, top_ps)
    assert together.shape == logits.shape
    for i in range(rows):
        own = (column[i : i + 1] for column in (logits, temperatures, top_ks, top_ps))
        assert torch.equal(filtering.filtered_logits(*own)[0], together[i]), (
            f"row {i} of {rows} is filtered differently alone"
        )


@settings(max_examples=examples(30))
@given(
    text=TEXTS,
    rows=around(NOISE_ROWS),
    part=st.sampled_from([4, 8, 36]),
    parts=st.integers(1, 3),
    tied=st.booleans(),
)
def test_the_best_of_all_parts_is_the_best_of_the_whole(
    text: int, rows: int, part: int, parts: int, tied: bool
) -> None:
    """Each rank looks at a part of the vocabulary. tied: many greedy rows have equal logits."""
    logits = noise(text, rows, part * parts)
    logits = logits.round() if tied else logits
    temperatures = 0.5 * (torch.arange(rows) % 3)
    seeds, positions = text + torch.arange(rows), torch.arange(rows)
    columns = temperatures, seeds, positions
    for all_greedy in (False, True):
        if all_greedy:
            columns = torch.zeros(rows), seeds, positions
        best = [
            sampling_shards.best_of_shard(
                logits[:, first : first + part], *columns, first, all_greedy=all_greedy
            )
            for first in range(0, part * parts, part)
        ]
        found = sampling_shards.best_of_shards(torch.stack(best))
        none, all_mass = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
        expected = sampling.sample(
            logits,
            columns[0],
            none,
            all_mass,
            seeds,
            positions,
            all_greedy=all_greedy,
            any_top_k_top_p=False,
        )
        assert torch.equal(found, expected), f"{parts} parts of {part} tokens choose another token"


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q: [length, q_heads, head_dim], the last of k, v: [tokens, kv_heads, head_dim]. Query head h
    reads KV head h // group.
    """
    past, group = len(k) - len(q), q.shape[1] // k.shape[1]
    result = torch.empty_like(q)
    for i in range(len(q)):
        for h in range(q.shape[1]):
            keys, values = k[: past + i + 1, h // group], v[: past + i + 1, h // group]
            result[i, h] = (keys @ q[i, h] * q.shape[2] ** -0.5).softmax(0) @ values
    return result
