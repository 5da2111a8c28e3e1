"""How much work a study gets on a machine: rules that hold for any hardware, and the plans that
users ask for.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.study import plan as planning
from experiments.study import plan_view, work_size
from experiments.study.plan import build_plan
from experiments.study.spec import Cell, Profile, load_profile, load_study

SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
}
MODEL = {
    "preset": "qwen3-0.6b",
    "path": None,
    "dtype": "bfloat16",
    "digest": "d" * 64,
    "shape": SHAPE,
}


def test_a_token_goes_through_few_of_the_experts_that_take_memory() -> None:
    """Qwen3-30B-A3B: 30.5 billion weights, 3.3 of which are active, as its name and its model card say."""
    shape = SHAPE | {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "tie_word_embeddings": False,
    }
    assert round(work_size.weight_bytes(shape, "bfloat16") / 2e9, 1) == 30.5
    embedding = shape["hidden_size"] * shape["vocab_size"]
    assert round((work_size.parameters(shape) + embedding) / 1e9, 1) == 3.3


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "resolve_model", lambda choice: MODEL)


def planned(profile: Profile | str, study: str = "gpu-ablate", *overrides: str) -> dict[str, Any]:
    loaded, applied = load_study(study, overrides)
    return build_plan(
        loaded, load_profile(profile) if isinstance(profile, str) else profile, None, applied
    )


@pytest.mark.usefixtures("no_weights")
def test_every_switch_of_a_gpu_is_switched_on_alone_and_off_alone() -> None:
    plan = planned("rtx4070")
    alone = {
        "attention_backend=triton",
        "kernels=triton",
        "cuda_graphs=on",
        "overlap=on",
        "batching=chunked",
        "prefix_cache=on",
    }
    left_out = {
        f"all-but-{name}"
        for name in (
            "attention_backend",
            "kernels",
            "cuda_graphs",
            "overlap",
            "batching",
            "prefix_cache",
            "cascade_attention",
        )
    }
    assert set(plan["cells"]) == {"baseline", "aa", "all", "hf", *alone, *left_out}
    without = plan["cells"]["all-but-attention_backend"]["levels"]
    assert (without["attention_backend"], without["cascade_attention"]) == ("torch", "off"), (
        "cascade attention needs Triton's"
    )
    assert plan["cells"]["all-but-cascade_attention"]["levels"]["attention_backend"] == "triton"
    reasons = {
        (entry["factor"], entry["level"]): entry["reason"] for entry in plan["not_applicable"]
    }
    assert "needs attention_backend" in reasons["cascade_attention=on", "cascade_attention=on"]
    assert "needs 2 GPUs" in reasons["tensor_parallel_size", 2]


@pytest.mark.usefixtures("no_weights")
def test_what_shares_the_work_over_gpus_stands_on_top_of_everything_on() -> None:
    cells = planned("h100-x2")["cells"]
    on_top = {
        "all+tensor_parallel_size=2": (2, "library", 1),
        "all+tensor_parallel_size=2+all_reduce=symmetric_memory": (2, "symmetric_memory", 1),
        "all+data_parallel_size=2": (1, "library", 2),
    }
    for name, levels in on_top.items():
        found = cells[name]["levels"]
        assert (
            found["tensor_parallel_size"],
            found["all_reduce"],
            found["data_parallel_size"],
        ) == levels
        assert found["kernels"] == "triton"
    assert {"tensor_parallel_size=2", "data_parallel_size=2"} <= set(cells)
    assert cells["all"]["levels"]["tensor_parallel_size"] == 1
    four = set(planned("h200-x4")["cells"])
    assert {
        "all+tensor_parallel_size=4",
        "all+data_parallel_size=4",
        "all+tensor_parallel_size=2",
    } <= four


TINY: Any = {
    "dtype": "float32",
    "shape": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
        "vocab_size": 2048,
    },
}


@cache
def embedded() -> tuple[Any, Any]:
    """The study of `make ablate`, and its cells on two cores."""
    study = load_study("embedded")[0]
    profile: Any = {**load_profile("cpu").model_dump(), "cpu_cores": 2}
    return study, planning._cells(study, profile, None)[0]


def on_cpu(flops_of_a_core: float, import_s: float = 2.0) -> tuple[Any, Any]:
    """The study of `make ablate`, sized for two cores, and what was chosen."""
    study, cells = embedded()
    machine: Any = {
        "device": "cpu",
        "cpu_cores": 2,
        "peak_flops": 2 * flops_of_a_core,
        "import_s": import_s,
    }
    return work_size.fit(study, machine, TINY, cells)


def test_a_cpu_takes_the_work_as_it_is_written_in_fewer_blocks_if_it_is_slow() -> None:
    written = load_study("embedded")[0].workloads
    fast, slow, hopeless = on_cpu(218e9), on_cpu(85e9), on_cpu(1e9)
    assert all(study.workloads == written for study, _ in (fast, slow, hopeless))
    assert [sized["blocks"] for _, sized in (fast, slow, hopeless)] == [6, 4, 4]
    for study, sized in (fast, slow):
        planned_s = sized["blocks"] * sum(sized["expected_launch_s"].values())
        assert planned_s <= sized["budget_s"] == 520
        assert study.measurement.launch_s == pytest.approx(
            planned_s / sized["blocks"] / len(sized["expected_launch_s"]), rel=0.02
        )


@pytest.mark.usefixtures("no_weights")
def test_a_plan_that_takes_longer_than_its_budget_says_so() -> None:
    def lines(expected_s: float) -> str:
        longer: Any = {**plan, "expected_s": expected_s}
        return "\n".join(line for line, _ in plan_view.lines(longer, []))

    plan = planned("rtx4070-laptop")
    budget_s = plan["sized"]["budget_s"]
    assert " to fit " in lines(budget_s)
    assert "takes longer" not in lines(budget_s)
    assert " to fit " not in lines(10 * budget_s)
    assert "takes longer than the" in lines(10 * budget_s)
    assert "--set workloads.NAME.num_requests=8" in lines(10 * budget_s)


@settings(deadline=None, max_examples=30)
@given(
    flops=st.floats(1e9, 1e12),
    import_s=st.floats(0.5, 20),
    faster=st.floats(1.0, 4.0),
)
def test_a_faster_cpu_never_gets_fewer_blocks(flops: float, import_s: float, faster: float) -> None:
    slow, fast = on_cpu(flops, import_s)[1], on_cpu(flops * faster, import_s / faster)[1]
    assert fast["blocks"] >= slow["blocks"]
    for cell, expected in slow["expected_launch_s"].items():
        assert fast["expected_launch_s"][cell] <= expected


@pytest.mark.usefixtures("no_weights")
def test_the_plan_says_what_it_chose() -> None:
    plan = planned("rtx4070-laptop")
    share, blocks = plan["sized"]["share_of_answers"], plan["sized"]["blocks"]
    assert plan["workloads"]["mixed"]["params"]["output_tokens"] == [
        max(2, -(-int(share * 100) * 8 // 100)),
        math.ceil(share * 64),
    ]
    assert len({launch["block"] for launch in plan["launches"]}) == blocks
    assert set(plan["sized"]["expected_launch_s"]) == set(plan["cells"])


@pytest.mark.usefixtures("no_weights")
def test_a_stated_number_of_blocks_stays() -> None:
    for blocks in (2, 12):
        plan = planned("rtx4070", "gpu-ablate", f"design.blocks={blocks}")
        assert (plan["study"]["design"]["blocks"], len(plan["launches"])) == (
            blocks,
            blocks * len(plan["cells"]),
        )
    assert (
        planned("rtx4070", "gpu-ablate", "design.bootstrap=true")["study"]["design"]["blocks"] == 6
    )
    assert (
        planned("rtx4070", "gpu-ablate", "design.budget_s=null")["study"]["design"]["blocks"] == 6
    )


def profile(bandwidth: float, host_op_s: float, flops: float = 5e13) -> Profile:
    given = {
        "bandwidth_bytes_per_s": bandwidth,
        "host_op_s": host_op_s,
        "peak_flops": {"bfloat16": flops, "float32": flops / 4},
    }
    return load_profile("rtx4070").model_copy(update=given)


@settings(deadline=None, max_examples=30)
@given(
    bandwidth=st.floats(1e11, 8e12),
    host_op_s=st.floats(2e-6, 3e-5),
    faster=st.floats(1.0, 4.0),
)
def test_a_faster_machine_never_gets_less_work(
    bandwidth: float, host_op_s: float, faster: float
) -> None:
    study = load_study("gpu-ablate")[0]
    cells = {
        "baseline": _cell({}),
        "all": _cell({"kernels": "triton", "attention_backend": "triton", "cuda_graphs": "on"}),
    }

    def work(p: Profile) -> tuple[float, int]:
        settled = p.model_dump() | {"peak_flops": p.peak_flops["bfloat16"]}  # type: ignore[index, call-overload]
        sized = work_size.fit(study, settled, MODEL, cells)[1]
        assert sized is not None
        return sized["share_of_answers"], sized["blocks"]

    slow, fast = (
        work(profile(bandwidth, host_op_s)),
        work(profile(bandwidth * faster, host_op_s / faster)),
    )
    assert fast[0] >= slow[0]
    if fast[0] == slow[0]:
        assert fast[1] >= slow[1]


def _cell(levels: dict[str, Any]) -> Any:
    return planning.Cell.model_construct(
        engine="nanovllm", role="treatment", levels=levels, config={}
    )


def test_steps_are_those_of_the_batching_policy() -> None:
    assert work_size._steps([4, 1, 1, 1], 2, static=True) == 5
    assert work_size._steps([4, 1, 1, 1], 2, static=False) == 4
    assert work_size._steps([3], 1, static=False) == 3


def test_weights_and_kv_are_counted_as_the_loader_and_the_cache_count_them() -> None:
    assert work_size.weight_bytes(SHAPE, "bfloat16") == pytest.approx(1.192e9, rel=1e-3)
    assert work_size.kv_bytes_per_token(SHAPE, "bfloat16") == 114_688


@pytest.mark.usefixtures("no_weights")
def test_weights_that_leave_no_room_are_refused_in_the_plan() -> None:
    with pytest.raises(
        planning.SpecError,
        match=r"the weights of qwen3-0\.6b take 1,19[0-9,]+ bytes .* Use a smaller MODEL",
    ):
        planned(load_profile("rtx4070").model_copy(update={"memory_bytes": 2**33}))


def test_the_first_launch_of_a_cell_compiles_its_kernels() -> None:
    study = load_study("gpu-ablate")[0]
    profile: Any = {"device": "cuda", "import_s": 5.0}
    first = {
        level: work_size.first_seconds(
            study, Cell(role="treatment", engine="nanovllm", levels={"kernels": level}), profile
        )
        for level in ("torch", "triton")
    }
    assert first["torch"] == 0
    assert 5 < first["triton"] < 12, "nine seconds on an H100 whose host imports PyTorch in five"
