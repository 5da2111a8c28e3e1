"""Claims are judged by their rule from what the records hold, whichever way that falls; what has no
record is not judged.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from experiments import workloads
from experiments.records.store import plan_hash
from experiments.study.yaml_files import SpecError
from nanovllm.toggles.counters import flat
from reports.analysis.analyse import analyse
from reports.claims import claims
from reports.claims.claims import Claim, Judged, judge, read_claims, verdict_of
from reports.claims.measurements import Finding
from reports.claims.prefix_work import _replay, saved
from reports.claims.published_studies import Library, Study, library
from reports.claims.questions import values
from reports.page.render import render, write_markdown
from tests.support.synthetic import BASE_LEVELS, make_plan, make_records

EMPTY = Library({}, {})


def claim(name: str) -> Claim:
    return next(one for one in read_claims() if one.id == name)


def study(
    name: str, cells: dict[str, Any], speedups: dict[str, float], blocks: int = 4, **changes: Any
) -> Study:
    """A synthetic execution as if it were published."""
    plan = make_plan(cells, blocks, changes.pop("workloads", ("scaled",)), name=name)
    plan["profile"] |= changes.pop("profile", {})
    plan["plan_hash"] = plan_hash(plan)
    records = make_records(plan, speedups)
    for record in (record for record in records if record["kind"] == "launch"):
        record["provenance"]["gpus"] = changes.get("gpus", [])
    return Study(name, Path(), plan, records, analyse(records, plan))


def cell(role: str, engine: str = "nanovllm", **levels: Any) -> dict[str, Any]:
    levels = {} if engine != "nanovllm" else BASE_LEVELS | levels
    return {"engine": engine, "config": levels, "levels": levels, "role": role}


def shelf(*studies: Study, results: dict[str, Any] | None = None) -> Library:
    return Library({one.name: one for one in studies}, results or {})


def test_every_row_of_the_design_has_its_claim() -> None:
    ids = {one.id for one in read_claims()}
    assert ids == {
        "throughput-vs-vllm",
        "lines-of-code",
        "prefix-cache-hit-rate",
        "prefix-cache-computation",
        "triton-store-kvcache",
        "cuda-graphs-cpu-overhead",
        "scaling-8-gpus",
    }


@pytest.mark.parametrize("one", read_claims(), ids=lambda one: one.id)
def test_without_records_nothing_is_claimed(one: Claim) -> None:
    judged = judge(one, EMPTY)
    assert (judged.verdict, judged.findings) == ("not testable here", [])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.06, 1.2, "reproduced"),
        (1.053, 1.2, "reproduced"),
        (0.9, 1.05, "not reproduced"),
        (1.0, 1.1, "inconclusive"),
        (None, None, "inconclusive"),
    ],
)
def test_the_whole_interval_has_to_be_on_one_side(
    low: float | None, high: float | None, verdict: str
) -> None:
    assert verdict_of(Finding("", 1.07, low, high, "", "", "", True), 1.053) == verdict


@pytest.mark.parametrize(("speed", "verdict"), [(0.5, "reproduced"), (0.99, "not reproduced")])
def test_vllm_is_judged_by_the_configuration_against_which_we_do_worst(
    speed: float, verdict: str
) -> None:
    cells = {
        "baseline": cell("baseline"),
        "aa": cell("aa"),
        "slow": cell("reference", "vllm"),
        "fast": cell("reference", "vllm"),
    }
    one = claim("throughput-vs-vllm")
    found = study("gpu-vllm", cells, {"vllm": speed})
    for record in found.records:
        if record["kind"] == "launch" and record["cell"] == "slow":
            before = record["workloads"]["scaled"]["duration_s"]
            record["workloads"]["scaled"] = slower(record["workloads"]["scaled"], 4)
            record["total_s"] += record["workloads"]["scaled"]["duration_s"] - before
    found = Study(
        found.name, found.folder, found.plan, found.records, analyse(found.records, found.plan)
    )
    one = one.model_copy(
        update={
            "measure": one.measure
            | {"fingerprint": found.plan["workloads"]["scaled"]["fingerprint"]}
        }
    )
    found.analysis["answer"]["caveats"] = ["A noisy machine."]
    judged = judge(one, shelf(found))
    assert len(judged.findings) == 2
    assert [finding.what.split(" on ")[0] for finding in judged.deciding] == [
        "all off over vLLM (fast)"
    ]
    assert judged.verdict == verdict
    (section,) = claims.document([judged]).folded
    assert section.lead[-1] == "Caveats of gpu-vllm: A noisy machine."
    # not the canonical workload
    assert judge(claim("throughput-vs-vllm"), shelf(found)).verdict == "not testable here"
    breach = {"ours": "baseline", "theirs": "fast", "breaches": ["another checkpoint"]}
    unfair = Study(
        found.name,
        found.folder,
        found.plan,
        found.records,
        {**found.analysis, "comparisons": [breach]},
    )
    assert [finding.what.split(" on ")[0] for finding in judge(one, shelf(unfair)).deciding] == [
        "all off over vLLM (slow)"
    ]


def test_engines_are_compared_on_equal_numbers_of_gpus(tmp_path: Path) -> None:
    """vLLM on two GPUs is no match for our one: our cell on two stands against it, or none."""
    two = cell("reference", "vllm") | {"config": {"tensor_parallel_size": 2}}
    cells = {
        "baseline": cell("baseline"),
        "aa": cell("aa"),
        "vllm": cell("reference", "vllm"),
        "vllm-tp2": two,
        "cached": cell("treatment", prefix_cache="on", tensor_parallel_size=2),
    }
    one = claim("throughput-vs-vllm")

    def judged(**more: Any) -> list[str]:
        found = study(
            "gpu-vllm",
            {**cells, **more},
            {"vllm": 0.5, "tensor_parallel_size": 1.8},
            profile={"device": "cuda"},
        )
        measure = one.measure | {"fingerprint": found.plan["workloads"]["scaled"]["fingerprint"]}
        page = render(found.plan, found.records, found.analysis, tmp_path)[0].read_text()
        assert "Not on equal devices: all off ran on 1 device, vLLM (tp2) on 2" in page
        assert "vLLM on 1" not in page
        return [
            each.what
            for each in judge(one.model_copy(update={"measure": measure}), shelf(found)).findings
        ]

    (alone,) = judged()
    assert alone.startswith("all off over vLLM on scaled")
    _, both = judged(tp2=cell("treatment", tensor_parallel_size=2))
    assert both.startswith("tp2 over vLLM (tp2) on scaled")
    assert both.endswith("per rank, 2 GPUs each")


def slower(work: dict[str, Any], times: float) -> dict[str, Any]:
    return work | {
        "duration_s": work["duration_s"] * times,
        "request_times_s": [
            [moment * times for moment in moments] for moments in work["request_times_s"]
        ],
        "step_times_s": [[step[0] * times, *step[1:]] for step in work["step_times_s"]],
    }


def test_scaling_is_per_device_and_needs_the_devices() -> None:
    cells = {
        "baseline": cell("baseline"),
        "aa": cell("aa"),
        "eight": cell("treatment", tensor_parallel_size=8),
    }
    eight = study("scaling", cells, {"tensor_parallel_size": 7.2}, profile={"num_devices": 8})
    judged = judge(claim("scaling-8-gpus"), shelf(eight))
    assert judged.verdict == "reproduced"
    assert judged.deciding[0].value == pytest.approx(0.9, rel=0.05)
    one = study("scaling", cells, {"tensor_parallel_size": 7.2}, profile={"num_devices": 1})
    assert judge(claim("scaling-8-gpus"), shelf(one)).verdict == "not testable here"


def test_host_time_is_what_graphs_save_of_it() -> None:
    """The prefix cache stands in for the graphs, which the synthetic machine does not have."""
    cells = {
        "baseline": cell("baseline"),
        "aa": cell("aa"),
        "graphs": cell("treatment", prefix_cache="on"),
    }
    plain = study("graphs", cells, {})
    fingerprint = plain.plan["workloads"]["scaled"]["fingerprint"]
    for record in (record for record in plain.records if record["kind"] == "launch"):
        work = record["workloads"]["scaled"]
        # of its steps the host works, and else waits
        share = 0.15 if record["cell"] == "graphs" else 0.5
        work["device_wait_s"] = (1 - share) * sum(step[0] for step in work["step_times_s"])
    one = claim("cuda-graphs-cpu-overhead")
    measure = one.measure | {"factor": "prefix_cache", "fingerprint": fingerprint}
    judged = judge(one.model_copy(update={"measure": measure}), shelf(plain))
    assert judged.verdict == "reproduced"
    assert judged.deciding[0].value == pytest.approx(0.7, abs=0.03)
    assert [finding.what.split(" a step")[0] for finding in judged.findings] == [
        "host time",
        "CPU time, spinning included,",
    ]
    for record in (record for record in plain.records if record["kind"] == "launch"):
        del record["workloads"]["scaled"]["device_wait_s"]  # as records were before they told
    assert (
        judge(one.model_copy(update={"measure": measure}), shelf(plain)).verdict
        == "not testable here"
    )


def benchmark_result(ratio: float, inside: bool = False) -> dict[str, Any]:
    """As benchmarks/bench_kernels.py writes it, alone or under pytest (`inside`)."""
    rows = [
        {
            "group": f"store KV: {tokens} tokens",
            "implementation": name,
            "shape": f"{tokens} tokens",
            "gb_per_s": 1.5,
        }
        | (
            {"times_slower_than_triton": [times, 0.99 * times, 1.01 * times]}
            if name == "torch"
            else {}
        )
        for tokens, times in ((8, 9.0), (256, ratio))
        for name in ("torch", "triton")
    ]
    entries = [
        {
            "group": row["group"],
            "extra_info": {k: v for k, v in row.items() if k != "group"},
            "stats": {},
        }
        for row in rows
    ]
    machine = {"device": "NVIDIA H200", "torch": "2.11"}
    return {
        "machine_info": machine,
        "benchmarks": [{"group": None, "extra_info": {"rows": rows}}] if inside else entries,
    }


@pytest.mark.parametrize("inside", [False, True])
def test_kernels_are_judged_at_the_shape_of_a_decode_step(inside: bool) -> None:
    one = claim("triton-store-kvcache")
    fast = judge(one, shelf(results={"h200/kernels.json": benchmark_result(5.0, inside)}))
    assert (fast.verdict, len(fast.findings), len(fast.deciding)) == ("reproduced", 2, 1)
    assert (fast.deciding[0].what, fast.deciding[0].hardware) == (
        "torch over triton: store KV: 256 tokens",
        "NVIDIA H200",
    )
    assert (
        judge(one, shelf(results={"h200/kernels.json": benchmark_result(2.0, inside)})).verdict
        == "not reproduced"
    )
    assert (
        judge(one, shelf(results={"h200/kernels.json": benchmark_result(4.0, inside)})).verdict
        == "inconclusive"
    )
    several = {f"h200/kernels-{i}.json": benchmark_result(5.0 + 0.01 * i, inside) for i in range(4)}
    judged = judge(one, shelf(results=several))
    assert ("4 processes" in judged.deciding[0].evidence, judged.verdict) == (True, "reproduced")


def test_lines_are_compared_like_with_like() -> None:
    counts = {
        "kind": "code-lines",
        "nanovllm": {"core": {"lines": 1200}},
        "vllm": {"version": "1", "loaded": {"lines": 50_000}},
    }
    one = claim("lines-of-code")
    assert judge(one, shelf(results={"lines.json": counts})).verdict == "reproduced"
    (finding,) = judge(one, shelf(results={"lines.json": counts})).findings
    assert finding.evidence == "counted in runs on a CPU; vLLM 1"
    counts["vllm"]["loaded"]["lines"] = 49_000  # type: ignore[index]
    assert judge(one, shelf(results={"lines.json": counts})).verdict == "not reproduced"


def test_most_blocks_decide_whatever_they_say() -> None:
    cells = {
        "baseline": cell("baseline"),
        "aa": cell("aa"),
        "eight": cell("treatment", tensor_parallel_size=8),
    }
    good = study("good", cells, {"tensor_parallel_size": 7.6}, 3, profile={"num_devices": 8})
    bad = study("bad", cells, {"tensor_parallel_size": 4.0}, 6, profile={"num_devices": 8})
    judged = judge(claim("scaling-8-gpus"), shelf(good, bad))
    assert (judged.verdict, len(judged.findings)) == ("not reproduced", 2)


@pytest.fixture(scope="module")
def conversation() -> Study:
    """A study of conversations whose counters are those of the real scheduler."""
    off, on = {"prefix_cache": "off"}, {"prefix_cache": "on"}
    cells = {
        "baseline": cell("baseline", **off),
        "aa": cell("aa", **off),
        "cached": cell("treatment", **on),
    }
    plan = make_plan(cells, 3, name="conversation")
    work = workloads.build(
        "conversation", "conversation", {"num_conversations": 4, "turns": 3, "system_tokens": 64}
    )
    plan["workloads"] = {"conversation": workloads.summarize(work)}
    for launch in plan["launches"]:
        launch["workload_order"] = ["conversation"]
    plan["plan_hash"] = plan_hash(plan)
    records = make_records(plan, {"prefix_cache": 2.0})
    settings = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "num_kv_blocks": 400,
        "block_size": 16,
    }
    resolved = settings | {"optimizations": {"batching": "continuous", "prefix_cache": True}}
    _, stats = _replay(work["waves"], resolved)
    for record in (record for record in records if record["kind"] == "launch"):
        record["resolved"] = resolved
        record["workloads"]["conversation"]["counters"] = flat(stats)
    return Study("cpu/conversation", Path(), plan, records, analyse(records, plan))


def test_the_work_saved_is_counted_request_by_request(conversation: Study) -> None:
    record = next(
        r for r in conversation.records if r["kind"] == "launch" and r["cell"] == "cached"
    )
    one = saved(record, conversation.plan, "conversation")
    assert (
        one.cached_tokens
        == record["workloads"]["conversation"]["counters"]["prefix_hit_tokens"]
        > 0
    )
    assert one.prompt_tokens == conversation.plan["workloads"]["conversation"]["prompt_tokens"]
    assert one.of_prefill[0] == one.of_prefill[1]
    # what is found stands first, where attention is cheap
    assert 0.9 * one.hit_rate < one.of_prefill[0] < one.hit_rate
    assert 0 < one.of_all[0] < one.of_prefill[0]


def test_a_replay_that_differs_from_the_record_is_not_believed(conversation: Study) -> None:
    """The scheduler has changed since: the tokens are the record's, the FLOPs lie between the least
    and the most.
    """
    record = json.loads(
        json.dumps(
            next(r for r in conversation.records if r["kind"] == "launch" and r["cell"] == "cached")
        )
    )
    exact = saved(record, conversation.plan, "conversation")
    record["workloads"]["conversation"]["counters"]["steps"] += 1
    bounded = saved(record, conversation.plan, "conversation")
    assert bounded.cached_tokens == exact.cached_tokens
    low, high = bounded.of_prefill
    assert low < exact.of_prefill[0] < high < low + 0.1
    record["resolved"]["optimizations"]["overlap"] = True
    assert saved(record, conversation.plan, "conversation") == exact, (
        "overlap takes a few steps more"
    )


def test_a_conversation_is_judged_by_tokens_flops_and_time(conversation: Study) -> None:
    rate = judge(claim("prefix-cache-hit-rate"), shelf(conversation))
    assert rate.verdict in ("reproduced", "not reproduced")
    assert "the same in 3 launches" in rate.deciding[0].evidence
    computation = judge(claim("prefix-cache-computation"), shelf(conversation))
    assert [finding.what.split(" saved")[0] for finding in computation.deciding] == [
        "prefill FLOPs",
        "serving time",
    ]
    assert computation.verdict == "not reproduced"  # twice as fast saves half of the time
    asked = values(shelf(conversation))
    assert "hit rate on conversation (3 turns)" in asked["found"](
        "prefix-cache-hit-rate", "hit rate"
    )
    assert asked["effect"]("conversation", "cached", "conversation").startswith("×")
    assert asked["effect"]("conversation", "nothing", "conversation") == "not measured"


def test_the_page_says_what_is_missing_and_escapes_what_is_not_ours(tmp_path: Path) -> None:
    hostile = "<script>x</script> | `a`"
    judged = [judge(one, EMPTY) for one in read_claims()]
    found = Finding(hostile, 0.9, 0.88, 0.92, hostile, hostile, hostile, True)
    judged.append(Judged(claim("scaling-8-gpus"), [found], [found], "reproduced"))
    page = claims.document(judged)
    assert (
        page.answers[0][0]
        == "Of 8 claims: 1 reproduced, 0 not reproduced, 0 inconclusive, 7 not testable here."
    )
    assert (
        sum(
            "No published record has it" in line for section in page.folded for line in section.lead
        )
        == 7
    )
    write_markdown(tmp_path / "claims.md", "report.md.j2", report=page, pictures={}, folder="")
    written = (tmp_path / "claims.md").read_text()
    assert r"&lt;script&gt;x&lt;/script&gt; \| \`a\`" in written
    assert "<script>" not in re.sub(r"(`+).+?\1", "", written)


def test_a_model_never_stands_in_a_table_of_measurements() -> None:
    """Beside a measured figure of the same quantity it would be read as one."""
    decisive = Finding("two GPUs", 0.9, 0.88, 0.92, "3 blocks", "here/it", "2 x GPU", True)
    other = Finding("one block", 0.8, None, None, "1 block", "here/old", "2 x GPU", False)
    model = Finding(
        "eight GPUs", 0.7, None, None, "modelled", "here/it", "2 x GPU", False, modelled=True
    )
    one = Judged(claim("scaling-8-gpus"), [model, other, decisive], [decisive], "reproduced")
    (section,) = claims.document([one]).folded
    assert section.gist == "reproduced"
    tables = {table.caption: [row[0] for row in table.rows] for table in section.tables}
    assert tables == {
        "What decides": ["two GPUs"],
        "Other measurements, which do not decide": ["one block"],
        "Modelled, not measured": ["eight GPUs"],
    }
    assert section.tables[2].columns[1].title == "modelled"


def test_an_unknown_measurement_names_what_is_allowed(tmp_path: Path) -> None:
    text = claims.CLAIMS.read_text().replace("kind: code_lines", "kind: guess")
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"'guess' is unknown; allowed: .*code_lines"):
        read_claims(path)
    path.write_text(claims.CLAIMS.read_text().replace("    rule:", "    ruel:", 1))
    with pytest.raises(SpecError, match="ruel: unknown key"):
        read_claims(path)


def test_a_file_that_is_no_result_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "some.json").write_text("[1, 2]")
    (tmp_path / "notes" / "other.json").write_text('{"benchmarks": 3}')
    found = library(tmp_path)
    assert (dict(found.studies), list(found.results)) == ({}, ["notes/other.json"])
    assert judge(claim("triton-store-kvcache"), found).verdict == "not testable here"
