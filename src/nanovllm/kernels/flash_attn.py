"""attention_backend=flash_attn: the FlashAttention library (Dao, 2023; Shah et al., 2024) behind
our interface.

Loaded only when on. Two packages contain it; the first that is installed is used, and a run's
record names it and its version:

    flash-attn   PyPI's, FlashAttention 2: flash_attn_with_kvcache for decodes, flash_attn_varlen_func for prefills;
                 blocks of a multiple of 256 tokens
    vllm         the copy in vLLM's wheel, FlashAttention 3 on Hopper, else 2: flash_attn_varlen_func for both, lengths as
                 `seqused_k`; blocks of a multiple of 16 tokens

Both want blocks as [blocks, block_size, kv_heads, head_dim] and check only the last stride, so our
head-major cache is passed transposed, without a copy. Nothing is read back from the device and no
launch depends on a length that only the device knows, so a CUDA graph may capture all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.batch import ForwardBatch

MAX_SPLITS = 32
"""The most pieces that FlashAttention 3 may cut a decode's KV into; it uses fewer where the batch
fills the device. The bound is fixed because a graph is captured before lengths are known; vLLM uses
the same value.
"""


@dataclass(frozen=True, slots=True)
class Library:
    """The library that was found. generation: FlashAttention's own version, 2 or 3."""

    provider: str
    version: str
    generation: int
    page_multiple: int
    varlen: Callable[..., Tensor]
    with_kvcache: Callable[..., Tensor] | None = None  # flash-attn only
    scheduler_metadata: Callable[..., Tensor] | None = None  # FlashAttention 3 only

    def describe(self) -> dict[str, Any]:
        """JSON-able, for records."""
        return {"provider": self.provider, "version": self.version, "generation": self.generation}


def find_library() -> Library:
    """The installed library. Raises ImportError, saying what to install and why an installed
    package cannot be used.
    """
    problems = []
    for find in (_pypi, _bundled):
        try:
            return find()
        except ImportError as error:
            problems.append(str(error))
    raise ImportError(
        f"attention_backend='flash_attn' finds no FlashAttention library ({'; '.join(problems)}): `pip install flash-attn` (2.8, "
        "it compiles for long) or `pip install vllm`, whose wheel carries one; or choose 'triton' or 'torch'"
    )


def _pypi() -> Library:
    package = import_module("flash_attn")
    # FlashAttention 4 has the same name and nothing of this
    if not hasattr(package, "flash_attn_with_kvcache"):
        raise ImportError("the package flash_attn that is installed is not version 2")
    return Library(
        "flash-attn",
        package.__version__,
        2,
        256,
        package.flash_attn_varlen_func,
        package.flash_attn_with_kvcache,
    )


def _bundled() -> Library:
    package, version = import_module("vllm.vllm_flash_attn"), import_module("vllm").__version__
    generation = next((n for n in (3, 2) if package.is_fa_version_supported(n)), None)
    if generation is None:
        raise ImportError(f"vllm {version}: {package.fa_version_unsupported_reason(2)}")
    metadata = package.get_scheduler_metadata if generation == 3 else None
    return Library("vllm", version, generation, 16, package.flash_attn_varlen_func, None, metadata)


@dataclass(slots=True)
class _Prepared:
    """Values shared by all layers of a step. Starts are [entries + 1] int32."""

    decode_starts: Tensor | None = None
    longest_decode: int = 0  # tokens of its KV
    scheduler_metadata: Tensor | None = None
    prefill_starts: Tensor | None = None  # of their query tokens
    prefill_kv_starts: Tensor | None = None
    longest_query: int = 0
    longest_prefill: int = 0  # tokens of its KV


class FlashAttention:
    """The same interface as TorchAttention. Raises ImportError without a library, ValueError for a
    dtype or block size that it does not compute.
    """

    def __init__(
        self, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"dtype={name!r} cannot be used with attention_backend='flash_attn': take 'bfloat16' or 'float16', or "
                "attention_backend='triton' or 'torch'"
            )
        self.library = library = find_library()
        if block_size % library.page_multiple:
            raise ValueError(
                f"block_size={block_size} cannot be used with attention_backend='flash_attn' ({library.provider} "
                f"{library.version}): take a multiple of {library.page_multiple}"
            )
        self.num_kv_heads, self.block_size, self.scale, self.dtype = (
            num_kv_heads,
            block_size,
            head_dim**-0.5,
            dtype,
        )

    def prepare(self, batch: ForwardBatch) -> None:
        """Computes offsets in the type that the library expects, once per step. Decodes and
        prefills are separate calls, each with its own tile shapes.
        """
        prepared = batch.attention = _Prepared()
        n = batch.num_decodes
        if n:
            prepared.longest_decode = max(batch.host_seq_lens[:n])
            prepared.decode_starts = batch.query_start_loc[: n + 1].int()
        if n < len(batch.host_query_lens):
            prepared.longest_query, prepared.longest_prefill = (
                max(batch.host_query_lens[n:]),
                max(batch.host_seq_lens[n:]),
            )
            # the n decodes before have one token each
            prepared.prefill_starts = (batch.query_start_loc[n:] - n).int()
            if self.library.provider == "flash-attn":
                prepared.prefill_kv_starts = torch.nn.functional.pad(
                    batch.seq_lens[n:].cumsum(0), (1, 0)
                ).int()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """q: [tokens, q_heads, head_dim]; k, v: [tokens, kv_heads, head_dim], already in the caches
        -> as q.
        """
        n, parts = batch.num_decodes, []
        # views: [blocks, block_size, kv_heads, head_dim]
        pages = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        if n:
            parts.append(self._decode(q[:n], *pages, batch))
        if n < len(batch.host_query_lens):
            parts.append(self._prefill(q[n:], *pages, batch))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, batch: ForwardBatch) -> Tensor:
        library, prepared, n = self.library, batch.attention, batch.num_decodes
        seq_lens, tables = batch.seq_lens[:n], batch.block_tables[:n]
        if library.with_kvcache is not None:
            return library.with_kvcache(
                q[:, None],
                keys,
                values,
                cache_seqlens=seq_lens,
                block_table=tables,
                softmax_scale=self.scale,
                causal=True,
            )[:, 0]
        split: dict[str, Any] = {}
        if library.scheduler_metadata is not None:
            # in the first layer: only here the number of query heads is known
            if prepared.scheduler_metadata is None:
                prepared.scheduler_metadata = library.scheduler_metadata(
                    batch_size=n,
                    max_seqlen_q=1,
                    max_seqlen_k=prepared.longest_decode,
                    num_heads_q=q.shape[1],
                    num_heads_kv=self.num_kv_heads,
                    headdim=q.shape[2],
                    cache_seqlens=seq_lens,
                    qkv_dtype=self.dtype,
                    cu_seqlens_q=prepared.decode_starts,
                    page_size=self.block_size,
                    causal=True,
                    num_splits=MAX_SPLITS,
                )
            split = {"scheduler_metadata": prepared.scheduler_metadata, "num_splits": MAX_SPLITS}
        return library.varlen(
            q,
            keys,
            values,
            cu_seqlens_q=prepared.decode_starts,
            max_seqlen_q=1,
            seqused_k=seq_lens,
            max_seqlen_k=prepared.longest_decode,
            block_table=tables,
            softmax_scale=self.scale,
            causal=True,
            fa_version=library.generation,
            **split,
        )

    def _prefill(self, q: Tensor, keys: Tensor, values: Tensor, batch: ForwardBatch) -> Tensor:
        library, prepared, n = self.library, batch.attention, batch.num_decodes
        lengths: dict[str, Any] = {"cu_seqlens_k": prepared.prefill_kv_starts}
        if library.provider == "vllm":
            lengths = {"seqused_k": batch.seq_lens[n:], "fa_version": library.generation}
        return library.varlen(
            q,
            keys,
            values,
            cu_seqlens_q=prepared.prefill_starts,
            max_seqlen_q=prepared.longest_query,
            max_seqlen_k=prepared.longest_prefill,
            block_table=batch.block_tables[n:],
            softmax_scale=self.scale,
            causal=True,
            **lengths,
        )
