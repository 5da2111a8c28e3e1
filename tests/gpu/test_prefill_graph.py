"""Short prefills in graphs, without a GPU: 'replay' runs what would have been recorded, on the same
padded inputs.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from nanovllm.config import Optimizations
from nanovllm.engine.kv_cache import KVCacheSpec
from nanovllm.engine.stats import StepStats
from nanovllm.gpu import prefill_graph
from nanovllm.gpu.capture import Captured
from nanovllm.gpu.prefill_graph import ShortPrefills
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.registry import load_kernels
from nanovllm.layers.attention import Attention
from nanovllm.layers.linear import TensorParallel
from nanovllm.models.config import load_hf_config
from nanovllm.models.loader import load_weights
from nanovllm.models.qwen3 import Qwen3ForCausalLM

pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning",
    "ignore:invalid value encountered:RuntimeWarning",
)
PAGE, NUM_BLOCKS = 16, 24


class ReplayedByHand(ShortPrefills):
    """Replays by computing again."""

    def _capture(self, bucket: int, kv_caches: Any, pool: Any, stream: Any) -> Any:
        hidden = torch.zeros(bucket, self.model.model.norm.weight.shape[0])

        def replay() -> None:
            hidden.copy_(self._forward(bucket, kv_caches))

        return Captured(SimpleNamespace(replay=replay), hidden, Counter(), Counter())


def model_with(level: str, folder: Path) -> tuple[Any, Any, Any]:
    """The model, its attention and empty caches; the last block is the spare one."""
    config = load_hf_config(folder)
    optimizations, stats = Optimizations(attention_backend=level), StepStats()
    attention = Attention(
        optimizations,
        stats.attention_calls,
        num_kv_heads=config.num_key_value_heads,
        block_size=PAGE,
        head_dim=config.head_dim,
        dtype=torch.float32,
    )
    model = Qwen3ForCausalLM(
        config, 256, load_kernels(optimizations, stats.kernel_calls), attention, TensorParallel()
    )
    load_weights(model, folder, TensorParallel())
    spec = KVCacheSpec(
        config.num_hidden_layers, config.num_key_value_heads, config.head_dim, PAGE, torch.float32
    )
    return model.eval(), attention, spec.allocate(NUM_BLOCKS + 1, torch.device("cpu"))


def batch_of(lengths: list[int], contexts: list[int], seed: int) -> ForwardBatch:
    """Prefills of `lengths` tokens behind `contexts` tokens that are in the cache (zeros, which is
    as good as any).
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(NUM_BLOCKS, generator=generator).int()
    tables, at = torch.zeros(len(lengths), 4, dtype=torch.int32), 0
    for entry, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        needed = -(-(length + context) // PAGE)
        tables[entry, :needed] = blocks[at : (at := at + needed)]
    positions = torch.cat([torch.arange(c, c + n) for n, c in zip(lengths, contexts, strict=True)])
    entry = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    slots = tables[entry, positions // PAGE].long() * PAGE + positions % PAGE
    totals = [n + c for n, c in zip(lengths, contexts, strict=True)]
    return ForwardBatch(
        torch.randint(0, 2000, (sum(lengths),), generator=generator),
        positions,
        slots,
        tables,
        torch.tensor(totals, dtype=torch.int32),
        torch.tensor([0, *lengths]).cumsum(0),
        0,
        lengths,
        totals,
    )


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU replays real graphs: tests/gpu/test_cuda_graph.py"
)
@torch.inference_mode()
def test_padding_changes_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_graph, "TOKENS", (16, 40))
    monkeypatch.setattr(prefill_graph, "ENTRIES", 4)
    twin, twin_attention, twin_caches = model_with("torch", tiny)
    model, attention, caches = model_with("triton", tiny)
    stats = StepStats()
    short = ReplayedByHand(model, attention, stats, caches, 4, NUM_BLOCKS * PAGE, None, None)  # type: ignore[arg-type]
    for seed, (lengths, contexts) in enumerate(
        [([17, 3, 9], [0, 5, 0]), ([4], [0]), ([16], [20]), ([1, 1, 1, 1], [3, 0, 16, 15])]
    ):
        batch = batch_of(lengths, contexts, seed)
        twin_attention.prepare(batch)
        expected = twin(batch, twin_caches)
        replays = stats.graph_replays
        torch.testing.assert_close(short(batch, caches), expected, rtol=1e-4, atol=1e-4)
        assert stats.graph_replays == replays + 1
        for ours, others in zip(caches, twin_caches, strict=True):  # all but the spare block
            torch.testing.assert_close(ours[0][:-1], others[0][:-1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours[1][:-1], others[1][:-1], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_what_no_graph_holds_runs_eagerly(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_graph, "TOKENS", (16,))
    monkeypatch.setattr(prefill_graph, "ENTRIES", 2)
    model, attention, caches = model_with("torch", tiny)
    stats = StepStats()
    monkeypatch.setattr(ReplayedByHand, "_capture", lambda *args: None)
    short = ReplayedByHand(model, attention, stats, caches, 4, NUM_BLOCKS * PAGE, None, None)  # type: ignore[arg-type]
    for lengths in ([17], [1, 1, 1]):
        batch = batch_of(lengths, [0] * len(lengths), 0)
        attention.prepare(batch)
        assert short(batch, caches).shape[0] == sum(lengths)
    assert stats.graph_replays == 0
