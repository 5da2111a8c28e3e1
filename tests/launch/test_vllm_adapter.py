"""What the vLLM adapter asks of vLLM and what it makes of the answers, against a stand-in with the
parts of vLLM that it uses.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.engines import load_adapter
from experiments.engines.vllm import Inspector, Tally

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128}
SHARED = {"dtype": "bfloat16", "kv_cache_memory_bytes": 2**20, **LIMITS}
SAMPLING = {"temperature": 0.6, "top_k": 0, "top_p": 1.0, "seed": 11, "ignore_eos": True}
REQUEST = {"prompt_token_ids": [5, 6], "max_tokens": 3, **SAMPLING}
VARIABLES = (
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_CACHE_ROOT",
    "VLLM_NO_USAGE_STATS",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
)


class StandIn:
    """vllm.LLM: answers each request with max_tokens tokens and notes what it was given."""

    def __init__(self, model: str, **arguments: Any) -> None:
        self.arguments, self.resets, self.calls, self.closed = arguments, [False, True], [], False
        config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=7))
        core = SimpleNamespace(shutdown=lambda: setattr(self, "closed", True))
        self.llm_engine: Any = SimpleNamespace(
            vllm_config=config, engine_core=core, logger_manager="exporters"
        )
        StandIn.last = self

    def collective_rpc(self, method: str) -> list[dict[str, Any]]:
        assert method == "inspect_for_record"
        return [{"levels": {"prefix_cache": "on"}, "kv_cache_bytes": 2**20, "block_size": 16}]

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        self.calls.append((prompts, params))
        stats = SimpleNamespace(
            prompt_token_stats=SimpleNamespace(computed=2),
            num_generation_tokens=5,
            num_preempted_reqs=1,
            time_to_first_tokens_iter=[0.1, 0.1],
        )
        hits = SimpleNamespace(prefix_cache_stats=SimpleNamespace(queries=4, hits=1))
        if self.llm_engine.logger_manager != "exporters":
            self.llm_engine.logger_manager.record(
                scheduler_stats=hits, iteration_stats=stats, mm_cache_stats=None
            )
        now, wall = time.monotonic(), time.time()
        metrics = SimpleNamespace(
            arrival_time=wall, first_token_ts=now + 0.25, last_token_ts=now + 0.5
        )
        completions = [
            SimpleNamespace(token_ids=(1,) * p.max_tokens, finish_reason="length") for p in params
        ]
        for completion, p in zip(completions, params, strict=True):
            asked = getattr(p, "logprobs", None) is not None
            completion.logprobs = (
                [{1: SimpleNamespace(logprob=-0.5 - i)} for i in range(p.max_tokens)]
                if asked
                else None
            )
        return [
            SimpleNamespace(metrics=metrics, outputs=[completion]) for completion in completions
        ]

    def reset_prefix_cache(self) -> bool:
        return self.resets.pop(0)


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: config -> an adapter that has loaded the stand-in."""
    package, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    package.__dict__.update(
        LLM=StandIn, SamplingParams=lambda **given: SimpleNamespace(**given), __version__="9.9"
    )
    platforms.__dict__["current_platform"] = SimpleNamespace(device_type="cpu")
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "")  # so that it is taken back after the test
    monkeypatch.delenv("VLLM_RPC_BASE_PATH")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def load(**config: Any) -> Any:
        made = load_adapter("vllm")(str(tiny), {**SHARED, "seed": 3, **config})
        made.resolved = made.load()  # type: ignore[attr-defined]
        return made

    return load


def test_every_switch_of_vllm_is_set_and_none_left_to_its_defaults(adapter: Any) -> None:
    made = adapter()
    given = StandIn.last.arguments
    assert given | SHARED == given
    assert (
        given["enable_prefix_caching"],
        given["enable_chunked_prefill"],
        given["async_scheduling"],
    ) == (True, True, True)
    assert (given["enforce_eager"], given["seed"], given["tensor_parallel_size"]) == (False, 3, 1)
    assert (
        given["skip_tokenizer_init"],
        given["generation_config"],
        given["disable_log_stats"],
    ) == (True, "vllm", True)
    assert not {"block_size", "compilation_config", "attention_config"} & set(given), (
        "left to vLLM, which knows best"
    )
    assert (
        made.resolved["version"],
        made.resolved["num_kv_blocks"],
        made.resolved["block_size"],
    ) == ("9.9", 7, 16)
    adapter(
        enforce_eager=True,
        vllm_block_size=32,
        compilation_mode=0,
        cudagraph_mode="FULL",
        attention_backend="FLASH_ATTN",
    )
    given = StandIn.last.arguments
    assert (given["enforce_eager"], given["block_size"]) == (True, 32)
    assert given["compilation_config"] == {"mode": 0, "cudagraph_mode": "FULL"}
    assert given["attention_config"] == {"backend": "FLASH_ATTN"}


def test_requests_and_their_times(adapter: Any) -> None:
    made = adapter(request_statistics=True)
    served = made.serve([REQUEST, {**REQUEST, "max_tokens": 2, "ignore_eos": False}])
    prompts, params = StandIn.last.calls[0]
    assert prompts == [{"prompt_token_ids": [5, 6]}] * 2
    assert [(p.max_tokens, p.temperature, p.seed, p.detokenize) for p in params] == [
        (3, 0.6, None, False),
        (2, 0.6, None, False),
    ]
    assert params[0].stop_token_ids is None
    assert params[1].stop_token_ids == made._eos_ids, (
        "without a tokenizer vLLM knows no end of sequence"
    )
    assert served["outputs"] == [[1, 1, 1], [1, 1]]
    assert served["finish_reasons"] == ["length", "length"]
    for arrival, first, finish in served["request_times_s"]:
        assert 0 <= arrival < 0.2
        assert first - arrival == pytest.approx(0.25, abs=0.05)
        assert finish - first == pytest.approx(0.25, abs=1e-6)
    assert [step[1:] for step in served["step_times_s"]] == [[2, 3]]
    assert made.counters() == {
        "requests": 2,
        "prefill_tokens": 2,
        "decode_tokens": 3,
        "preemptions": 1,
        "prefix_lookup_tokens": 4,
        "prefix_hit_tokens": 1,
    }
    assert made.toggles() == {
        "prefix_cache": {"level": True, "baseline": False, "engaged": 4, "opportunity": 1}
    }


def test_log_probabilities_are_asked_for_in_a_pass_of_their_own(adapter: Any) -> None:
    made = adapter()
    made.serve([REQUEST])
    assert not hasattr(StandIn.last.calls[0][1][0], "logprobs"), (
        "asking for them changes the work that is timed"
    )
    served = made.logprobs([REQUEST, {**REQUEST, "max_tokens": 1}])
    assert served == {"outputs": [[1, 1, 1], [1]], "logprobs": [[-0.5, -1.5, -2.5], [-0.5]]}
    assert [p.logprobs for p in StandIn.last.calls[1][1]] == [0, 0], (
        "of the answer's own tokens, no others"
    )


def test_its_exporters_are_replaced_and_may_be_left_out(adapter: Any) -> None:
    adapter(request_statistics=True)
    assert isinstance(StandIn.last.llm_engine.logger_manager, Tally)
    made = adapter(per_request_seeds=True)
    assert StandIn.last.arguments["disable_log_stats"] is True
    assert StandIn.last.llm_engine.logger_manager == "exporters"
    served = made.serve([REQUEST])
    assert (served["request_times_s"], made.counters(), made.toggles()) == ([], {}, {})
    assert StandIn.last.calls[0][1][0].seed == 11


def test_the_cache_is_really_reset_and_the_engine_really_closed(
    adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter()
    made.reset()  # refused at first, a step was in flight
    assert StandIn.last.resets == []
    monkeypatch.setattr(time, "sleep", lambda s: None)
    StandIn.last.resets = [False] * 200
    with pytest.raises(RuntimeError, match="did not reset its prefix cache"):
        made.reset()
    sockets = Path(os.environ["VLLM_RPC_BASE_PATH"])
    (sockets / "left-behind").touch()
    made.close()
    assert StandIn.last.closed
    assert not sockets.exists()
    assert "VLLM_RPC_BASE_PATH" not in os.environ


def test_a_vllm_for_another_device_is_an_error(adapter: Any) -> None:
    with pytest.raises(
        RuntimeError,
        match=r"this vLLM \(9\.9\) supports cpu, but the plan needs cuda: give another interpreter",
    ):
        adapter(device="cuda")


@pytest.mark.parametrize("told", [True, None])  # None: a version that has no such setting
def test_what_ran_is_read_back_in_the_worker(told: bool | None) -> None:
    layer = SimpleNamespace(
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "CPU_ATTN"),
        impl=SimpleNamespace(),
        kv_cache=[torch.zeros(4)],
    )
    mode = SimpleNamespace(name="NONE")
    model = {
        "dtype": torch.float32,
        "max_model_len": 128,
        "seed": 3,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }
    worker = Inspector()
    worker.model_runner = object()
    worker.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            **model, **({} if told is None else {"disable_cascade_attn": told})
        ),
        cache_config=SimpleNamespace(block_size=16, enable_prefix_caching=True),
        compilation_config=SimpleNamespace(
            static_forward_context={"0": layer},
            cudagraph_mode=mode,
            mode=mode,
            backend="eager",
            cudagraph_capture_sizes=[],
        ),
        scheduler_config=SimpleNamespace(
            max_num_seqs=8,
            max_num_batched_tokens=64,
            enable_chunked_prefill=True,
            async_scheduling=True,
        ),
        parallel_config=SimpleNamespace(
            distributed_executor_backend="uni", tensor_parallel_size=1, data_parallel_size=2
        ),
    )
    found = worker.inspect_for_record()
    assert (
        found["skip_tokenizer_init"],
        found["disable_cascade_attn"],
        found["data_parallel_size"],
    ) == (True, told, 2)
    assert (found["attention_backends"], found["kv_cache_bytes"], found["levels"]["batching"]) == (
        ["CPU_ATTN"],
        16,
        "chunked",
    )
