"""The plan runner: a fresh process a launch, and nothing lost or counted twice whatever happens to
it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.engines import load_adapter
from experiments.host import machine_lock, provenance, telemetry
from experiments.launch import runner
from experiments.launch.runner import Runner
from experiments.records import store
from tests.support.fake_engine import ENVIRONMENT, LABORATORY, make_plan, without


def command(plan: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "experiments.launch",
        "--plan",
        str(plan),
        "--out",
        str(out),
        *options,
    ]


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    store.write_plan(make_plan(tmp_path / "model"), tmp_path / "plan.json")
    return tmp_path / "plan.json"


def by_launch(folder: Path) -> dict[str, dict[str, Any]]:
    return {r["launch"]: r for r in store.launches(store.read(folder))}


def test_every_launch_is_recorded_as_the_contract_says(plan_file: Path, tmp_path: Path) -> None:
    assert runner.main(["--plan", str(plan_file), "--out", str(tmp_path / "out")]) == 0
    found = store.read(tmp_path / "out")
    plan = store.read_plan(plan_file)
    assert [r["launch"] for r in found] == [entry["launch"] for entry in plan["launches"]]
    for line in (tmp_path / "out" / store.RECORDS).read_text().splitlines():
        assert line.startswith('{"kind":"launch","schema":1,')
    record = found[0]
    assert (record["status"], record["reason"], record["attempt"]) == ("ok", None, 1)
    assert record["requested"] == plan["cells"]["baseline"]["config"]
    assert record["resolved"]["seed"] == plan["launches"][0]["seed"]
    assert list(record["workloads"]) == ["a", "b"]
    for name, work in record["workloads"].items():
        planned = plan["workloads"][name]
        assert {
            key: work[key]
            for key in ("fingerprint", "num_requests", "prompt_tokens", "output_tokens")
        } == {
            key: planned[key]
            for key in ("fingerprint", "num_requests", "prompt_tokens", "output_tokens")
        }
        assert len(work["request_times_s"]) == planned["num_requests"]
        assert max(finish for *_, finish in work["request_times_s"]) <= work["duration_s"] + 1e-5
        assert work["counters"] == {"steps": planned["num_requests"]}
    digests = {
        json.loads(line)["digest"]
        for line in (tmp_path / "out" / store.TOKENS).read_text().splitlines()
    }
    assert digests == {work["tokens_digest"] for r in found for work in r["workloads"].values()}
    on = by_launch(tmp_path / "out")["b00-o02-prefix_cache=on"]["toggles"]["prefix_cache"]
    assert (on["level"], on["engaged"]) == ("on", 8)
    assert record["provenance"]["packages"]
    assert record["provenance"]["environment"]["OMP_WAIT_POLICY"] == "PASSIVE", "as the plan says"
    git = record["provenance"]["git"]
    if provenance.git_state() is None:  # from a release's archive, in a container
        assert git is None
    else:
        assert git.keys() == {"commit", "branch", "dirty", "dirty_digest"}
    assert not list((tmp_path / "out" / store.LOGS).iterdir())


def test_bad_launches_are_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    plan = make_plan(
        tmp_path / "model",
        blocks=1,
        timeout_s=2,
        crash="crash",
        hang="hang",
        wrong="wrong_work",
        dead="dead_toggle",
        stuck="stuck_toggle",
    )
    with Runner(plan, tmp_path / "out", resume=False) as runner:
        assert runner.run()
    found = {r["cell"]: r for r in store.read(tmp_path / "out")}
    assert {cell: r["status"] for cell, r in found.items()} == {
        "baseline": "ok",
        "aa": "ok",
        "prefix_cache=on": "ok",
        "crash": "failed",
        "hang": "failed",
        "wrong": "invalid",
        "dead": "invalid",
        "stuck": "invalid",
    }
    assert "exit status 1" in found["crash"]["reason"]
    assert "RuntimeError: the fake engine crashes as told" in found["crash"]["reason"]
    assert "killed after 2 s without a result" in found["hang"]["reason"]
    assert "the fake engine hangs as told" in found["hang"]["reason"]
    assert "request 0 asked for" in found["wrong"]["reason"]
    assert found["dead"]["reason"] == "prefix_cache=on never engaged"
    assert "at its baseline, off, but engaged" in found["stuck"]["reason"]
    with Runner(plan, tmp_path / "out", resume=True) as runner:
        pending = [entry["cell"] for entry in runner.pending()]
    assert pending == ["crash", "hang"], "failed launches run again, invalid ones do not"


DIES_WRITING = """
import os, sys, time
from pathlib import Path
from experiments.launch import engine_process
engine_process.serve_launch = lambda *launch: {"record": {}}
Path.rename = lambda partial, result: os._exit(9)
engine_process.main({}, "", "", time.time(), Path(sys.argv[sys.argv.index("--result") + 1]))
"""


def test_a_result_cut_in_the_middle_is_removed(tmp_path: Path) -> None:
    """By the runner, or by the next one where that died as well."""
    dies = [sys.executable, "-c", DIES_WRITING]
    assert runner.run_engine_process(dies, tmp_path / "b00.a1", 30, {})["record"][
        "reason"
    ].startswith("exit status 9")
    assert [path.name for path in tmp_path.iterdir()] == ["b00.a1.log"]
    logs = tmp_path / "out" / store.LOGS
    logs.mkdir(parents=True)
    orphan = [*dies, "--result", str(logs / "b00.a1.result")]
    with subprocess.Popen(orphan, env=ENVIRONMENT, stdin=subprocess.PIPE) as child:
        child.wait(timeout=30)
    assert len(list(logs.iterdir())) == 1
    with Runner(make_plan(tmp_path / "model"), tmp_path / "out", resume=False):
        assert list(logs.iterdir()) == []


def test_another_workload_is_not_served(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "model", blocks=1)
    plan["workloads"]["a"]["fingerprint"] = "0" * 64
    plan["plan_hash"] = store.plan_hash(plan)
    with Runner(plan, tmp_path / "out", resume=False) as runner:
        runner.run()
    assert all(
        r["status"] == "failed" and "make it again" in r["reason"]
        for r in store.read(tmp_path / "out")
    )


def test_a_folder_of_other_records_is_refused(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--plan", str(plan_file), "--out", str(out), "--blocks", "0"]
    assert runner.main(arguments) == 0
    assert len(by_launch(out)) == 3
    assert runner.main(arguments) == 1
    assert "already holds 3 records; add --resume" in capsys.readouterr().err
    store.write_plan(make_plan(tmp_path / "model", blocks=3), tmp_path / "other.json")
    assert runner.main(["--plan", str(tmp_path / "other.json"), "--out", str(out), "--resume"]) == 1
    assert "holds records of another plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--blocks", "0,x"],
            "argument --blocks: 'x' is not a block number; write numbers separated by commas, e.g. 0,1",
        ),
        (["--blocks", "1,99"], "plan.json has no block 99; allowed: 0, 1"),
        (
            ["--python", "vllm"],
            "argument --python: 'vllm': write ENGINE=PATH, e.g. vllm=.venv-vllm/bin/python",
        ),
        (
            ["--model", "/nonexistent"],
            "model /nonexistent: not a folder with a config.json; give the folder of a checkpoint",
        ),
    ],
)
def test_wrong_options_are_said(
    plan_file: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status = runner.main(["--plan", str(plan_file), "--out", str(tmp_path / "out"), *options])
    except SystemExit as ended:
        status = int(str(ended.code))
    assert status in (1, 2)
    assert message in capsys.readouterr().err
    assert store.read(tmp_path / "out") == []


def test_a_folder_of_logs_that_cannot_be_made_is_said(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / store.LOGS).touch()
    assert runner.main(["--plan", str(plan_file), "--out", str(tmp_path)]) == 1
    assert f"{tmp_path / store.LOGS}: cannot be written" in capsys.readouterr().err


def test_records_of_other_code_are_not_mixed(
    plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = store.read_plan(plan_file)
    with Runner(plan, tmp_path / "out", resume=False) as runner:
        runner.run([0])
        monkeypatch.setattr(provenance, "code_digest", lambda: "other")
        with pytest.raises(
            store.RecordError,
            match="code has changed since this run began, so b01-o00-baseline would measure",
        ):
            runner.run()
    with pytest.raises(store.RecordError, match="another version of the code"):
        Runner(plan, tmp_path / "out", resume=True)


def test_the_deadline_stops_before_a_launch_and_resume_goes_on(
    plan_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert (
        runner.main(["--plan", str(plan_file), "--out", str(out), "--deadline-s", "0.01"])
        == runner.DEADLINE_STATUS
    )
    assert by_launch(out) == {}
    assert runner.main(["--plan", str(plan_file), "--out", str(out), "--resume"]) == 0
    assert len(by_launch(out)) == 6


def test_on_another_boot_an_unfinished_block_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tmp_path / "model", blocks=2)
    with Runner(plan, tmp_path / "out", resume=False) as runner:
        for entry in runner.pending()[:4]:  # block 0 and one launch of block 1
            runner.run_launch(entry)
    with Runner(plan, tmp_path / "out", resume=True) as runner:
        assert [e["order"] for e in runner.pending()] == [1, 2], (
            "the same boot goes on at the first unfinished launch"
        )
    monkeypatch.setattr(provenance, "boot_id", lambda: "another boot")
    with Runner(plan, tmp_path / "out", resume=True) as runner:
        assert [(e["block"], e["order"]) for e in runner.pending()] == [(1, 0), (1, 1), (1, 2)]
        runner.run()
    found = store.read(tmp_path / "out")
    superseded = [r for r in found if r["kind"] == "superseded"]
    assert [(r["launch"], r["attempt"]) for r in superseded] == [("b01-o00-baseline", 1)]
    assert [r["boot_id"] for r in found if r["kind"] == "resumed"][-1] == "another boot"
    counted = store.counted(found)
    assert len(counted) == 6
    assert {r["boot_id"] for r in counted if r["block"] == 1} == {"another boot"}


KILLS = 20


@pytest.mark.timeout(180)
def test_killed_twenty_times_at_random_moments_it_ends_with_the_same_launches(
    tmp_path: Path,
) -> None:
    """By turns, in random order, the runner's whole process group is killed and only the child that
    serves a launch.
    """
    plan = make_plan(tmp_path / "model", blocks=12, seconds=0.01)
    store.write_plan(plan, tmp_path / "plan.json")
    begin = time.monotonic()
    with Runner(plan, tmp_path / "undisturbed", resume=False) as undisturbed:
        undisturbed.run([0])
    # a machine that is busy is slow in all of this
    launch_s = (time.monotonic() - begin) / len(undisturbed.plan["cells"])
    out, rng = tmp_path / "out", random.Random(0)
    total, kills, only_child = len(plan["launches"]), 0, 0
    resume = command(tmp_path / "plan.json", out, "--resume")
    while kills < KILLS:
        runner = subprocess.Popen(
            resume, env=ENVIRONMENT, stdout=subprocess.DEVNULL, start_new_session=True
        )
        # A study that is ahead of the kills is killed early, so that it is not over before the last
        # one.
        ahead = finished(out) > total * (kills + 1) / (KILLS + 2)
        time.sleep(rng.uniform(0.1, 0.8) * launch_s if ahead else rng.uniform(0.3, 2.7) * launch_s)
        child = child_of(runner.pid)
        if child is not None and (only_child < 3 or rng.random() < 0.4):
            with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
                os.kill(child, signal.SIGKILL)
                kills, only_child = kills + 1, only_child + 1
            time.sleep(rng.uniform(0.0, 0.2))
        assert runner.poll() is None, "the study is too short for so many kills"
        os.killpg(runner.pid, signal.SIGKILL)
        runner.wait()
        kills += 1
    assert only_child >= 3
    assert 0 < finished(out) < total
    with (out / store.RECORDS).open("a") as file:  # a power cut on top: half a record at the end
        file.write('{"kind":"launch","schema":1,"stu')
    done = subprocess.run(resume, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "removed a truncated last line" in done.stderr
    found = store.read(out)
    undisturbed_block = what_was_done(store.read(tmp_path / "undisturbed"))
    for block in range(12):  # the same in each
        assert what_was_done(found, block) == undisturbed_block
    assert len(store.counted(found)) == total
    assert len({(r["launch"], r["attempt"]) for r in found if r["kind"] == "launch"}) == sum(
        r["kind"] == "launch" for r in found
    )
    assert not [name for name in os.listdir(out / store.LOGS) if ".result" in name]


def what_was_done(found: list[dict[str, Any]], block: int = 0) -> list[Any]:
    """Everything of the counted records of a block that depends neither on the clock nor on its number."""
    return sorted(
        (
            r["launch"].removeprefix(f"b{block:02d}-"),
            r["order"],
            r["cell"],
            r["seed"],
            r["requested"],
            r["resolved"],
            {
                name: (w["fingerprint"], w["tokens_digest"], w["counters"])
                for name, w in r["workloads"].items()
            },
        )
        for r in store.counted(found)
        if r["block"] == block
    )


def finished(out: Path) -> int:
    return len(store.counted(store.read(out)))


def child_of(runner: int) -> int | None:
    """The process that serves a launch for a runner, if there is one at this moment."""
    children = [pid for pid in telemetry.process_tree(runner)[1:] if is_alive(pid)]
    return children[0] if children else None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_runner_leaves_no_process_behind(tmp_path: Path, how: signal.Signals) -> None:
    plan = make_plan(tmp_path / "model", blocks=1, orphan="orphan")
    plan["launches"] = plan["launches"][-1:]
    plan["plan_hash"] = store.plan_hash(plan)
    store.write_plan(plan, tmp_path / "plan.json")
    pids = tmp_path / "pids"
    environment = {**ENVIRONMENT, "FAKE_ENGINE_PIDS": str(pids)}
    arguments = command(tmp_path / "plan.json", tmp_path / "out")
    runner = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    engine, worker = map(int, pids.read_text().split())
    assert is_alive(engine)
    assert is_alive(worker)
    runner.send_signal(how)
    _, err = runner.communicate(timeout=10)
    wait_for(lambda: not is_alive(engine) and not is_alive(worker))
    assert store.read(tmp_path / "out") == []
    if how is signal.SIGINT:
        assert runner.returncode == 130
        assert "Run the same command with --resume" in err


def test_the_runner_needs_the_standard_library_only(plan_file: Path, tmp_path: Path) -> None:
    """On a bare GPU host there is no pydantic, MLflow, YAML, typer, rich, numpy or ray; runner and
    child run without them.
    """
    environment = without(
        tmp_path / "hook", *LABORATORY, "numpy", "psutil", "pynvml", "torch", "transformers"
    )
    probe = subprocess.run(
        [sys.executable, "-c", "import yaml"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "yaml is blocked" in probe.stderr, "the blocker itself must work"
    done = subprocess.run(
        command(plan_file, tmp_path / "out"),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {r["status"] for r in store.read(tmp_path / "out")} == {"ok"}


def test_two_studies_do_not_measure_on_one_machine_at_once(
    plan_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = store.read_plan(plan_file)
    with Runner(plan, tmp_path / "first", resume=False):
        other = ["--plan", str(plan_file), "--out", str(tmp_path / "second"), "--blocks", "0"]
        assert runner.main(other) == 1
        said = capsys.readouterr().err
        assert (
            f"another study is being measured on this machine (process {os.getpid()}, records in {tmp_path / 'first'})"
            in said
        )
        assert "wait for it or stop it" in said
        same = ["--plan", str(plan_file), "--out", str(tmp_path / "first"), "--resume"]
        assert runner.main(same) == 1
        assert "another runner is using this folder" in capsys.readouterr().err
    assert runner.main([*other, "--resume"]) == 0, "the lock went with its holder"

    gpu = {**plan, "profile": {**plan["profile"], "device": "cuda"}}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with machine_lock.held(gpu, tmp_path):
        with (
            pytest.raises(store.RecordError, match="measured on GPU 3 of this machine"),
            machine_lock.held(gpu, tmp_path),
        ):
            pass
        with (
            pytest.raises(store.RecordError, match="measured on this machine"),
            machine_lock.held(plan, tmp_path),
        ):
            pass
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
        with machine_lock.held(gpu, tmp_path):
            assert machine_lock.gpus(gpu) == ["4"], "one GPU is all that these cells use"


def test_a_plan_locks_all_gpus_of_its_widest_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(*configs: dict[str, Any]) -> list[str]:
        cells = {str(index): {"config": config} for index, config in enumerate(configs)}
        return machine_lock.gpus(
            {
                "profile": {"device": "cuda"},
                "study": {"measurement": {"environment": {}}},
                "cells": cells,
            }
        )

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ours, vllm = (
        {"optimizations": {"data_parallel_size": 2, "tensor_parallel_size": 2}},
        {"tensor_parallel_size": 2},
    )
    assert used({}, vllm) == ["0", "1"]
    assert used({}, vllm, ours) == ["0", "1", "2", "3"]
    assert (
        len(used(ours, {"optimizations": {"data_parallel_size": 8, "tensor_parallel_size": None}}))
        == 8
    )


def test_another_gpu_of_the_same_boot_is_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tmp_path / "model", blocks=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with Runner(plan, tmp_path / "out", resume=False) as runner:
        runner.run_launch(runner.pending()[0])
    with Runner(plan, tmp_path / "out", resume=True) as runner:
        assert [e["order"] for e in runner.pending()] == [1, 2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with Runner(plan, tmp_path / "out", resume=True) as runner:
        assert [e["order"] for e in runner.pending()] == [0, 1, 2]


def test_an_interpreter_that_is_not_there_is_said_at_once(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--plan",
        str(plan_file),
        "--out",
        str(tmp_path / "out"),
        "--python",
        "vllm=/nowhere/python",
    ]
    assert runner.main(options) == 1
    assert "--python vllm=/nowhere/python: no such program" in capsys.readouterr().err


def test_an_unknown_engine_or_setting_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="engine 'vlm' has no adapter; allowed: nanovllm, hf, vllm,"
    ):
        load_adapter("vlm")
    for engine in ("nanovllm", "hf", "vllm"):
        with pytest.raises(
            ValueError, match=f"{engine}: unknown config key max_num_seq; allowed: .*max_num_seqs"
        ):
            load_adapter(engine)("model", {"max_num_seq": 3})


def wait_for(condition: Any, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
