"""A study with a lossy optimization: its margins, its plan, its price records. No optimization has to be
lossy for this: the tests declare batching to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import workloads
from experiments.price import measure, rules
from experiments.price.measure import PriceError, Pricing, described, main
from experiments.records import merged_folders, store
from experiments.records.reading import read_records
from experiments.study import machine, plan, spec
from experiments.study.yaml_files import SpecError
from nanovllm.config import BASELINE
from nanovllm.toggles.row import Toggle

STUDY = """
name: rounded
settings: {max_num_seqs: 4, max_num_batched_tokens: 256, max_model_len: 256, block_size: 16, kv_cache_memory_bytes: 8388608}
design: {blocks: 2}
factors: {batching: {levels: [continuous]}, prefix_cache: {levels: [on]}}
workloads:
  scaled: {kind: random, num_requests: 4, prompt_tokens: 8, output_tokens: 4}
price:
  margins: {kl: 0.005}
  prompts: {kind: random, num_requests: 32, prompt_tokens: [4, 8], vocab_size: 2048}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "rounded.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture(autouse=True)
def lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batching changes the output here; and measuring this machine takes seconds."""
    monkeypatch.setattr(rules, "lossless_levels", lambda: {"batching": "static"})
    speeds = {"bandwidth_bytes_per_s": 1e10, "peak_flops": {"float32": 1e11, "bfloat16": 1e11}}
    monkeypatch.setattr(machine, "measure", lambda: speeds)


def built(path: Path, *overrides: str) -> Any:
    loaded, applied = spec.load_study(path, overrides)
    profile = spec.load_profile("cpu").model_copy(update={"cpu_cores": 2})
    return plan.build_plan(
        loaded, profile, spec.ModelChoice(preset="tiny", dtype="float32"), overrides=applied
    )


# What is lossy


def test_a_toggle_that_says_so_is_lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    row = Toggle(levels=("none", "int8"), engaged=lambda stats: 0)
    object.__setattr__(row, "lossy", True)
    exact = Toggle(levels=(False, True), engaged=lambda stats: 0)
    monkeypatch.setattr(rules, "toggles_of", lambda _: {"quantization": row, "overlap": exact})
    assert rules.lossless_levels() == {"quantization": "none"}
    on = {"optimizations": {"quantization": "int8", "overlap": True}}
    assert rules.lossy_levels(on) == {"quantization": "int8"}
    assert rules.lossy_levels({"optimizations": {"quantization": "none", "overlap": True}}) == {}
    # another engine's setting of the same name
    assert rules.lossy_levels({"quantization": "int8"}) == {"quantization": "int8"}
    assert rules.lossy_levels({"quantization": None, "dtype": "bfloat16"}) == {}


# The study and its plan


def test_a_plan_holds_margins_prompts_and_lossy_cells(study: Path) -> None:
    made = built(study)
    price = made["price"]
    assert price["margins"] == {"kl": 0.005, "top_choice": 0.01, "log_perplexity": 0.01}
    assert price["level"] == 0.05
    assert price["cells"] == {"batching=continuous": {"batching": "continuous"}}
    assert price["prompts"]["num_requests"] == 32
    assert "price" not in made["study"]
    assert made["plan_hash"] == store.plan_hash(made)
    assert json.loads(json.dumps(made)) == made


def test_another_margin_or_other_prompts_are_another_plan(study: Path) -> None:
    hashes = {
        built(study, *change)["plan_hash"]
        for change in (
            (),
            ("price.margins.kl=0.006",),
            ("price.level=0.01",),
            ("price.prompts.seed=1",),
        )
    }
    assert len(hashes) == 4


def test_a_study_that_states_none_gets_the_default_margins(study: Path) -> None:
    study.write_text(STUDY.partition("price:")[0])
    price = built(study)["price"]
    assert price["margins"] == rules.MARGINS
    assert price["prompts"]["num_requests"] >= rules.LEAST_PROMPTS


def test_a_study_without_lossy_cells_has_the_plan_it_had(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "lossless_levels", dict)
    study.write_text(STUDY.partition("price:")[0])
    assert "price" not in built(study)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "price.margins={klm: 0.1}",
            "klm: unknown metric; allowed: kl, top_choice, log_perplexity",
        ),
        ("price.margins.kl=0", "allowed: a number above 0 and below 10"),
        ("price.margins.kl=low", "allowed: a number above 0 and below 10"),
        ("price.margins=0.1", "no mapping; allowed: {kl: 0.02"),
        ("price.level=0.9", "less than or equal to 0.2"),
        ("price.margin=0.1", "margin"),
        ("price.prompts={kind: random, arrivals: {process: poisson, rate: 1}}", "do not arrive"),
        ("price.prompts.kind=poem", "poem"),
    ],
)
def test_what_a_margin_may_not_be(study: Path, override: str, said: str) -> None:
    with pytest.raises(SpecError, match=said.replace("{", r"\{")):
        spec.load_study(study, [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("price.prompts.num_requests=31", "needed: at least 32 prompts"),
        ("price.prompts.prompt_tokens=1", "each of two tokens or more"),
        ("price.prompts.prompt_tokens=400", "price.prompts has a request of 401 tokens"),
    ],
)
def test_prompts_that_cannot_give_a_price_are_refused(
    study: Path, override: str, said: str
) -> None:
    with pytest.raises(SpecError, match=said):
        built(study, override)


def test_margins_without_anything_lossy_are_refused(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "lossless_levels", lambda: {"quantization": "none"})
    with pytest.raises(SpecError, match="vary an optimization that does: quantization"):
        spec.load_study(study)


# Measuring


def test_a_lossy_cell_gets_a_price_record(
    study: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = built(study), tmp_path / "out"
    store.write_plan(made, out / store.PLAN)
    command = ["--plan", str(out / store.PLAN), "--out", str(out)]
    assert main(command) == 0
    assert "batching=continuous: " in capsys.readouterr().err
    (record,) = store.read(out)
    assert record["kind"] == "price"
    assert record["status"] == "ok", record["reason"]
    assert record["levels"] == {"batching": "continuous"}
    assert record["fingerprint"] == made["price"]["prompts"]["fingerprint"]
    assert (record["dtype"], record["reference_dtype"]) == ("float32", "float64")
    assert record["resolved"]["optimizations"]["batching"] == "continuous"
    figures = record["figures"]
    assert figures is not None
    tokens = figures["prompts"]["tokens"]
    drawn = workloads.rebuild("price.prompts", made["price"]["prompts"])
    lengths = [len(r["prompt_token_ids"]) - 1 for wave in drawn["waves"] for r in wave]
    assert tokens == lengths
    # batching computes the same, so this price is that of float32
    assert sum(figures["prompts"]["engine"]["kl"]) / sum(tokens) < 1e-9
    assert "top choice kept in 100.0%" in described(record)
    assert main([*command, "--resume"]) == 0
    assert len(store.read(out)) == 1
    assert read_records(out / store.RECORDS).notes == []


def test_what_cannot_be_measured_is_recorded_with_its_reason(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = built(study), tmp_path / "out"
    made["cells"]["batching=continuous"]["engine"] = "hf"
    made["cells"]["batching=continuous"]["config"] = {"dtype": "float32"}
    made["plan_hash"] = store.plan_hash(made)
    store.write_plan(made, out / store.PLAN)
    assert main(["--plan", str(out / store.PLAN), "--out", str(out)]) == 1
    (record,) = store.read(out)
    assert record["kind"] == "price"
    assert (record["status"], record["figures"]) == ("error", None)
    assert "the adapter of hf cannot tell" in str(record["reason"])
    assert "not measured: the adapter of hf" in capsys.readouterr().err


def test_an_engine_whose_logits_are_no_numbers_has_no_price(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflows(*_: Any) -> Any:
        raise ValueError("the engine's logits at position 3 are not finite")

    monkeypatch.setattr(measure, "price_of", overflows)
    with store.Folder(tmp_path / "out") as folder:
        record = Pricing(built(study), folder).measure("batching=continuous")
    assert record["status"] == "error"
    assert "position 3" in str(record["reason"])


def test_a_plan_without_lossy_cells_has_nothing_to_measure(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = built(study)
    del made["price"]
    made["plan_hash"] = store.plan_hash(made)
    with (
        store.Folder(tmp_path / "out") as folder,
        pytest.raises(PriceError, match="nothing has a price"),
    ):
        Pricing(made, folder)
    store.write_plan(made, tmp_path / "plan.json")
    assert main(["--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]) == 2
    assert "nothing has a price" in capsys.readouterr().err


def test_a_cell_is_measured_in_short_steps_with_its_own_settings() -> None:
    config = {"dtype": "float32", "max_num_seqs": 64, "optimizations": vars(BASELINE)}
    allowed = ("dtype", "max_num_seqs", "max_num_batched_tokens", "seed", "optimizations")
    found = measure.settings_of(config, allowed)
    assert found == {**config, "max_num_seqs": 1, "max_num_batched_tokens": 16, "seed": 0}
    assert measure.settings_of({"dtype": "float32"}, ("dtype",)) == {"dtype": "float32"}


# Records


def price_record(made: Any, **change: Any) -> Any:
    return {
        "kind": "price",
        "schema": 1,
        "study": "rounded",
        "plan_hash": made["plan_hash"],
        "cell": "batching=continuous",
        "status": "ok",
        **change,
    }


def test_an_error_does_not_replace_a_price_when_visits_are_merged(study: Path) -> None:
    made = built(study)
    good, bad = price_record(made), price_record(made, status="error")
    for order in ([good, bad], [bad, good]):
        merged, _ = merged_folders.combine(made, [[record] for record in order])
        assert [record["status"] for record in merged] == ["error", "ok"]
