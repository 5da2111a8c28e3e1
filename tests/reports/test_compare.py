"""A comparison of engines is fair or there is none: wrong checkpoints, unequal memory and tampered
outputs do not get through.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from experiments.__main__ import app
from experiments.gate import judge
from experiments.host import model_files
from experiments.host.model_files import ModelError
from experiments.launch import fairness
from experiments.launch.fairness import FairnessError
from experiments.launch.runner import Runner, tail
from experiments.records import store
from experiments.study import machine
from experiments.study.plan import build_plan
from experiments.study.spec import load_profile, load_study
from experiments.study.yaml_files import SpecError
from reports import text
from reports.analysis.analyse import analyse, ratios
from reports.page.render import render
from reports.page.table import print_table
from tests.support.synthetic import cell_of, make_plan, make_records

forked = pytest.mark.usefixtures("forked_processes")
ENGINE = "tests.support.offline_api_engine"
STUDY = f"""
name: compare-offline
settings: {{max_num_seqs: 4, max_num_batched_tokens: 64, max_model_len: 64, kv_cache_memory_bytes: 4194304}}
measurement: {{warm_up_requests: 2, warm_up_tokens: 2, timeout_s: 60, environment: {{OMP_NUM_THREADS: "1"}}}}
design: {{kind: listed, blocks: 2}}
factors: {{prefix_cache: {{levels: [off], baseline: on}}, batching: {{levels: [static], baseline: chunked}}}}
cells:
  other:
    role: reference
    engine: {ENGINE}
    levels: {{prefix_cache: on, batching: chunked}}
    config: {{enable_prefix_caching: true, enable_chunked_prefill: true}}
comparisons: {{like: {{ours: baseline, theirs: [other], rule: like-for-like}}}}
workloads: {{w: {{kind: random, num_requests: 6, prompt_tokens: [8, 20], output_tokens: [4, 10], temperature: 0}}}}
gate: {{}}
"""


def plan_of(folder: Path, *overrides: str) -> dict[str, Any]:
    (folder / "study.yaml").write_text(STUDY)
    study, applied = load_study(folder / "study.yaml", overrides)
    return build_plan(study, load_profile("cpu"), None, applied)


@pytest.fixture(autouse=True)
def _known_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"bandwidth_bytes_per_s": 1e11, "peak_flops": {"float32": 1e12, "bfloat16": 1e12}}
    monkeypatch.setattr(machine, "measure", lambda: speeds)


def run(plan: dict[str, Any], out: Path, **options: Any) -> list[dict[str, Any]]:
    with Runner(plan, out, resume=False, **options) as runner:
        runner.run([0])
    return store.read(out)


def keep(plan: dict[str, Any], cells: tuple[str, ...]) -> dict[str, Any]:
    """The plan with the launches of these cells of its first block only, in this order."""
    chosen = [
        entry
        for cell in cells
        for entry in plan["launches"]
        if entry["cell"] == cell and entry["block"] == 0
    ]
    plan = {**plan, "launches": chosen}
    return {**plan, "plan_hash": store.plan_hash(plan)}


@forked
def test_any_engine_with_the_offline_api_is_compared_gated_and_reported(
    tiny: Path, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path)
    found = run(plan, tmp_path / "out")
    assert {r["cell"]: r["status"] for r in found} == {"baseline": "ok", "aa": "ok", "other": "ok"}
    store.write_plan(plan, tmp_path / "plan.json")
    assert judge.main(["--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]) == 0
    analysis = analyse(store.read(tmp_path / "out"), plan)
    (entry,) = analysis["comparisons"]
    assert (entry["ours"], entry["theirs"], entry["breaches"]) == ("baseline", "other", [])
    assert entry["effects"]["output_tokens_per_s"]["w"]["n"] == 1
    markdown, _ = render(plan, store.read(tmp_path / "out"), analysis, tmp_path / "report")
    page = markdown.read_text()
    assert f"Against {ENGINE.rpartition('.')[2]}, comparison like, no verdict on w (×" in page, (
        "one block has no interval"
    )
    assert "Not compared" in page
    assert "quantization" in page


@forked
def test_a_wrong_checkpoint_is_refused(tiny: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    wrong = tmp_path / "wrong"
    shutil.copytree(tiny, wrong)
    weights = next(wrong.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    weights.write_bytes(bytes(content))
    with pytest.raises(ModelError, match="but the plan was made for"):
        Runner(plan, tmp_path / "out", resume=False, model=str(wrong))
    right = tmp_path / "right"
    shutil.copytree(tiny, right)
    with Runner(
        keep(plan, ("baseline", "other")), tmp_path / "later", resume=False, model=str(right)
    ) as runner:
        runner.run_launch(runner.pending()[0])
        shutil.copy(weights, right / weights.name)  # exchanged in mid-run
        with pytest.raises(
            store.RecordError,
            match=r"the checkpoint in .* has changed since this run began. Restore it and resume",
        ):
            runner.run()
        shutil.rmtree(right)
        with pytest.raises(
            store.RecordError, match=r"the checkpoint in .* has changed since this run began"
        ):
            runner.run()
    assert len(store.read(tmp_path / "later")) == 1, "what ran is kept"


@forked
def test_unequal_kv_bytes_stop_it(tiny: Path, tmp_path: Path) -> None:
    asked = plan_of(tmp_path, "cells.other.config.kv_cache_memory_bytes=8388608")
    with pytest.raises(
        FairnessError,
        match=r"'like' .* of baseline with other .*kv_cache_memory_bytes: 4194304 against 8388608",
    ):
        Runner(asked, tmp_path / "asked", resume=False)
    resolves_to_less = plan_of(
        tmp_path, "cells.other.config.misbehave=less_memory", "comparisons.like.rule=best"
    )
    plan = keep(resolves_to_less, ("baseline", "other", "aa"))
    with pytest.raises(
        FairnessError, match=r"kv_cache_bytes: 4194304 against 2097152.*finished launches are kept"
    ):
        run(plan, tmp_path / "out")
    assert [r["cell"] for r in store.read(tmp_path / "out")] == ["baseline", "other"], (
        "stopped at the first pair"
    )
    with pytest.raises(FairnessError, match="kv_cache_bytes"):
        Runner(plan, tmp_path / "out", resume=True)


@forked
def test_a_tampered_output_fails_the_gate(tiny: Path, tmp_path: Path) -> None:
    plan = keep(plan_of(tmp_path, "cells.other.config.misbehave=tamper"), ("baseline", "other"))
    store.write_plan(plan, tmp_path / "plan.json")
    run(plan, tmp_path / "out")
    assert judge.main(["--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]) == 1
    found = store.read(tmp_path / "out")
    digest = {
        r["cell"]: r["workloads"]["w"]["tokens_digest"] for r in found if r["kind"] == "launch"
    }
    verdicts = {r["tokens_digest"]: r["status"] for r in found if r["kind"] == "gate"}
    assert (verdicts[digest["baseline"]], verdicts[digest["other"]]) == ("pass", "fail")
    analysis = analyse(found, plan)
    assert (
        "no answer, no block holds both all on and reference: offline_api_engine"
        in analysis["answer"]["sentence"]
    )
    assert any("gate: fail" in row["reason"] for row in analysis["excluded"])


@forked
def test_an_engine_that_dies_in_mid_run_costs_its_own_launch_only(
    tiny: Path, tmp_path: Path
) -> None:
    plan = keep(plan_of(tmp_path, "cells.other.config.misbehave=die"), ("other", "baseline"))
    found = {r["cell"]: r for r in run(plan, tmp_path / "out")}
    assert (found["other"]["status"], found["baseline"]["status"]) == ("failed", "ok")
    assert (
        "exit status 3; its output ends with: the engine dies in mid-run as told"
        in found["other"]["reason"]
    )
    assert (tmp_path / "out" / "logs" / f"{found['other']['launch']}.a1.log").is_file()


def test_the_first_error_of_a_long_log_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "start\n(Worker pid=7) RuntimeError: no such kernel\n"
        + "\n".join(f"line {i}" for i in range(40))
    )
    assert tail(log, 2) == "(Worker pid=7) RuntimeError: no such kernel\n[...]\nline 38\nline 39"
    log.write_text("one\ntwo")
    assert tail(log, 2) == "one\ntwo"


# -------------------------------------------------------------------------------------------------
# the rules, without engines


def served(cell: str, **resolved: Any) -> dict[str, Any]:
    levels = {"prefix_cache": "on", "batching": "chunked", "compile": "off"}
    return {
        "cell": cell,
        "workloads": {"w": {"fingerprint": "f"}},
        "resolved": {
            "dtype": "float32",
            "kv_cache_bytes": 4096,
            "num_kv_blocks": 4,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "max_model_len": 64,
            "levels": levels,
            **resolved,
        },
    }


PLAN = {
    "workloads": {"w": {"fingerprint": "f"}},
    "cells": {"a": {"levels": {}}, "b": {"levels": {"prefix_cache": "on"}}},
}


@pytest.mark.parametrize(
    ("change", "of_best", "of_like"),
    [
        ({}, [], []),
        # a whole block less: rounding
        ({"kv_cache_bytes": 4096 - 1024, "num_kv_blocks": 3}, [], []),
        (
            {"kv_cache_bytes": 4096 - 1025, "num_kv_blocks": 4},
            ["kv_cache_bytes: 4096 against 3071"],
            None,
        ),
        ({"dtype": "bfloat16"}, ["dtype: float32 against bfloat16"], None),
        ({"kv_cache_bytes": None}, [], ["kv_cache_bytes: 4096 against None"]),
        ({"max_num_seqs": 9}, [], ["max_num_seqs: 8 against 9"]),
        ({"max_num_batched_tokens": 32}, [], ["max_num_batched_tokens: 64 against 32"]),
        ({"max_model_len": None}, [], ["max_model_len: 64 against None"]),
        (
            {"levels": {"prefix_cache": "on", "batching": "continuous"}},
            [],
            ["batching: chunked against continuous"],
        ),
        ({"levels": {"prefix_cache": "on", "compile": "on"}}, [], ["compile: off against on"]),
        ({"levels": {}}, [], ["b does not report its optimizations"]),
        ({"block_size": 7, "seed": 3}, [], []),
    ],
)
def test_what_each_rule_asks_for(
    change: dict[str, Any], of_best: list[str], of_like: list[str] | None
) -> None:
    ours, theirs = served("a"), served("b", **change)
    assert list(fairness.breaches(PLAN, "best", ours, theirs)) == of_best
    assert list(fairness.breaches(PLAN, "like-for-like", ours, theirs)) == (
        of_best if of_like is None else of_like
    )


def test_other_work_and_a_level_that_did_not_run_are_breaches() -> None:
    other_work = served("b") | {"workloads": {"w": {"fingerprint": "g"}}}
    assert list(fairness.breaches(PLAN, "best", served("a"), other_work)) == [
        "b served w with fingerprint g, the plan's is f"
    ]
    off = {"prefix_cache": "off"}
    found = list(
        fairness.breaches(PLAN, "like-for-like", served("a", levels=off), served("b", levels=off))
    )
    assert found == ["b was planned with prefix_cache=on, but ran with off"]


def test_our_switches_are_read_from_our_optimizations() -> None:
    ours = served(
        "a", optimizations={"prefix_cache": True, "batching": "chunked", "kernels": "compile"}
    )
    assert fairness.switches(ours["resolved"])["compile"] == "on"
    assert list(fairness.breaches(PLAN, "like-for-like", ours, served("b"))) == [
        "compile: on against off"
    ]
    rows = fairness.differences(ours["resolved"], served("b", block_size=128, seed=5)["resolved"])
    assert rows == [
        ("block_size", None, 128),
        ("compile", "on", "off"),
        ("kernels", "compile", None),
    ]


def test_a_setting_without_a_record_is_not_said_to_be_absent(tmp_path: Path) -> None:
    plan, lines = synthetic(1.0)
    for record in lines:
        if record["kind"] == "launch" and record["cell"] == "all":
            record["resolved"]["skip_tokenizer_init"] = True
    page = render(plan, lines, analyse(lines, plan), tmp_path)[0].read_text()
    assert "| `skip_tokenizer_init` | `true` | `not recorded` |" in page
    assert "has none" not in page


def test_latencies_are_promised_where_they_were_recorded(tmp_path: Path) -> None:
    plan, lines = synthetic(1.0)
    both = "The latencies of both engines are in the section on latency."
    assert both in render(plan, lines, analyse(lines, plan), tmp_path)[0].read_text()
    plan["cells"]["vllm"]["config"]["request_statistics"] = False
    for record in lines:
        if record["kind"] == "launch" and record["cell"] == "vllm":
            record["workloads"]["scaled"]["request_times_s"] = []
    page = render(plan, lines, analyse(lines, plan), tmp_path)[0].read_text()
    assert both not in page
    assert (
        "Latencies were not recorded for reference: vLLM (request statistics were off); those of the others"
        in page
    )


def test_a_comparison_stands_beside_its_twin_and_the_time_it_took(tmp_path: Path) -> None:
    """The A/A arm is the baseline once more: its ratio is shown where the baseline is compared, and
    nowhere else.
    """
    cells = (
        cell_of("baseline", "baseline")
        | cell_of("again", "aa")
        | cell_of("all", "all", ["prefix_cache"])
    )
    plan = make_plan(
        cells | cell_of("vllm", "reference", engine="vllm"),
        6,
        comparisons={
            "off": {"ours": "baseline", "theirs": ["vllm"], "rule": "best"},
            **COMPARISONS,
        },
    )
    lines = make_records(plan, {"vllm": 0.5}, sd=0.004)
    analysis = analyse(lines, plan)
    off, best = analysis["comparisons"]
    (twin,) = ratios(lines, plan, "again", "vllm")
    assert (off["twins"]["scaled"], best["twins"]) == (twin, {})
    assert "verdict" not in twin
    page = render(plan, lines, analysis, tmp_path)[0].read_text()
    rows = {
        row.split(" | ")[1]: row.split(" | ")[9:]
        for row in page.split("\n")
        if row.startswith("| `scaled` | ")
    }
    shown = f"{text.ratio(twin['ratio'])} ({text.interval(twin['low'], twin['high'])})"
    durations = {row["cell"]: row["duration_s"] for row in analysis["costs"]["work"]}
    served = sorted(
        r["workloads"]["scaled"]["duration_s"]
        for r in lines
        if r["kind"] == "launch" and r["cell"] == "vllm"
    )
    assert durations["vllm"] == pytest.approx((served[2] + served[3]) / 2)
    assert (rows["off"], rows["best"]) == ([f"{shown} |"], ["– |"])
    took = [text.seconds(durations[cell]) for cell in ("baseline", "vllm")]
    assert f"| `scaled` | `all off` | `vLLM` | {took[0]} | {took[1]} |" in page
    assert "A/A twin: the ratio with our configuration's second run" in page


def test_lines_of_code_say_where_they_were_counted(tmp_path: Path) -> None:
    plan, lines = synthetic(1.0)
    page = render(plan, lines, analyse(lines, plan), tmp_path)[0].read_text()
    assert "| loaded with everything on, on a CPU |" in page
    assert re.search(r"vLLM's count is of version \d+\.\d+\.\d+ on a CPU, eager", page)


def test_a_plan_without_a_digest_is_no_comparison(tiny: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    with pytest.raises(FairnessError, match="needs the digest of its checkpoint"):
        fairness.check_plan({**plan, "model": {**plan["model"], "digest": None}})


def test_a_comparison_names_cells_that_exist(tmp_path: Path) -> None:
    with pytest.raises(
        SpecError,
        match=r"comparisons\.like: 'others' is not a cell of this study; allowed: .*other",
    ):
        plan_of(tmp_path, "comparisons.like.theirs=[others]")


@pytest.mark.parametrize("study", ["compare-vllm", "compare-vllm-06b", "gpu-vllm", "gpu-vllm-8gb"])
def test_the_studies_against_vllm_ask_for_equal_terms(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits, dtype and KV bytes asked of vLLM are ours; every switch of it is set, none is left to
    a default.
    """
    sizes = {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    monkeypatch.setattr(
        model_files,
        "inspect",
        lambda preset, path, **_: {"path": str(tmp_path), "digest": "d" * 64},
    )
    plan = build_plan(
        load_study(study)[0], load_profile("h200" if study.startswith("gpu") else "cpu")
    )
    fairness.check_plan(plan)
    shared = (
        "dtype",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "kv_cache_memory_bytes",
    )
    theirs = [cell["config"] for cell in plan["cells"].values() if cell["engine"] == "vllm"]
    assert theirs
    for config in theirs:
        assert {key: config[key] for key in shared} == {
            key: plan["cells"]["baseline"]["config"][key] for key in shared
        }
        assert {
            "enable_prefix_caching",
            "enable_chunked_prefill",
            "async_scheduling",
            "enforce_eager",
        } <= set(config)
        assert "block_size" not in config, "pages of our size are not vLLM's best"


# ----------------------------------------------------------------------------------------------------------
# the first sentence

COMPARISONS = {"best": {"ours": "all", "theirs": ["vllm"], "rule": "best"}}


def synthetic(speed: float, sd: float = 0.004) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    cells = cell_of("baseline", "baseline") | cell_of("baseline-again", "aa")
    cells |= cell_of("all", "all", ["prefix_cache"]) | cell_of("vllm", "reference", engine="vllm")
    plan = make_plan(cells, 6, comparisons=COMPARISONS)
    return plan, make_records(plan, {"vllm": speed}, sd=sd)


@pytest.mark.parametrize(
    ("speed", "sd", "verdict", "said"),
    [
        (0.5, 0.004, "faster", "nanovllm is faster"),
        (2.0, 0.004, "slower", "nanovllm is slower"),
        (1.0, 0.004, "equivalent", "nanovllm is as fast, within 5 %,"),
        (1.0, 0.2, "inconclusive", "there is no clear winner"),
    ],
)
def test_the_report_answers_first(
    speed: float, sd: float, verdict: str, said: str, tmp_path: Path
) -> None:
    plan, lines = synthetic(speed, sd)
    analysis = analyse(lines, plan)
    answer = analysis["answer"]
    effect = analysis["comparisons"][0]["effects"]["output_tokens_per_s"]["scaled"]
    assert (answer["verdict"], effect["verdict"]) == (verdict, verdict)
    assert effect["low"] < 1 / speed < effect["high"]
    sentence = f"Against vLLM, everything on in both, {said} on scaled (×"
    assert answer["sentence"].startswith(sentence)
    assert re.search(r"95 % interval [\d.]+ to [\d.]+, 6 blocks\)", answer["sentence"])
    page = render(plan, lines, analysis, tmp_path)[0].read_text()
    assert page.index(sentence) < page.index("## "), "before every section"
    assert "TTFT, time to first token" in page
    head = page.split("## Evidence")[0]
    assert "| `scaled` | all on / vLLM, everything on in both |" in head
    assert f"| {text.verdict(effect)} | pass |" in head


def test_a_pair_of_our_own_cells_is_no_comparison_of_engines(tmp_path: Path) -> None:
    cells = cell_of("baseline", "baseline") | cell_of("alone", "treatment", ["prefix_cache"])
    cells |= cell_of("both", "treatment", ["prefix_cache", "batching"])
    plan = make_plan(
        cells,
        6,
        comparisons={"batching-on-top": {"ours": "both", "theirs": ["alone"], "rule": "best"}},
    )
    lines = make_records(plan, {"prefix_cache": 2.0, "batching": 1.25}, sd=0.004)
    analysis = analyse(lines, plan)
    sentence = analysis["answer"]["sentence"]
    assert sentence.startswith("On scaled, both gives 2."), "about the largest gain"
    assert "Against" not in sentence
    page = render(plan, lines, analysis, tmp_path)[0].read_text()
    assert "nanovllm against other engines" not in page
    assert "Was the comparison fair?" not in page
    pairs = page.split("<b>What one change adds to another</b>")[1].split("</details>")[0]
    (effect,) = [
        entry["effects"]["output_tokens_per_s"]["scaled"] for entry in analysis["comparisons"]
    ]
    assert effect["low"] < 1.25 < effect["high"]
    assert "| batching-on-top | `both` | `alone` | ×1.2" in pairs
    assert "| faster |" in pairs
    for record in lines:
        if record["kind"] == "launch":
            record["resolved"]["kv_cache_bytes"] = 2**28 if record["cell"] == "both" else 2**29
    page = render(plan, lines, analyse(lines, plan), tmp_path)[0].read_text()
    pairs = page.split("<b>What one change adds to another</b>")[1].split("</details>")[0]
    assert "No ratio of both to alone: kv_cache_bytes: 268435456 against 536870912." in pairs
    assert "×1.2" not in pairs


def test_an_unfair_pair_has_no_ratio(tmp_path: Path) -> None:
    plan, lines = synthetic(0.5)
    for record in lines:
        if record["kind"] == "launch":
            record["resolved"]["kv_cache_bytes"] = 2**28 if record["cell"] == "vllm" else 2**29
    analysis = analyse(lines, plan)
    assert analysis["comparisons"][0]["effects"] == {}
    assert (
        "the comparison was not fair (kv_cache_bytes: 536870912 against 268435456)"
        in analysis["answer"]["sentence"]
    )
    assert any("Not a fair comparison" in caveat for caveat in analysis["answer"]["caveats"])
    page = render(plan, lines, analysis, tmp_path)[0].read_text()
    assert "×2.0" not in page.split("<b>Was the comparison fair?</b>")[0]


def test_costs_are_told_apart() -> None:
    plan, lines = synthetic(1.0)
    launches = [r for r in lines if r["kind"] == "launch"]
    first = next(r for r in launches if r["cell"] == "vllm")
    first["total_s"] += 60.0 - first["load_s"]
    first["load_s"] = 60.0
    analysis = analyse(json.loads(json.dumps(lines)), copy.deepcopy(plan))
    rows = {row["cell"]: row for row in analysis["costs"]["launch"]}
    assert (rows["vllm"]["first_load_s"], rows["vllm"]["load_s"]) == (
        pytest.approx(60.4),
        pytest.approx(1.2),
    )
    assert rows["vllm"]["host_bytes"] == 500 << 20
    (work,) = [row for row in analysis["costs"]["work"] if row["cell"] == "all"]
    served_by_all = [r["workloads"]["scaled"] for r in launches if r["cell"] == "all"]
    per_s = [part["num_requests"] / part["duration_s"] for part in served_by_all]
    assert min(per_s) <= work["requests_per_s"] <= max(per_s)


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("vllm=/no/such/python", "no such program"),
        (f"vllm={sys.executable}", "has no vllm: run `make compare-vllm`, which installs"),
    ],
)
def test_an_interpreter_without_vllm_is_said_at_once(
    python: str, message: str, tiny: Path, tmp_path: Path
) -> None:
    done = CliRunner().invoke(
        app, ["compare", "--with", "vllm", "--out", str(tmp_path / "out"), "--python", python]
    )
    assert done.exit_code == 2
    assert message in done.output + done.stderr
    assert not (tmp_path / "out").exists(), "nothing was run"


def test_what_engines_run_with_is_told_apart(tmp_path: Path) -> None:
    """A value that one engine lacks is not the same for all launches; each value names its engines."""
    plan, lines = synthetic(1.0)
    for record in lines:
        if record["kind"] == "launch":
            own = plan["cells"][record["cell"]]["engine"]
            record["provenance"]["packages"] = {"torch": "2.1" if own == "vllm" else "2.2"}
            if own == "vllm":
                record["provenance"]["environment"] = {"LD_PRELOAD": "libgomp.so.1"}
    analysis = analyse(lines, plan)
    found = analysis["hardware"]
    assert "environment.LD_PRELOAD" not in found["provenance"]
    (absent, present) = found["varying"]["environment.LD_PRELOAD"]
    assert (absent.endswith("(vllm)"), present.startswith("not set")) == (True, True)
    assert "2.1 (vllm)" in found["varying"]["packages.torch"]
    page = render(plan, lines, analysis, tmp_path)[0].read_text()
    assert "Each engine runs with the packages that it pins: torch 2.1 (vllm)" in page


def test_the_settings_of_another_engine_are_told_in_its_names(tmp_path: Path) -> None:
    plan, lines = synthetic(1.0)
    for cell in plan["cells"].values():
        if cell["engine"] == "vllm":
            cell["config"] |= {"enforce_eager": True, "async_scheduling": False}
    page = render(plan, lines, analyse(lines, plan), tmp_path)[0].read_text()
    assert "enforce_eager=true, async_scheduling=false" in page


def test_the_terminal_puts_pairs_of_engines_first_with_both_throughputs() -> None:
    """Ratios to another engine stand in a table of their own, none of them cut."""
    plan, lines = synthetic(0.5)
    analysis = analyse(lines, plan)
    out = Console(record=True, width=80)
    print_table(analysis, out)
    shown = out.export_text()
    beside = shown[shown.index("ours / theirs") : shown.index("relative to ")]
    assert "…" not in beside
    (row,) = (line for line in beside.splitlines() if line.startswith(" all on / vLLM"))
    rates = {
        rate["cell"]: rate["mean"]
        for rate in analysis["rates"]
        if rate["metric"] == "output_tokens_per_s" and rate["workload"] == "scaled"
    }
    assert f"{text.number(rates['all'])} / {text.number(rates['vllm'])}" in row
    assert row.rstrip().endswith("faster")
    assert " / vLLM" not in shown[shown.index("relative to ") :]
