"""The virtual engine makes the schedule of the real one, step by step, and its clock tells the times of
records.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from experiments import workloads
from experiments.prediction.cards import card_of
from experiments.prediction.cells import Run, waves_of
from experiments.prediction.fitting import virtual_run
from experiments.prediction.virtual_engine import (
    Settings,
    StepTime,
    VirtualEngine,
    recorded,
)
from experiments.records import store
from experiments.records.types import LaunchRecord, Plan, Request
from nanovllm import SamplingParams
from nanovllm.config import Optimizations
from nanovllm.engine.llm_engine import LLM
from nanovllm.engine.scheduler import StepPlan

PUBLISHED = Path(__file__).resolve().parents[2] / "reports" / "published"
IN_A_PLAN = ("num_decodes", "rows", "starts", "query_lens", "samples", "new_blocks")


def requests(seed: int, number: int = 12) -> list[Request]:
    """Some begin with the same tokens; some are longer than a step's budget."""
    rng = random.Random(seed)
    prefix = [rng.randrange(2000) for _ in range(40)]
    return [
        {
            "prompt_token_ids": (prefix if rng.random() < 0.5 else [])
            + [rng.randrange(2000) for _ in range(rng.randint(1, 60))],
            "max_tokens": rng.randint(1, 14),
            "temperature": 0.6 if rng.random() < 0.5 else 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "seed": 1,
            "ignore_eos": True,
        }
        for _ in range(number)
    ]


class Engine:
    """A real engine on a CPU, and the plans that its scheduler made."""

    def __init__(self, model: Path, **config: Any) -> None:
        switches = config.pop("optimizations")
        self.llm: Any = LLM(
            str(model), device="cpu", dtype="float32", optimizations=switches, **config
        )
        self.plans: list[StepPlan] = []
        schedule = self.llm.scheduler.schedule

        def watched() -> StepPlan | None:
            if (plan := schedule()) is not None:
                self.plans.append(plan)
            return plan  # type: ignore[no-any-return]

        self.llm.scheduler.schedule = watched

    def serve(self, work: list[Request]) -> list[Any]:
        params = [
            SamplingParams(
                max_tokens=r["max_tokens"], temperature=r["temperature"], ignore_eos=True, seed=1
            )
            for r in work
        ]
        prompts = [{"prompt_token_ids": r["prompt_token_ids"]} for r in work]
        return self.llm.generate(prompts, params, use_tqdm=False)  # type: ignore[no-any-return]

    def virtual(self, clock: Any) -> VirtualEngine:
        config = self.llm.config
        return VirtualEngine(
            Settings(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                block_size=config.block_size,
                num_kv_blocks=config.num_kv_blocks,
                optimizations=config.optimizations,
            ),
            clock,
        )


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("batching", "prefix_cache", "blocks"),
    [
        ("static", False, 40),
        (
            "continuous",
            False,
            18,
        ),  # too few blocks for all: admission waits, requests are preempted
        ("chunked", True, 18),
        ("chunked", True, 60),
    ],
)
def test_the_virtual_schedule_is_the_engines(
    tiny: Path, batching: str, prefix_cache: bool, blocks: int, overlap: bool
) -> None:
    switches = {"batching": batching, "prefix_cache": prefix_cache, "overlap": overlap}
    engine = Engine(
        tiny,
        optimizations=switches,
        max_model_len=128,
        max_num_seqs=5,
        max_num_batched_tokens=48,
        block_size=8,
        kv_cache_memory_bytes=blocks * 8 * 4 * 2 * 2 * 64 * 4,
    )
    with engine.llm:
        assert engine.llm.config.num_kv_blocks == blocks
        virtual_plans: list[StepPlan] = []

        def clock(plan: StepPlan) -> StepTime:
            virtual_plans.append(plan)
            return StepTime(1e-3, 1e-3, 0.0, 5e-3)

        virtual = engine.virtual(clock)
        for wave in (requests(1), requests(2)):  # the second finds what the first has cached
            engine.serve(wave)
            virtual.serve(wave)
        assert [_shown(plan) for plan in virtual_plans] == [_shown(plan) for plan in engine.plans]
        counted = dataclasses.asdict(virtual.stats)
        real = dataclasses.asdict(engine.llm._stats)
        for name in (
            "steps",
            "preemptions",
            "prefix_hit_tokens",
            "prefix_evictions",
            "mixed_steps",
        ):
            assert counted[name] == real[name], name


def _shown(plan: StepPlan) -> dict[str, Any]:
    """What a plan says, but for token ids, which nobody knows before they are sampled."""
    return {name: getattr(plan, name) for name in IN_A_PLAN} | {"tokens": len(plan.token_ids)}


@pytest.mark.parametrize("overlap", [False, True])
def test_a_replay_of_an_engines_own_step_times_gives_its_throughput(
    tiny: Path, overlap: bool
) -> None:
    engine = Engine(
        tiny,
        optimizations={"batching": "chunked", "overlap": overlap},
        max_model_len=128,
        max_num_seqs=8,
    )
    with engine.llm:
        work = requests(3, 24)
        results = engine.serve(work)
        begin = min(result.metrics.arrival_time for result in results)
        last_arrival = max(result.metrics.arrival_time for result in results)
        end = max(result.metrics.finished_time for result in results)
        clock = recorded(engine.llm.step_times(), waits=overlap)
        served = engine.virtual(clock).serve(work, set_up_s=last_arrival - begin)
    # this process may lose the CPU between two steps
    assert served.duration_s == pytest.approx(end - begin, rel=0.01 if not overlap else 0.03)


def launches_of(machine: str, study: str) -> tuple[Plan, list[LaunchRecord]]:
    folder = PUBLISHED / machine / study
    records = [
        record
        for record in store.counted(store.read(folder))
        if record["engine"] == "nanovllm" and record["block"] == 0
    ]
    return store.read_plan(folder / store.PLAN), records


@pytest.mark.parametrize(("machine", "study"), [("h200", "ablate"), ("h200", "gpu-latency")])
def test_published_launches_replayed_with_their_step_times(machine: str, study: str) -> None:
    """Schedule, throughput within 1 %, and when each request ended, of every configuration. A launch of
    0.2 s may have spent 2.5 ms between steps, which no record tells.
    """
    plan, records = launches_of(machine, study)
    assert len(records) >= 6
    for name, entry in plan["workloads"].items():
        workload = workloads.rebuild(name, entry)
        for record in records:
            served = record["workloads"][name]
            on = record["resolved"]["optimizations"]
            run = virtual_run(plan, record["cell"], record, card_of(plan["profile"]))
            run.engine.runner.step_clock = recorded(
                served["step_times_s"], waits=on["overlap"] and on["cuda_graphs"]
            )
            arrivals = [times[0] for times in served["request_times_s"]]
            (wave,) = waves_of(workload)
            result = run.engine.serve(wave, set_up_s=max(arrivals))
            where = (record["launch"], name)
            assert [step[1:] for step in result.step_times_s] == [
                tuple(step[1:]) for step in served["step_times_s"]
            ], where
            assert result.duration_s == pytest.approx(served["duration_s"], rel=0.01, abs=2.5e-3), (
                where
            )
            ends = [end for _, _, end in result.request_times_s]
            assert ends == pytest.approx(
                [end for _, _, end in served["request_times_s"]],
                abs=max(0.01 * served["duration_s"], 2.5e-3),
            ), where


def test_a_replay_that_needs_more_steps_than_were_recorded_says_so() -> None:
    engine = VirtualEngine(_settings(), recorded([(0.1, 8, 0)], waits=False))
    with pytest.raises(IndexError, match="the record ends with step 0"):
        engine.serve(requests(0, 2))


def _settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "block_size": 8,
        "num_kv_blocks": 64,
        "optimizations": Optimizations(batching="chunked"),
    }
    return Settings(**given | changes)


def _three_steps(overlap: bool) -> float:
    """The duration of one request of three tokens: the host takes 1 + 2 s a step, the device 10 s."""
    engine = VirtualEngine(
        _settings(optimizations=Optimizations(overlap=overlap)),
        lambda plan: StepTime(1.0, 2.0, 2.0, 10.0),
    )
    (one,) = requests(5, 1)
    return engine.serve([{**one, "max_tokens": 3}]).duration_s


def test_overlap_hides_the_host_behind_the_device() -> None:
    assert _three_steps(overlap=False) == 3 * (1 + 2 + 10)
    assert _three_steps(overlap=True) == (1 + 2) + 3 * 10


def test_the_device_cannot_finish_before_the_host_has_issued_everything() -> None:
    engine = VirtualEngine(_settings(), lambda plan: StepTime(1.0, 7.0, 0.0, 2.0))
    (one,) = requests(5, 1)
    assert engine.serve([{**one, "max_tokens": 2}]).duration_s == 2 * (1 + 7)


def test_requests_are_served_when_they_are_due() -> None:
    work = requests(7, 3)
    schedule: Any = {"rate": 1.0, "offset_s": [0.0, 50.0, 5.0], "after": [None, None, 1]}
    engine = VirtualEngine(_settings(), lambda plan: StepTime(1.0))
    served = engine.serve(work, schedule)
    (first, second, third) = served.request_times_s
    assert first[0] == 0
    assert second[0] == 50
    assert third[0] == second[2] + 5  # a conversation: 5 s after the answer before it
    assert served.duration_s == third[2]


def test_a_cache_that_holds_no_request_is_an_error() -> None:
    engine = VirtualEngine(_settings(num_kv_blocks=1), lambda plan: StepTime(1.0))
    with pytest.raises(ValueError, match="KV blocks"):
        engine.serve(requests(0))


def test_a_run_counts_a_work_for_every_step() -> None:
    plan, records = launches_of("h200", "ablate")
    run: Run = virtual_run(plan, "all", records[0], card_of(plan["profile"]))
    workload = workloads.rebuild("mixed", plan["workloads"]["mixed"])
    for wave in workload["waves"]:
        run.serve(wave, workload)
    assert len(run.works) == len(run.step_times_s) == run.engine.stats.steps
    assert sum(work.sampled for work in run.works) >= plan["workloads"]["mixed"]["output_tokens"]
