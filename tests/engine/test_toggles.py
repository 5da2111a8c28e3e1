"""The table of toggles is the one place: a row that is added there is validated, resolved, counted, printed and
translated like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.study import spec
from nanovllm.config import ALL, BASELINE, LEVELS, EngineConfig, Optimizations
from nanovllm.engine.stats import StepStats
from nanovllm.gpu import machine
from nanovllm.toggles import vllm_names
from nanovllm.toggles.counters import toggle_counters
from nanovllm.toggles.row import toggles_of
from nanovllm.toggles.table import toggle


@dataclass(frozen=True, kw_only=True)
class WithAToy(Optimizations):
    """Every optimization, and one that nobody has written."""

    toy: str = toggle(
        "off",
        "small",
        "large",
        title="toy",
        best={"cuda": "large"},
        gpu_only={"large": "a large toy runs on a GPU"},
        by_triton=("large",),
        needs=(lambda on: on["prefix_cache"], "prefix_cache=True, which it reads"),
        vllm=("enable_toy", {True: "small", False: "off"}),
        engaged=lambda stats: stats.overlapped_steps,
        opportunity=lambda stats: stats.refills,
    )


def test_a_new_row_is_validated() -> None:
    with pytest.raises(
        ValueError, match=r"toy='huge' is not allowed.*'off', 'small', 'large', 'auto'"
    ):
        WithAToy(toy="huge")


def test_a_new_row_is_resolved() -> None:
    assert WithAToy(toy="auto", prefix_cache=True).resolve("cuda").toy == "large"
    assert WithAToy(toy="auto", prefix_cache=True).resolve("cpu").toy == "off"
    assert WithAToy(toy="auto").resolve("cuda").toy == "off", "it needs the prefix cache"
    with pytest.raises(
        ValueError, match=r"toy='large' cannot run on device 'cpu': a large toy.*Use toy='off'"
    ):
        WithAToy(toy="large", prefix_cache=True).resolve("cpu")
    with pytest.raises(
        ValueError, match=r"toy='small' needs prefix_cache=True, which it reads\. Use toy='off'"
    ):
        WithAToy(toy="small").resolve("cpu", in_engine=True)


def test_a_new_row_is_counted() -> None:
    stats = StepStats(overlapped_steps=3, refills=2)
    counted = toggle_counters(WithAToy(toy="small"), stats)["toy"]
    assert counted == {"level": "small", "baseline": "off", "engaged": 3, "opportunity": 2}


def test_a_new_row_is_printed() -> None:
    config = SimpleNamespace(
        optimizations=WithAToy(toy="small"),
        dtype="bfloat16",
        num_kv_blocks=1,
        block_size=16,
        kv_cache_bytes=1,
        max_num_seqs=1,
        max_model_len=1,
    )
    assert ", toy small" in machine.describe(config, "a GPU")


def test_a_new_row_falls_back_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "triton_problem", lambda: "there is no compiler")
    with pytest.raises(
        ValueError, match=r"toy='large' cannot run here: there is no compiler.*toy='off'"
    ):
        machine._without_triton_where_it_cannot_run(WithAToy(toy="large"))


def test_a_new_row_is_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = toggles_of(WithAToy)
    monkeypatch.setattr(vllm_names, "ALL", WithAToy())
    monkeypatch.setattr(vllm_names, "TOGGLES", rows)
    monkeypatch.setattr(vllm_names, "SWITCHES", vllm_names.switches(rows))
    found = vllm_names.translate({"enable_toy": True}, {"model", "optimizations"})
    assert found["optimizations"].toy == "small"
    with pytest.raises(
        ValueError, match=r"enable_toy='yes' is not allowed; it must be True, False or None"
    ):
        vllm_names.translate({"enable_toy": "yes"}, {"model"})


def test_a_row_that_says_something_unknown_is_an_error() -> None:
    @dataclass(frozen=True)
    class Wrong:
        toy: str = toggle("off", "on", engaged=lambda stats: 0, colour="red")

    with pytest.raises(TypeError, match="colour"):
        toggles_of(Wrong)


def test_everything_derives_from_the_table() -> None:
    rows = toggles_of(Optimizations)
    assert (
        list(rows) == [f.name for f in fields(Optimizations)] == list(LEVELS) == list(spec.LEVELS)
    )
    assert list(toggle_counters(BASELINE, StepStats())) == list(rows)
    assert {ours for ours, _ in vllm_names.SWITCHES.values()} <= set(rows)
    for name, row in rows.items():
        assert getattr(BASELINE, name) == row.levels[0]
        assert getattr(ALL, name) == (row.levels[0] if type(row.levels[0]) is int else "auto")


@pytest.mark.parametrize("name", LEVELS)
def test_counters_are_zero_before_anything_ran(name: str) -> None:
    counted: dict[str, Any] = toggle_counters(ALL, StepStats())[name]
    assert counted["engaged"] == 0
    assert not counted["opportunity"]


def test_every_name_of_vllm_is_an_argument() -> None:
    for name in vllm_names.SWITCHES:
        assert EngineConfig.from_kwargs("m", **{name: None}).optimizations == ALL
