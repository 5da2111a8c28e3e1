"""Studies whose requests arrive over time: what a plan holds, and what is refused before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.study import machine, plan, spec
from experiments.study.yaml_files import SpecError

STUDY = """
name: online
metric: goodput_requests_per_s
settings: {max_num_seqs: 8, max_num_batched_tokens: 512, max_model_len: 512, block_size: 16}
load: {slo: {ttft_s: 0.5}}
factors: {batching: {levels: [continuous]}}
workloads:
  slow: {kind: random, num_requests: 8, arrivals: {process: poisson, rate: 2}}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "online.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture(autouse=True)
def speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring this machine takes seconds, and does not matter here."""
    found = {"bandwidth_bytes_per_s": 1e10, "peak_flops": {"float32": 1e11, "bfloat16": 1e11}}
    monkeypatch.setattr(machine, "measure", lambda: found)


def built(path: Path, *overrides: str) -> Any:
    loaded, applied = spec.load_study(path, overrides)
    profile = spec.load_profile("cpu").model_copy(update={"cpu_cores": 2})
    return plan.build_plan(loaded, profile, overrides=applied)


def test_a_plan_holds_the_rules_of_the_load(study: Path) -> None:
    made = built(study, "load.slo=mlperf-llama3.1-8b")
    assert made["study"]["load"] == {
        "slo": {"ttft_s": 2.0, "tpot_s": 0.1},
        "slo_name": "mlperf-llama3.1-8b",
        "attainment": 0.99,
        "max_lateness_s": 0.01,
        "min_delivered": 0.98,
    }
    assert made["workloads"]["slow"]["params"]["arrivals"]["rate"] == 2


WRONG = [
    (["workloads.slow.arrivals.rate=0"], r"online.yaml.*workloads.slow.*rate: 0 is not allowed"),
    (["load.slo=mlperf"], r"'mlperf' is not a preset; allowed: mlperf-llama2-70b"),
    (["load.slo={ttft: 1}"], "allowed: a mapping of one or more of ttft_s"),
    (["load.attainment=2"], "load.attainment"),
    (["load={}"], "metric: needs an objective"),
    (["load={}", "metric=output_tokens_per_s", "workloads.slow.arrivals={process: poisson, search: {low: 1, high: 4}}"],
     "workloads.slow.arrivals.search: needs an objective"),
    (["metric=sustainable_requests_per_s"], "needs a workload with arrivals.search"),
    (["workloads={slow: {kind: random}}"], "load: no workload of this study has arrivals"),
    (["cells={hf: {role: reference, engine: hf}}"], "cell hf cannot serve workloads with arrivals: HF's"),
    (["fixed={data_parallel_size: 2}"], r"cell baseline cannot serve .*data_parallel_size"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_what_cannot_be_is_refused(study: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        built(study, *overrides)


def test_a_metric_under_load_needs_a_load(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text(
        "name: plain\nmetric: goodput_requests_per_s\nfactors: {batching: {levels: [continuous]}}\n"
        "workloads: {scaled: {kind: random, num_requests: 8}}\n"
    )
    with pytest.raises(SpecError, match="needs a workload with arrivals; allowed without"):
        spec.load_study(path)
