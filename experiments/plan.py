"""From a study, a profile and a model to a plan: every launch there will be, in an order drawn from the study's seed.

Randomized complete blocks: a block holds every cell once, in random order, and each launch serves the workloads in random
order. The same study, profile, model and overrides give the same plan, byte for byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import shutil
from pathlib import Path
from typing import Any

from experiments import machine, model_files, records, workloads
from experiments.engines import load_adapter
from experiments.levels import Level, level_value
from experiments.spec import FACTORS, Cell, ModelChoice, Profile, Study
from experiments.yaml_files import SpecError
from nanovllm.config import BASELINE

Plan = dict[str, Any]


def build_plan(study: Study, profile: Profile, model: ModelChoice | None = None, overrides: dict[str, Any] | None = None) -> Plan:
    """Expands a study. model: instead of the study's own or the profile's. Raises SpecError, or ModelError for the checkpoint.

    A factor's level that cannot run on the profile is listed in `not_applicable` with the reason, and has no cell.
    """
    choice = model or study.model or ModelChoice(preset=profile.preset, dtype=profile.dtype)
    resolved_model = resolve_model(choice)
    settled_profile = machine.settle(profile, choice.dtype)
    work = {name: workloads.build(name, w.kind, w.params) for name, w in study.workloads.items()}
    settings = study.settings.model_dump()
    settings["kv_cache_memory_bytes"] = settings["kv_cache_memory_bytes"] or profile.kv_cache_memory_bytes
    settled_profile["kv_cache_memory_bytes"] = settings["kv_cache_memory_bytes"]
    _check_fit(study, work, resolved_model["shape"], settings)

    cells, not_applicable = _cells(study, settled_profile, resolved_model["shape"])
    shared = {**settings, "dtype": choice.dtype, "device": profile.device}
    launches = _launches(study, list(cells), list(work))
    plan: Plan = {
        "plan_version": 1,
        "study": {**study.model_dump(exclude={"workloads", "cells", "gate", "model"}), "overrides": overrides or {}},
        "profile": settled_profile,
        "model": resolved_model,
        "workloads": {name: workloads.summarize(w) for name, w in work.items()},
        "cells": {name: _entry(study, cell, shared) for name, cell in cells.items()},
        "not_applicable": not_applicable,
        "launches": launches,
        "gate": study.gate,
        "expected_s": len(launches) * study.measurement.launch_s,
    }
    return {**plan, "plan_hash": records.plan_hash(plan)}


def resolve_model(choice: ModelChoice) -> dict[str, Any]:
    """The `model` part of a plan. A preset is built if it is not in the cache yet."""
    found = model_files.inspect(choice.preset, choice.path)
    path = None if choice.preset else found["path"]
    shape = model_files.shape(Path(found["path"]))
    return {"preset": choice.preset, "path": path, "dtype": choice.dtype, "digest": found["digest"], "shape": shape}


def inapplicable(factor: str, level: Level, profile: dict[str, Any], shape: dict[str, Any]) -> str | None:
    """Why a level of a factor cannot run on a profile with a model; None if it can."""
    try:
        change: dict[str, Any] = {factor: level_value(level)}
        dataclasses.replace(BASELINE, **change).resolve(profile["device"])
    except ValueError as error:
        return str(error)
    if factor == "tensor_parallel_size":
        heads = shape["num_key_value_heads"]
        if heads % int(level):
            return f"{level} processes cannot share the model's {heads} KV heads evenly"
    if factor in ("tensor_parallel_size", "data_parallel_size"):
        have, unit = (profile["num_devices"], "GPU") if profile["device"] == "cuda" else (profile["cpu_cores"], "CPU core")
        if int(level) > have:
            return f"needs {level} {unit}s, one a process; profile {profile['name']} has {have}"
    if (factor, level) == ("kernels", "compile") and profile["device"] == "cpu" and not _cpp_compiler():
        return "torch.compile needs a C++ compiler on a CPU and finds none; install g++, or set CXX"
    return None


def _cpp_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def _cells(study: Study, profile: dict[str, Any], shape: dict[str, Any]) -> tuple[dict[str, Cell], list[dict[str, Any]]]:
    """The cells that can run, by name, and what cannot. The baseline and its A/A arm need no YAML: they are always there."""
    not_applicable: list[dict[str, Any]] = []
    cells = {
        "baseline": Cell.model_construct(engine=study.engine, role="baseline", levels={}, config={}),
        "aa": Cell.model_construct(engine=study.engine, role="aa", levels={}, config={}),
    }
    alone = study.design.kind == "one_at_a_time"
    for factor, spec in study.factors.items():
        if reason := inapplicable(factor, spec.baseline or FACTORS[factor][0], profile, shape):
            raise SpecError(f"study {study.name}: the baseline of {factor} cannot run on profile {profile['name']}: {reason}")
        for level in spec.levels:
            if reason := inapplicable(factor, level, profile, shape):
                not_applicable.append({"factor": factor, "level": level, "reason": reason})
            elif alone:
                cells[f"{factor}={level}"] = Cell(engine=study.engine, role="treatment", levels={factor: level})
    absent = {(entry["factor"], entry["level"]): entry["reason"] for entry in not_applicable}
    for name, cell in study.cells.items():
        if missing := [pair for pair in cell.levels.items() if pair in absent]:
            factor, level = missing[0]
            not_applicable.append({"factor": name, "level": f"{factor}={level}", "reason": absent[missing[0]]})
        else:
            cells[name] = cell
    return cells, not_applicable


def _entry(study: Study, cell: Cell, shared: dict[str, Any]) -> dict[str, Any]:
    """A cell as a plan stores it. Every optimization is set explicitly, whatever the engine's defaults are."""
    allowed = load_adapter(cell.engine).allowed
    baseline = {factor: spec.baseline or FACTORS[factor][0] for factor, spec in study.factors.items()}
    levels = baseline | cell.levels if cell.engine == study.engine else cell.levels
    config = {key: value for key, value in shared.items() if key in allowed}
    if "optimizations" in allowed:
        every = {factor: known[0] for factor, known in FACTORS.items()} | levels
        config["optimizations"] = {factor: level_value(level) for factor, level in every.items()}
    if unknown := sorted(set(cell.config) - set(allowed)):
        raise SpecError(f"study {study.name}: engine {cell.engine} has no setting {unknown[0]!r}; allowed: {', '.join(allowed)}")
    return {"engine": cell.engine, "config": config | cell.config, "levels": levels, "role": cell.role}


def _launches(study: Study, cells: list[str], work: list[str]) -> list[dict[str, Any]]:
    launches = []
    for block in range(study.design.blocks):
        rng = random.Random(f"{study.design.seed}/{block}")
        order = rng.sample(cells, len(cells))
        for position, cell in enumerate(order):
            launches.append({
                "launch": f"b{block:02d}-o{position:02d}-{cell}", "block": block, "order": position, "cell": cell,
                "seed": _seed(f"{study.design.seed}/{block}/{cell}"), "workload_order": rng.sample(work, len(work)),
            })  # fmt: skip
    return launches


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _check_fit(study: Study, work: dict[str, Any], shape: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises SpecError for a workload that the model or the settings cannot hold: found now, not in the first launch."""
    for name, workload in work.items():
        requests = [request for wave in workload["waves"] for request in wave]
        longest = max(len(r["prompt_token_ids"]) + r["max_tokens"] for r in requests)
        where = f"study {study.name}: workload {name}"
        if longest > settings["max_model_len"]:
            raise SpecError(f"{where} has a request of {longest} tokens; settings.max_model_len is {settings['max_model_len']}")
        drawn = workload["params"]["vocab_size"]
        if drawn > shape["vocab_size"]:
            raise SpecError(f"{where} draws from {drawn} tokens; the model has {shape['vocab_size']}: lower its vocab_size")
