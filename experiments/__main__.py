"""The command line: python -m experiments ablate | run | compare | check | predict | report | import |
chat | validate | serve | list.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from experiments.checking import run as checking
from experiments.checking.jobs import Scope
from experiments.cluster.dispatch import WorkerError
from experiments.cluster.executor import EXECUTORS, Options
from experiments.engines import ENGINES, library
from experiments.host import environment, model_files, provenance, real_weights
from experiments.host.model_files import ModelError, download
from experiments.records import merged_folders, store
from experiments.records.store import RecordError
from experiments.records.types import Plan, PlannedProfile
from experiments.run import execution
from experiments.run.execution import ExecutionError, say
from experiments.run.help_texts import epilog
from experiments.run.tracking import TrackingError, import_folder, link
from experiments.study import machine, plan_view
from experiments.study.plan import build_plan
from experiments.study.spec import (
    PROFILES,
    STUDIES,
    ModelChoice,
    Profile,
    Study,
    load_profile,
    load_study,
)
from experiments.study.work_size import BYTES
from experiments.study.yaml_files import SpecError, names, suggest
from nanovllm.serving.command import serve

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: examples keep their lines
    help="Measure what each optimization buys, and check that the output stays the same.",
    epilog="COMMAND --help shows examples, and the studies, profiles and presets that there are.",
)
console = Console()
ABLATE = "make ablate" if environment.IN_REPOSITORY else "nanovllm ablate"
Act = Callable[[Plan, Path, Options, Console], bool]
CANNOT_RUN = "cannot run"
OWN_VLLM = environment.WORKPLACE / ".venv-vllm" / "bin" / "python"
KNOWN_ERRORS = (
    SpecError,
    ModelError,
    RecordError,
    ExecutionError,
    TrackingError,
    checking.CheckError,
    WorkerError,
)

StudyOption = Annotated[
    str, typer.Option("--study", help="name of a file in ablations/studies, or a path")
]
ProfileOption = Annotated[
    str | None,
    typer.Option("--profile", help="hardware profile, by name or path (default: this machine)"),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="checkpoint folder, Hugging Face id or preset (default: the study's)"
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="override a key of the study, e.g. design.blocks=2"
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="output folder (default: a new folder under runs/)"),
]
BlocksOption = Annotated[
    int | None, typer.Option("--blocks", help="number of blocks (same as --set design.blocks=N)")
]
PythonOption = Annotated[
    list[str] | None,
    typer.Option(
        "--python",
        metavar="ENGINE=PATH",
        help="Python interpreter for an engine, e.g. vllm=.venv-vllm/bin/python",
    ),
]
DeadlineOption = Annotated[
    float | None,
    typer.Option("--deadline-s", help="skip launches not expected to finish within this time"),
]
ExecutorOption = Annotated[
    str,
    typer.Option("--executor", help="local (this machine) or ray (blocks run on a Ray cluster)"),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        help="host:port of a Ray cluster, or auto (default: $RAY_ADDRESS, else a local Ray)",
    ),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", help="print every row, legend and note of the result")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="print the plan and exit")]
FolderArgument = Annotated[
    Path | None, typer.Argument(help="folder of an execution (default: the latest under runs/)")
]


@app.command(epilog=epilog("ablate"))
def ablate(
    study: Annotated[
        str | None,
        typer.Option(
            "--study",
            help="name or path of a study (default: gpu-ablate on a GPU; else embedded, and real-text for smollm2)",
        ),
    ] = None,
    profile: ProfileOption = None,
    model: ModelOption = None,
    overrides: SetOption = None,
    blocks: BlocksOption = None,
    out: OutOption = None,
    python: PythonOption = None,
    deadline_s: DeadlineOption = None,
    executor: ExecutorOption = "local",
    ray_address: RayAddressOption = None,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure what each optimization gains on this machine.

    Runs or resumes a study, checks all outputs, then writes the report and MLflow runs.
    """
    if study is None:
        study = (
            "gpu-ablate"
            if guarded(lambda: choose_profile(profile)).device == "cuda"
            else "real-text"  # twenty times the size of what `embedded` is made for
            if model == real_weights.NAME
            else "embedded"
        )
    plan = make_plan(study, profile, model, overrides, blocks)
    if not dry_run:
        go(plan, out, make_options(python, deadline_s, executor, ray_address, verbose))


@app.command(epilog=epilog("run"))
def run(
    study: Annotated[
        str, typer.Option("--study", help="name of a file in ablations/studies, or a path")
    ],
    profile: ProfileOption = None,
    model: ModelOption = None,
    overrides: SetOption = None,
    blocks: BlocksOption = None,
    out: OutOption = None,
    python: PythonOption = None,
    deadline_s: DeadlineOption = None,
    executor: ExecutorOption = "local",
    ray_address: RayAddressOption = None,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
    write_plan: Annotated[
        Path | None, typer.Option("--write-plan", help="also write the plan to this file")
    ] = None,
) -> None:
    """Run any study.

    With --dry-run --write-plan plan.json, only write the plan, to be run on another host.
    """
    plan = make_plan(study, profile, model, overrides, blocks)
    if write_plan:
        store.write_plan(plan, write_plan)
        say(
            console,
            f"plan     {write_plan}; to run it: python -m experiments.launch --plan {write_plan.name} --out DIR --resume",
        )
    if not dry_run:
        go(plan, out, make_options(python, deadline_s, executor, ray_address, verbose))


@app.command(epilog=epilog("compare"))
def compare(
    other: Annotated[
        str,
        typer.Option("--with", help="what to compare with: hf, vllm, or vllm-online (its server)"),
    ] = "hf",
    study: Annotated[
        str | None,
        typer.Option(
            "--study",
            help="name or path of a study (default: gpu-compare-ENGINE on a GPU, else compare-ENGINE)",
        ),
    ] = None,
    profile: ProfileOption = None,
    model: ModelOption = None,
    overrides: SetOption = None,
    blocks: BlocksOption = None,
    out: OutOption = None,
    python: PythonOption = None,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare nanovllm with another engine on the same model and the same work.

    The launches of both engines are interleaved, and the outputs of both go through the gate.
    """
    if study is None:
        for_gpu = guarded(
            lambda: choose_profile(profile)
        ).device == "cuda" and f"gpu-compare-{other}" in names(STUDIES)
        study = f"gpu-compare-{other}" if for_gpu else f"compare-{other}"
    plan = make_plan(study, profile, model, overrides, blocks)
    if not dry_run:
        go(plan, out, Options(pythons=parse_pythons(python), verbose=verbose))


@app.command(epilog=epilog("check"))
def check(
    profile: ProfileOption = None,
    model: ModelOption = None,
    out: OutOption = None,
    python: PythonOption = None,
    drawn: Annotated[
        int, typer.Option("--workloads", min=4, help="number of workloads that Hypothesis draws")
    ] = 120,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype", help="only this one; may be given again [the machine's, float32, bfloat16]"
        ),
    ] = None,
) -> None:
    """Check that outputs are correct.

    Every pair of optimization levels, HF and vLLM must pass the gate; deliberately broken engines
    must fail it. vLLM is included if it has an interpreter: --python vllm=PATH.
    """
    if wrong := sorted(set(dtype or ()) - set(BYTES)):
        fail(f"--dtype {wrong[0]}: unknown; allowed: {', '.join(BYTES)}")
    conclude_check(profile, model, out, parse_pythons(python), drawn, tuple(dtype or ()))


@app.command(epilog=epilog("predict"))
def predict(
    study: Annotated[
        str, typer.Option("--study", help="name of a file in ablations/studies, or a path")
    ],
    profile: Annotated[str, typer.Option("--profile", help="hardware profile, by name or path")],
    model: ModelOption = None,
    overrides: SetOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="also write the predictions to this file")
    ] = None,
) -> None:
    """Predict what a study would measure on a GPU that is not at hand.

    The study's requests are served by the engine's scheduler in virtual time; nothing is measured.
    """
    from experiments.prediction import cards, cells, shapes, view
    from experiments.prediction.step_time import read_fitted

    def work() -> None:
        chosen, applied = load_study(study, overrides or [])
        hardware = load_profile(profile)
        cards.require_gpu(hardware.name, hardware.device)
        choice = choose_model(model, chosen, hardware)
        plan = build_plan(chosen, hardware, choice, applied, resolve=shapes.planned)
        fitted = read_fitted()
        found, unknown = cells.predict(plan, fitted)
        view.show(console, plan, found, unknown, fitted)
        if json_file:
            view.write(json_file, view.content(plan, found, unknown, fitted))

    guarded(work, (*KNOWN_ERRORS, ValueError))


@app.command(epilog=epilog("report"))
def report(folder: FolderArgument = None, verbose: VerboseOption = False) -> None:
    """Render the report of an execution from its records and print its answer."""
    chosen = guarded(lambda: latest(folder))
    guarded(lambda: execution.render(chosen, verbose))
    say(console, f"\nreport   {execution.shown(chosen / execution.REPORT / 'report.html')}")


@app.command("import", epilog=epilog("import"))
def import_command(
    folders: Annotated[
        list[Path], typer.Argument(help="folders of records, e.g. copied from a GPU host")
    ],
    merge: Annotated[
        Path | None,
        typer.Option(
            "--merge",
            metavar="NEW",
            help="merge the folders, which hold parts of one study, into a new one and import that",
        ),
    ] = None,
) -> None:
    """Write reports and MLflow runs from records. Importing the same records again changes nothing."""
    for folder in folders:
        guarded(lambda folder=folder: check_records(folder))
    if merge:
        for note in guarded(lambda: merged_folders.merge(folders, merge)):
            say(console, note, "yellow")
        folders = [merge]
    elif alike := guarded(lambda: merged_folders.of_one_plan(folders)):
        listed = " and ".join(str(folder) for folder in alike)
        say(
            console,
            f"{listed} hold the same plan and are imported as separate executions; use --merge NEW to combine them",
            "yellow",
        )
    for folder in folders:

        def work(folder: Path = folder) -> None:
            execution.render(folder)
            run_id, fresh = import_folder(folder, folder / execution.REPORT)
            say(
                console,
                f"{folder}: MLflow run {run_id} {'written' if fresh else 'already up to date'}",
            )
            say(console, f"its configurations: {link(run_id)}")

        guarded(work)


@app.command("chat", epilog=epilog("chat"))
def chat_command(
    model: Annotated[str, typer.Argument(help="checkpoint folder, Hugging Face id or preset")],
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="default: what the checkpoint recommends")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="the most tokens of an answer")] = 1024,
    chat_template: Annotated[
        Path | None, typer.Option(help="a Jinja file (default: the checkpoint's template)")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Talk with a model: each token is printed as it is generated. Ctrl-D or Ctrl-C ends.

    The prompt is made by the checkpoint's own chat template, as in LLM.chat.
    """
    from experiments import chat  # the engine, and torch with it

    settings = {"max_tokens": max_tokens} | (
        {} if temperature is None else {"temperature": temperature}
    )
    talk = guarded(
        lambda: chat.Conversation(
            model,
            system=system,
            template=chat.read_template(chat_template),
            settings=settings,
            engine={"device": device},
        ),
        (chat.ChatError,),
    )
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        chat.converse(talk, lambda: input(prompt), lambda piece: print(piece, end="", flush=True))
    except KeyboardInterrupt:
        print()
    finally:
        talk.close()


@app.command(epilog=epilog("validate"))
def validate(
    files: Annotated[
        list[str] | None,
        typer.Argument(help="studies by name or path (default: all studies and profiles)"),
    ] = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
) -> None:
    """Check studies and profiles without running anything.

    Prints what each study would launch on this machine or on --profile.
    """
    problems = 0
    hardware = guarded(lambda: choose_profile(profile))

    def study_in_short(name: str) -> str:
        return plan_view.in_short(load_study(name, overrides or [])[0], hardware)

    checks: list[tuple[str, Callable[[], str]]] = [
        (name, partial(study_in_short, name)) for name in files or names(STUDIES)
    ]
    if not files:
        checks += [
            (name, partial(lambda name: load_profile(name).title, name)) for name in names(PROFILES)
        ]
    for name, in_short in checks:
        try:
            say(console, f"ok       {name}: {in_short()}")
        except SpecError as error:
            problems += 1
            say(console, str(error), "red")
    raise typer.Exit(1 if problems else 0)


app.command(epilog=epilog("serve"))(serve)


@app.command("list", epilog=epilog("list"))
def list_command(profile: ProfileOption = None) -> None:
    """List studies, profiles, presets and executions.

    Shows what each study would launch on this machine or on --profile. For the question and the
    factors of a study: ablate --dry-run --study NAME.
    """
    hardware = guarded(lambda: choose_profile(profile))
    table = Table(box=None, pad_edge=False)
    table.add_column("study", no_wrap=True)
    table.add_column("launches", no_wrap=True, justify="right")
    table.add_column("time", no_wrap=True, justify="right")
    table.add_column(f"title (on {hardware.name})")  # the only column that may wrap
    for name in names(STUDIES):
        study: Study = guarded(lambda name=name: load_study(name)[0])
        cost = guarded(lambda study=study: plan_view.cost(study, hardware))
        table.add_row(name, *(cost or ("-", CANNOT_RUN)), study.title)
    console.print(table, highlight=False)
    if CANNOT_RUN in table.columns[2].cells:
        say(console, f"why a study cannot run: {environment.COMMAND} validate NAME")
    for kind, known in (("profiles", names(PROFILES)), ("presets", model_files.PRESETS)):
        console.print(f"\n{kind}: {', '.join(known)}", highlight=False)
    found = execution.executions()
    say(
        console,
        f"\nexecutions in {execution.shown(execution.RUNS)}:" if found else "\nno executions yet",
    )
    for folder in found:
        state = "finished" if (folder / execution.FINISHED).exists() else "interrupted"
        try:
            say(
                console,
                f"  {folder.name}  {state}, {len(store.counted(store.read(folder)))} launches counted",
            )
        except store.RecordError as error:
            say(console, f"  {folder.name}  {state}, damaged: {error}", "yellow")


def make_plan(
    study: str,
    profile: str | None,
    model: str | None,
    overrides: list[str] | None,
    blocks: int | None,
) -> Plan:
    """Plans a study and prints a summary of the plan. Exits with a message on an error."""

    def work() -> Plan:
        given = [*(overrides or []), *([f"design.blocks={blocks}"] if blocks else [])]
        chosen, applied = load_study(study, given)
        hardware = choose_profile(profile)
        return build_plan(chosen, hardware, choose_model(model, chosen, hardware), applied)

    plan: Plan = guarded(work)
    for line, style in guarded(lambda: plan_view.lines(plan, execution.earlier())):
        say(console, line, style)
    return plan


def choose_profile(given: str | None) -> Profile:
    """The given profile, else this machine's. Raises SpecError."""
    return load_profile(given) if given else machine.detect_profile()


def choose_model(given: str | None, study: Study, profile: Profile) -> ModelChoice | None:
    """The model of --model, in the study's or the profile's dtype; None without --model."""
    if given is None:
        return None
    preset, path = find_checkpoint(given)
    dtype = study.model.dtype if study.model else profile.dtype
    return ModelChoice(preset=preset, path=path, dtype=dtype)


def find_checkpoint(given: str) -> tuple[str | None, str | None]:
    """(preset, None) or (None, folder) of --model, which is a folder, a Hugging Face id or a preset."""
    if (Path(given) / "config.json").is_file():
        return None, str(Path(given).resolve())
    if "/" in given:
        return None, str(download(given))
    if given not in model_files.PRESETS:
        raise ModelError(
            f"--model {given}: no folder with a config.json and no preset{suggest(given, model_files.PRESETS)}; give a "
            f"folder, a hub id such as Qwen/Qwen3-0.6B, or a preset: {', '.join(model_files.PRESETS)}"
        )
    return given, None


def go(plan: Plan, out: Path | None, options: Options) -> NoReturn:
    """Executes a plan in `out`, else in the folder of its interrupted execution, else in a new one."""
    check_interpreters(plan, options.pythons)
    conclude(
        plan,
        guarded(lambda: out or execution.interrupted(plan, console) or execution.new_folder(plan)),
        options,
    )


def conclude(plan: Plan, folder: Path, options: Options, act: Act = execution.execute) -> NoReturn:
    """Executes the plan and exits: 0 if every launch is ok and every output passed, 1 if not, 2 on
    an error, 130 on Ctrl-C.
    """
    try:
        good = guarded(lambda: act(plan, folder, options, console))
    except KeyboardInterrupt:
        say(
            console,
            f"\nstopped; finished launches are in {execution.shown(folder)}. Run the same command to resume.",
        )
        raise typer.Exit(130) from None
    raise typer.Exit(0 if good else 1)


def conclude_check(
    profile: str | None,
    model: str | None,
    out: Path | None,
    pythons: dict[str, str],
    drawn: int,
    only: tuple[str, ...] = (),
) -> NoReturn:
    """Runs a check, in the dtypes of `only` if there are any.

    Exits: 0 if every verdict is the expected one, 1 if not, 2 on an error, 130 on Ctrl-C.
    """

    def work() -> bool:
        hardware = choose_profile(profile)
        given = find_checkpoint(model or "tiny")
        found = checking.find_model(*given)
        settled: PlannedProfile = hardware.model_dump()  # type: ignore[assignment]
        settled["cpu_cores"] = hardware.cpu_cores or provenance.cpu_cores()
        dtypes = tuple(dict.fromkeys(only or (hardware.dtype, "float32", "bfloat16")))
        peers = tuple(name for name in pythons if name not in ("nanovllm", "hf"))
        scope = Scope(
            settled, model_files.shape(Path(found["path"])), hardware.device, dtypes, peers
        )
        folder = out or execution.new_check_folder()
        good = checking.run(folder, found, scope, drawn, pythons, console)
        say(
            console, f"page     {execution.shown(folder / 'check.html')} (and check.md, check.json)"
        )
        if "vllm" not in pythons:
            say(
                console,
                "vLLM was not checked: give --python vllm=PATH, an interpreter that has it",
                "yellow",
            )
        return good

    try:
        good = guarded(work)
    except KeyboardInterrupt:
        say(console, "\nstopped; checks do not resume, run it again from the start")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if good else 1)


def make_options(
    python: list[str] | None,
    deadline_s: float | None,
    executor: str,
    ray_address: str | None,
    verbose: bool,
) -> Options:
    if executor not in EXECUTORS:
        fail(f"--executor {executor}: unknown; allowed: {', '.join(EXECUTORS)}")
    if ray_address and executor != "ray":
        fail(f"--ray-address {ray_address}: add --executor ray")
    return Options(
        executor,
        parse_pythons(python),
        deadline_s=deadline_s,
        ray_address=ray_address,
        verbose=verbose,
    )


def parse_pythons(given: list[str] | None) -> dict[str, str]:
    """Interpreters by engine. vLLM's defaults to the one that `make compare-vllm` has built."""
    if wrong := [item for item in given or [] if "=" not in item]:
        fail(f"--python {wrong[0]}: write ENGINE=PATH, e.g. vllm=.venv-vllm/bin/python")
    built = {"vllm": str(OWN_VLLM)} if OWN_VLLM.exists() else {}
    return built | dict(item.split("=", 1) for item in given or [])


def check_interpreters(plan: Plan, pythons: dict[str, str]) -> None:
    """Exits if an engine is not installed in its interpreter, instead of failing in every launch."""
    for engine in {cell["engine"] for cell in plan["cells"].values()}:
        if library(engine) != "vllm" and not {engine, library(engine)} & set(pythons):
            continue
        python = pythons.get(engine) or pythons.get(library(engine)) or sys.executable
        if shutil.which(python) is None:
            fail(
                f"--python {engine}={python}: no such program; give an interpreter that has {engine} installed"
            )
        # a clone puts its own engine on the path of every interpreter; a wheel has nothing to put there
        if not environment.IN_REPOSITORY and not _has(python, "nanovllm"):
            fail(
                f"{python} has no nanovllm, which its launches need: install it there too, `{python} -m pip install --no-deps` "
                "and what was installed here"
            )
        if engine in ENGINES and not _has(python, library(engine)):
            fail(
                f"{python} has no {library(engine)}: run `make compare-vllm`, which installs vLLM, or name an interpreter that has "
                "it with VLLM_PYTHON=PATH (--python vllm=PATH)"
            )


def _has(python: str, module: str) -> bool:
    """Whether an interpreter can import a module of this name."""
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", probe], check=False).returncode == 0


def latest(folder: Path | None) -> Path:
    if folder is None and not execution.executions():
        raise ExecutionError(f"runs/ holds no execution yet; run `{ABLATE}` first")
    if folder is None:
        return execution.executions()[-1]
    check_records(folder)
    return folder


def check_records(folder: Path) -> None:
    """Raises ExecutionError for a folder that is not there, or holds no execution."""
    known = [path.name for path in execution.executions()[-5:]]
    remedy = (
        f"executions in {execution.shown(execution.RUNS)}: {', '.join(known)}"
        if known
        else f"`{ABLATE}` makes one"
    )
    if not folder.is_dir():
        raise ExecutionError(f"{folder}: there is no such folder; {remedy}")
    if not (folder / store.PLAN).is_file():
        raise ExecutionError(
            f"{folder}: no execution, as it holds no {store.PLAN} and {store.RECORDS}; {remedy}"
        )


def guarded(work: Any, known: tuple[type[Exception], ...] = KNOWN_ERRORS) -> Any:
    """Returns what `work` returns. An error that a user can act on exits with its message alone."""
    try:
        return work()
    except known as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    Console(stderr=True).print(
        f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True
    )
    raise typer.Exit(2)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no … must not end a study
    app()


if __name__ == "__main__":
    main()
