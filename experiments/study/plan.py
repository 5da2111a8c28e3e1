"""Expands a study, a profile and a model into a plan: the list of all launches, in an order drawn
from the study's seed.

The design is a randomized complete block design: each block runs every cell once, in random order,
and each launch serves the workloads in random order. The same study, profile, model and overrides
give the same plan, byte for byte. `outline` computes its shape without a model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import shutil
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments import workload_files, workloads
from experiments.engines import load_adapter, why_not_over_time
from experiments.host import model_files
from experiments.price import rules
from experiments.records import store, types
from experiments.records.factor_levels import Level, level_value
from experiments.records.types import (
    Config,
    JsonObject,
    LaunchEntry,
    ModelShape,
    NotApplicable,
    Plan,
    PlannedModel,
    PlannedPrice,
    PlannedProfile,
    PlannedSettings,
    Workload,
)
from experiments.study import block_count, designs, machine, prompts, work_size
from experiments.study.protocol import Statistics
from experiments.study.spec import FACTORS, Cell, ModelChoice, Price, Profile, Study
from experiments.study.spec import Workload as StudyWorkload
from experiments.study.yaml_files import SpecError
from nanovllm.config import BASELINE

ReasonAgainst = Callable[[Mapping[str, Level]], str | None]
"""Why a combination of levels cannot run here; None if it can."""


class NotHereError(SpecError):
    """A valid study that cannot run on this profile; the message says why."""


@dataclasses.dataclass(frozen=True)
class Outline:
    """The shape of a plan: its cells, what cannot run, the number of blocks, and the generators of a
    fractional factorial.
    """

    cells: dict[str, Cell]
    not_applicable: list[NotApplicable]
    blocks: int
    generators: dict[str, list[str]]
    launch_s: float

    @property
    def launches(self) -> int:
        return self.blocks * len(self.cells)

    @property
    def expected_s(self) -> float:
        return self.launches * self.launch_s


def build_plan(
    study: Study,
    profile: Profile,
    model: ModelChoice | None = None,
    overrides: JsonObject | None = None,
    *,
    resolve: Callable[[ModelChoice], PlannedModel] | None = None,
) -> Plan:
    """Expands a study. `model` overrides the study's and the profile's. resolve: finds the checkpoint;
    a plan that nothing is to run may do without one. Raises SpecError, or ModelError for the checkpoint.

    A level that cannot run on the profile gets no cell; `not_applicable` lists it with the reason.
    """
    choice = model or study.model or ModelChoice(preset=profile.preset, dtype=profile.dtype)
    resolved_model = (resolve or resolve_model)(choice)
    study = with_tokens(study, choice)
    settled_profile = machine.settle(profile, choice.dtype)
    cells = _cells(study, settled_profile, resolved_model["shape"])[0]
    study, sized = work_size.fit(study, settled_profile, resolved_model, cells)
    work = {name: workloads.build(name, w.kind, w.params) for name, w in study.workloads.items()}
    settings: PlannedSettings = study.settings.model_dump()  # type: ignore[assignment]
    kv_cache_bytes = _kv_cache_bytes(study, settled_profile, resolved_model, work)
    settings["kv_cache_memory_bytes"] = settled_profile["kv_cache_memory_bytes"] = kv_cache_bytes
    _check_fit(study, work, resolved_model["shape"], settings)
    _check_memory(study, settled_profile, resolved_model)

    shape = outline(study, settled_profile, resolved_model["shape"])
    _check_over_time(study, shape.cells)
    shared: Config = {**settings, "dtype": choice.dtype, "device": profile.device}
    launches = _launches(study.design.seed, shape.blocks, list(shape.cells), list(work))
    described = {
        **study.model_dump(exclude={"workloads", "cells", "gate", "model", "price"}),
        "overrides": overrides or {},
    }
    if study.statistics == Statistics():
        del described["statistics"]  # plans of studies that say nothing of it stay as they were
    del described["load"]
    if study.load_rules is not None:
        described["load"] = study.load_rules.model_dump()
    # as resolved
    described["design"] |= {"blocks": shape.blocks, "generators": shape.generators}
    plan: Plan = {
        "plan_version": 1,
        "study": described,  # type: ignore[typeddict-item]
        "profile": settled_profile,
        "model": resolved_model,
        "workloads": {name: workloads.summarize(w) for name, w in work.items()},
        "cells": {name: _entry(study, cell, shared) for name, cell in shape.cells.items()},
        "not_applicable": shape.not_applicable,
        "launches": launches,
        "gate": study.gate,
        "expected_s": shape.expected_s,
        "plan_hash": "",
    }
    if sized:
        plan["sized"] = sized
    if (price := _price(study, choice, plan)) is not None:
        plan["price"] = price
    return {**plan, "plan_hash": store.plan_hash(plan)}


def with_tokens(study: Study, choice: ModelChoice) -> Study:
    """The study with the texts of its workloads tokenized by the model's tokenizer. Raises SpecError for
    texts that the model cannot take, such as a conversation where it has no chat template.
    """
    found = {
        name: _tokenized(w, choice, f"{study.source}: workload {name}")
        for name, w in study.workloads.items()
    }
    if all(found[name] is w for name, w in study.workloads.items()):
        return study
    tokenized = study.model_copy(update={"workloads": found})
    tokenized._source = study.source
    return tokenized


def _tokenized(w: StudyWorkload, choice: ModelChoice, where: str) -> StudyWorkload:
    """A workload with token ids in place of texts; `w` itself where it has none."""
    if w.kind != "file" or not workload_files.has_texts(w.params["content"]):
        return w
    try:
        folder = model_files.inspect(choice.preset, choice.path)["path"]
        content = prompts.tokenize(folder, w.params["content"], as_chat=w.params["as_chat"])
    except model_files.ModelError as error:
        raise SpecError(f"{where}: {error}") from error
    return w.model_copy(update={"params": w.params | {"content": content}})


def _price(study: Study, choice: ModelChoice, plan: Plan) -> PlannedPrice | None:
    """The margins and held prompts of a plan, and its lossy cells; None for a plan without any. Raises
    SpecError for prompts that the model or the settings cannot take.
    """
    lossy = {
        name: levels
        for name, cell in plan["cells"].items()
        if (levels := rules.lossy_levels(cell["config"]))
    }
    if not lossy:
        return None
    stated = study.price or Price()
    held = _tokenized(stated.prompts, choice, f"{study.source}: price.prompts")
    drawn = workloads.build("price.prompts", held.kind, held.params)
    lengths = [len(r["prompt_token_ids"]) for wave in drawn["waves"] for r in wave]
    if len(lengths) < rules.LEAST_PROMPTS or min(lengths) < 2:
        raise SpecError(
            f"{study.source}: price.prompts: {len(lengths)} prompts, the shortest of {min(lengths)} tokens; needed: at least "
            f"{rules.LEAST_PROMPTS} prompts, so that intervals hold what they promise, each of two tokens or more"
        )
    asked: Workload = {  # one token is generated, and thrown away
        **drawn,
        "waves": [[{**request, "max_tokens": 1} for request in wave] for wave in drawn["waves"]],
    }
    settings: PlannedSettings = study.settings.model_dump()  # type: ignore[assignment]
    _check_fit(study, {"price.prompts": asked}, plan["model"]["shape"], settings)
    return {
        "margins": stated.margins,
        "level": stated.level,
        "prompts": workloads.summarize(drawn),
        "cells": lossy,
    }


def _check_over_time(study: Study, cells: Mapping[str, Cell]) -> None:
    """Raises SpecError for a cell that cannot take requests over time, if the study has any."""
    if study.load_rules is None:
        return
    for name, cell in cells.items():
        levels = {**study.baselines(), **study.fixed, **cell.levels}
        reason = why_not_over_time(cell.engine)
        if cell.engine == study.engine and levels.get("data_parallel_size", 1) != 1:
            reason = "replicas (data_parallel_size above 1) take all requests of a call at once"
        if reason is not None:
            raise SpecError(
                f"{study.source}: cell {name} cannot serve workloads with arrivals: {reason}. Remove the cell, or the "
                "`arrivals` of the workloads"
            )


def resolve_model(choice: ModelChoice) -> PlannedModel:
    """The `model` part of a plan. Builds a preset that is not in the cache yet."""
    found = model_files.inspect(choice.preset, choice.path)
    path = None if choice.preset else found["path"]
    shape = model_files.shape(Path(found["path"]))
    return {
        "preset": choice.preset,
        "path": path,
        "dtype": choice.dtype,
        "digest": found["digest"],
        "shape": shape,
    }


def outline(study: Study, profile: PlannedProfile, shape: ModelShape | None = None) -> Outline:
    """The cells and blocks of a study on a profile. `shape` is the model's, if known. Raises
    SpecError, NotHereError.

    A level or combination of levels that cannot run gets no cell and is listed with the reason. A
    factorial design, which needs all of its cells, raises instead.
    """
    cells, not_applicable, generators = _cells(study, profile, shape)
    design, launch_s = study.design, study.measurement.launch_s
    budget_s, sizing = design.budget_s, study.sizing
    if sizing and design.blocks is None and budget_s:
        # a guess by launch_s; work_size.fit estimates each launch, and never takes fewer blocks
        fitting = int(budget_s / (len(cells) * launch_s))
        blocks = min(sizing.most_blocks, max(sizing.least_blocks, fitting))
        return Outline(cells, not_applicable, blocks, generators, launch_s)
    try:
        blocks = block_count.blocks_within(
            design.blocks, budget_s, design.bootstrap, len(cells), launch_s
        )
    except ValueError as error:
        raise SpecError(f"{study.source}: {error}") from error
    return Outline(cells, not_applicable, blocks, generators, launch_s)


def inapplicable(
    factor: str, level: Level, profile: PlannedProfile, shape: ModelShape | None
) -> str | None:
    """Why a level of a factor cannot run on a profile with this model; None if it can."""
    if reason := why_not({factor: level}, profile):
        return reason
    if factor == "tensor_parallel_size":
        heads = shape["num_key_value_heads"] if shape else 0
        if heads % int(level):
            return f"the model's {heads} KV heads cannot be split evenly over {level} processes"
    if factor in ("tensor_parallel_size", "data_parallel_size") and (
        reason := _too_few_devices(int(level), profile)
    ):
        return reason
    if (
        (factor, level) == ("kernels", "compile")
        and profile["device"] == "cpu"
        and not _cpp_compiler()
    ):
        return "torch.compile needs a C++ compiler on a CPU, and none was found; install g++ or set CXX"
    return None


def _cpp_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def why_not(
    levels: Mapping[str, Level], profile: PlannedProfile, *, whole: bool = False
) -> str | None:
    """Why a combination of levels cannot run on a profile; None if it can. The check is the
    engine's own.

    whole: `levels` holds every level of a cell that differs from its baseline.
    """
    try:
        change: Config = {factor: level_value(level) for factor, level in levels.items()}
        asked = dataclasses.replace(BASELINE, **change)
        dataclasses.replace(asked, data_parallel_size=1).resolve(profile["device"], in_engine=whole)
    except ValueError as error:
        return str(error)
    return (
        _too_few_devices(asked.tensor_parallel_size * asked.data_parallel_size, profile)
        if whole
        else None
    )


def _too_few_devices(processes: int, profile: PlannedProfile) -> str | None:
    have, unit = (
        (profile["num_devices"], "GPU")
        if profile["device"] == "cuda"
        else (profile["cpu_cores"], "CPU core")
    )
    return (
        f"needs {processes} {unit}s; profile {profile['name']} has {have}"
        if processes > (have or 1)
        else None
    )


def _cells(
    study: Study, profile: PlannedProfile, shape: ModelShape | None
) -> tuple[dict[str, Cell], list[NotApplicable], dict[str, list[str]]]:
    """The cells that can run, by name; what cannot run; the generators of a fractional factorial."""
    kind, where = study.design.kind, f"on profile {profile['name']}"
    _check_fixed_and_baselines(study, profile, shape)
    absent = _absent_levels(study, profile, shape)
    not_applicable: list[NotApplicable] = [
        {"factor": factor, "level": level, "reason": reason}
        for (factor, level), reason in absent.items()
    ]
    levels = {
        factor: [level for level in spec.levels if (factor, level) not in absent]
        for factor, spec in study.factors.items()
    }
    generators = study.generators(levels)

    def reason_against(point: Mapping[str, Level]) -> str | None:
        return why_not({**study.fixed, **point}, profile, whole=True)

    name, point = designs.reference(kind, study.baselines(), levels, study.apart())
    if reason := reason_against(point):
        raise NotHereError(
            f"{study.source}: the reference, {name} ({_described(point)}), cannot run {where}: {reason}"
        )
    cells = {
        name: Cell.model_construct(engine=study.engine, role="baseline", levels=point, config={}),
        "aa": Cell.model_construct(engine=study.engine, role="aa", levels=point, config={}),
    }
    for found, skipped in (
        _cells_of_design(study, profile, levels, generators, reason_against),
        _cells_of_study(study, profile, absent, reason_against),
    ):
        cells |= found
        not_applicable += skipped
    if len(cells) == 2:
        raise NotHereError(
            f"{study.source}: nothing to compare {name} with {where}: {not_applicable[0]['reason']}"
        )
    return cells, not_applicable, generators


def _check_fixed_and_baselines(
    study: Study, profile: PlannedProfile, shape: ModelShape | None
) -> None:
    """Raises NotHereError for a fixed level or a baseline that cannot run: every cell needs them."""
    where = f"on profile {profile['name']}"
    for factor, level in study.fixed.items():
        if reason := inapplicable(factor, level, profile, shape):
            raise NotHereError(
                f"{study.source}: fixed.{factor}: {level} cannot run {where}: {reason}"
            )
    for factor, level in study.baselines().items():
        if reason := inapplicable(factor, level, profile, shape):
            raise NotHereError(
                f"{study.source}: the baseline of {factor} cannot run {where}: {reason}"
            )


def _absent_levels(
    study: Study, profile: PlannedProfile, shape: ModelShape | None
) -> dict[tuple[str, Level], str]:
    """The levels of factors that cannot run on the profile, each with the reason. Raises NotHereError
    if there is one and the design needs every level.
    """
    absent = {
        (factor, level): reason
        for factor, spec in study.factors.items()
        for level in spec.levels
        if (reason := inapplicable(factor, level, profile, shape))
    }
    kind = study.design.kind
    if absent and kind in designs.FACTORIALS:
        (factor, level), reason = next(iter(absent.items()))
        raise NotHereError(
            f"{study.source}: factors.{factor}.levels: {level} cannot run on profile {profile['name']}: "
            f"{reason.rstrip('.')}. design.kind: {kind} needs every level: remove this one, or use another kind: {_others()}"
        )
    return absent


def _cells_of_design(
    study: Study,
    profile: PlannedProfile,
    levels: Mapping[str, Sequence[Level]],
    generators: designs.Generators,
    reason_against: ReasonAgainst,
) -> tuple[dict[str, Cell], list[NotApplicable]]:
    """The cells that the design adds to its reference, and those of them that cannot run. Raises
    NotHereError if there is one and the design needs every cell.
    """
    kind, baselines = study.design.kind, study.baselines()
    cells: dict[str, Cell] = {}
    not_applicable: list[NotApplicable] = []
    designed = designs.cells(
        kind,
        baselines,
        levels,
        generators,
        apart=study.apart(),
        can_run=lambda point: reason_against(point) is None,
    )
    for name, (role, point) in designed.items():
        reason = reason_against(point)
        if reason is None:
            cells[name] = Cell(engine=study.engine, role=role, levels=point)
            continue
        if kind in designs.FACTORIALS:
            raise NotHereError(
                f"{study.source}: cell {name} cannot run on profile {profile['name']}: {reason.rstrip('.')}. "
                f"design.kind: {kind} needs every cell: remove a factor, or use another kind: {_others()}"
            )
        changed = {factor: level for factor, level in point.items() if level != baselines[factor]}
        not_applicable.append({"factor": name, "level": _described(changed), "reason": reason})
    return cells, not_applicable


def _cells_of_study(
    study: Study,
    profile: PlannedProfile,
    absent: Mapping[tuple[str, Level], str],
    reason_against: ReasonAgainst,
) -> tuple[dict[str, Cell], list[NotApplicable]]:
    """The cells that the study lists itself (`cells`), and those of them that cannot run. A cell of role `all` has
    everything on that can run: it is made without the levels that cannot, which are listed as such.
    """
    cells: dict[str, Cell] = {}
    not_applicable: list[NotApplicable] = []
    for name, cell in study.cells.items():
        if cell.role == "all":
            here = {pair[0]: pair[1] for pair in cell.levels.items() if pair not in absent}
            cell = cell.model_copy(update={"levels": here}) if here else cell
        missing = next((pair for pair in cell.levels.items() if pair in absent), None)
        levels = cell.levels
        if missing is not None:
            reason: str | None = absent[missing]
            levels = dict([missing])
        elif cell.engine == study.engine:
            reason = reason_against(study.baselines() | cell.levels)
        else:
            reason = _too_few_devices(cell.config.get("tensor_parallel_size", 1), profile)
        if reason is None:
            cells[name] = cell
            continue
        if not levels:  # of another engine, which only needs its devices
            levels = {"tensor_parallel_size": cell.config.get("tensor_parallel_size", 1)}
        not_applicable.append({"factor": name, "level": _described(levels), "reason": reason})
    return cells, not_applicable


def _described(levels: Mapping[str, Level]) -> str:
    return ", ".join(f"{factor}={level}" for factor, level in levels.items())


def _others() -> str:
    return ", ".join(
        other for other in typing.get_args(designs.Kind) if other not in designs.FACTORIALS
    )


def _entry(study: Study, cell: Cell, shared: Config) -> types.Cell:
    """A cell as stored in a plan. Every optimization is set explicitly, so that the engine's
    defaults do not matter.
    """
    allowed = load_adapter(cell.engine).allowed
    levels = study.baselines() | cell.levels if cell.engine == study.engine else cell.levels
    config = {key: value for key, value in shared.items() if key in allowed}
    if "optimizations" in allowed:
        every = {factor: known[0] for factor, known in FACTORS.items()} | study.fixed | levels
        config["optimizations"] = {factor: level_value(level) for factor, level in every.items()}
    if unknown := sorted(set(cell.config) - set(allowed)):
        raise SpecError(
            f"{study.source}: engine {cell.engine} has no setting {unknown[0]!r}; it has {', '.join(allowed)}"
        )
    return {
        "engine": cell.engine,
        "config": config | cell.config,
        "levels": levels,
        "role": cell.role,
    }


def _launches(seed: int, blocks: int, cells: list[str], work: list[str]) -> list[LaunchEntry]:
    launches: list[LaunchEntry] = []
    for block in range(blocks):
        rng = random.Random(f"{seed}/{block}")
        order = rng.sample(cells, len(cells))
        for position, cell in enumerate(order):
            launches.append(
                {
                    "launch": f"b{block:02d}-o{position:02d}-{cell}",
                    "block": block,
                    "order": position,
                    "cell": cell,
                    "seed": _seed(f"{seed}/{block}/{cell}"),
                    "workload_order": rng.sample(work, len(work)),
                }
            )
    return launches


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _kv_cache_bytes(
    study: Study, profile: PlannedProfile, model: PlannedModel, work: dict[str, Workload]
) -> int:
    """The size of the KV cache: as given by the study or the profile; otherwise the memory that is
    free on the device now, but no more than the workloads can fill.
    """
    settings, shape = study.settings, model["shape"]
    given: int | str = settings.kv_cache_memory_bytes or profile["kv_cache_memory_bytes"]
    if isinstance(given, int):
        return given
    longest = [
        len(r["prompt_token_ids"]) + r["max_tokens"]
        for w in work.values()
        for wave in w["waves"]
        for r in wave
    ]
    pages = -(-max(longest) // settings.block_size) + 1  # the last token of a step may open a page
    most = (
        settings.max_num_seqs
        * pages
        * settings.block_size
        * work_size.kv_bytes_per_token(shape, model["dtype"])
    )
    step = work_size.step_bytes(
        shape, model["dtype"], settings.max_num_batched_tokens, settings.max_num_seqs
    )
    free = machine.free_gpu_bytes(profile["num_devices"])
    return machine.kv_budget(free, work_size.weight_bytes(shape, model["dtype"]), step, most)


def _check_memory(study: Study, profile: PlannedProfile, model: PlannedModel) -> None:
    """Raises SpecError if the KV cache, or weights and KV cache together, exceed a device's
    memory.
    """
    asked, there = profile["kv_cache_memory_bytes"], profile["memory_bytes"]
    if asked and there and asked > there:
        raise SpecError(
            f"{study.source}: settings.kv_cache_memory_bytes is {asked:,}, and profile {profile['name']} has {there:,} bytes of "
            "memory: lower it (SET=settings.kv_cache_memory_bytes=5368709120), or use a study for small GPUs (gpu-8gb, "
            "gpu-vllm-8gb)"
        )
    weights = work_size.weight_bytes(model["shape"], model["dtype"])
    shards = int({**study.baselines(), **study.fixed}.get("tensor_parallel_size", 1))
    if profile["device"] == "cuda" and there and weights / shards + asked > there:
        raise SpecError(
            f"{study.source}: the weights of {model['preset'] or model['path']} take {weights:,} bytes in {model['dtype']} and the "
            f"KV cache {asked:,}; profile {profile['name']} has {there:,} bytes of memory. Use a smaller MODEL, or lower "
            "settings.kv_cache_memory_bytes"
        )


def _check_fit(
    study: Study, work: dict[str, Workload], shape: ModelShape, settings: PlannedSettings
) -> None:
    """Raises SpecError for a workload that does not fit the model or the settings, before anything
    is launched.
    """
    for name, workload in work.items():
        requests = [request for wave in workload["waves"] for request in wave]
        longest = max(len(r["prompt_token_ids"]) + r["max_tokens"] for r in requests)
        where = f"{study.source}: workload {name}"
        if longest > settings["max_model_len"]:
            raise SpecError(
                f"{where} has a request of {longest} tokens, more than settings.max_model_len, {settings['max_model_len']}; "
                "shorten its prompts or outputs, or raise the setting"
            )
        highest = max(max(r["prompt_token_ids"]) for r in requests)
        if "vocab_size" not in workload["params"] and highest >= shape["vocab_size"]:
            raise SpecError(
                f"{where} has the token id {highest}, but the model's vocabulary has {shape['vocab_size']}: its file was made "
                "for another model"
            )
        drawn = workload["params"].get("vocab_size", 0)
        if drawn > shape["vocab_size"]:
            raise SpecError(
                f"{where} draws from {drawn} token ids, but the model's vocabulary has {shape['vocab_size']}: lower the "
                "workload's vocab_size"
            )
