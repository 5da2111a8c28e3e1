"""benchmarks/gpu_fused.py without a GPU: everything but the clock, at a small shape, under Triton's
interpreter.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from benchmarks import gpu_fused as study
from nanovllm.kernels.triton import fused
from tests.support.interpreter import make_faster

if not torch.cuda.is_available():
    make_faster()

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the study itself runs"),
]
SMALL = study.Shape(
    512, 128, 4, 2, head_dim=32, layers=2, page=16, device="cpu", dtype=torch.float16
)


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def call_the_last_layer(function: object, layers: int) -> float:
        function(layers - 1)  # type: ignore[operator]
        return 5e-6

    monkeypatch.setattr(study, "graph_s", call_the_last_layer)


def test_every_line_of_the_study_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fused.json"
    study.run(SMALL, [20, 3], out, time.monotonic(), 1e4)
    result = json.loads(out.read_text())
    lines = result["lines"]
    assert [line for line in lines if line["failed"] or line["wrong"] or not line["us"]] == []
    assert result["left_out"] == []
    chains = [
        line["variant"] for line in lines if line["operation"] == "chain" and line["rows"] == 20
    ]
    assert chains == ["today", "both fused", "gate_up only", "qkv only"]
    assert "fused, few" in {line["variant"] for line in lines if line["rows"] == 3}
    assert len({tuple(line["tiling"]) for line in lines if line["tiling"]}) > 15
    assert "best by rows" in capsys.readouterr().out


def test_wrong_and_refused_tilings_are_lines_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fused.fused_gate_up
    monkeypatch.setattr(fused, "fused_gate_up", lambda *args: real(*args) * 1.1)

    def refused(*args: object, tiling: fused.Tiling) -> None:
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(fused, "fused_qkv", refused)
    lines = study.run(SMALL, [20], tmp_path / "fused.json", time.monotonic(), 1e4)["lines"]
    assert all(
        line["wrong"]
        for line in lines
        if line["operation"] == "gate_up" and line["variant"] == "fused"
    )
    assert {
        line["failed"]
        for line in lines
        if line["operation"] == "qkv" and line["variant"] == "fused"
    } == {"RuntimeError: out of resource: shared memory"}
    assert [line["variant"] for line in lines if line["operation"] == "chain"] == ["today"]


def test_without_time_it_says_what_is_left_out(tmp_path: Path) -> None:
    result = study.run(SMALL, [40, 3], tmp_path / "fused.json", time.monotonic(), 0.0)
    assert result["lines"] == []
    assert result["left_out"] == ["40 rows", "3 rows"]


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 100, 128, 192, 256])
@pytest.mark.parametrize("operation", ["gate_up", "qkv"])
def test_tilings_suit_the_real_shapes(rows: int, operation: str) -> None:
    tilings = study.tilings_to_try(operation, rows)
    assert 5 <= len(tilings) <= 6
    assert tilings[0] in (*fused.GATE_UP_TILINGS.values(), *fused.QKV_TILINGS.values())
    for tiling in tilings:
        assert operation == "gate_up" or tiling.columns == 128
        for shape in study.SHAPES.values():
            assert shape.hidden % tiling.step == 0
            assert 2 * shape.intermediate % tiling.columns == 0
