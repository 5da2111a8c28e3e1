"""The adapters of nanovllm and HF transformers serve the same requests, each as its engine does,
and say what they did.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments import workloads
from experiments.engines import load_adapter
from nanovllm.config import LEVELS
from nanovllm.models.checkpoint import ensure_checkpoint

SHARED = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4, "seed": 0}
REQUESTS = workloads.build(
    "w",
    "random",
    {"num_requests": 10, "prompt_tokens": [3, 20], "output_tokens": [2, 12], "temperature": 0},
)["waves"][0]


@pytest.fixture(scope="module")
def model() -> Path:
    return ensure_checkpoint("tiny")


@pytest.fixture(scope="module")
def hf(model: Path) -> Any:
    adapter = load_adapter("hf")(str(model), dict(SHARED))
    resolved = adapter.load()
    assert (resolved["attn_implementation"], resolved["batching"], resolved["max_num_seqs"]) == (
        "sdpa",
        "static",
        4,
    )
    return adapter


def nanovllm(model: Path, **optimizations: Any) -> Any:
    levels = {name: values[0] for name, values in LEVELS.items()} | optimizations
    config = {
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "block_size": 4,
        "kv_cache_memory_bytes": 2**24,
        "optimizations": levels,
    }
    adapter = load_adapter("nanovllm")(str(model), {**SHARED, **config})
    assert adapter.load()["optimizations"] == levels
    return adapter


@pytest.mark.usefixtures("forked_processes")
def test_replicas_serve_like_one_engine(model: Path) -> None:
    adapter = nanovllm(model, data_parallel_size=2)
    try:
        served = adapter.serve(REQUESTS)
        # each replica has its own
        assert (served["step_times_s"], served["device_wait_s"]) == ([], None)
        one = nanovllm(model)
        assert served["outputs"] == one.serve(REQUESTS)["outputs"]
        one.close()
    finally:
        adapter.close()


def check_served(served: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    assert [len(output) for output in served["outputs"]] == [
        request["max_tokens"] for request in requests
    ]
    assert set(served["finish_reasons"]) == {"length"}
    for arrival, first, finish in served["request_times_s"]:
        assert 0 <= arrival <= first <= finish <= served["duration_s"]
    decoded = sum(decode for _, _, decode in served["step_times_s"])
    assert decoded == sum(request["max_tokens"] - 1 for request in requests)
    assert sum(seconds for seconds, _, _ in served["step_times_s"]) <= served["duration_s"]


def test_both_engines_serve_the_same_work(model: Path, hf: Any) -> None:
    ours = nanovllm(model)
    first, second = ours.serve(REQUESTS), hf.serve(REQUESTS)
    ours.close()
    check_served(first, REQUESTS)
    check_served(second, REQUESTS)
    # greedy, float32, short: no near-tie among these tokens
    assert first["outputs"] == second["outputs"]


def test_hf_batches_are_static(hf: Any) -> None:
    served = hf.serve(REQUESTS)
    finished = [finish for *_, finish in served["request_times_s"]]
    assert [len(set(finished[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1], (
        "a batch is handed over as a whole"
    )
    assert finished[0] < finished[4] < finished[8]
    longest = sum(max(r["max_tokens"] for r in REQUESTS[i : i + 4]) for i in (0, 4, 8))
    assert len(served["step_times_s"]) == longest, "it runs until its longest member has ended"


def test_hf_samples_from_its_seed(hf: Any) -> None:
    sampled = [{**request, "temperature": 1.0} for request in REQUESTS]
    first = hf.serve(sampled)["outputs"]
    assert first == hf.serve(sampled)["outputs"]
    assert (
        first
        != hf.serve([{**request, "seed": request["seed"] + 1} for request in sampled])["outputs"]
    )
    with pytest.raises(ValueError, match="all requests of a batch must have the same"):
        hf.serve([*sampled[:1], *REQUESTS[1:2]])


def test_hf_stops_at_an_eos_that_is_not_ignored(hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hf.serve(REQUESTS)["outputs"]
    monkeypatch.setattr(hf, "_eos_ids", [before[0][1]])
    assert hf.serve(REQUESTS)["outputs"] == before, "ignored unless it is asked for"
    served = hf.serve([{**request, "ignore_eos": False} for request in REQUESTS])
    eos = before[0][1]
    expected = [output[: output.index(eos) + 1] if eos in output else output for output in before]
    assert served["outputs"] == expected
    assert served["finish_reasons"] == [
        "stop" if output[-1] == eos else "length" for output in expected
    ]


def test_nanovllm_counts_from_its_start_and_forgets_prefixes(model: Path) -> None:
    adapter = nanovllm(model, prefix_cache=True, batching="chunked")
    adapter.serve(REQUESTS)
    once, hits = adapter.counters(), adapter.toggles()["prefix_cache"]["opportunity"]
    adapter.serve(REQUESTS)
    assert adapter.counters()["decode_tokens"] == 2 * once["decode_tokens"]
    cached = adapter.toggles()["prefix_cache"]["opportunity"]
    assert cached > hits, "the same prompts again are hits"
    adapter.reset()
    adapter.serve(REQUESTS)
    assert adapter.toggles()["prefix_cache"]["opportunity"] - cached == hits
    assert adapter.toggles()["batching"]["engaged"] > 0
    assert adapter.toggles()["overlap"] == {
        "level": False,
        "baseline": False,
        "engaged": 0,
        "opportunity": None,
    }
    adapter.close()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_wait_for_the_device_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool
) -> None:
    """Two steps whose tokens arrive 30 ms late, as on a GPU; and steps without an event."""
    import time
    from types import SimpleNamespace

    from experiments.engines.nanovllm import Adapter
    from nanovllm.engine import llm_engine

    arrived = SimpleNamespace(synchronize=lambda: time.sleep(0.03)) if on_gpu else None
    runner = SimpleNamespace(collect=lambda handle: handle.tokens)

    def generate(*_: object, **__: object) -> list[object]:
        assert [runner.collect(SimpleNamespace(arrived=arrived, tokens=i)) for i in range(2)] == [
            0,
            1,
        ]
        return []

    engine = SimpleNamespace(
        runner=runner,
        generate=generate,
        step_times=list,
        resolved_config=lambda: {"optimizations": {"attention_backend": "torch"}},
    )
    monkeypatch.setattr(llm_engine, "LLM", lambda **_: engine)
    adapter = Adapter("model", {})
    adapter.load()
    for _ in range(2):  # each wave has its own
        wait_s = adapter.serve([])["device_wait_s"]
        assert 0.06 <= wait_s < 0.3 if on_gpu else wait_s is None


OPTIONS: dict[str, Any] = {
    "min_p": 0.1,
    "min_tokens": 2,
    "logit_bias": {7: 1.5},
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_request_arrive_or_are_refused(name: str) -> None:
    from types import SimpleNamespace

    from experiments.engines import nanovllm as ours
    from experiments.engines import vllm as theirs
    from nanovllm import SamplingParams

    request: Any = {**REQUESTS[0], name: OPTIONS[name]}
    engine: Any = object.__new__(ours.Adapter)
    engine._sampling_params = SamplingParams
    (params,) = engine._inputs([request])[1]
    assert getattr(params, name) == OPTIONS[name]
    (plain,) = engine._inputs([REQUESTS[0]])[1]
    assert type(plain) is SamplingParams, "nothing is loaded for requests without options"
    peer: Any = object.__new__(theirs.Adapter)
    peer._sampling_params, peer._eos_ids = lambda **given: SimpleNamespace(**given), [1]
    peer._config = {"per_request_seeds": True}
    assert getattr(peer._params(request), name) == OPTIONS[name]
    reference: Any = object.__new__(load_adapter("hf"))
    with pytest.raises(ValueError, match=f"hf: a request has {name}, .*allowed: none"):
        reference._generation_config([REQUESTS[0], request])
    with pytest.raises(ValueError, match=r"nanovllm: a request has bad_words, .*allowed: min_p"):
        engine._inputs([{**request, "bad_words": [[1, 2]]}])
