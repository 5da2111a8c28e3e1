"""The scaling studies: what of them runs on which machine."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from pathlib import Path

import pytest

from experiments import workloads
from experiments.host import model_files
from experiments.study.plan import NotHereError, build_plan, inapplicable
from experiments.study.spec import load_profile, load_study
from nanovllm.config import Optimizations, ResolvedConfig
from nanovllm.engine.continuous_batching import ContinuousScheduler
from nanovllm.engine.prefix_cache import CachingBlockManager
from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import StepStats
from nanovllm.models.checkpoint import GENERATED, PRESETS
from nanovllm.sampling_params import SamplingParams


@pytest.fixture(autouse=True)
def _no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan needs a preset's shape, not its gigabytes of weights."""

    def inspect(preset: str, path: None, **_: bool) -> dict[str, str]:
        shape = dataclasses.asdict((PRESETS | GENERATED)[preset])
        (tmp_path / "config.json").write_text(json.dumps(shape))
        return {"path": str(tmp_path), "digest": "d" * 64}

    monkeypatch.setattr(model_files, "inspect", inspect)


@pytest.mark.parametrize(
    ("profile", "degrees"), [("h200-x2", [2]), ("h200-x4", [2, 4]), ("8gpu", [2, 4, 8])]
)
def test_degrees_as_far_as_the_machine_has_them(profile: str, degrees: list[int]) -> None:
    plan = build_plan(load_study("scaling-8b")[0], load_profile(profile))
    found = {cell.split("-")[0] for cell in plan["cells"] if cell.startswith("tp")}
    assert found == {f"tp{degree}" for degree in degrees}
    if 2 in degrees:
        assert (
            plan["cells"]["tp2-symmetric"]["config"]["optimizations"]["all_reduce"]
            == "symmetric_memory"
        )
        assert plan["cells"]["dp2"]["config"]["optimizations"]["data_parallel_size"] == 2
    reasons = [
        entry["reason"]
        for entry in plan["not_applicable"]
        if entry["factor"] == "tensor_parallel_size"
    ]
    assert len(reasons) == 3 - len(degrees)
    assert all("GPUs; profile" in reason for reason in reasons)


def test_one_gpu_has_nothing_to_scale_to() -> None:
    with pytest.raises(NotHereError, match="needs 2 GPUs; profile h200 has 1"):
        build_plan(load_study("scaling-8b")[0], load_profile("h200"))


@pytest.mark.parametrize("name", ["scaling", "scaling-32b"])
def test_the_other_studies_are_valid(name: str) -> None:
    study = load_study(name)[0]
    assert {"tp2", "tp8-symmetric"} <= study.cells.keys()


@pytest.mark.parametrize(
    ("profile", "found"), [("h200-x2", {"vllm-tp2"}), ("8gpu", {"vllm-tp2", "vllm-tp8"})]
)
def test_another_engine_needs_its_gpus_as_well(profile: str, found: set[str]) -> None:
    plan = build_plan(load_study("scaling")[0], load_profile(profile))
    assert {cell for cell in plan["cells"] if cell.startswith("vllm")} == found
    reasons = {
        entry["factor"]: entry["reason"]
        for entry in plan["not_applicable"]
        if entry["factor"].startswith("vllm")
    }
    assert reasons == (
        {} if profile == "8gpu" else {"vllm-tp8": "needs 8 GPUs; profile h200-x2 has 2"}
    )


@pytest.mark.parametrize("preset", ["qwen3-8b-4-layers", "qwen3-32b-4-layers"])
def test_the_gate_has_a_study_of_its_own(preset: str) -> None:
    study = load_study("scaling-gate")[0]
    model = study.model.model_copy(update={"preset": preset})
    plan = build_plan(study.model_copy(update={"model": model}), load_profile("h200-x2"))
    assert plan["model"]["shape"]["num_hidden_layers"] == 4
    assert {"baseline", "tp2", "tp2-symmetric"} <= plan["cells"].keys()


@pytest.mark.parametrize(("degree", "preemptions"), [(1, 3), (2, 2)])
def test_the_gate_sees_preempted_requests(degree: int, preemptions: int) -> None:
    """The scheduler alone, with the study's cache: admission foresees most, so that a workload has
    to be made for it.
    """
    study = load_study("scaling-gate")[0]
    plan = build_plan(study, load_profile("h200-x2"))
    shape, resolved = plan["model"]["shape"], study.settings.model_dump(exclude_none=True)
    token_bytes = (
        2
        * 2
        * shape["num_hidden_layers"]
        * shape["num_key_value_heads"]
        * shape["head_dim"]
        // degree
    )
    size, stats = resolved["block_size"], StepStats()
    blocks = CachingBlockManager(
        resolved.pop("kv_cache_memory_bytes") // (token_bytes * size), size, stats
    )
    switches = Optimizations(batching="chunked", prefix_cache=True, cuda_graphs=True, overlap=True)
    config = ResolvedConfig(model="none", **resolved, optimizations=switches)
    scheduler = ContinuousScheduler(config, blocks, stats)
    for i, request in enumerate(
        workloads.rebuild("growing", plan["workloads"]["growing"])["waves"][0]
    ):
        params = SamplingParams(max_tokens=request["max_tokens"], ignore_eos=True)
        scheduler.add(Sequence(str(i), list(request["prompt_token_ids"]), params))
    in_flight: deque[StepPlan] = deque()
    while scheduler.num_unfinished or in_flight:
        step = scheduler.schedule()
        if step is not None:
            in_flight.append(step)
        if step is None or len(in_flight) > 1:
            oldest = in_flight.popleft()
            scheduler.commit(oldest, [1] * sum(oldest.samples))
    assert stats.preemptions == preemptions


def test_symmetric_memory_is_not_for_a_cpu() -> None:
    profile = {"name": "cpu", "device": "cpu", "num_devices": 1, "cpu_cores": 2}
    assert "cannot run on device 'cpu'" in str(
        inapplicable("all_reduce", "symmetric_memory", profile, {})
    )
    assert inapplicable("data_parallel_size", 2, profile, {}) is None
    assert "needs 4 CPU cores" in str(inapplicable("data_parallel_size", 4, profile, {}))
