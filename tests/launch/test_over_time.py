"""Launches whose requests arrive over time: what the record holds, on the fake engine and on ours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import workloads
from experiments.engines import load_adapter, why_not_over_time
from experiments.engines.vllm_steps import VllmServing
from experiments.launch import over_time
from experiments.launch.engine_process import serve_launch
from experiments.load import delivered
from experiments.load.driving import drive
from nanovllm.config import LEVELS
from tests.support.fake_engine import make_plan

RULES = {
    "slo": {"ttft_s": 0.5},
    "slo_name": None,
    "attainment": 0.9,
    "max_lateness_s": 0.25,
    "min_delivered": 0.5,
}
SMALL = {"num_requests": 12, "prompt_tokens": [2, 4], "output_tokens": [1, 3]}


def plan_of(model: Path, arrivals: dict[str, Any], **rules: Any) -> Any:
    plan = make_plan(model, blocks=1, seconds=0.002)
    work = {"online": workloads.build("online", "random", {**SMALL, "arrivals": arrivals})}
    plan["workloads"] = {name: workloads.summarize(each) for name, each in work.items()}
    plan["study"]["load"] = {**RULES, **rules}
    for launch in plan["launches"]:
        launch["workload_order"] = ["online"]
    return plan


def launched(plan: Any, tmp_path: Path) -> Any:
    return serve_launch(plan, plan["launches"][0]["launch"], str(tmp_path))["record"]


def test_the_record_holds_when_requests_were_due_and_every_token_came(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "model", {"process": "poisson", "rate": 40})
    record = launched(plan, tmp_path)
    assert (record["status"], record["reason"]) == ("ok", None)
    work = record["workloads"]["online"]
    built = workloads.rebuild("online", plan["workloads"]["online"])
    assert work["requests_digest"] == built["requests_digest"]
    due = [times[0] for times in work["request_times_s"]]
    assert due == pytest.approx(built["arrivals"]["offset_s"], abs=1e-6)
    gaps = delivered.unpack(work["load"]["token_gaps_us"])
    for request, times, of_request, sent in zip(
        built["waves"][0], work["request_times_s"], gaps, work["load"]["sent_s"], strict=True
    ):
        assert len(of_request) == request["max_tokens"] - 1
        assert times[2] - times[1] == pytest.approx(sum(of_request) / 1e6, abs=1e-5)
        assert times[0] - 1e-6 <= sent <= times[1]
    assert work["duration_s"] == pytest.approx(max(t[2] for t in work["request_times_s"]), abs=1e-5)
    assert (work["load"]["never_sent"], work["load"]["asked_rate"]) == (0, 40.0)
    begin, end = work["window_s"]
    assert 0 <= begin <= end


def test_a_launch_whose_generator_was_late_is_invalid(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "model", {"process": "poisson", "rate": 40}, max_lateness_s=1e-9)
    record = launched(plan, tmp_path)
    assert record["status"] == "invalid"
    assert "workload online: the load generator was late by" in record["reason"]


def test_a_search_keeps_the_best_rate_and_every_trial(tmp_path: Path) -> None:
    arrivals = {"process": "constant", "search": {"low": 20, "high": 20_000, "within": 3}}
    plan = plan_of(tmp_path / "model", arrivals, slo={"ttft_s": 0.02})
    record = launched(plan, tmp_path)
    work = record["workloads"]["online"]
    search = work["load"]["search"]
    assert search["stopped"] in ("within", "most", "low failed")  # another program may disturb it
    passed = [trial["rate"] for trial in search["trials"] if trial["passed"]]
    assert search["rate"] == max(passed, default=None)
    assert work["load"]["asked_rate"] == (search["rate"] or 20)
    assert work["num_requests"] == 12
    assert record["status"] == "ok"
    without_objective = plan_of(tmp_path / "model", arrivals, slo=None)
    with pytest.raises(ValueError, match="a search needs an objective"):
        launched(without_objective, tmp_path)


def test_an_engine_that_takes_no_requests_over_time_says_why() -> None:
    assert why_not_over_time("nanovllm") is None
    assert why_not_over_time("vllm") is None
    assert "serves one batch to its end" in str(why_not_over_time("hf"))
    adapter: Any = load_adapter("hf")("nowhere", {"max_num_seqs": 2, "dtype": "float32"})
    schedule: Any = {"rate": 1.0, "offset_s": [0.0], "after": [None]}
    with pytest.raises(ValueError, match="hf cannot serve requests that arrive over time"):
        over_time.answer(adapter, [], schedule, None)


def ours(model: Path, **optimizations: Any) -> Any:
    levels = {name: values[0] for name, values in LEVELS.items()} | optimizations
    config = {
        "dtype": "float32",
        "device": "cpu",
        "max_num_seqs": 4,
        "seed": 0,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "block_size": 4,
        "kv_cache_memory_bytes": 2**24,
        "optimizations": levels,
    }
    adapter = load_adapter("nanovllm")(str(model), config)
    adapter.load()
    return adapter


@pytest.mark.parametrize(
    "optimizations",
    [
        {},
        {"batching": "continuous"},
        {"batching": "chunked", "prefix_cache": True},
        {"batching": "continuous", "overlap": True},
    ],
)
def test_our_engine_gives_the_same_tokens_whenever_requests_arrive(
    tiny: Path, optimizations: dict[str, Any]
) -> None:
    work = workloads.build(
        "w",
        "random",
        {
            "num_requests": 8,
            "prompt_tokens": [3, 20],
            "output_tokens": [2, 8],
            "temperature": 0,
            "arrivals": {"process": "gamma", "rate": 30, "burstiness": 0.5},
        },
    )
    requests = work["waves"][0]
    adapter = ours(tiny, **optimizations)
    at_once = adapter.serve(requests)
    answer = over_time.answer(adapter, requests, work["arrivals"], None)
    assert answer["outputs"] == at_once["outputs"]
    assert set(answer["finish_reasons"]) == {"length"}
    assert len(answer["request_times_s"]) == len(requests)
    for due, first, finish in answer["request_times_s"]:
        assert due <= first <= finish <= answer["duration_s"]
    decoded = sum(decode for _, _, decode in answer["step_times_s"])
    assert decoded == sum(request["max_tokens"] - 1 for request in requests)

    # given up after the first answer: nothing is left in the engine, and it serves on
    given_up = over_time.answer(adapter, requests, work["arrivals"], lambda *_: True)
    assert given_up["load"]["never_sent"] > 0 or "abort" in given_up["finish_reasons"]
    assert not adapter._llm.has_unfinished_requests() or adapter._llm.scheduler.in_flight
    assert adapter.serve(requests)["outputs"] == at_once["outputs"]
    adapter.close()


def test_replicas_take_no_requests_over_time(tiny: Path) -> None:
    adapter: Any = load_adapter("nanovllm")(str(tiny), {})
    adapter._llm = SimpleNamespace()
    with pytest.raises(ValueError, match="use data_parallel_size=1"):
        adapter.start([])


class FakeVllm:
    """vLLM's LLMEngine as far as it is called: a token for every request at each step."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[list[int], int]] = {}
        self.aborted: list[str] = []

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.running[request_id] = ([], params.max_tokens)

    def step(self) -> list[Any]:
        outputs = []
        for request_id, (tokens, most) in list(self.running.items()):
            tokens.append(len(tokens))
            done = len(tokens) == most
            completion = SimpleNamespace(
                token_ids=list(tokens), finish_reason="length" if done else None
            )
            outputs.append(
                SimpleNamespace(request_id=request_id, outputs=[completion], finished=done)
            )
            if done:
                del self.running[request_id]
        return outputs

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids


def test_vllm_is_driven_through_add_request_and_step() -> None:
    engine = FakeVllm()
    params = [SimpleNamespace(max_tokens=n) for n in (1, 3, 2)]
    serving = VllmServing(engine, [{"prompt_token_ids": [1]}] * 3, params, [])
    line = drive(serving, {"rate": 1.0, "offset_s": [0.0, 0.0, 0.01], "after": [None] * 3})
    assert all(line.finished)
    assert [len(times) for times in line.token_s] == [1, 3, 2]
    served = serving.served()
    assert served["outputs"] == [[0], [0, 1, 2], [0, 1]]
    assert served["finish_reasons"] == ["length"] * 3
    serving.abort(1)
    assert engine.aborted == ["due-1"]
