"""Whatever a constructor or a study accepts, runs: every field with everything that Python and YAML
can hold.
"""

from __future__ import annotations

import copy
import datetime
import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from experiments import workloads
from experiments.host import model_files
from experiments.records import store
from experiments.study import machine, plan_view
from experiments.study.plan import build_plan
from experiments.study.spec import ModelChoice, load_profile, load_study
from experiments.study.yaml_files import SpecError
from nanovllm import LLM, EngineConfig, SamplingParams
from nanovllm.models.checkpoint import ensure_checkpoint
from tests.study.test_plan import SHAPE

YAML_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    1.0,
    2.0,
    1.5,
    -0.5,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**30,
    -(10**30),
    2**31,
    2**63,
    1e-40,
    1e39,
    "",
    "x",
    "1",
    "on",
    "auto",
    "a\0b",
    b"x",
    [],
    {},
    [1],
    ["x"],
    [None],
    {"a": 1},
    datetime.date(2026, 1, 2),
    {1, 2},
]
PYTHON_VALUES = [
    *YAML_VALUES,
    np.int64(1),
    np.float32(0.5),
    np.bool_(True),
    np.array([1, 2]),
    np.str_("x"),
    (1,),
    object(),
    Decimal("0.5"),
    Fraction(1, 2),
    1j,
    torch.float32,
    torch.tensor(1),
    Path("x"),
    range(2),
    lambda: 1,
    frozenset({1}),
]
SMALL: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 1 << 20,
    "skip_tokenizer_init": True,
}
REFUSALS = (ValueError, TypeError)
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # in C ten times as fast


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {
        "num_hidden_layers": 1,
        "vocab_size": 2048,
        "hidden_size": 32,
        "intermediate_size": 32,
        "head_dim": 8,
    }
    return ensure_checkpoint("tiny", cache_dir=tmp_path_factory.mktemp("checkpoints"), **shape)


@pytest.fixture(scope="module")
def llm(small: Path) -> Any:
    with LLM(str(small), **SMALL) as engine:
        yield engine


@pytest.mark.parametrize("name", sorted(SamplingParams.__dataclass_fields__))
def test_sampling_parameters_that_are_accepted_run(llm: LLM, name: str) -> None:
    for value in PYTHON_VALUES:
        accepted_params_run(llm, name, value)


def accepted_params_run(llm: LLM, name: str, value: Any) -> None:
    try:
        params = SamplingParams(**{"max_tokens": 2, name: value})
    except REFUSALS as error:
        assert name in str(error), error  # noqa: PT017  what is accepted has to go on
        return
    try:
        (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    except ValueError as error:  # of a length that this engine, and not another one, cannot hold
        assert "max_model_len" in str(error)  # noqa: PT017
        return
    assert 1 <= len(output.outputs[0].token_ids) <= params.max_tokens


NAMES = sorted(
    {
        *EngineConfig.__dataclass_fields__,
        "enforce_eager",
        "enable_prefix_caching",
        "enable_chunked_prefill",
        "disable_cascade_attn",
        "async_scheduling",
    }
    - {"device"}
)


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_that_is_made_runs(
    small: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for value in PYTHON_VALUES:
        made_engine_runs(small, name, value)


def made_engine_runs(small: Path, name: str, value: Any) -> None:
    given_ = {"model": str(small), **SMALL, name: value}
    try:
        engine = LLM(**given_)
    except (*REFUSALS, FileNotFoundError, MemoryError):
        return
    with engine:
        if engine.config.max_model_len < 5:
            return  # refuses the request, by its length
        (output,) = engine.generate(
            [[5, 6, 7]], SamplingParams(max_tokens=2, temperature=0.5), use_tqdm=False
        )
        assert len(output.outputs[0].token_ids) in (1, 2)
        json.dumps(engine.resolved_config(), allow_nan=False)


STUDY: dict[str, Any] = {
    "name": "odd",
    "title": "t",
    "question": "q",
    "metric": "output_tokens_per_s",
    "smallest_effect": 0.05,
    "alpha": 0.05,
    "design": {
        "kind": "one_at_a_time",
        "blocks": 2,
        "budget_s": 10_000.0,
        "bootstrap": False,
        "seed": 0,
    },
    "measurement": {
        "warm_up_requests": 1,
        "warm_up_tokens": 1,
        "timeout_s": 300.0,
        "launch_s": 8.0,
        "environment": {"A": "b"},
    },
    "settings": {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "max_model_len": 512,
        "block_size": 16,
        "kv_cache_memory_bytes": 1 << 24,
    },
    "factors": {"batching": {"levels": ["continuous"], "baseline": "static", "workloads": ["w"]}},
    "fixed": {"prefix_cache": "on"},
    "workloads": {
        "w": {
            "kind": "random",
            "num_requests": 2,
            "prompt_tokens": [4, 8],
            "output_tokens": 4,
            "vocab_size": 2048,
            "seed": 0,
            "temperature": 0.6,
            "top_k": 0,
            "top_p": 1.0,
            "ignore_eos": True,
        },
        "online": {
            "kind": "random",
            "num_requests": 2,
            "arrivals": {
                "process": "gamma",
                "burstiness": 0.5,
                "search": {"low": 1.0, "high": 2.0, "within": 1.5, "most": 3},
            },
        },
    },
    "load": {
        "slo": {"ttft_s": 1.0},
        "attainment": 0.9,
        "max_lateness_s": 0.01,
    },
    "validity": {"foreign_gpu_processes": 0, "throttle": [], "max_foreign_cpu": 0.9},
    "comparisons": {},
    "cells": {},
    "gate": {},
}


GIVEN = ("temperature", "top_k", "top_p", "ignore_eos")


def leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    below = (
        [leaf for key, value in tree.items() for leaf in leaves(value, (*path, key))]
        if isinstance(tree, dict)
        else []
    )
    return [path, *below] if path else below


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    monkeypatch.setattr(
        model_files,
        "inspect",
        lambda preset, path, **_: {"path": str(tmp_path), "digest": "d" * 64},
    )
    speeds = {"bandwidth_bytes_per_s": 1e10, "peak_flops": {"float32": 1e11, "bfloat16": 1e11}}
    monkeypatch.setattr(machine, "measure", lambda: speeds)
    return tmp_path


@pytest.mark.parametrize("path", leaves(STUDY), ids=".".join)
def test_a_study_that_is_accepted_can_run(here: Path, path: tuple[str, ...]) -> None:
    """It plans; the plan is JSON; and every launch would make its engine and its requests."""
    for value in YAML_VALUES:
        accepted_study_runs(here, path, value)


def accepted_study_runs(here: Path, path: tuple[str, ...], value: Any) -> None:
    study = copy.deepcopy(STUDY)
    target = study
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    file = here / "odd.yaml"
    file.write_text(yaml.dump(study, Dumper=DUMPER), encoding="utf-8")
    try:
        loaded, _ = load_study(file)
        profile = load_profile("cpu").model_copy(update={"cpu_cores": 2, "memory_bytes": 2**34})
        plan = build_plan(loaded, profile, ModelChoice(preset="tiny", dtype="float32"))
    except SpecError as error:
        assert "odd" in str(error)  # noqa: PT017  accepted, it has to go on
        return
    store.write_plan(plan, here / "plan.json")
    assert store.read_plan(here / "plan.json") == json.loads(json.dumps(plan, allow_nan=False))
    assert list(plan_view.lines(plan, []))
    assert 0 < plan["study"]["measurement"]["timeout_s"] < 1e9
    for cell in plan["cells"].values():
        EngineConfig.from_kwargs("m", **{**cell["config"], "seed": plan["launches"][0]["seed"]})
    for name, entry in plan["workloads"].items():
        for wave in workloads.rebuild(name, entry)["waves"]:
            for request in wave:
                SamplingParams(**{key: request[key] for key in (*GIVEN, "max_tokens", "seed")})


@pytest.mark.parametrize(
    "key", [None, True, 1, 1.5, float("nan"), "", "x.y", "a\0b", datetime.date(2026, 1, 2), b"x"]
)
@pytest.mark.parametrize(
    "path",
    [
        (),
        ("workloads",),
        ("workloads", "w"),
        ("factors",),
        ("cells",),
        ("measurement", "environment"),
    ],
)
def test_a_key_of_any_kind_is_a_message(here: Path, path: tuple[str, ...], key: Any) -> None:
    study = copy.deepcopy(STUDY)
    target = study
    for part in path:
        target = target[part]
    target[key] = {"kind": "random"} if path == ("workloads",) else 1
    target[0] = 1
    file = here / "odd.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    with pytest.raises(SpecError, match="odd"):
        load_study(file)
