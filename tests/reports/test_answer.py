"""The answer of a report: a sentence for each workload, names that mean one thing, verdicts that fit
the interval beside them, and caveats.
"""

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from experiments.records import cell_names
from nanovllm.config import LEVELS
from reports import text
from reports.analysis import names
from reports.analysis.analyse import analyse
from reports.analysis.answer import answer
from reports.analysis.gate_and_launches import same_tokens
from reports.figures.ratio_plots import configurations
from reports.page.evidence import evidence
from reports.page.overview import overview
from reports.page.render import document
from reports.page.sections import results
from reports.statistics.intervals import Rule, judge
from reports.switches import by_switch
from tests.support.synthetic import (
    BASE_LEVELS,
    ON,
    cell_of,
    designed,
    factorial,
    gate_line,
    make_plan,
    make_records,
    one_at_a_time,
)

SPEEDUPS = {"prefix_cache": 1.0, "batching": 2.5, "tensor_parallel_size": 0.7, "hf": 0.8}


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections() -> Iterator[None]:
    """statsmodels collects garbage at every Holm adjustment: what other tests left behind need not
    be walked.
    """
    gc.freeze()
    yield
    gc.unfreeze()


def effects_of(analysis: dict[str, Any], cell: str) -> list[dict[str, Any]]:
    return [
        e for e in analysis["effects"] if e["metric"] == "output_tokens_per_s" and e["cell"] == cell
    ]


def test_the_strongest_interaction_is_told_with_the_answer() -> None:
    plan = make_plan(factorial(), 6)
    lines = make_records(plan, SPEEDUPS, sd=0.004, interactions={("prefix_cache", "batching"): 1.8})
    sentence = analyse(lines, plan)["answer"]["sentence"]
    pair = "batching=continuous and prefix_cache=on help each other (×1."
    assert f"strongest interaction: {pair}" in sentence


def test_an_interval_that_excludes_1_and_is_not_significant_is_called_suggestive() -> None:
    """What a reader sees beside the interval and what Holm's correction says are both in the sentence."""
    plan = make_plan(one_at_a_time(), 3)
    analysis = analyse(make_records(plan, {"batching": 1.2}, sd=0.03, seed=3), plan)
    effect = effects_of(analysis, cell="batching=continuous")[0]
    assert (effect["verdict"], effect["low"] > 1) == ("inconclusive", True)
    assert text.verdict(effect) == "suggestive: faster"
    assert "batching=continuous comes first (×1." in analysis["answer"]["sentence"]
    everything = effects_of(analysis, cell="all")[0]
    assert text.verdict(everything) == "suggestive: faster"
    assert (
        "suggestive: faster; not significant after correction for 4 tests"
        in analysis["answer"]["sentence"]
    )
    assert text.verdict(effect | {"leans": None}) == "inconclusive"
    assert text.verdict(effect | {"verdict": "faster"}) == "faster"


@pytest.mark.parametrize(("better", "side"), [("higher", "slower"), ("lower", "faster")])
def test_a_suggestive_effect_says_on_which_side_it_lies(better: Any, side: str) -> None:
    """A ratio of 0.77 is a loss of throughput, and a gain in latency."""
    effect: Any = {"low": 0.644, "high": 0.920, "p": 0.02}
    tests = [effect, *({"low": 0.9, "high": 1.1, "p": 0.9} for _ in range(13))]
    judge(tests, Rule(), better)
    assert text.verdict(effect) == f"suggestive: {side}"
    assert text.uncorrected(effect["tests"]) == "not significant after correction for 14 tests"


def test_a_switch_that_slows_everything_on_is_named() -> None:
    """Where everything on would be faster without one switch, the ratio of everything on hides it."""
    factors = list(ON)
    plan = make_plan(
        designed("both", factors),
        4,
        factors={name: {"baseline": off} for name, off in BASE_LEVELS.items()},
        design={"kind": "both"},
    )
    slow = {"prefix_cache": 3.0, "batching": 0.5, "tensor_parallel_size": 1.5}
    analysis = analyse(make_records(plan, slow, sd=0.002), plan)
    sentence = analysis["answer"]["by_workload"][0]["sentence"]
    assert "; batching=continuous, added last, makes it worse (×0.5" in sentence
    assert ", slower; without it ×4.5" in sentence
    words = "(everything on over everything on without it; such gains overlap and do not multiply)"
    assert f"; added last {words}, prefix_cache ×3." in sentence, "the largest first"
    assert "and tensor_parallel_size ×1.497 gain most" in sentence
    noisy = analyse(make_records(plan, {**slow, "batching": 0.93}, sd=0.2), plan)
    last = next(
        row for row in noisy["factors"] if (row["kind"], row["factor"]) == ("left out", "batching")
    )
    assert (text.verdict(last), last["ratio"] < 0.95) == ("inconclusive", True)
    assert "worse" not in noisy["answer"]["sentence"], "an inconclusive loss is none"
    elsewhere = make_plan(
        designed("both", factors),
        4,
        factors={
            name: {"baseline": off, "workloads": ["other"] if name == "batching" else []}
            for name, off in BASE_LEVELS.items()
        },
        design={"kind": "both"},
    )
    said = analyse(make_records(elsewhere, slow, sd=0.002), elsewhere)["answer"]["sentence"]
    assert "worse" not in said, "a switch that is not meant to act on this workload"
    helpful = analyse(make_records(plan, {**slow, "batching": 1.2}, sd=0.002), plan)
    assert "worse" not in helpful["answer"]["sentence"]


def test_every_workload_with_noise_is_named() -> None:
    """The one whose twin is furthest from 1 first; those whose twin is equivalent are left out."""
    effects = [
        {"role": "aa", "metric": "output_tokens_per_s", "verdict": "inconclusive", "workload": name}
        | {"ratio": ratio, "low": low, "high": high}
        for name, ratio, low, high in (("mixed", 1.006, 0.58, 1.73), ("shared", 0.898, 0.81, 0.99))
    ]
    effects.append(effects[0] | {"workload": "quiet", "verdict": "equivalent"})
    plan = make_plan(one_at_a_time(), 2)
    analysis = analyse(make_records(plan, SPEEDUPS), plan) | {
        "effects": effects,
        "workloads": {"mixed": {}, "shared": {}, "quiet": {}},
    }
    analysis["effects"].append(effects[1] | {"workload": "far", "verdict": "faster", "ratio": 1.4})
    analysis["workloads"]["far"] = {}
    far, near, *rest = answer(analysis)["caveats"]
    assert far.startswith(
        "Noise: two runs of the same configuration (the A/A twin) differed by 40 % on far (0.810 to 0.990) and "
        "10 % on shared (0.810 to 0.990): distrust single effects smaller than about ×1.4 on far and ×1.3 on shared."
    ), "throughput leads; the far end of an interval is what noise may look like"
    assert far.endswith(
        "On far the difference is significant: something besides the factors varies."
    )
    assert (
        "reads ×1.006 (0.580 to 1.730) on mixed: distrust single effects smaller than about "
        in near
    )
    assert near.endswith("×1.8 on mixed."), "by the same rule"
    assert not [caveat for caveat in (far, near, *rest) if "quiet" in caveat]


def test_a_noisy_machine_is_said() -> None:
    plan = make_plan(one_at_a_time(), 4)
    records = make_records(plan, SPEEDUPS, sd=0.1)
    launches = [record for record in records if record["kind"] == "launch"]
    for number, record in enumerate(launches):
        share = 0.4 if number < 3 else 0.0
        record["telemetry"]["summary"]["cpu_foreign"] = {"min": 0, "mean": share, "max": 1}
    caveats = analyse(records, plan)["answer"]["caveats"]
    assert any(
        "more than 20 % of the CPU during 3 of 28 counted launches (4 % on average)" in caveat
        for caveat in caveats
    )
    assert any(
        caveat.startswith("Noise: the A/A twin, which is all off run a second time, reads ×")
        for caveat in caveats
    )


def test_configurations_are_called_what_they_are() -> None:
    """`baseline` is everything off in one study and everything on in another."""
    plan = make_plan(one_at_a_time(), 2)
    records = make_records(plan, SPEEDUPS)
    for record in records:
        if record.get("cell") == "hf":
            record["resolved"]["version"] = "5.1"
    shown = analyse(records, plan)["shown"]
    assert shown == {
        "baseline": "all off",
        "baseline-again": "A/A twin",
        "prefix_cache=on": "prefix_cache=on",
        "batching=continuous": "batching=continuous",
        "tensor_parallel_size=2": "tensor_parallel_size=2",
        "all": "all on",
        "hf": "reference: HF 5.1",
    }
    assert cell_names.baseline_name({"prefix_cache": "on", "tensor_parallel_size": 1}) == "all on"
    assert cell_names.baseline_name({"prefix_cache": "on", "batching": "static"}) == "baseline"
    plan["cells"] |= cell_of("hf-eager", "reference", engine="hf")
    two = cell_names.shown_names(plan, [])
    assert (two["hf"], two["hf-eager"]) == ("reference: HF", "reference: HF (eager)")


def test_what_could_not_run_is_told_once_a_reason() -> None:
    entries = [
        {"factor": "tensor_parallel_size", "level": 2, "reason": "needs 2 GPUs"},
        {"factor": "data_parallel_size", "level": 2, "reason": "needs 2 GPUs"},
        {"factor": "tp2", "level": "tensor_parallel_size=2", "reason": "needs 2 GPUs"},
        {"factor": "kernels", "level": "triton", "reason": "needs a GPU"},
    ]
    assert names.not_applicable({"not_applicable": entries}) == [
        ("needs 2 GPUs", ["tensor_parallel_size=2", "data_parallel_size=2", "tp2"]),
        ("needs a GPU", ["kernels=triton"]),
    ]


def test_a_row_for_each_switch_in_place_of_all_but_one() -> None:
    """Each ratio of the table is that of the two throughputs beside it, up to the kinds of mean."""
    factors = list(ON)
    plan = make_plan(
        designed("both", factors),
        4,
        factors={name: {"baseline": off} for name, off in BASE_LEVELS.items()},
        design={"kind": "both"},
    )
    effects = {"prefix_cache": 3.0, "batching": 0.5, "tensor_parallel_size": 1.5}
    analysis = analyse(make_records(plan, effects, sd=0.002), plan)
    results = next(section for section in overview(plan, analysis) if section.key == "results")
    rows = {row[1]: row for row in results.tables[0].rows}
    assert not [title for title in rows if "all-but" in title]
    assert {f"{factor}, {way}" for factor in factors for way in ("alone", "added last")} <= {*rows}
    for title, (_, _, rate, ratio, *_) in rows.items():
        if "→" in rate:
            below, above = (float(part.replace(",", "")) for part in rate.split(" → "))
            assert float(ratio.removeprefix("×")) == pytest.approx(above / below, rel=0.02), title
    words = " ".join(results.notes)
    assert "On top: " not in words, "no row is"
    assert "one optimization alone: " in words
    assert "added last or on top: " in words
    assert "A/A twin: 1." in words, "a family of its own"
    drawn = [label for label, _ in configurations(analysis)]
    assert drawn == ["A/A twin", "all on", *(label for _, label in by_switch(analysis, "scaled"))]
    assert {title for title in rows if "," in title and "/" not in title} == {
        label for label in drawn if "," in label
    }, "the chart and the table have the same rows"


def found_by_the_cache(records: list[dict[str, Any]], found: dict[str, int]) -> None:
    """Writes into records how many prompt tokens the prefix cache of each cell found."""
    for record in records:
        if record["kind"] == "launch" and record["cell"] in found:
            for work in record["workloads"].values():
                work["toggles"]["prefix_cache"]["opportunity"] = found[record["cell"]]


def test_more_together_than_alone_is_said_with_the_counter_that_shows_why() -> None:
    """Everything on brings four times what its parts multiply to; a study of single toggles has no pair
    of them, but the cache finds more tokens in company.
    """
    plan = make_plan(one_at_a_time(), 4)
    records = make_records(
        plan, {"batching": 1.2}, sd=0.004, interactions={("prefix_cache", "batching"): 4.0}
    )
    found_by_the_cache(records, {"prefix_cache=on": 3840, "all": 18560})
    analysis = analyse(records, plan)
    (row,) = analysis["combinations"]
    assert row["ratio"] == pytest.approx(4.0, rel=0.03)
    assert row["low"] < 4.0 < row["high"]
    assert row["verdict"] == "help each other"
    sentence = analysis["answer"]["sentence"]
    assert ". Together they bring " in sentence
    assert " times (3." in sentence
    assert "what their single speedups multiply to, ×1." in sentence
    assert (
        ". What the counters show: prefix_cache=on beside batching=continuous: 18,560 prompt tokens found, 3,840 alone"
        in sentence
    )
    together = next(s for s in results(analysis) if s.key == "together")
    assert "18,560 prompt tokens found" in " ".join(together.lead)
    assert together.gist == "scaled: help each other"


def test_parts_that_do_not_act_on_each_other_are_not_said_to() -> None:
    plan = make_plan(one_at_a_time(), 4)
    records = make_records(plan, {"batching": 1.2, "prefix_cache": 1.5}, sd=0.004)
    analysis = analyse(records, plan)
    (row,) = analysis["combinations"]
    assert row["ratio"] == pytest.approx(1, abs=0.03)
    assert "multiply" not in analysis["answer"]["sentence"]


def test_the_partner_is_the_one_without_which_the_counter_falls() -> None:
    plan = make_plan(
        designed("both", list(ON)),
        4,
        factors={name: {"baseline": off} for name, off in BASE_LEVELS.items()},
        design={"kind": "both"},
    )
    records = make_records(plan, {}, interactions={("prefix_cache", "tensor_parallel_size"): 3.0})
    found_by_the_cache(
        records,
        {
            "prefix_cache=on": 100,
            "all": 900,
            "all-but-batching": 900,
            "all-but-tensor_parallel_size": 150,
        },
    )
    analysis = analyse(records, plan)
    why = names.why_together(analysis, "scaled")
    assert why == (
        "prefix_cache=on beside tensor_parallel_size=2: 900 prompt tokens found, 100 alone, "
        "150 with everything on but tensor_parallel_size"
    )


def test_what_an_optimization_did_is_said_in_words() -> None:
    row = {"factor": "prefix_cache", "level": "on", "engaged": [120, 120]}
    assert names.did(row | {"opportunity": [3840, 18560]}) == (
        "120 lookups, 3,840 to 18,560 prompt tokens found"
    )
    assert names.did(row | {"opportunity": [0, 0]}).endswith(": nothing to gain in this workload")
    assert names.did_in_short(row | {"opportunity": [3840, 18560]}) == "18,560 found"
    chunked = {"factor": "batching", "level": "chunked", "engaged": [179, 179]}
    assert names.did(chunked | {"opportunity": [35, 35]}) == (
        "179 steps, 35 with prefill beside decodes"
    )
    own = {"factor": "my_toggle", "level": "on", "engaged": [7, 7], "opportunity": None}
    assert names.did(own) == "7 times"


def test_every_toggle_has_words_for_its_counters() -> None:
    for factor, levels in LEVELS.items():
        for level in levels[1:]:
            counts = names.counts_of(factor, level)
            assert counts is not names._UNKNOWN, (factor, level)
            for opportunity in (None, [1, 2]):
                row = {"factor": factor, "level": level, "engaged": [1, 2]}
                said = names.did_in_short(row | {"opportunity": opportunity})
                assert said.rsplit(" ", 1)[-1] in names.UNITS, "explained below the table"


def test_the_number_of_tests_comes_from_one_count() -> None:
    """Two workloads, four changes: eight tests. All workloads together are four rows more, and no test
    of this family.
    """
    plan = make_plan(one_at_a_time(), 3, ("scaled", "shared"))
    analysis = analyse(make_records(plan, {"batching": 1.2}, sd=0.03, seed=3), plan)
    section = next(s for s in results(analysis) if s.key == "effects")
    assert sum(int(part.split()[0]) for part in section.gist.split(", ")) == 8
    assert "Holm's test over the 8 treatments of single workloads" in " ".join(section.lead)
    words = " ".join(next(s for s in overview(plan, analysis) if s.key == "results").notes)
    assert "Correction: each of 8 tests" in words
    assert "suggestive: faster or suggestive: slower" in words
    assert "not significant after correction for 8 tests" in words
    assert "The A/A twin is corrected apart, for 3 tests of its own: one a workload" in words


def test_the_gate_says_how_many_launches_gave_the_tokens_of_the_start() -> None:
    """Here the launches with two ranks round another way, and those of HF draw other samples."""
    plan = make_plan(one_at_a_time(), 3)
    records = make_records(plan, SPEEDUPS)
    launches = [record for record in records if record["kind"] == "launch"]
    start = next(record for record in launches if record["cell"] == "baseline")
    digest = start["workloads"]["scaled"]["tokens_digest"]
    others = ("hf", "tensor_parallel_size=2")
    for record in launches:
        served = record["workloads"]["scaled"]
        served["tokens_digest"] = "e" * 64 if record["cell"] in others else digest
    records.append(gate_line(plan, "scaled", "e" * 64))
    analysis = analyse(records, plan)
    tokens, outputs = analysis["gate"]["tokens_checked"], len(analysis["gate"]["rows"])
    assert analysis["answer"]["output"] == (
        f"Output: equivalent. Every judged token passed the gate ({tokens:,} tokens, {outputs} distinct outputs); "
        "identical to all off in 15 of 21 launches (with its own), the others "
        "differ where rounding decides between near-equal tokens."
    )
    assert same_tokens(analysis, "scaled") == (
        f"15 of 21 launches gave the tokens of all off, {tokens:,} judged"
    )
    gate = next(s for s in evidence(plan, analysis, "") if s.key == "gate")
    assert "Launches of tensor_parallel_size=2 and reference: HF gave other tokens" in " ".join(
        gate.lead
    )
    place = [column.title for column in gate.tables[0].columns].index("launches")
    made = {row[1]: row[place] for row in gate.tables[0].rows}
    assert made["reference: HF, tensor_parallel_size=2"] == "6"
    assert "15" in made.values()


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ("failed", "Output: NOT the same. The gate did not pass 1 of "),
        ("unjudged", "Output: not judged. The gate has checked no token"),
        ("some unjudged", "launches were not judged, so these do not count."),
        ("same", "Output: identical to all off in every launch. Every judged token passed"),
        ("drawn", "are of another engine (HF), which draws other samples."),
    ],
)
def test_whether_the_output_is_the_same_is_said_plainly(outputs: str, said: str) -> None:
    plan = make_plan(one_at_a_time(), 3)
    records = make_records(plan, SPEEDUPS)
    launches = [record for record in records if record["kind"] == "launch"]
    gates = [r for r in records if r["kind"] == "gate" and not r["is_negative_control"]]
    if outputs == "failed":
        gates[-1] |= {"status": "fail", "reason": "as told"}
    elif outputs == "unjudged":
        records = [record for record in records if record["kind"] != "gate"]
    elif outputs == "some unjudged":
        records = [record for record in records if record is not gates[-1]]
    else:
        start = next(record for record in launches if record["cell"] == "baseline")
        digest = start["workloads"]["scaled"]["tokens_digest"]
        for record in launches:
            served = record["workloads"]["scaled"]
            other = outputs == "drawn" and record["cell"] == "hf"
            served["tokens_digest"] = "e" * 64 if other else digest
        line = gate_line(plan, "scaled", "e" * 64)
        line["calibration"] |= {
            "distribution": {"z": 0.1, "z_limit": 4.9, "tokens": line["tokens_checked"]}
            | {"largest_log_evidence": 2.0, "log_evidence_limit": 20.0}
        }
        records += [line] if outputs == "drawn" else []
    analysis = analyse(records, plan)
    assert said in analysis["answer"]["output"]
    head = document(plan, records, analysis)
    assert head.output == analysis["answer"]["output"]
    assert head.output_verdict == {"failed": "slower", "unjudged": "inconclusive"}.get(
        outputs, "equivalent"
    )


def test_what_the_study_achieved_is_on_its_page() -> None:
    """The median interval, as the ratio it multiplies and divides by."""
    plan = make_plan(one_at_a_time(), 4)
    analysis = analyse(make_records(plan, SPEEDUPS, sd=0.05), plan)
    reach = sorted(
        (effect["high"] / effect["low"]) ** 0.5 - 1
        for effect in analysis["effects"]
        if effect["metric"] == "output_tokens_per_s" and effect["role"] in ("treatment", "all")
    )
    found = analysis["precision"]
    assert found["effects"] == len(reach) == 4
    assert found["half_width"] == pytest.approx((reach[1] + reach[2]) / 2)
    assert analyse([], plan)["precision"] is None
