"""attention_backend=flash_attn without its library: stand-ins with the signatures of the two
packages that carry it, computing by hand what those document, and refusing what those refuse. The
real library runs on a GPU host only (the last tests).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.config import Optimizations
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.flash_attn import MAX_SPLITS, FlashAttention, find_library
from nanovllm.kernels.torch.attention import TorchAttention

KV_HEADS, GROUP, HEAD_DIM = 2, 2, 32
ON_GPU = torch.cuda.is_available()


def attention_case(
    query_lens: list[int],
    seq_lens: list[int],
    num_decodes: int,
    page: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[list[Tensor], ForwardBatch]:
    """q, k, v, caches with pages in random order, and the batch. What lies past the end of a
    sequence is large.
    """
    generator = torch.Generator().manual_seed(0)
    entries, width = len(query_lens), -(-max(seq_lens) // page)
    tables = torch.randperm(entries * width, generator=generator).view(entries, width).int()
    caches = [
        torch.randn(entries * width, KV_HEADS, page, HEAD_DIM, generator=generator)
        for _ in range(2)
    ]
    for entry, seq_len in enumerate(seq_lens):
        for token in range(seq_len, width * page):
            for cache in caches:
                cache[tables[entry, token // page], :, token % page] = 100.0
    places = [
        (int(tables[e, p // page]), p % page)
        for e in range(entries)
        for p in range(seq_lens[e] - query_lens[e], seq_lens[e])
    ]
    k, v = (torch.stack([cache[block, :, offset] for block, offset in places]) for cache in caches)
    q = torch.randn(len(places), KV_HEADS * GROUP, HEAD_DIM, generator=generator)
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    nothing = torch.empty(0)
    batch = ForwardBatch(
        nothing,
        nothing,
        nothing,
        tables.to(device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        starts.to(device),
        num_decodes,
        query_lens,
        seq_lens,
    )
    return [tensor.to(device, dtype) for tensor in (q, k, v, *caches)], batch


# -- the stand-ins ---------------------------------------------------------------------------------


def check_pages(k: Tensor, v: Tensor, block_table: Tensor, multiple: int) -> None:
    """What both libraries check of a paged cache, and that nobody copied it on the way."""
    for cache in (k, v):
        assert cache.stride(-1) == 1, "Input tensor must have contiguous last dimension"
        assert cache.shape[2:] == (KV_HEADS, HEAD_DIM)
        assert cache.shape[1] % multiple == 0, (
            f"Paged KV cache block size must be divisible by {multiple}"
        )
        assert cache.stride(2) == cache.shape[1] * HEAD_DIM, (
            "this is a copy, not the head-major cache"
        )
    assert block_table.dtype == torch.int32
    assert block_table.stride(-1) == 1


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], block_table: Tensor, scale: float
) -> Tensor:
    """One entry: causal, aligned to the end of its KV. q: [tokens, heads, head_dim]; zeros where
    there is no KV.
    """
    length = lengths[0]
    if length == 0:
        return torch.zeros_like(q)
    pages = block_table[: -(-length // k.shape[1])].long()
    keys, values = (
        c[pages].flatten(0, 1)[:length].repeat_interleave(GROUP, 1).float() for c in (k, v)
    )
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    scores.masked_fill_(
        torch.ones(scores.shape[1:], dtype=torch.bool).triu(length - q.shape[0] + 1), -torch.inf
    )
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    longest: tuple[int, int],
    table: Tensor,
    scale: float,
) -> Tensor:
    assert q.dtype in (torch.bfloat16, torch.float16), (
        "FlashAttention only support fp16 and bf16 data type"
    )
    assert starts.dtype == torch.int32
    assert starts.shape == (len(table) + 1,)
    assert starts.is_contiguous()
    begins = starts.tolist()
    assert begins[0] == 0
    assert begins[-1] == len(q)
    assert max(b - a for a, b in itertools.pairwise(begins)) <= longest[0]
    assert max(lengths.tolist()) <= longest[1]
    parts = [
        by_hand(q[begins[i] : begins[i + 1]], k, v, lengths[i : i + 1].tolist(), table[i], scale)
        for i in range(len(table))
    ]
    return torch.cat(parts)


def pypi_package() -> dict[str, ModuleType]:
    """`flash_attn` 2.8: arguments by position in its order, lengths of KV as cumulative sums."""
    package: Any = ModuleType("flash_attn")
    package.__version__ = "2.8.3"

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        check_pages(k, v, block_table, 256)
        assert causal
        assert cu_seqlens_k.dtype == torch.int32
        return varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k.diff(),
            (max_seqlen_q, max_seqlen_k),
            block_table,
            softmax_scale,
        )

    def flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        block_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        rotary_interleaved=True,
        alibi_slopes=None,
        num_splits=0,
        return_softmax_lse=False,
    ):
        check_pages(k_cache, v_cache, block_table, 256)
        assert q.shape[1] == 1
        assert cache_seqlens.dtype == torch.int32
        starts = torch.arange(len(q) + 1, dtype=torch.int32)
        longest = (1, block_table.shape[1] * k_cache.shape[1])
        return varlen(
            q[:, 0], k_cache, v_cache, starts, cache_seqlens, longest, block_table, softmax_scale
        )[:, None]

    package.flash_attn_varlen_func, package.flash_attn_with_kvcache = (
        flash_attn_varlen_func,
        flash_attn_with_kvcache,
    )
    return {"flash_attn": package}


def bundled_package(generations: tuple[int, ...] = (2, 3)) -> dict[str, ModuleType]:
    """`vllm.vllm_flash_attn` of vLLM 0.24: other order, lengths of KV as they are, the generation
    chosen by the caller.
    """
    vllm: Any = ModuleType("vllm")
    package: Any = ModuleType("vllm.vllm_flash_attn")
    vllm.__version__, vllm.__path__, vllm.vllm_flash_attn = "0.24.0", [], package
    package.is_fa_version_supported = generations.__contains__
    package.fa_version_unsupported_reason = lambda _: (
        "FA2 is only supported on devices with compute capability >= 8"
    )
    package.metadata_made = []

    def get_scheduler_metadata(
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        num_heads_q,
        num_heads_kv,
        headdim,
        cache_seqlens,
        qkv_dtype=torch.bfloat16,
        headdim_v=None,
        cu_seqlens_q=None,
        cu_seqlens_k_new=None,
        cache_leftpad=None,
        page_size=None,
        max_seqlen_k_new=0,
        causal=False,
        window_size=(-1, -1),
        has_softcap=False,
        num_splits=0,
        pack_gqa=None,
        sm_margin=0,
    ):
        assert 3 in generations
        assert (num_heads_q, num_heads_kv, headdim, causal, max_seqlen_q) == (
            KV_HEADS * GROUP,
            KV_HEADS,
            HEAD_DIM,
            True,
            1,
        )
        assert len(cache_seqlens) == batch_size
        assert len(cu_seqlens_q) == batch_size + 1
        package.metadata_made.append((batch_size, max_seqlen_k, page_size, num_splits))
        return package.metadata_made[-1]

    def flash_attn_varlen_func(
        q,
        k,
        v,
        max_seqlen_q,
        cu_seqlens_q,
        max_seqlen_k,
        cu_seqlens_k=None,
        seqused_k=None,
        q_v=None,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=None,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
        return_softmax_lse=False,
        out=None,
        scheduler_metadata=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        num_splits=0,
        output_scale=None,
        fa_version=2,
    ):
        check_pages(k, v, block_table, 16)
        assert causal
        assert cu_seqlens_k is None, (
            "cu_seqlens_k and seqused_k cannot be provided at the same time"
        )
        assert seqused_k.dtype == torch.int32
        assert fa_version in generations
        if fa_version == 2:
            assert scheduler_metadata is None
            assert num_splits <= 1, "FA2 does not support num_splits > 1"
        if scheduler_metadata is not None:  # made for the very launch that uses it
            assert scheduler_metadata == (len(block_table), max_seqlen_k, k.shape[1], num_splits)
        return varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            seqused_k,
            (max_seqlen_q, max_seqlen_k),
            block_table,
            softmax_scale,
        )

    package.get_scheduler_metadata, package.flash_attn_varlen_func = (
        get_scheduler_metadata,
        flash_attn_varlen_func,
    )
    return {"vllm": vllm, "vllm.vllm_flash_attn": package}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes exactly these packages importable."""

    def only(**packages: Any) -> None:
        # None: an import fails
        found: dict[str, Any] = dict.fromkeys(("flash_attn", "vllm", "vllm.vllm_flash_attn"))
        for modules in packages.values():
            found |= modules
        for name, module in found.items():
            monkeypatch.setitem(sys.modules, name, module)

    return only


# -- on any machine --------------------------------------------------------------------------------

CASES = [
    ([1], [1], 1),
    ([1, 1, 1], [5, 700, 256], 3),
    ([7], [7], 0),
    ([70, 33], [70, 300], 0),  # a cached prefix
    ([1, 1, 7, 70, 3], [1, 530, 7, 90, 515], 2),  # decodes and prefills in one step
    ([1, 1], [33, 17], 1),  # a prefill of one token
]


def packages_of(name: str) -> dict[str, ModuleType]:
    return {
        "pypi": pypi_package,
        "bundled-3": bundled_package,
        "bundled-2": lambda: bundled_package((2,)),
    }[name]()


@pytest.mark.parametrize("name", ["pypi", "bundled-3", "bundled-2"])
@pytest.mark.parametrize(("query_lens", "seq_lens", "num_decodes"), CASES)
def test_calls_mean_what_the_twin_computes(
    install: Any, name: str, query_lens: list[int], seq_lens: list[int], num_decodes: int
) -> None:
    install(any=packages_of(name))
    tensors, batch = attention_case(query_lens, seq_lens, num_decodes, 256)
    outputs = []
    for backend in (TorchAttention, FlashAttention):
        attention = backend(KV_HEADS, 256, HEAD_DIM, torch.bfloat16)
        attention.prepare(batch)
        outputs += [attention.attend(*tensors, batch) for _ in range(2)]  # two layers
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1.6e-2, atol=1.6e-2)
    assert torch.equal(outputs[2], outputs[3])


def test_a_recorded_decode_depends_on_no_length_of_the_host(install: Any) -> None:
    """As cuda_graph.py records it: every host length is max_model_len, and entries of length 0 pad
    the batch.
    """
    packages = bundled_package()
    install(any=packages)
    tensors, batch = attention_case([1] * 3, [40, 300, 9], 3, 256)
    attention = FlashAttention(KV_HEADS, 256, HEAD_DIM, torch.bfloat16)
    attention.prepare(batch)
    expected = attention.attend(*tensors, batch)
    batch.host_seq_lens = [4096] * 3
    batch.seq_lens[2] = 0
    attention.prepare(batch)
    outputs = [attention.attend(*tensors, batch) for _ in range(2)]
    assert torch.equal(outputs[1][:2], expected[:2])
    made = packages["vllm.vllm_flash_attn"].metadata_made
    # once a step, not once a layer
    assert made == [(3, 300, 256, MAX_SPLITS), (3, 4096, 256, MAX_SPLITS)]


def test_which_library_serves_is_known(install: Any) -> None:
    install(a=pypi_package(), b=bundled_package())
    assert find_library().describe() == {
        "provider": "flash-attn",
        "version": "2.8.3",
        "generation": 2,
    }
    install(b=bundled_package())
    assert find_library().describe() == {"provider": "vllm", "version": "0.24.0", "generation": 3}
    install(b=bundled_package((2,)))
    assert find_library().describe()["generation"] == 2


def test_no_library_is_an_error_that_says_what_to_install(install: Any) -> None:
    install()
    with pytest.raises(
        ImportError, match=r"pip install flash-attn.*pip install vllm.*'triton' or 'torch'"
    ):
        FlashAttention(KV_HEADS, 256, HEAD_DIM, torch.bfloat16)
    install(b=bundled_package(()))
    with pytest.raises(ImportError, match="compute capability >= 8"):
        FlashAttention(KV_HEADS, 256, HEAD_DIM, torch.bfloat16)


def test_a_namesake_without_the_functions_is_passed_over(install: Any) -> None:
    install(a={"flash_attn": ModuleType("flash_attn")}, b=bundled_package())
    assert find_library().provider == "vllm"


def test_what_the_library_cannot_compute_is_refused(install: Any) -> None:
    install(a=pypi_package())
    with pytest.raises(ValueError, match=r"block_size=64.*flash-attn 2\.8\.3.*multiple of 256"):
        FlashAttention(KV_HEADS, 64, HEAD_DIM, torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype='float32'.*'bfloat16'"):
        FlashAttention(KV_HEADS, 256, HEAD_DIM, torch.float32)
    install(b=bundled_package())
    FlashAttention(KV_HEADS, 64, HEAD_DIM, torch.bfloat16)


def test_the_registry_finds_and_counts_it(install: Any) -> None:
    from collections import Counter

    from nanovllm.layers.attention import Attention

    install(a=pypi_package())
    calls: Counter[str] = Counter()
    backend = Attention(
        Optimizations(attention_backend="flash_attn"),
        calls,
        num_kv_heads=KV_HEADS,
        block_size=256,
        head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
    )
    tensors, batch = attention_case([1, 5], [300, 5], 1, 256)
    backend.prepare(batch)
    backend.attend(*tensors, batch)
    assert calls == {"flash_attn": 1}


def test_a_record_names_the_library(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.engines.nanovllm import Adapter
    from nanovllm.engine import llm_engine

    install(b=bundled_package())
    for level, expected in (
        ("flash_attn", {"provider": "vllm", "version": "0.24.0", "generation": 3}),
        ("triton", None),
    ):
        engine = SimpleNamespace(
            resolved_config=lambda level=level: {"optimizations": {"attention_backend": level}},
            runner=SimpleNamespace(collect=None),
        )
        monkeypatch.setattr(llm_engine, "LLM", lambda engine=engine, **_: engine)
        assert Adapter("model", {}).load().get("attention_library") == expected


def test_it_resolves_on_a_gpu() -> None:
    asked = Optimizations(attention_backend="flash_attn")
    assert asked.resolve("cuda").attention_backend == "flash_attn"
    with pytest.raises(ValueError, match="cannot run on device 'cpu'"):
        asked.resolve("cpu")


# -- the real library, on a GPU host ---------------------------------------------------------------


@pytest.fixture
def library() -> Any:
    if not ON_GPU:
        pytest.skip("needs a GPU")
    try:
        return find_library()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("query_lens", "seq_lens", "num_decodes"), CASES)
def test_the_library_equals_the_twin(
    library: Any, query_lens: list[int], seq_lens: list[int], num_decodes: int
) -> None:
    tensors, batch = attention_case(query_lens, seq_lens, num_decodes, 256, "cuda")
    outputs = []
    for backend in (TorchAttention, FlashAttention):
        attention = backend(KV_HEADS, 256, HEAD_DIM, torch.bfloat16)
        attention.prepare(batch)
        outputs.append(attention.attend(*tensors, batch))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1.6e-2, atol=1.6e-2)


def test_the_library_can_be_recorded(library: Any) -> None:
    """A graph recorded at one set of lengths serves another, padding included."""
    tensors, batch = attention_case([1] * 4, [40, 700, 300, 9], 4, 256, "cuda")
    lengths, batch.host_seq_lens = batch.seq_lens.clone(), [1024] * 4
    attention, twin = (
        backend(KV_HEADS, 256, HEAD_DIM, torch.bfloat16)
        for backend in (FlashAttention, TorchAttention)
    )
    batch.seq_lens.fill_(1)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for _ in range(2):  # the first compiles and allocates
        attention.prepare(batch)
        attention.attend(*tensors, batch)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        attention.prepare(batch)
        outputs = [attention.attend(*tensors, batch) for _ in range(2)]
    batch.seq_lens.copy_(lengths)
    batch.seq_lens[3] = 0
    graph.replay()
    torch.cuda.synchronize()
    batch.host_seq_lens, batch.seq_lens = lengths.tolist(), lengths
    twin.prepare(batch)
    expected = twin.attend(*tensors, batch)
    for output in outputs:
        torch.testing.assert_close(output[:3], expected[:3], rtol=1.6e-2, atol=1.6e-2)
        assert torch.isfinite(output).all()
