"""A plan is the same wherever it is made, complete, and honest about what cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import machine, model_files, records
from experiments.levels import level_name
from experiments.plan import build_plan
from experiments.spec import ModelChoice, Profile, load_profile, load_study
from experiments.yaml_files import SpecError
from nanovllm.config import LEVELS

SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "intermediate_size": 768, "vocab_size": 2048, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelChoice:
    """A checkpoint without weights, and a machine with known speeds."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    monkeypatch.setattr(model_files, "inspect", lambda preset, path: {"path": str(tmp_path), "digest": "d" * 64})
    speeds = {"bandwidth_bytes_per_s": 1e10, "peak_flops": {"float32": 1e11, "bfloat16": 1e11}}
    monkeypatch.setattr(machine, "measure", lambda: speeds)
    return ModelChoice(preset="tiny", dtype="float32")


@pytest.fixture
def cpu() -> Profile:
    return load_profile("cpu").model_copy(update={"cpu_cores": 2, "memory_bytes": 2**34})


def plan_of(cpu: Profile, model: ModelChoice, *overrides: str, study: str = "embedded") -> dict[str, Any]:
    loaded, applied = load_study(study, overrides)
    return build_plan(loaded, cpu, model, applied)


def test_the_same_study_gives_the_same_plan(cpu: Profile, model: ModelChoice) -> None:
    first, second = plan_of(cpu, model), plan_of(cpu, model)
    assert first == second
    assert first["plan_hash"] == records.plan_hash(first)
    assert json.loads(json.dumps(first)) == first
    for override in ("design.seed=1", "workloads.scaled.num_requests=16", "design.blocks=3"):
        other = plan_of(cpu, model, override)
        assert other["plan_hash"] != first["plan_hash"]
        assert list(other["study"]["overrides"]) == [override.split("=")[0]]


def test_a_plan_is_written_and_read_whole(cpu: Profile, model: ModelChoice, tmp_path: Path) -> None:
    plan = plan_of(cpu, model)
    path = tmp_path / "plan.json"
    records.write_plan(plan, path)
    assert records.read_plan(path) == plan
    path.write_text(path.read_text().replace('"alpha": 0.05', '"alpha": 0.5'))
    with pytest.raises(records.RecordError, match="the plan was edited"):
        records.read_plan(path)


def test_every_block_holds_every_cell_once_in_its_own_order(cpu: Profile, model: ModelChoice) -> None:
    plan = plan_of(cpu, model)
    blocks: dict[int, list[str]] = {}
    for entry in plan["launches"]:
        blocks.setdefault(entry["block"], []).append(entry["cell"])
        assert sorted(entry["workload_order"]) == sorted(plan["workloads"])
    assert len(blocks) == 6
    assert all(sorted(cells) == sorted(plan["cells"]) for cells in blocks.values())
    assert len({tuple(cells) for cells in blocks.values()}) > 1
    assert len({entry["launch"] for entry in plan["launches"]}) == len(plan["launches"])
    assert {entry["workload_order"][0] for entry in plan["launches"]} == set(plan["workloads"])


def test_cells_set_every_switch_explicitly(cpu: Profile, model: ModelChoice) -> None:
    plan = plan_of(cpu, model)
    roles = [cell["role"] for cell in plan["cells"].values()]
    assert roles.count("baseline") == roles.count("aa") == 1
    assert plan["cells"]["baseline"]["config"] == plan["cells"]["aa"]["config"]
    baseline = {name: levels[0] for name, levels in LEVELS.items()}
    for name, cell in plan["cells"].items():
        if cell["engine"] == "nanovllm":
            changed = {factor: level for factor, level in cell["levels"].items() if level != level_name(baseline[factor])}
            assert {f: level_name(v) for f, v in cell["config"]["optimizations"].items()} == {
                **{f: level_name(v) for f, v in baseline.items()}, **changed
            }  # fmt: skip
            assert cell["role"] in ("baseline", "aa", "all") or name == "{}={}".format(*next(iter(changed.items())))
    assert plan["cells"]["hf"]["config"] == {"max_num_seqs": 96, "dtype": "float32", "device": "cpu"}


def test_what_cannot_run_is_listed_with_the_reason(cpu: Profile, model: ModelChoice) -> None:
    one_core = cpu.model_copy(update={"cpu_cores": 1})
    plan = plan_of(one_core, model, "factors.cuda_graphs={levels: [on]}", "cells.graphs={role: all, levels: {cuda_graphs: on}}")
    reasons = {(entry["factor"], entry["level"]): entry["reason"] for entry in plan["not_applicable"]}
    assert "needs 2 CPU cores" in reasons["tensor_parallel_size", 2]
    assert "cuda_graphs" in reasons["cuda_graphs", "on"]
    assert reasons["graphs", "cuda_graphs=on"] == reasons["cuda_graphs", "on"]
    assert not {"tensor_parallel_size=2", "cuda_graphs=on", "graphs"} & set(plan["cells"])


def test_a_workload_that_cannot_run_is_refused_before_anything_runs(cpu: Profile, model: ModelChoice) -> None:
    with pytest.raises(SpecError, match=r"workload scaled has a request of \d+ tokens; settings.max_model_len is 180"):
        plan_of(cpu, model, "settings.max_model_len=180")
    with pytest.raises(SpecError, match="workload scaled draws from 50000 tokens; the model has 2048"):
        plan_of(cpu, model, "workloads.scaled.vocab_size=50000")
    with pytest.raises(SpecError, match="engine hf has no setting 'block_size'; allowed: max_num_seqs"):
        plan_of(cpu, model, "cells.hf.config={block_size: 16}")


def test_a_listed_design_has_no_cells_of_its_own(cpu: Profile, model: ModelChoice) -> None:
    assert list(plan_of(cpu, model, study="compare-hf")["cells"]) == ["baseline", "aa", "all", "hf"]
