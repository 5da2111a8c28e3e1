"""The command line: what it says, what it resumes, and how it ends."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import experiments.__main__ as cli
import reports.__main__ as reports_cli
from experiments.cluster.executor import Options
from experiments.host import model_files, provenance
from experiments.host.environment import COMMAND
from experiments.launch.runner import Runner
from experiments.records import store
from experiments.run import execution, help_texts
from experiments.run.progress import ProgressBar
from experiments.study import machine
from nanovllm.models import checkpoint, hub
from tests.study.test_plan import SHAPE
from tests.support.fake_engine import make_plan


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(execution, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_validate_names_what_is_wrong(tmp_path: Path) -> None:
    assert invoke("validate").exit_code == 0
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("name: wrong\nfactor: {}\n")
    result = invoke("validate", "embedded", str(wrong))
    assert result.exit_code == 1
    assert "ok       embedded" in result.output
    assert "wrong.yaml:2: factor: unknown key (did you mean factors?)" in result.output


def test_an_error_is_one_message_and_status_2(runs: Path) -> None:
    result = invoke("ablate", "--study", "embeded")
    assert (result.exit_code, "Traceback" in result.output) == (2, False)
    assert "embeded: no such study (did you mean embedded?)" in result.output
    result = invoke("ablate", "--profile", "gpu")
    assert (result.exit_code, "8gpu, cpu, h100" in result.output) == (2, True)
    result = invoke("report")
    assert (result.exit_code, "run `make ablate` first" in result.output) == (2, True)


@pytest.mark.parametrize("command", ["report", "import"])
def test_a_folder_that_holds_no_execution_is_named(
    command: str, tmp_path: Path, runs: Path
) -> None:
    result = invoke(command, str(tmp_path / "nosuch"))
    assert (result.exit_code, "Traceback" in result.output) == (2, False)
    assert "nosuch: there is no such folder; `make ablate` makes one" in result.output
    result = invoke(command, str(tmp_path))
    assert (result.exit_code, "holds no plan.json" in result.output) == (2, True)


def test_a_model_that_is_neither_folder_nor_preset_is_named(runs: Path) -> None:
    result = invoke("ablate", "--study", "embedded", "--model", "tinny", "--dry-run")
    assert result.exit_code == 2
    assert (
        "--model tinny: no folder with a config.json and no preset (did you mean tiny?)"
        in result.output
    )
    assert set(model_files.PRESETS) == {*checkpoint.PRESETS, *checkpoint.GENERATED, *hub.CONVERTED}
    assert set(model_files.GENERATED) == set(checkpoint.GENERATED)
    assert model_files.preset_digests() == checkpoint.DIGESTS


COMMANDS = (
    "ablate",
    "run",
    "compare",
    "check",
    "predict",
    "report",
    "import",
    "chat",
    "validate",
    "serve",
    "list",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_that_parse(command: str) -> None:
    shown = invoke(command, "--help").output
    assert "Examples:" in shown
    assert max(map(len, shown.splitlines())) <= 80
    group: Any = typer.main.get_command(cli.app)
    for example, _ in help_texts.EXAMPLES[command]:
        assert f"{COMMAND} {example}" in map(str.strip, shown.splitlines())
        name, *arguments = example.split()
        group.commands[name].make_context(name, arguments)  # an unknown option raises


def test_the_help_of_both_programs_looks_alike() -> None:
    """Plain text without boxes, at 80 columns, with examples that parse."""
    group: Any = typer.main.get_command(reports_cli.app)
    assert set(group.commands) == set(reports_cli.EXAMPLES)
    for app, arguments in (
        (cli.app, ["--help"]),
        (reports_cli.app, ["--help"]),
        *((reports_cli.app, [command, "--help"]) for command in group.commands),
    ):
        shown = CliRunner().invoke(app, arguments).output
        assert not set(shown) & set("╭╮╰╯│─"), arguments
        assert max(map(len, shown.splitlines())) <= 80, arguments
        assert ("Examples:" if len(arguments) > 1 else "COMMAND --help shows examples") in shown
    for command, pairs in reports_cli.EXAMPLES.items():
        shown = CliRunner().invoke(reports_cli.app, [command, "--help"]).output
        for example, _ in pairs:
            assert f"python -m reports {example}" in map(str.strip, shown.splitlines())
            name, *arguments = example.split()
            group.commands[name].make_context(name, arguments)


@pytest.mark.parametrize(
    "arguments",
    [("render", "FOLDER"), ("ratio", "FOLDER", "a", "b"), ("publish", "FOLDER", "here/it")],
)
def test_reports_name_a_folder_that_holds_no_execution(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    for folder, why in ((tmp_path / "nosuch", "there is no such folder"), (tmp_path, "no plan")):
        given = [word.replace("FOLDER", str(folder)) for word in arguments]
        result = CliRunner().invoke(reports_cli.app, given)
        assert (result.exit_code, "Traceback" in result.output) == (2, False)
        assert f"{folder}: " in result.stderr
        assert why in result.stderr
        assert "give a folder with plan.json and records.jsonl" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "study"),
    [
        (["--profile", "cpu"], "embedded"),
        (["--profile", "cpu", "--model", "tiny"], "embedded"),
        (["--profile", "cpu", "--model", "smollm2"], "real-text"),
        (["--profile", "cpu", "--model", "smollm2", "--study", "embedded"], "embedded"),
        (["--profile", "h200", "--model", "smollm2"], "gpu-ablate"),
    ],
)
def test_ablate_chooses_a_study(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], study: str
) -> None:
    chosen = []
    monkeypatch.setattr(cli, "make_plan", lambda name, *_: chosen.append(name))
    assert invoke("ablate", *arguments, "--dry-run").exit_code == 0
    assert chosen == [study]


def test_help_lists_studies_profiles_and_presets() -> None:
    shown = " ".join(invoke("ablate", "--help").output.split())
    assert "conversation, cpu-online, cpu-quantization, embedded, gpu-8gb" in shown
    assert "cpu, h100, h100-x2" in shown
    assert "tiny, qwen3-0.6b" in shown
    assert set(COMMANDS) == set(cast(Any, typer.main.get_command(cli.app)).commands)


@pytest.mark.parametrize("profile", ["cpu", "h200"])
def test_the_list_is_readable_at_80_columns(
    profile: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "console", Console(width=80))
    shown = invoke("list", "--profile", profile)
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 70
    assert any(line.startswith("embedded") and " min " in line for line in lines)
    here, head = cli.names(cli.STUDIES), lines[0].index("title (on")
    rows = [line for line in lines if line.partition(" ")[0] in here]
    assert [row.split()[0] for row in rows] == here, "no name is broken over two lines"
    for row in rows:
        launches, cost = row[:head].split()[1], row[:head].split(maxsplit=2)[2].strip()
        assert (launches.isdigit() and cost.endswith((" min", " h"))) or (
            (launches, cost) == ("-", "cannot run")
        ), row
    assert ("validate NAME" in shown.output) == ("cannot run" in shown.output)


def test_a_dry_run_writes_a_plan_for_another_host(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    monkeypatch.setattr(
        model_files,
        "inspect",
        lambda preset, path, **_: {"path": str(tmp_path), "digest": "d" * 64},
    )
    monkeypatch.setattr(machine, "measure", lambda: pytest.fail("an H200 is not measured here"))
    path = tmp_path / "plan.json"
    result = invoke(
        "run",
        "--study",
        "embedded",
        "--profile",
        "h200",
        "--blocks",
        "3",
        "--dry-run",
        "--write-plan",
        str(path),
    )
    assert result.exit_code == 0, result.output
    plan = store.read_plan(path)
    assert plan["study"]["overrides"] == {"design.blocks": 3}
    assert (plan["profile"]["device"], plan["model"]["preset"], plan["model"]["dtype"]) == (
        "cuda",
        "qwen3-0.6b",
        "bfloat16",
    )
    assert "tensor_parallel_size=2" in result.output
    assert "needs 2 GPUs; profile h200 has 1" in " ".join(result.output.split())
    assert "python -m experiments.launch --plan plan.json" in result.output
    assert not runs.exists()


def test_an_interrupted_run_of_the_same_plan_and_code_is_found(
    tmp_path: Path, runs: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tmp_path / "model")
    assert execution.interrupted(plan, console) is None
    folder = execution.new_folder(plan)
    with Runner(plan, folder, resume=True) as runner:
        runner.run([0])
    assert execution.interrupted(plan, console) == folder
    assert "3 launches are recorded" in said(console)
    assert execution.interrupted(make_plan(tmp_path / "model", blocks=3), console) is None
    other = tmp_path / "runs" / "99999999-other"
    other.mkdir()
    (other / store.PLAN).write_text('{"plan_version": 0}')
    assert execution.interrupted(plan, console) == folder, (
        "another study's damaged folder stops none"
    )
    assert "99999999-other: " in said(console)
    (other / store.RECORDS).write_text("damaged\nmore\n")
    listed = invoke("list")
    assert listed.exit_code == 0
    assert f"{folder.name}  interrupted, 3 launches counted" in listed.output
    assert "99999999-other  interrupted, damaged: " in listed.output
    with monkeypatch.context() as changed:
        changed.setattr(provenance, "code_digest", lambda: "other")
        assert execution.interrupted(plan, console) is None
        assert "the code has changed since" in said(console)
    (folder / execution.FINISHED).touch()
    assert execution.interrupted(plan, console) is None


def test_launches_are_run_once_and_what_went_wrong_is_listed(
    tmp_path: Path, runs: Path, console: Console
) -> None:
    plan = make_plan(tmp_path / "model", blocks=1, dead="dead_toggle")
    folder = execution.new_folder(plan)
    assert execution.run_launches(plan, folder, Options(), console)
    assert execution.run_launches(plan, folder, Options(), console)
    assert len(store.read(folder)) == 4 + 1, "the second time only notes that it resumed"
    assert not execution.all_ok(folder, console)
    assert "invalid: b00-o03-dead: prefix_cache=on never engaged" in said(console)


def test_the_time_left_follows_what_launches_really_take(
    tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(tmp_path / "model", blocks=2)
    bar = ProgressBar(plan, console)
    assert bar.remaining_s() == pytest.approx(plan["expected_s"])
    for entry, seconds in zip(plan["launches"][:2], (10.0, 20.0), strict=True):
        record = {
            "cell": entry["cell"],
            "launch": entry["launch"],
            "block": entry["block"],
            "total_s": seconds,
            "status": "ok",
        }
        bar.listen("end", {"launch": entry, "record": {**record, "workloads": {}, "reason": None}})
    # baseline and aa once more by their own times, prefix_cache=on twice by the median of all
    assert bar.remaining_s() == pytest.approx(10 + 20 + 2 * 15)
    assert not (tmp_path / "out").exists()
    names = {"baseline": "all off", "aa": "A/A twin"}
    first = plan["launches"][0]["cell"]
    assert capsys.readouterr().out.startswith(f"block 0, {names.get(first, first)}: ok in 10.0 s")
