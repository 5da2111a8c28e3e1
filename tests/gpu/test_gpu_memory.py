"""What can be told without a GPU of the care for its memory."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.engine.stats import StepStats
from nanovllm.gpu.capture import capture
from nanovllm.gpu.step_memory import room_for
from nanovllm.gpu.workspaces import Workspaces


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),  # of a graph's instantiation
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_form_of_out_of_memory_says_what_to_lower(error: RuntimeError) -> None:
    with (
        pytest.raises(
            MemoryError,
            match="recorded steps does not fit into the device's memory: lower max_num_seqs",
        ),
        room_for("recorded steps", "lower max_num_seqs"),
    ):
        raise error


def test_other_errors_are_left_as_they_are() -> None:
    with (
        pytest.raises(RuntimeError, match="illegal memory access"),
        room_for("recorded steps", "lower max_num_seqs"),
    ):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_a_recording_that_fails_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next engine of the process could neither record nor free anything."""
    calls: list[str] = []

    class Graph:
        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            calls.append("begin")

        def capture_end(self) -> None:
            calls.append("end")
            raise RuntimeError("the capture was invalidated")

    def forward() -> torch.Tensor:
        if calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 76 MiB")
        return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    stream: Any = SimpleNamespace(device=None, synchronize=lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        capture(forward, StepStats(), None, stream)
    assert calls == ["begin", "end"]


def test_workspaces_stay_until_the_last_engine_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS clears those of the whole process, and the graphs of an engine that lives hold the
    addresses of theirs.
    """
    cleared: list[str] = []
    workspaces = Workspaces()
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append("all"), raising=False
    )
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    workspaces.keep_for(first)
    workspaces.keep_for(second)
    del first
    gc.collect()
    assert not cleared
    del second
    gc.collect()
    assert cleared == ["all"]
