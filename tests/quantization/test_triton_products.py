"""The Triton kernels of quantized weights and of a small cache equal their torch twins, under Triton's interpreter where there is
no GPU. tests/kernels/test_triton_kernels.py compiles them for GPUs that are not here.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from nanovllm.kernels.batch import ForwardBatch
from nanovllm.layers.linear import TensorParallel
from nanovllm.quantization import triton as on_gpu
from nanovllm.quantization.kv_cache import Stored, TorchAttentionOfStored
from nanovllm.quantization.weights import WEIGHTS, Int4Weight, QuantizedWeight, check_fp8

if not torch.cuda.is_available():
    from tests.support.interpreter import make_faster

    make_faster()

pytestmark = pytest.mark.filterwarnings(  # of the interpreter, which computes with NumPy
    "ignore:Conversion of an array with ndim:DeprecationWarning",
    "ignore:invalid value encountered:RuntimeWarning",
    "ignore:overflow encountered:RuntimeWarning",
    "ignore:divide by zero:RuntimeWarning",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("level", WEIGHTS)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 48, 256), (3, 20, 192), (17, 16, 388), (64, 33, 128)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_equal_their_twins(
    level: str, rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    weight = WEIGHTS[level](draw(outputs, inputs, dtype=dtype), None)
    x, bias = draw(rows, inputs, dtype=dtype, seed=1), draw(outputs, dtype=dtype, seed=2)
    for own in (None, bias):
        found, expected = on_gpu.product(x, weight, own), weight.product(x, own)
        assert found.dtype == dtype
        rounding = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0.0, atol=rounding)


def test_more_rows_go_to_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = WEIGHTS["int8"](draw(8, 64), None)
    x = draw(65, 64)
    monkeypatch.setattr(on_gpu.kernels, "int8_linear", lambda *_: pytest.fail("a kernel was used"))
    assert torch.equal(on_gpu.product(x, weight), weight.product(x))


@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("group", [1, 2])
def test_attention_over_a_small_cache_equals_its_twin(head_dim: int, group: int) -> None:
    kv_heads, block_size, dtype = 2, 16, torch.float32
    seq_lens, query_lens = [21, 5, 40], [1, 1, 12]
    tables = torch.tensor([[3, 1, 0], [4, 0, 0], [2, 5, 6]], dtype=torch.int32, device=DEVICE)
    caches: Any = [
        Stored(
            draw(7, kv_heads, block_size, head_dim, seed=seed).to(torch.float8_e4m3fn),
            torch.tensor(scales, device=DEVICE)[:, None],
        )
        for seed, scales in ((0, [0.5, 1.5]), (1, [2.0, 0.75]))
    ]
    starts = torch.tensor([0, 1, 2, 14], dtype=torch.int32, device=DEVICE)
    slots = torch.cat(
        [
            tables[i].long()[places // block_size] * block_size + places % block_size
            for i, (n, length) in enumerate(zip(seq_lens, query_lens, strict=True))
            for places in (torch.arange(n - length, n, device=DEVICE),)
        ]
    )
    k, v = (
        cache.store(draw(14, kv_heads, head_dim, seed=seed), slots)
        for cache, seed in zip(caches, (2, 3), strict=True)
    )
    q = draw(14, kv_heads * group, head_dim, seed=4)
    found = []
    for made in (TorchAttentionOfStored, on_gpu.TritonAttentionOfStored):
        batch = ForwardBatch(
            slots, slots, slots, tables,
            torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
            starts, 2, query_lens, seq_lens,
        )  # fmt: skip
        backend: Any = made(kv_heads, block_size, head_dim, dtype)
        backend.prepare(batch)
        found.append(backend.attend(q, k, v, *caches, batch))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_groups_that_ranks_share_are_refused_by_name() -> None:
    tp = TensorParallel()
    tp.rank, tp.size = 1, 2  # type: ignore[misc]
    tp.all_gather = lambda x: torch.cat((x, x), dim=-1)  # type: ignore[method-assign]
    weight: QuantizedWeight = Int4Weight(draw(4, 96), tp)
    with pytest.raises(ValueError, match=r"int4.*groups of 128 inputs that no two ranks share.*96"):
        on_gpu.check(weight)
    on_gpu.check(Int4Weight(draw(4, 128), tp))


def test_fp8_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(
        ValueError, match=r"quantization='fp8' needs.*8\.9.*has 8\.6\. Use .*'int8'"
    ):
        check_fp8("quantization", "fp8", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_fp8("kv_cache_dtype", "fp8_e4m3", torch.device("cuda", 0))
    check_fp8("quantization", "fp8", torch.device("cpu"))
