"""A plan is the same wherever it is made, complete, and honest about what cannot run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import experiments.__main__ as cli
from experiments.host import model_files, provenance
from experiments.records import store
from experiments.records.factor_levels import level_name
from experiments.study import block_count, machine, plan_view
from experiments.study.plan import NotHereError, build_plan
from experiments.study.spec import ModelChoice, Profile, load_profile, load_study
from experiments.study.yaml_files import SpecError
from nanovllm.config import LEVELS

SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelChoice:
    """A checkpoint without weights, and a machine with known speeds."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    monkeypatch.setattr(
        model_files,
        "inspect",
        lambda preset, path, **_: {"path": str(tmp_path), "digest": "d" * 64},
    )
    speeds = {"bandwidth_bytes_per_s": 1e10, "peak_flops": {"float32": 1e11, "bfloat16": 1e11}}
    monkeypatch.setattr(machine, "measure", lambda: speeds)
    return ModelChoice(preset="tiny", dtype="float32")


@pytest.fixture
def cpu() -> Profile:
    return load_profile("cpu").model_copy(update={"cpu_cores": 2, "memory_bytes": 2**34})


def plan_of(
    cpu: Profile, model: ModelChoice, *overrides: str, study: str = "embedded"
) -> dict[str, Any]:
    loaded, applied = load_study(study, overrides)
    return build_plan(loaded, cpu, model, applied)


def test_the_same_study_gives_the_same_plan(cpu: Profile, model: ModelChoice) -> None:
    first, second = plan_of(cpu, model), plan_of(cpu, model)
    assert first == second
    assert first["plan_hash"] == store.plan_hash(first)
    assert json.loads(json.dumps(first)) == first
    for override in ("design.seed=1", "workloads.scaled.num_requests=16", "design.blocks=3"):
        other = plan_of(cpu, model, override)
        assert other["plan_hash"] != first["plan_hash"]
        assert list(other["study"]["overrides"]) == [override.split("=")[0]]


def test_a_plan_names_the_statistics_of_a_study_that_asks_for_them(
    cpu: Profile, model: ModelChoice
) -> None:
    """The plans of all other studies stay as they were, and with them what may be resumed."""
    assert "statistics" not in plan_of(cpu, model)["study"]
    asked = plan_of(cpu, model, "statistics.variance=moderated")
    assert asked["study"]["statistics"] == {"variance": "moderated", "families": "joint"}


def test_a_plan_is_written_and_read_whole(cpu: Profile, model: ModelChoice, tmp_path: Path) -> None:
    plan = plan_of(cpu, model)
    path = tmp_path / "plan.json"
    store.write_plan(plan, path)
    assert store.read_plan(path) == plan
    path.write_text(path.read_text().replace('"alpha": 0.05', '"alpha": 0.5'))
    with pytest.raises(store.RecordError, match="the plan was edited"):
        store.read_plan(path)


def test_every_block_holds_every_cell_once_in_its_own_order(
    cpu: Profile, model: ModelChoice
) -> None:
    plan = plan_of(cpu, model, "design.blocks=6")
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
            changed = {
                factor: level
                for factor, level in cell["levels"].items()
                if level != level_name(baseline[factor])
            }
            assert {f: level_name(v) for f, v in cell["config"]["optimizations"].items()} == {
                **{f: level_name(v) for f, v in baseline.items()},
                **changed,
            }
            assert cell["role"] in ("baseline", "aa", "all") or name == "{}={}".format(
                *next(iter(changed.items()))
            )
    assert plan["cells"]["hf"]["config"] == {
        "max_num_seqs": 96,
        "dtype": "float32",
        "device": "cpu",
    }


def test_what_cannot_run_is_listed_with_the_reason(cpu: Profile, model: ModelChoice) -> None:
    one_core = cpu.model_copy(update={"cpu_cores": 1})
    plan = plan_of(
        one_core,
        model,
        "factors.cuda_graphs={levels: [on]}",
        "cells.graphs={role: all, levels: {cuda_graphs: on}}",
    )
    reasons = {
        (entry["factor"], entry["level"]): entry["reason"] for entry in plan["not_applicable"]
    }
    assert "needs 2 CPU cores" in reasons["tensor_parallel_size", 2]
    assert "cuda_graphs" in reasons["cuda_graphs", "on"]
    assert reasons["graphs", "cuda_graphs=on"] == reasons["cuda_graphs", "on"]
    assert not {"tensor_parallel_size=2", "cuda_graphs=on", "graphs"} & set(plan["cells"])


TWO = "factors={prefix_cache: {levels: on}, batching: {levels: [continuous, chunked]}}"


def test_a_budget_gives_the_number_of_blocks(cpu: Profile, model: ModelChoice) -> None:
    within = "design={kind: full_factorial, budget_s: 600}"
    plan = plan_of(cpu, model, TWO, "cells={}", within, "sizing=null")
    assert plan["study"]["design"]["blocks"] == 600 // (7 * 8) == 10
    assert (len(plan["launches"]), plan["expected_s"]) == (70, 560)
    message = (
        r"embedded.yaml .with overrides .*: design.budget_s: 2 blocks of 7 cells at 8 s per launch "
        r"take 112 s, but 100 s are enough for 1"
    )
    within = "design={kind: full_factorial, budget_s: 100}"
    with pytest.raises(SpecError, match=message):
        plan_of(cpu, model, TWO, "cells={}", within, "sizing=null")


def test_the_reference_of_leave_one_out_is_everything_on(cpu: Profile, model: ModelChoice) -> None:
    plan = plan_of(cpu, model, TWO, "cells={}", "design={kind: leave_one_out}")
    assert list(plan["cells"]) == ["all", "aa", "all-but-prefix_cache", "all-but-batching"]
    assert plan["cells"]["all"]["role"] == "baseline"
    assert plan["cells"]["all"]["config"] == plan["cells"]["aa"]["config"]
    assert plan["cells"]["all"]["config"]["optimizations"]["batching"] == "chunked"
    assert plan["cells"]["all-but-batching"]["levels"] == {
        "prefix_cache": "on",
        "batching": "static",
    }


def test_fixed_levels_are_in_every_cell_of_the_engine(cpu: Profile, model: ModelChoice) -> None:
    plan = plan_of(
        cpu,
        model,
        "factors={prefix_cache: {levels: on}}",
        "fixed={batching: chunked}",
        "cells.all.levels={prefix_cache: on}",
    )
    ours = [cell for cell in plan["cells"].values() if cell["engine"] == "nanovllm"]
    assert {cell["config"]["optimizations"]["batching"] for cell in ours} == {"chunked"}
    with pytest.raises(NotHereError, match=r"fixed.cuda_graphs: on cannot run on profile cpu"):
        plan_of(cpu, model, "fixed={cuda_graphs: on}")


def test_a_factorial_cannot_lose_a_cell_and_other_designs_list_it(
    cpu: Profile, model: ModelChoice
) -> None:
    graphs = "factors={prefix_cache: {levels: on}, cuda_graphs: {levels: on}}"
    message = (
        "factors.cuda_graphs.levels: on cannot run on profile cpu: .* "
        "design.kind: full_factorial needs every level"
    )
    with pytest.raises(NotHereError, match=message):
        plan_of(cpu, model, graphs, "cells={}", "design={kind: full_factorial}")
    assert set(plan_of(cpu, model, graphs, "cells={}", "design={kind: add_one_in}")["cells"]) == {
        "baseline",
        "aa",
        "prefix_cache=on",
    }

    gpus = load_profile("h200-x2")
    pair = "factors={all_reduce: {levels: symmetric_memory}, tensor_parallel_size: {levels: 2}}"
    with pytest.raises(
        NotHereError,
        match=r"cell all_reduce=symmetric_memory cannot run on profile h200-x2: "
        r"all_reduce='symmetric_memory' needs tensor_parallel_size of 2",
    ):
        plan_of(gpus, model, pair, "cells={}", "design={kind: full_factorial}")
    plan = plan_of(gpus, model, pair, "cells={}", "design={kind: add_one_in}")
    assert list(plan["cells"]) == ["baseline", "aa", "tensor_parallel_size=2", "all"]
    (lost,) = plan["not_applicable"]
    assert (lost["factor"], lost["level"]) == (
        "all_reduce=symmetric_memory",
        "all_reduce=symmetric_memory",
    )
    four = "factors={data_parallel_size: {levels: 2}, tensor_parallel_size: {levels: 2}}"
    with pytest.raises(
        NotHereError, match=r"the reference, all .* cannot run on profile h200-x2: needs 4 GPUs"
    ):
        plan_of(gpus, model, four, "cells={}", "design={kind: leave_one_out}")
    with pytest.raises(NotHereError, match="nothing to compare baseline with on profile cpu"):
        plan_of(cpu, model, "factors={cuda_graphs: {levels: on}}", "cells={}")


def test_a_fraction_keeps_its_generators(cpu: Profile, model: ModelChoice) -> None:
    gpu = load_profile("h200")
    four = "factors={kernels: {levels: triton}, cuda_graphs: {levels: on}, overlap: {levels: on}, batching: {levels: chunked}}"
    plan = plan_of(gpu, model, four, "cells={}", "design={kind: fractional_factorial}")
    assert plan["study"]["design"]["generators"] == {
        "batching": ["kernels", "cuda_graphs", "overlap"]
    }
    assert len(plan["cells"]) == 8 + 1
    assert plan["cells"]["all"]["role"] == "all"


def test_a_workload_that_cannot_run_is_refused_before_anything_runs(
    cpu: Profile, model: ModelChoice
) -> None:
    with pytest.raises(
        SpecError,
        match=r"workload scaled has a request of \d+ tokens, more than settings.max_model_len, 180",
    ):
        plan_of(cpu, model, "settings.max_model_len=180")
    with pytest.raises(
        SpecError,
        match="workload scaled draws from 50000 token ids, but the model's vocabulary has 2048",
    ):
        plan_of(cpu, model, "workloads.scaled.vocab_size=50000")
    with pytest.raises(
        SpecError,
        match=r"kv_cache_memory_bytes is 17,179,869,185, and profile cpu has 17,179,869,184 bytes",
    ):
        plan_of(cpu, model, f"settings.kv_cache_memory_bytes={2**34 + 1}")
    with pytest.raises(
        SpecError, match="engine hf has no setting 'block_size'; it has max_num_seqs"
    ):
        plan_of(cpu, model, "cells.hf.config={block_size: 16}")


def test_a_listed_design_has_no_cells_of_its_own(cpu: Profile, model: ModelChoice) -> None:
    assert list(plan_of(cpu, model, study="compare-hf")["cells"]) == ["baseline", "aa", "all", "hf"]


def said(plan: dict[str, Any], *earlier: Path) -> str:
    return "\n".join(line for line, _ in plan_view.lines(plan, earlier))


def test_a_plan_says_what_it_costs_and_what_it_cannot_do(cpu: Profile, model: ModelChoice) -> None:
    text = said(
        plan_of(
            cpu,
            model,
            TWO,
            "factors.cuda_graphs={levels: on}",
            "cells={}",
            "design.blocks=6",
            "design.budget_s=null",
            "sizing=null",
            "measurement.launch_s=10",
        )
    )
    assert (
        "plan     30 launches (6 blocks of 5 cells) at 10 s each: about 5.0 min, plus the gate; hash"
        in text
    )
    assert "skipped  cuda_graphs=on: cuda_graphs=True cannot run on device 'cpu'" in text
    assert "power " not in text, "without an earlier run nobody knows the noise"
    assert "aliases" not in text


def test_what_cannot_run_is_grouped_by_reason_in_readable_lines() -> None:
    reason = "needs 2 GPUs; profile h100 has 1"
    cells = [f"all-but-{factor}+tensor_parallel_size=2" for factor in ("kernels", "overlap")]
    lines = plan_view.skipped(
        [
            {"factor": "tensor_parallel_size", "level": 2, "reason": reason},
            {"factor": "cuda_graphs", "level": "on", "reason": "needs a GPU"},
            *(
                {"factor": cell, "level": "tensor_parallel_size=2", "reason": reason}
                for cell in cells
            ),
        ]
    )
    assert all(len(line) <= 80 for line in lines)
    text = " ".join(line.strip() for line in lines)
    assert f"skipped  tensor_parallel_size=2, {', '.join(cells)}: {reason}" in text
    assert "skipped  cuda_graphs=on: needs a GPU" in lines
    assert "everything on" not in text
    assert text.count(reason) == 1


def test_a_switch_that_cannot_run_alone_is_still_part_of_everything_on(model: ModelChoice) -> None:
    """Cascade attention needs other switches: its own row is missing, not the switch."""
    factors = ", ".join(
        f"{name}: {{levels: {level}}}"
        for name, level in (
            ("attention_backend", "triton"),
            ("prefix_cache", "on"),
            ("cuda_graphs", "on"),
            ("cascade_attention", "on"),
        )
    )
    plan = plan_of(
        load_profile("h200"), model, f"factors={{{factors}}}", "cells={}", "design={kind: both}"
    )
    text = said(plan)
    assert (
        "design   both (each switch alone, and left out of everything on); "
        f"{len(plan['cells'])} configurations: all off, A/A twin, attention_backend=triton" in text
    )
    (line,) = re.findall(r"skipped  cascade_attention=on: (?:.|\n {9})*", text)
    assert " ".join(line.split()).endswith("It stays part of everything on.")


def test_a_plan_says_what_a_fraction_mixes(model: ModelChoice) -> None:
    four = "factors={kernels: {levels: triton}, cuda_graphs: {levels: on}, overlap: {levels: on}, batching: {levels: chunked}}"
    text = said(
        plan_of(
            load_profile("h200"), model, four, "cells={}", "design={kind: fractional_factorial}"
        )
    )
    assert "fraction resolution 4, generators batching = kernels * cuda_graphs * overlap" in text
    assert "aliases  kernels*cuda_graphs + overlap*batching (cannot be separated)" in text


def test_a_plan_says_what_it_will_find_if_noise_is_as_before(
    cpu: Profile, model: ModelChoice
) -> None:
    published = provenance.ROOT / "reports" / "published" / "cpu-two-cores" / "embedded"
    text = said(plan_of(cpu, model, "design.blocks=6"), published)
    found = re.search(
        r"power    detects changes of ([\d.]+)% or more with probability 80%, "
        r"if the noise between blocks is as in embedded \(([\d.]+)%\)",
        text,
    )
    assert found
    assert 1 < float(found[1]) / float(found[2]) < 2, (
        "six blocks find about one and a half standard deviations"
    )


def test_a_detectable_effect_is_a_percentage_or_is_not_said(
    cpu: Profile, model: ModelChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = provenance.ROOT / "reports" / "published" / "cpu-two-cores" / "embedded"
    monkeypatch.setattr(block_count, "detectable", lambda *_: 53.1)
    text = said(plan_of(cpu, model, "design.blocks=6"), published)
    assert "power    6 blocks are too few to detect any change at alpha = 0.05" in text
    assert "5310" not in text


def test_validate_shows_launches_and_time_and_what_cannot_run_here() -> None:
    result = CliRunner().invoke(
        cli.app, ["validate", "embedded", "gpu-canonical", "--profile", "cpu"]
    )
    assert result.exit_code == 0, result.output
    assert re.search(
        r"ok       embedded: one_at_a_time, \d+ launches \(6 blocks of \d+ cells.*\), about [\d.]+ min",
        result.output,
    )
    assert "gpu-canonical: not on profile cpu: " in result.output
    small = [
        "validate",
        "embedded",
        "--profile",
        "cpu",
        "--set",
        "design.budget_s=20",
        "--set",
        "sizing=null",
    ]
    refused = CliRunner().invoke(cli.app, small)
    assert refused.exit_code == 1
    assert (
        "embedded.yaml (with overrides design.budget_s, sizing): design.budget_s: 2 blocks of"
        in refused.output
    )
