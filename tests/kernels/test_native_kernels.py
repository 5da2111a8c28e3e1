"""The C++ kernels for CPUs: each equals its torch twin, and a row's bits depend on nothing but the row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm import LLM, Optimizations, SamplingParams, cxx

if problem := cxx.why_not():
    pytest.skip(problem, allow_module_level=True)

from nanovllm.kernels import native
from nanovllm.kernels import torch as twins
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.native.attention import NativeAttention
from nanovllm.kernels.native.library import library
from nanovllm.kernels.native.packing import pack
from nanovllm.kernels.torch import sampling
from nanovllm.kernels.torch.attention import TorchAttention
from property_tests.support.strategies import around

DTYPES = [torch.float32, torch.bfloat16]
VECTORS = Path(__file__).parents[1] / "support" / "data" / "gumbel_vectors.json"


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(a: Tensor, b: Tensor) -> None:
    """Within rounding: relative to each value, and to the largest where a sum cancels."""
    rtol = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}[a.dtype]
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.float().abs().max()))


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# -- twins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 97), (5, 1024), (2, 3, 40), (200, 256), (4, 3)])
def test_norms(dtype: torch.dtype, shape: tuple[int, ...], threads: int) -> None:
    x, residual = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    weight = draw(shape[-1], dtype=dtype, seed=2)
    before = x.clone(), residual.clone()
    close(native.rms_norm(x, weight, 1e-6), twins.rms_norm(x, weight, 1e-6))
    ours, total = native.add_rms_norm(x, residual, weight, 1e-3)
    expected, expected_total = twins.add_rms_norm(x, residual, weight, 1e-3)
    close(ours, expected)
    assert torch.equal(total, expected_total)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 96, 1500])
def test_silu_and_mul(dtype: torch.dtype, n: int, threads: int) -> None:
    gate_up = draw(33, 2 * n, dtype=dtype) * 20
    close(native.silu_and_mul(gate_up), twins.silu_and_mul(gate_up))
    assert torch.equal(native.silu_and_mul(gate_up[:1])[0], native.silu_and_mul(gate_up)[0])


def test_silu_of_what_is_too_large_for_an_exponential() -> None:
    gate_up = torch.tensor([[-1e4, 1e4, -100.0, 100.0, 0.0] + [1.0] * 5])
    torch.testing.assert_close(
        native.silu_and_mul(gate_up), twins.silu_and_mul(gate_up), rtol=1e-6, atol=1e-30
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 13, 50])
@pytest.mark.parametrize(("n", "k"), [(16, 8), (64, 256), (100, 33), (5, 1), (272, 500)])
def test_linear(dtype: torch.dtype, rows: int, n: int, k: int, threads: int) -> None:
    x, weight = draw(rows, k, dtype=dtype), draw(n, k, dtype=dtype, seed=1)
    bias = draw(n, dtype=dtype, seed=2)
    packed = pack(weight)
    for b in (None, bias):
        exact = x.double() @ weight.double().T + (0 if b is None else b.double())
        close(native.linear(x, packed, b), exact.to(dtype))
    assert torch.equal(native.linear(x, weight), twins.linear(x, weight))


def test_many_rows_are_taken_in_blocks() -> None:
    x, weight = draw(1000, 300), draw(40, 300, seed=1)
    close(native.linear(x, pack(weight)), (x.double() @ weight.double().T).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 20])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (40, 24), (768, 256), (3, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_silu_and_mul(
    dtype: torch.dtype, rows: int, n: int, k: int, with_bias: bool, threads: int
) -> None:
    x, weight = draw(rows, k, dtype=dtype), draw(2 * n, k, dtype=dtype, seed=1)
    bias = draw(2 * n, dtype=dtype, seed=2) if with_bias else None
    expected = twins.linear_silu_and_mul(x, weight, bias)
    close(native.linear_silu_and_mul(x, pack(weight, 2), bias), expected)
    close(native.linear_silu_and_mul(x, weight, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"), [(4, 2, 64), (2, 1, 8), (3, 3, 128), (6, 2, 20)]
)
@pytest.mark.parametrize("normed", [True, False])
def test_qkv(
    dtype: torch.dtype, q_heads: int, kv_heads: int, head_dim: int, normed: bool, threads: int
) -> None:
    rows, k, block_size = 9, 48, 4
    heads = q_heads + 2 * kv_heads
    x, weight = draw(rows, k, dtype=dtype), draw(heads * head_dim, k, dtype=dtype, seed=1)
    bias = draw(heads * head_dim, dtype=dtype, seed=2)
    norms = [draw(head_dim, dtype=dtype, seed=seed) for seed in (3, 4)]
    cos_sin = draw(rows, head_dim, seed=5)
    slots = torch.randperm(5 * block_size)[:rows]

    def run(function: Any, weight: Any, *norms: Any) -> tuple[Tensor, ...]:
        caches = torch.zeros(2, 5, kv_heads, block_size, head_dim, dtype=dtype)
        return *function(x, weight, bias, *norms, 1e-6, cos_sin, *caches, slots), *caches

    if not normed:
        norms = [None, None]  # type: ignore[list-item]
    expected = run(twins.linear_qk_norm_rope_store_kv, weight, *norms)
    for form in (weight, pack(weight, heads)):
        found = run(native.linear_qk_norm_rope_store_kv, form, *norms)
        for ours, twin in zip(found, expected, strict=True):
            close(ours, twin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_packed_rows_are_looked_up(dtype: torch.dtype, groups: int) -> None:
    weight = draw(70, 12, dtype=dtype)
    numbers = torch.tensor([0, 69, 3, 3, 41, 17])
    packed = pack(weight, groups)
    assert (packed.outputs, packed.k) == (70, 12)
    assert torch.equal(packed.rows(numbers), weight[numbers])


# -- attention -------------------------------------------------------------------------------------


def a_batch(
    shapes: list[tuple[int, int]], num_decodes: int, heads: tuple[int, int], head_dim: int,
    block_size: int, dtype: torch.dtype,
) -> tuple[ForwardBatch, tuple[Tensor, ...]]:  # fmt: skip
    """shapes: (tokens in the cache before, query tokens) of each entry. Slots that nobody may read hold NaN."""
    q_heads, kv_heads = heads
    query_lens = [length for _, length in shapes]
    seq_lens = [past + length for past, length in shapes]
    needed = [-(-n // block_size) for n in seq_lens]
    pool = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    caches = torch.full((2, len(pool), kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    tables = torch.zeros(len(shapes), max(needed), dtype=torch.int32)
    fresh = []
    for i, (past, _) in enumerate(shapes):
        table = [pool.pop() for _ in range(needed[i])]
        tables[i, : len(table)] = torch.tensor(table)
        kv = draw(2, seq_lens[i], kv_heads, head_dim, dtype=dtype, seed=i)
        for position in range(seq_lens[i]):
            block, offset = table[position // block_size], position % block_size
            caches[:, block, :, offset] = kv[:, position]
        fresh.append(kv[:, past:])
    empty = torch.zeros(0, dtype=torch.int64)
    batch = ForwardBatch(
        empty, empty, empty, tables, torch.tensor(seq_lens, dtype=torch.int32),
        torch.tensor([0, *query_lens]).cumsum(0), num_decodes, query_lens, seq_lens,
    )  # fmt: skip
    q = draw(sum(query_lens), q_heads, head_dim, dtype=dtype, seed=99) * 2
    k, v = torch.cat(fresh, dim=1)
    return batch, (q, k, v, caches[0], caches[1])


def attend(backend: type, batch: ForwardBatch, tensors: tuple[Tensor, ...]) -> Tensor:
    kv_heads, block_size, head_dim = tensors[3].shape[1:]
    attention = backend(kv_heads, block_size, head_dim, tensors[0].dtype)
    attention.prepare(batch)
    return attention.attend(*tensors, batch)  # type: ignore[no-any-return]


SHAPES = [(0, 1), (15, 1), (16, 1), (300, 1), (513, 1), (0, 5), (0, 40), (30, 7), (250, 20)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (7, 1), (20, 1)])
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (8, 1), (20, 3), (128, 256)])
def test_attention(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int, block_size: int, threads: int
) -> None:
    batch, tensors = a_batch(SHAPES, 5, heads, head_dim, block_size, dtype)
    found = attend(NativeAttention, batch, tensors)
    clean = (*tensors[:3], *(cache.nan_to_num(0.0) for cache in tensors[3:]))
    exact = attend(TorchAttention, batch, tuple(t.float() for t in clean))
    close(found, exact.to(dtype))


# -- a row alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_row_depend_on_the_row_alone(dtype: torch.dtype, threads: int) -> None:
    x, norm = draw(29, 200, dtype=dtype), draw(200, dtype=dtype, seed=1)
    weight, double = pack(draw(90, 200, dtype=dtype, seed=2)), pack(draw(180, 200, dtype=dtype), 2)
    for operation in (
        lambda rows: native.rms_norm(rows, norm, 1e-6),
        lambda rows: native.linear(rows, weight),
        lambda rows: native.linear_silu_and_mul(rows, double),
    ):
        together = operation(x)
        for first, last in ((0, 1), (1, 3), (3, 10), (10, 29)):
            assert torch.equal(operation(x[first:last]), together[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_token_is_the_same_in_every_batch(dtype: torch.dtype, threads: int) -> None:
    """A prompt at once, in chunks, or token by token, alone or among others: the same bits."""
    past, length = 0, 300
    batch, tensors = a_batch([(past, length), (7, 30)], 0, (4, 2), 64, 16, dtype)
    whole = attend(NativeAttention, batch, tensors)[:length]
    for first, last in ((0, 37), (37, 256), (256, 299), (299, 300)):
        part, _ = a_batch([(first, last - first)], 0, (4, 2), 64, 16, dtype)
        part.block_tables = batch.block_tables[:1]
        own = (tensors[0][first:last], *tensors[1:])
        assert torch.equal(attend(NativeAttention, part, own), whole[first:last])


BATCHES = settings(max_examples=25, deadline=None, derandomize=True, database=None)
THREADS = st.sampled_from([1, 2])


@contextmanager
def running_on(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@BATCHES
@given(
    dtype=st.sampled_from(DTYPES),
    rows=around(6, 12),  # of a tile, with AVX2 and with AVX-512
    n=around(16, 64),  # outputs of a panel, and of those that a row computes at once
    k=st.sampled_from([1, 33, 200, 4096]),  # of 4096, twelve rows are a block
    threads=THREADS,
)
def test_products_of_a_batch_are_those_of_its_rows(
    dtype: torch.dtype, rows: int, n: int, k: int, threads: int
) -> None:
    x, norm = draw(rows, k, dtype=dtype), draw(k, dtype=dtype, seed=1)
    weight = draw(2 * n, k, dtype=dtype, seed=2)
    one, two = pack(weight), pack(weight, 2)
    exact = x.double() @ weight.double().T
    with running_on(threads):
        products = native.linear(x, one)
        close(products, exact.to(dtype))
        close(
            native.linear_silu_and_mul(x, two),
            twins.silu_and_mul(exact.to(dtype)),
        )
        for operation in (
            lambda given: native.linear(given, one),
            lambda given: native.linear_silu_and_mul(given, two),
            lambda given: native.silu_and_mul(native.linear(given, one)),
            lambda given: native.rms_norm(given, norm, 1e-6),
        ):
            together = operation(x)
            for i in range(rows):
                assert torch.equal(operation(x[i : i + 1])[0], together[i]), (
                    f"row {i} of {rows} differs alone"
                )


@BATCHES
@given(
    rows=st.sampled_from([1, 2, 5]),
    vocab_size=around(32, 8192),  # tokens that are looked at together, and that a thread takes
    top_k=st.sampled_from([0, 3]),
    spread=st.sampled_from([0.0, 0.1, 5.0]),
    threads=THREADS,
)
def test_samples_of_a_batch_are_those_of_its_rows(
    rows: int, vocab_size: int, top_k: int, spread: float, threads: int
) -> None:
    logits = draw(rows, vocab_size) * spread
    given = (
        logits,
        torch.tensor([0.7, 0.0, 1.3, 0.01, 1.0])[:rows],
        torch.full((rows,), top_k),
        torch.ones(rows),
        torch.arange(rows) * 2**33 + 7,
        torch.arange(rows) + vocab_size,
    )
    flags = {"all_greedy": False, "any_top_k_top_p": top_k > 0}
    with running_on(threads):
        together = native.sample(*given, **flags)
        alone = [
            native.sample(*(column[i : i + 1] for column in given), **flags) for i in range(rows)
        ]
    assert torch.equal(together, twins.sample(*given, **flags))
    assert torch.equal(together, torch.cat(alone))


@BATCHES
@given(
    dtype=st.sampled_from(DTYPES),
    cached=st.lists(around(256), min_size=1, max_size=4),  # keys of a chunk
    prompts=st.lists(around(8, 16), max_size=3),  # query tokens of an item: 16 rows of 1 or 2 heads
    heads=st.sampled_from([(4, 2), (3, 3)]),
    threads=THREADS,
)
def test_attention_of_a_batch_is_that_of_its_entries(
    dtype: torch.dtype, cached: list[int], prompts: list[int], heads: tuple[int, int], threads: int
) -> None:
    shapes = [(past - 1, 1) for past in cached]
    shapes += [(past % 7, length) for past, length in zip(cached, prompts, strict=False)]
    batch, tensors = a_batch(shapes, len(cached), heads, 24, 16, dtype)
    clean = (*tensors[:3], *(cache.nan_to_num(0.0) for cache in tensors[3:]))
    starts = batch.query_start_loc.tolist()
    with running_on(threads):
        together = attend(NativeAttention, batch, tensors)
        close(together, attend(TorchAttention, batch, tuple(t.float() for t in clean)).to(dtype))
        for i, (past, length) in enumerate(shapes):
            first, last = starts[i], starts[i + 1]
            alone, _ = a_batch([(past, length)], int(i < len(cached)), heads, 24, 16, dtype)
            alone.block_tables = batch.block_tables[i : i + 1]
            own = (*(t[first:last] for t in tensors[:3]), *tensors[3:])
            assert torch.equal(attend(NativeAttention, alone, own), together[first:last])


def test_no_rows() -> None:
    """A step of unfinished prompts samples nothing."""
    x = draw(0, 32)
    assert native.rms_norm(x, draw(32), 1e-6).shape == (0, 32)
    assert native.linear(x, pack(draw(48, 32))).shape == (0, 48)
    assert native.linear_silu_and_mul(x, pack(draw(48, 32), 2)).shape == (0, 24)
    none = torch.zeros(0, dtype=torch.int64)
    flags = {"all_greedy": False, "any_top_k_top_p": False}
    sampled = native.sample(draw(0, 50), draw(0), none, draw(0), none, none, **flags)
    assert sampled.shape == (0,)


# -- sampling --------------------------------------------------------------------------------------


def native_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    noise = torch.full((len(seeds), vocab_size), torch.nan)
    library().gumbel_noise(
        noise.data_ptr(), seeds.data_ptr(), positions.data_ptr(), len(seeds), vocab_size
    )
    return noise


def test_noise_has_the_bits_of_the_vectors() -> None:
    vectors = json.loads(VECTORS.read_text())
    for case in vectors["cases"]:
        seed, position = (torch.tensor([case[name]]) for name in ("seed", "position"))
        noise = native_noise(seed, position, case["vocab_size"])
        shown = noise[0, torch.tensor(vectors["token_ids"][str(case["vocab_size"])])]
        bits = [f"{int(b) & 0xFFFFFFFF:08x}" for b in shown.view(torch.int32)]
        assert bits == case["noise"], case


def test_noise_has_the_bits_of_its_twin() -> None:
    seeds = torch.tensor([0, -1, 3, 2**40 + 5, 2**62, -(2**63)])
    positions = torch.tensor([0, 17, 2**31, 2**32 - 1, 5, 5])
    noise = native_noise(seeds, positions, 70_001)
    assert torch.equal(noise, sampling.gumbel_noise(seeds, positions, 70_001))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 3, 31, 2048, 20_011])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 50.0])
def test_sampled_tokens_are_those_of_the_twin(
    dtype: torch.dtype, vocab_size: int, filtered: bool, spread: float, threads: int
) -> None:
    rows = 40
    logits = (draw(rows, vocab_size) * spread).to(dtype)
    temperatures = torch.tensor([0.0, 0.6, 1.0, 1.7, 0.01] * (rows // 5))
    top_ks = torch.tensor([0, 5, -1, 17] * (rows // 4))
    top_ps = torch.tensor([1.0, 0.7] * (rows // 2))
    seeds, positions = torch.arange(rows) * 2**33 + 7, torch.arange(rows)
    given = (logits, temperatures, top_ks, top_ps, seeds, positions)
    for flags in (
        {"all_greedy": False, "any_top_k_top_p": filtered},
        {"all_greedy": True, "any_top_k_top_p": filtered},
    ):
        if flags["all_greedy"]:
            given = (logits, torch.zeros(rows), *given[2:])
        assert torch.equal(native.sample(*given, **flags), twins.sample(*given, **flags))


def test_what_is_not_a_number_or_infinite_is_sampled_as_by_the_twin() -> None:
    nan, inf = float("nan"), float("inf")
    logits = draw(6, 20_000)
    logits[0, 9000:9003] = nan
    logits[1, [5, 15_000]] = inf
    logits[2] = -inf
    logits[3, :19_000] = -inf
    logits[4, [3, 19_999]] = torch.tensor([inf, nan])
    temperatures = torch.full((6,), 0.7)
    for temperature in (temperatures, torch.zeros(6)):
        given = (
            logits,
            temperature,
            torch.zeros(6, dtype=torch.int64),
            torch.ones(6),
            torch.arange(6),
            torch.arange(6),
        )
        flags = {"all_greedy": False, "any_top_k_top_p": False}
        assert torch.equal(native.sample(*given, **flags), twins.sample(*given, **flags))


# -- an engine -------------------------------------------------------------------------------------

NATIVE = {"kernels": "native", "attention_backend": "native"}
PROMPTS = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (4, 17, 40, 1, 70)]
PARAMS = [
    SamplingParams(temperature=t, top_k=k, max_tokens=24, ignore_eos=True)
    for t, k in ((0.0, 0), (0.7, 0), (1.0, 20), (0.6, 0), (0.0, 0))
]


def tokens_of(tiny: Path, optimizations: dict[str, Any], **arguments: Any) -> tuple[Any, Any]:
    arguments = {"max_model_len": 256, "max_num_seqs": 4, **arguments}
    with LLM(str(tiny), device="cpu", optimizations=optimizations, **arguments) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        return [o.outputs[0].token_ids for o in outputs], llm.toggles()


def test_an_engine_gives_the_tokens_of_its_baseline_and_proves_that_it_ran(tiny: Path) -> None:
    expected, off = tokens_of(tiny, {})
    for levels in (
        {"kernels": "native"},
        {"attention_backend": "native"},
        NATIVE,
        {**NATIVE, "batching": "chunked", "prefix_cache": True, "overlap": True},
    ):
        tokens, toggles = tokens_of(tiny, levels)
        assert tokens == expected
        for name in levels:
            if name not in ("prefix_cache", "batching"):
                assert off[name]["engaged"] == 0 < toggles[name]["engaged"], name


def test_tokens_in_bfloat16_do_not_depend_on_batching(tiny: Path) -> None:
    """Steps of other sizes and cut prompts change no bit, so in bfloat16, where the baseline's tokens may change with
    their neighbours, these do not.
    """
    found = [
        tokens_of(tiny, {**NATIVE, "batching": batching, "overlap": overlap}, dtype="bfloat16",
                  max_num_seqs=seqs, max_num_batched_tokens=budget)[0]
        for batching, overlap, seqs, budget in (
            ("static", False, 1, 512), ("continuous", False, 5, 64), ("chunked", True, 3, 16)
        )
    ]  # fmt: skip
    assert found[0] == found[1] == found[2]


def test_weights_are_packed_once_and_not_kept_twice(tiny: Path) -> None:
    def weights(llm: LLM) -> int:
        model = llm.runner.model
        tensors = {id(p): p for p in model.parameters()}
        for module in model.modules():
            if hasattr(weight := getattr(module, "weight", None), "data") and not isinstance(
                weight, Tensor
            ):
                tensors[id(weight)] = weight.data
        return sum(t.numel() * t.element_size() for t in tensors.values())

    sizes = []
    for level in ("torch", "native"):
        with LLM(
            str(tiny), device="cpu", optimizations={"kernels": level}, max_model_len=64
        ) as llm:
            sizes.append(weights(llm))
    assert sizes[0] == sizes[1]


@pytest.mark.usefixtures("forked_processes")
def test_a_rank_packs_its_shard(tiny: Path) -> None:
    expected, _ = tokens_of(tiny, {})
    found, toggles = tokens_of(tiny, {**NATIVE, "tensor_parallel_size": 2})
    assert found == expected
    assert toggles["kernels"]["engaged"] > 0


def test_a_gpu_is_told_that_they_are_for_cpus() -> None:
    for name in NATIVE:
        with pytest.raises(
            ValueError, match=f"{name}='native' cannot run on device 'cuda': .*CPUs"
        ):
            Optimizations(**{name: "native"}).resolve("cuda")


def test_another_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match=r"float32 and bfloat16, not torch\.float16"):
        native.rms_norm(draw(2, 8).half(), draw(8).half(), 1e-6)


def test_calls_are_counted() -> None:
    from nanovllm.kernels.registry import load_kernels

    calls: Counter[str] = Counter()
    kernels = load_kernels(Optimizations(kernels="native"), calls)
    kernels.rms_norm(draw(2, 8), draw(8), 1e-6)
    assert calls == {"native": 1}
