"""The plan runner: a fresh process a launch, and nothing lost or counted twice whatever happens to it."""

from __future__ import annotations

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

from experiments import launch, provenance, records
from experiments.engines import load_adapter
from experiments.launch import Runner
from tests.fake_engine import make_plan

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(provenance.ROOT), str(provenance.ROOT / "src")])}


def command(plan: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "experiments.launch", "--plan", str(plan), "--out", str(out), *options]


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    records.write_plan(make_plan(tmp_path / "model"), tmp_path / "plan.json")
    return tmp_path / "plan.json"


def by_launch(folder: Path) -> dict[str, dict[str, Any]]:
    return {r["launch"]: r for r in records.launches(records.read(folder))}


def test_every_launch_is_recorded_as_the_contract_says(plan_file: Path, tmp_path: Path) -> None:
    assert launch.main(["--plan", str(plan_file), "--out", str(tmp_path / "out")]) == 0
    found = records.read(tmp_path / "out")
    plan = records.read_plan(plan_file)
    assert [r["launch"] for r in found] == [entry["launch"] for entry in plan["launches"]]
    for line in (tmp_path / "out" / records.RECORDS).read_text().splitlines():
        assert line.startswith('{"kind":"launch","schema":1,')
    record = found[0]
    assert (record["status"], record["reason"], record["attempt"]) == ("ok", None, 1)
    assert record["requested"] == plan["cells"]["baseline"]["config"]
    assert record["resolved"]["seed"] == plan["launches"][0]["seed"]
    assert list(record["workloads"]) == ["a", "b"]
    for name, work in record["workloads"].items():
        planned = plan["workloads"][name]
        assert {key: work[key] for key in ("fingerprint", "num_requests", "prompt_tokens", "output_tokens")} == {
            key: planned[key] for key in ("fingerprint", "num_requests", "prompt_tokens", "output_tokens")
        }
        assert len(work["request_times_s"]) == planned["num_requests"]
        assert max(finish for *_, finish in work["request_times_s"]) <= work["duration_s"] + 1e-5
        assert work["counters"] == {"steps": planned["num_requests"]}
    digests = {json.loads(line)["digest"] for line in (tmp_path / "out" / records.TOKENS).read_text().splitlines()}
    assert digests == {work["tokens_digest"] for r in found for work in r["workloads"].values()}
    on = by_launch(tmp_path / "out")["b00-o02-prefix_cache=on"]["toggles"]["prefix_cache"]
    assert (on["level"], on["engaged"]) == ("on", 8)
    assert record["provenance"]["packages"]
    assert record["provenance"]["environment"]["OMP_WAIT_POLICY"] == "PASSIVE", "as the plan says"
    assert record["provenance"]["git"].keys() == {"commit", "branch", "dirty", "dirty_digest"}
    assert not list((tmp_path / "out" / records.LOGS).iterdir())


def test_bad_launches_are_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "model", blocks=1, timeout_s=2, crash="crash", hang="hang", wrong="wrong_work",
                     dead="dead_toggle", stuck="stuck_toggle")  # fmt: skip
    with Runner(plan, tmp_path / "out", resume=False) as runner:
        assert runner.run()
    found = {r["cell"]: r for r in records.read(tmp_path / "out")}
    assert {cell: r["status"] for cell, r in found.items()} == {
        "baseline": "ok", "aa": "ok", "prefix_cache=on": "ok", "crash": "failed", "hang": "failed", "wrong": "invalid",
        "dead": "invalid", "stuck": "invalid",
    }  # fmt: skip
    assert "exit status 1" in found["crash"]["reason"]
    assert "RuntimeError: the fake engine crashes as told" in found["crash"]["reason"]
    assert "no result after 2 s" in found["hang"]["reason"]
    assert "the fake engine hangs as told" in found["hang"]["reason"]
    assert "request 0 asked for" in found["wrong"]["reason"]
    assert found["dead"]["reason"] == "prefix_cache=on never engaged"
    assert "at its baseline, off, and yet engaged" in found["stuck"]["reason"]
    with Runner(plan, tmp_path / "out", resume=True) as runner:
        pending = [entry["cell"] for entry in runner.pending()]
    assert pending == ["crash", "hang"], "failed launches run again, invalid ones do not"


def test_another_workload_is_not_served(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "model", blocks=1)
    plan["workloads"]["a"]["fingerprint"] = "0" * 64
    plan["plan_hash"] = records.plan_hash(plan)
    with Runner(plan, tmp_path / "out", resume=False) as runner:
        runner.run()
    assert all(r["status"] == "failed" and "make it again" in r["reason"] for r in records.read(tmp_path / "out"))


def test_a_folder_of_other_records_is_refused(plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--plan", str(plan_file), "--out", str(out), "--blocks", "0"]
    assert launch.main(arguments) == 0
    assert len(by_launch(out)) == 3
    assert launch.main(arguments) == 1
    assert "already holds 3 records; add --resume" in capsys.readouterr().err
    records.write_plan(make_plan(tmp_path / "model", blocks=3), tmp_path / "other.json")
    assert launch.main(["--plan", str(tmp_path / "other.json"), "--out", str(out), "--resume"]) == 1
    assert "holds records of another plan" in capsys.readouterr().err


def test_records_of_other_code_are_not_mixed(plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = records.read_plan(plan_file)
    with Runner(plan, tmp_path / "out", resume=False) as runner:
        runner.run([0])
        monkeypatch.setattr(provenance, "code_digest", lambda: "other")
        with pytest.raises(records.RecordError, match="code has changed since this run began: b01-o00-baseline would measure"):
            runner.run()
    with pytest.raises(records.RecordError, match="made by other code"):
        Runner(plan, tmp_path / "out", resume=True)


def test_the_deadline_stops_before_a_launch_and_resume_goes_on(plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert launch.main(["--plan", str(plan_file), "--out", str(out), "--deadline-s", "0.01"]) == launch.DEADLINE_STATUS
    assert by_launch(out) == {}
    assert launch.main(["--plan", str(plan_file), "--out", str(out), "--resume"]) == 0
    assert len(by_launch(out)) == 6


def test_on_another_boot_an_unfinished_block_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path / "model", blocks=2)
    with Runner(plan, tmp_path / "out", resume=False) as runner:
        for entry in runner.pending()[:4]:  # block 0 and one launch of block 1
            runner.run_launch(entry)
    with Runner(plan, tmp_path / "out", resume=True) as runner:
        assert [e["order"] for e in runner.pending()] == [1, 2], "the same boot goes on at the first unfinished launch"
    monkeypatch.setattr(provenance, "boot_id", lambda: "another boot")
    with Runner(plan, tmp_path / "out", resume=True) as runner:
        assert [(e["block"], e["order"]) for e in runner.pending()] == [(1, 0), (1, 1), (1, 2)]
        runner.run()
    found = records.read(tmp_path / "out")
    superseded = [r for r in found if r["kind"] == "superseded"]
    assert [(r["launch"], r["attempt"]) for r in superseded] == [("b01-o00-baseline", 1)]
    assert [r["boot_id"] for r in found if r["kind"] == "resumed"][-1] == "another boot"
    counted = records.counted(found)
    assert len(counted) == 6
    assert {r["boot_id"] for r in counted if r["block"] == 1} == {"another boot"}


def test_killed_at_random_moments_it_ends_with_the_same_launches(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "model", blocks=3, seconds=0.02)
    records.write_plan(plan, tmp_path / "plan.json")
    out, rng, kills = tmp_path / "out", random.Random(0), 0
    while kills < 12:
        runner = subprocess.Popen(command(tmp_path / "plan.json", out, "--resume"), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.05, 1.1))
        if runner.poll() is not None:
            break
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        kills += 1
    assert kills >= 3
    if (out / records.RECORDS).exists():  # a power cut on top: half a record at the end
        with (out / records.RECORDS).open("a") as file:
            file.write('{"kind":"launch","schema":1,"stu')
    again = command(tmp_path / "plan.json", out, "--resume")
    done = subprocess.run(again, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the last line was cut short" in done.stderr
    counted = records.counted(records.read(out))
    assert [r["launch"] for r in counted] == [entry["launch"] for entry in plan["launches"]]
    assert len({(r["launch"], r["attempt"]) for r in counted}) == len(plan["launches"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_runner_leaves_no_process_behind(tmp_path: Path, how: signal.Signals) -> None:
    plan = make_plan(tmp_path / "model", blocks=1, orphan="orphan")
    plan["launches"] = plan["launches"][-1:]
    plan["plan_hash"] = records.plan_hash(plan)
    records.write_plan(plan, tmp_path / "plan.json")
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
    assert records.read(tmp_path / "out") == []
    if how is signal.SIGINT:
        assert runner.returncode == 130
        assert "Go on with the same command and --resume" in err


def test_the_runner_needs_the_standard_library_only(plan_file: Path, tmp_path: Path) -> None:
    """On a bare GPU host there is no pydantic, MLflow, YAML, typer, rich or numpy; runner and child run without them."""
    blocked = ("pydantic", "mlflow", "yaml", "typer", "rich", "jinja2", "numpy", "psutil", "pynvml", "torch")
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked!r}:\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(hook), ENVIRONMENT["PYTHONPATH"]])}
    probe = subprocess.run([sys.executable, "-c", "import yaml"], env=environment, capture_output=True, text=True, check=False)
    assert "yaml is blocked" in probe.stderr, "the blocker itself must work"
    done = subprocess.run(command(plan_file, tmp_path / "out"), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {r["status"] for r in records.read(tmp_path / "out")} == {"ok"}


def test_an_unknown_engine_or_setting_is_an_error() -> None:
    with pytest.raises(ValueError, match="engine 'vlm' has no adapter; allowed: nanovllm, hf, vllm,"):
        load_adapter("vlm")
    for engine in ("nanovllm", "hf", "vllm"):
        with pytest.raises(ValueError, match=f"{engine}: unknown config key max_num_seq; allowed: .*max_num_seqs"):
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
