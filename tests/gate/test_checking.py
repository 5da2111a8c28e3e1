"""`make check`: all pairs are covered, the work is what was promised, any adapter can be the peer,
and a wrong verdict is seen.
"""

from __future__ import annotations

import io
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import experiments.__main__ as cli
from experiments import look
from experiments.checking import jobs, judging, page, run, work
from experiments.checking.jobs import CONTROL, SAMPLED, TRUNCATED, Job, Scope
from experiments.checking.pairs import combinations, pairs_of, pairwise
from experiments.checking.serve import serve
from experiments.gate.lossy.recipe import EXACT, recipe_of
from experiments.gate.negative_controls import CONTROL_PROMPT, controls
from experiments.host import provenance
from experiments.host.model_files import shape
from nanovllm.config import LEVELS
from nanovllm.kernels import flash_attn

CPU = {"name": "cpu", "device": "cpu", "num_devices": 1, "cpu_cores": 2}


def scope(model: Path, *peers: str, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> Scope:
    return Scope(CPU, shape(model), "cpu", dtypes, peers)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 3, 2, 2), (3, 3, 2, 2, 2, 2, 4), (5,)])
def test_all_pairs_are_covered_by_few_choices(sizes: tuple[int, ...]) -> None:
    levels = {f"factor{i}": list(range(size)) for i, size in enumerate(sizes)}
    chosen = pairwise(levels)
    for a, b in itertools.combinations(levels, 2):
        assert {(c[a], c[b]) for c in chosen} == set(itertools.product(levels[a], levels[b]))
    largest = sorted(sizes)[-2:]
    assert len(chosen) <= 2 * (largest[0] * largest[1] if len(sizes) > 1 else 0) or len(sizes) == 1


def test_float16_is_checked_without_the_kernels_that_lack_it(tiny: Path) -> None:
    made, absent = jobs.all_jobs(scope(tiny, dtypes=("float16",)), ["drawn-000"])
    assert {job.dtype for job in made} == {"float16"}
    assert "native" not in {
        level for job in made for level in job.config.get("optimizations", {}).values()
    }
    assert any(reason.startswith("kernels=native: ") for reason in absent)


def test_pairs_that_cannot_meet_are_left_out_and_no_others() -> None:
    levels = {"graphs": [False, True], "ranks": [1, 2, 4], "cache": [False, True]}

    def allowed(choice: dict[str, Any]) -> bool:
        return not (choice["graphs"] and choice["ranks"] > 1)

    first = [{"graphs": False, "ranks": 1, "cache": False}]
    chosen = pairwise(levels, allowed, first)
    assert chosen[0] == first[0]
    assert all(map(allowed, chosen))
    possible = set().union(*map(pairs_of, combinations(levels, allowed)))
    assert set().union(*map(pairs_of, chosen)) == possible
    assert (("graphs", True), ("ranks", 2)) not in possible
    with pytest.raises(ValueError, match="not an allowed combination"):
        pairwise(levels, allowed, [{"graphs": True, "ranks": 2, "cache": False}])


def test_every_switch_of_this_machine_meets_every_other(tiny: Path) -> None:
    chosen, absent = jobs.configurations(scope(tiny))
    here = {name: {choice[name] for choice in chosen} for name in LEVELS}
    assert here["batching"] == {"static", "continuous", "chunked"}
    assert here["overlap"] == here["prefix_cache"] == {False, True}
    assert any(reason.startswith("cuda_graphs=on: ") for reason in absent)
    assert not any(reason.startswith("overlap") for reason in absent)
    assert here["quantization"] == set(LEVELS["quantization"])
    apart = {("native", "fp8_e4m3")}  # attention that cannot read such a cache
    for a, b in itertools.combinations(LEVELS, 2):
        expected = set(itertools.product(here[a], here[b]))
        if (a, b) == ("attention_backend", "kv_cache_dtype"):
            expected -= apart
        assert {(c[a], c[b]) for c in chosen} == expected
    assert len(chosen) <= 18


def test_a_lossy_job_is_compared_with_its_own_reference_alone(tiny: Path) -> None:
    made, _ = jobs.all_jobs(scope(tiny), ["drawn-000"])
    lossy = [job for job in made if recipe_of(job.config) != EXACT]
    assert {recipe_of(job.config).quantization for job in lossy} >= {"int8", "int4", "fp8"}
    assert all(job.like is None for job in lossy)
    assert recipe_of({"dtype": "float32"}) == EXACT


def test_what_a_check_on_a_gpu_is_too_small_for_is_named(tiny: Path) -> None:
    gpu = Scope(
        {"name": "gpu", "device": "cuda", "num_devices": 1, "cpu_cores": 8},
        shape(tiny),
        "cuda",
        ("bfloat16",),
        (),
    )
    chosen, absent = jobs.configurations(gpu)
    assert {choice["cascade_attention"] for choice in chosen} == {False}
    assert {choice["cuda_graphs"] for choice in chosen} == {False, True}
    assert chosen[1]["cuda_graphs"]
    assert any(
        "needs 104 concurrent requests that share a prefix, but a check runs 4" in reason
        for reason in absent
    )
    assert jobs.never_shared("cascade_attention", True, {"num_key_value_heads": 128}) is None


def test_a_check_leaves_out_a_level_whose_library_is_not_installed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention is not among what `make setup` installs, so most GPU hosts have none."""
    gpu = Scope(
        {"name": "gpu", "device": "cuda", "num_devices": 1, "cpu_cores": 8},
        shape(tiny),
        "cuda",
        ("bfloat16",),
        (),
    )

    def missing() -> None:
        raise ImportError("No module named 'flash_attn'")

    monkeypatch.setattr(flash_attn, "find_library", missing)
    chosen, absent = jobs.configurations(gpu)
    assert {choice["attention_backend"] for choice in chosen} == {"torch", "triton"}
    assert any("attention_backend=flash_attn: no FlashAttention library" in why for why in absent)
    monkeypatch.setattr(flash_attn, "find_library", lambda: None)
    chosen, absent = jobs.configurations(gpu)
    assert "flash_attn" in {choice["attention_backend"] for choice in chosen}
    assert not any("flash_attn" in why for why in absent)


def test_the_work_is_drawn_the_same_every_time_and_holds_what_trips_engines() -> None:
    drawn = work.draw(60, 2048)
    assert drawn == work.draw(60, 2048)
    assert len(drawn) == 60
    requests = [request for requests in drawn.values() for request in requests]
    assert len({json.dumps(requests) for requests in drawn.values()}) == 60
    lengths = {len(request["prompt_token_ids"]) for request in requests}
    # around block boundaries
    assert len({length for length in lengths if length % work.BLOCK_SIZE in (15, 0, 1)}) >= 8
    assert max(lengths) <= work.LONGEST_PROMPT
    assert {1, 2} <= {request["max_tokens"] for request in requests}
    assert {request["ignore_eos"] for request in requests} == {False, True}
    assert len({(r["temperature"], r["top_k"], r["top_p"]) for r in requests}) == len(
        work.SAMPLINGS
    )
    pairs = [
        pair
        for members in drawn.values()
        for pair in itertools.pairwise(r["prompt_token_ids"] for r in members)
    ]
    assert any(a == b for a, b in pairs)
    assert any(a != b and a[:8] == b[:8] for a, b in pairs)


def small_work() -> dict[str, Any]:
    def same(seed: int, sampling: dict[str, float], number: int = 6) -> list[dict[str, Any]]:
        return work.uniform(number, 2048, 48, 16, sampling, seed)

    mixed = (
        same(4, work.GREEDY, 2)
        + same(5, work.SAMPLINGS[3], 2)
        + [{**r, "ignore_eos": False} for r in same(6, work.GREEDY, 1)]
    )
    return {
        "drawn-000": mixed,
        CONTROL: same(1, work.GREEDY, 24),
        SAMPLED: same(2, work.SAMPLINGS[1], 24),
        TRUNCATED: same(3, work.SAMPLINGS[2]),
    }


@pytest.fixture(scope="module")
def everything(tiny: Path) -> tuple[judging.Judge, list[Job]]:
    """Four jobs of a check, served in this process."""
    drawn = small_work()
    planned, _ = jobs.all_jobs(scope(tiny, dtypes=("float32",)), ["drawn-000"])
    good = ("nanovllm float32: baseline", "nanovllm float32: all on", "hf float32: batches of 48")
    wanted = (*good, f"broken float32: {next(iter(controls(CONTROL_PROMPT)))}")
    chosen = [job for job in planned if job.name in wanted]
    assert len(chosen) == len(wanted)
    served = {
        job.name: json.loads(json.dumps(serve(job.as_dict(), drawn, str(tiny)))) for job in chosen
    }
    return judging.Judge(tiny, drawn, chosen, served), chosen


def test_good_engines_pass_and_the_broken_one_fails(
    everything: tuple[judging.Judge, list[Job]],
) -> None:
    judge, chosen = everything
    lines = [judge.verdict(job) for job in chosen]
    assert [(line["status"], line["good"]) for line in lines] == [("pass", True)] * 3 + [
        ("fail", True)
    ], lines
    baseline, all_on, hf, broken = lines
    assert all(
        line["logprobs"]["status"] == ("fail" if line is broken else "pass") for line in lines
    )
    assert (all_on["identical"], all_on["answers"]) == (59, 59)
    assert baseline["gate"]["mismatches"] == 0
    assert hf["gate"]["calibration"]["distribution"]["tokens"] == 30 * 16
    result = {
        "lines": lines,
        "good": True,
        "noise": {},
        "absent": [],
        "model": {"name": "tiny", "digest": "d" * 64},
        "device": "cpu",
        "hardware": "a CPU",
        "workloads": {"drawn": 1, "requests": 59},
        "duration_s": 1.0,
    }
    assert "3 configurations and engines pass the gate, 1 broken ones fail it" in page.markdown(
        result
    )
    assert "<script" not in page.page(result)


def test_the_page_of_a_check_escapes_what_it_shows_and_looks_like_a_report() -> None:
    line = {
        "name": "batching=chunked, a|b",
        "group": "pairs <all>",
        "dtype": "float32",
        "expected": "fail",
        "status": "pass",
        "good": False,
        "reason": "not *seen*",
        "gate": None,
    }
    result: Any = {
        "lines": [line],
        "good": False,
        "noise": {},
        "absent": ["cuda_graphs: no GPU"],
        "model": {"name": "tiny", "digest": "d" * 64},
        "device": "cpu",
        "hardware": "a CPU",
        "workloads": {"drawn": 1, "requests": 59},
        "duration_s": 1.0,
    }
    html = page.page(result)
    assert "1 of 1 verdicts are not as expected: batching=chunked, a|b" in html
    assert "<small>pairs &lt;all&gt;</small>" in html
    assert '<tr class="bad">' in html
    assert all(f"--{name}: {light};" in html for name, (light, _) in look.PALETTE.items())
    assert (look.LOOK / "style.css").read_text().strip() in html
    markdown = page.markdown(result)
    assert "| NOT OK | batching=chunked, a\\|b | passes |" in markdown
    assert "| not \\*seen\\* |" in markdown
    assert "- Skipped on this machine: cuda_graphs: no GPU\n" in markdown
    assert "- **batching=chunked, a\\|b**: pairs &lt;all&gt;\n" in markdown


def test_what_is_tampered_with_afterwards_fails(
    everything: tuple[judging.Judge, list[Job]],
) -> None:
    judge, _ = everything
    for line in judge.controls("float32"):
        # 384 tokens are too few to see that; `make check` has 1,152
        if "temperature" not in line["name"]:
            assert line["good"], line["name"]


def test_a_wrong_verdict_is_not_ok(everything: tuple[judging.Judge, list[Job]]) -> None:
    """Whatever goes wrong, the page and the exit status say so."""
    judge, chosen = everything
    first = chosen[0]
    served = judge.served[first.name]

    def verdict(**changes: Any) -> dict[str, Any]:
        changed = judging.Judge(
            judge.model, judge.work, chosen, {**judge.served, first.name: {**served, **changes}}
        )
        changed._rescorers = judge._rescorers
        return changed.verdict(first)

    other = json.loads(json.dumps(served["workloads"]))
    other[CONTROL]["outputs"][3][5] = (other[CONTROL]["outputs"][3][5] + 1) % 2048
    shorter = json.loads(json.dumps(served["workloads"]))
    shorter[CONTROL]["outputs"][3].pop()
    off = json.loads(json.dumps(served["logprobs"]))
    off[CONTROL]["logprobs"][0][0] += 1e-3
    for changes, status, reason in (
        ({"workloads": other}, "fail", "tokens exceed the noise bound"),
        ({"workloads": shorter}, "error", "15 tokens instead of exactly 16"),
        ({"logprobs": off}, "fail", "log-probabilities differ from the reference by 0.001 nats"),
        ({"problems": ["overlap=on never engaged"]}, "error", "overlap=on never engaged"),
        ({"error": "exit status 1"}, "error", "exit status 1"),
    ):
        line = verdict(**changes)
        assert (line["status"], line["good"]) == (status, False)
        assert reason in line["reason"]
        assert page.row(line)[0] == "NOT OK"
    intact = judging.Judge(judge.model, judge.work, chosen, judge.served)
    intact._rescorers = judge._rescorers
    passes = intact.verdict(Job(**{**first.as_dict(), "expected": "fail"}))
    assert (passes["status"], passes["good"]) == ("pass", False), "a broken engine that passes"


def test_any_adapter_can_be_a_peer_and_a_crash_is_told(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "logs").mkdir()
    drawn = small_work()
    work.write(drawn, tmp_path / "work.json")
    planned, _ = jobs.all_jobs(
        scope(tiny, "tests.support.fake_engine", dtypes=("float32",)), ["drawn-000"]
    )
    peer = next(job for job in planned if job.engine == "tests.support.fake_engine")
    fine = Job(**{**peer.as_dict(), "config": {"max_num_seqs": 4}})
    python = str(Path(provenance.ROOT) / ".venv" / "bin" / "python")
    python = python if Path(python).exists() else run.sys.executable
    assert run.serve_one(0, fine, tmp_path, str(tiny), python, run.Running()) is None
    served = json.loads((tmp_path / "served" / "00.json").read_text())
    assert set(served["workloads"]) == set(drawn)
    assert served["logprobs"] is None
    line = judging.Judge(tiny, drawn, [fine], {fine.name: served}).verdict(fine)
    assert (line["status"], line["good"]) == ("fail", False), "its tokens are arithmetic"

    crash = Job(**{**peer.as_dict(), "config": {"behaviour": "crash"}})
    error = run.serve_one(1, crash, tmp_path, str(tiny), python, run.Running())
    assert error is not None
    assert "the fake engine crashes as told" in error
    assert "crashes as told" in json.loads((tmp_path / "served" / "01.json").read_text())["error"]


def test_an_interrupt_ends_the_jobs_that_run_and_drops_those_that_wait(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "logs").mkdir()
    slow = tmp_path / "slow_python"
    slow.write_text(f"#!/bin/sh\necho job >> {tmp_path}/started\nexec sleep 120\n")
    slow.chmod(0o755)
    planned, _ = jobs.all_jobs(scope(tiny, dtypes=("float32",)), ["drawn-000"])
    assert len(planned) > 4

    def interrupted(futures: Any) -> Any:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "as_completed", interrupted)
    begin = time.monotonic()
    with run.Progress(disable=True) as progress, pytest.raises(KeyboardInterrupt):
        run.serve_all(
            planned,
            tmp_path,
            str(tiny),
            scope(tiny),
            {"nanovllm": str(slow), "hf": str(slow)},
            Console(file=io.StringIO()),
            progress,
        )
    assert time.monotonic() - begin < 60, "waits for the jobs"
    assert len((tmp_path / "started").read_text().split()) <= run.jobs_at_once("cpu")


@pytest.mark.parametrize(
    ("device", "cores", "at_once"),
    [("cpu", 1, 1), ("cpu", 2, 2), ("cpu", 64, 2), ("cuda", 2, 1), ("cuda", 8, 2), ("cuda", 64, 4)],
)
def test_jobs_side_by_side(
    device: Any, cores: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "cpu_cores", lambda: cores)
    assert run.jobs_at_once(device) == at_once


@pytest.mark.parametrize(("good", "status"), [(True, 0), (False, 1)])
def test_the_exit_status_is_the_verdict(
    good: bool, status: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def judged(
        folder: Path,
        model: dict[str, Any],
        checked: Scope,
        drawn: int,
        pythons: dict[str, str],
        console: Console,
    ) -> bool:
        seen.update(folder=folder, model=model, scope=checked, drawn=drawn, pythons=pythons)
        return good

    monkeypatch.setattr(cli.checking, "run", judged)
    # where somebody has built it, `check` takes it by itself
    monkeypatch.setattr(cli, "OWN_VLLM", tmp_path / "no-vllm")
    monkeypatch.setattr(
        cli.checking,
        "find_model",
        lambda preset, path: {"name": path, "path": path, "digest": "d" * 64},
    )
    arguments = [
        "check",
        "--profile",
        "cpu",
        "--model",
        str(tiny),
        "--out",
        str(tmp_path),
        "--workloads",
        "7",
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == status, result.output
    assert "vLLM was not checked" in result.output
    assert (seen["folder"], seen["drawn"], seen["scope"].peers, seen["scope"].dtypes) == (
        tmp_path,
        7,
        (),
        ("float32", "bfloat16"),
    )
    result = CliRunner().invoke(cli.app, [*arguments, "--python", "vllm=/some/python"])
    assert (result.exit_code, seen["scope"].peers, seen["pythons"]) == (
        status,
        ("vllm",),
        {"vllm": "/some/python"},
    )
    assert "vLLM was not checked" not in result.output


def test_a_check_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli.app, ["check", "--profile", "cpu", "--model", "huge", "--out", str(tmp_path)]
    )
    said = " ".join(result.output.split())
    assert result.exit_code == 2
    assert "--model huge: no folder with a config.json and no preset" in said
    assert "or a preset: tiny, " in said


def test_a_check_names_the_hardware_it_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 2**36, "driver": "580"}
    monkeypatch.setattr(run, "gpu_inventory", lambda: [gpu])
    assert run.hardware_of("cuda") == "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(run, "gpu_inventory", lambda: [gpu, gpu])
    assert run.hardware_of("cuda") == "2 x NVIDIA H100 80GB HBM3"
    assert run.hardware_of("cpu") == run.provenance.cpu_model()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_check(tiny: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    model = run.find_model("tiny", None)
    good = run.run(tmp_path, model, scope(tiny), 8, {}, console)
    result = json.loads((tmp_path / "check.json").read_text())
    assert good, [line["reason"] for line in result["lines"] if not line["good"]]
    names = [line["name"] for line in result["lines"]]
    assert sum(name.startswith("broken ") for name in names) == 6
    assert sum(name.startswith("tampered ") for name in names) == 9
    assert (tmp_path / "check.md").read_text().startswith("# Output check")
    assert (tmp_path / "check.html").read_text().count("<tr") == len(names) + 1
