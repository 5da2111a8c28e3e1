"""The engine as a user meets it: vLLM's offline interface, the same tokens as HF transformers under
every toggle.
"""

from __future__ import annotations

import gc
import random
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, EngineConfig, LLMEngine, RequestOutput, SamplingParams
from nanovllm.engine.invariants import check_invariants
from nanovllm.engine.llm_engine import EngineDeadError
from tests.models import test_families_against_hf as families

SMALL: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "block_size": 8,
}
TOGGLES: list[dict[str, Any]] = [
    {},
    {"batching": "continuous"},
    {"batching": "chunked"},
    {"prefix_cache": True},
    {"overlap": True},
    {"batching": "continuous", "overlap": True, "prefix_cache": True},
    {"batching": "chunked", "overlap": True, "prefix_cache": True},
]


def prompts_of(count: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    prefix = [rng.randrange(10, 2000) for _ in range(shared)]
    return [
        prefix + [rng.randrange(10, 2000) for _ in range(rng.randint(1, 40))] for _ in range(count)
    ]


@pytest.fixture(scope="module")
def hf(tiny: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()


def run(
    tiny: Path,
    prompts: list[list[int]],
    params: SamplingParams | list[SamplingParams],
    **kwargs: Any,
) -> list[RequestOutput]:
    with LLM(str(tiny), **{**SMALL, **kwargs}) as llm:
        return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def assert_greedy(hf: Any, prompt: list[int], tokens: list[int]) -> None:
    """Each token is HF's argmax in float64, or within the noise of float32."""
    with torch.inference_mode():
        logits = hf(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    margin = logits.max(-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    assert margin.max() < 1e-4


@pytest.mark.parametrize(
    "toggles", TOGGLES, ids=lambda t: ",".join(f"{k}={v}" for k, v in t.items()) or "baseline"
)
def test_greedy_tokens_are_the_argmax_of_hf(tiny: Path, hf: Any, toggles: dict[str, Any]) -> None:
    prompts = prompts_of(12, shared=20)
    outputs = run(
        tiny,
        prompts,
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        optimizations=toggles,
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        assert len(tokens) == 12
        assert output.outputs[0].finish_reason == "length"
        assert_greedy(hf, prompt, tokens)


def test_sampled_tokens_depend_on_seed_and_position_alone(tiny: Path) -> None:
    prompts = prompts_of(10, seed=1)
    params = [
        SamplingParams(
            temperature=0.8,
            top_k=50 * (i % 2),
            top_p=1 - 0.1 * (i % 3),
            max_tokens=20,
            seed=7 + i,
            ignore_eos=True,
        )
        for i in range(len(prompts))
    ]
    together = [
        o.outputs[0].token_ids
        for o in run(tiny, prompts, params, optimizations={"batching": "chunked"})
    ]
    alone = [
        run(tiny, [p], [s], optimizations={})[0].outputs[0].token_ids
        for p, s in zip(prompts, params, strict=True)
    ]
    assert together == alone
    assert len({tuple(t) for t in together}) == len(prompts)


def test_a_pool_that_preempts_changes_nothing(tiny: Path) -> None:
    prompts = prompts_of(8, seed=2)
    params = SamplingParams(temperature=0.7, max_tokens=40, ignore_eos=True)
    roomy = run(tiny, prompts, params, optimizations={"batching": "chunked"})
    bytes_a_block = 4 * 2 * 2 * 64 * 8 * 4
    with LLM(
        str(tiny),
        **SMALL,
        kv_cache_memory_bytes=20 * bytes_a_block,
        optimizations={"batching": "chunked", "prefix_cache": True},
    ) as llm:
        # it expects every request to end at once: memory runs out
        llm.scheduler.forecast.asked = 1 << 40
        tight = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert llm.stats()["preemptions"] > 0
        assert llm.resolved_config()["num_kv_blocks"] == 20
    assert [o.outputs[0].token_ids for o in tight] == [o.outputs[0].token_ids for o in roomy]


def test_bfloat16_runs(tiny: Path) -> None:
    outputs = run(
        tiny,
        prompts_of(3),
        SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
        dtype="bfloat16",
    )
    assert all(len(o.outputs[0].token_ids) == 5 for o in outputs)


def test_more_logprobs_than_there_are_tokens(tiny: Path) -> None:
    """The request gets those of the whole vocabulary; others in the step are not harmed."""
    with LLM(str(tiny), **SMALL) as llm:
        params = [
            SamplingParams(max_tokens=2, temperature=0, logprobs=10**9),
            SamplingParams(max_tokens=2, temperature=0),
        ]
        asked, plain = (
            output.outputs[0]
            for output in llm.generate([[5, 6, 7], [5, 6, 7]], params, use_tqdm=False)
        )
    assert asked.token_ids == plain.token_ids
    assert asked.logprobs is not None
    assert [len(found) for found in asked.logprobs] == [llm.model_config.vocab_size] * 2


def test_the_outputs_of_vllm(tiny: Path) -> None:
    with LLM(str(tiny), **SMALL) as llm:
        one = llm.generate(
            "Beautiful is better than", SamplingParams(max_tokens=6, temperature=0, logprobs=3)
        )[0]
        assert one.prompt == "Beautiful is better than"
        assert one.finished
        completion = one.outputs[0]
        assert llm.tokenizer is not None
        assert completion.text == llm.tokenizer.decode(completion.token_ids)
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        for token, found in zip(completion.token_ids, completion.logprobs, strict=True):
            assert len(found) == 3
            assert found[token].rank == 1
            assert found[token].logprob == max(entry.logprob for entry in found.values())
            assert found[token].decoded_token == llm.tokenizer.decode([token])
        assert completion.cumulative_logprob == pytest.approx(
            sum(
                f[t].logprob for t, f in zip(completion.token_ids, completion.logprobs, strict=True)
            )
        )
        metrics = one.metrics
        assert metrics.first_token_time is not None
        assert metrics.finished_time is not None
        assert metrics.arrival_time < metrics.first_token_time <= metrics.finished_time
        several = llm.generate(
            [{"prompt_token_ids": [5, 6]}, {"prompt": "Flat"}],
            [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)],
            use_tqdm=False,
        )
        assert [len(o.outputs[0].token_ids) <= n for o, n in zip(several, (2, 3), strict=True)] == [
            True,
            True,
        ]
        assert llm.generate([], use_tqdm=False) == []


def test_logprobs_equal_those_of_hf(tiny: Path, hf: Any) -> None:
    prompts = prompts_of(5, seed=3)
    outputs = run(
        tiny, prompts, SamplingParams(temperature=1.0, max_tokens=10, logprobs=0, ignore_eos=True)
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        with torch.inference_mode():
            expected = (
                hf(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            )
        for i, (token, found) in enumerate(
            zip(tokens, output.outputs[0].logprobs or [], strict=True)
        ):
            assert found[token].logprob == pytest.approx(float(expected[i, token]), abs=1e-4)


def test_stop_tokens_and_eos(tiny: Path) -> None:
    prompt = prompts_of(1, seed=4)[0]
    free = (
        run(tiny, [prompt], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0]
        .outputs[0]
        .token_ids
    )
    stop = free[5]
    for overlap in (False, True):
        stopped = run(
            tiny,
            [prompt],
            SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop]),
            optimizations={"overlap": overlap},
        )[0].outputs[0]
        assert stopped.token_ids == free[: free.index(stop) + 1]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("overlap", [False, True])
def test_add_step_abort(tiny: Path, overlap: bool) -> None:
    config = EngineConfig.from_kwargs(
        str(tiny), **SMALL, optimizations={"batching": "chunked", "overlap": overlap}
    )
    with LLMEngine(config) as engine:
        for i, prompt in enumerate(prompts_of(4)):
            engine.add_request(
                f"r{i}",
                {"prompt_token_ids": prompt},
                SamplingParams(max_tokens=6, temperature=0, ignore_eos=True),
            )
        with pytest.raises(ValueError, match="already in use"):
            engine.add_request("r0", [1], SamplingParams())
        finished: dict[str, RequestOutput] = {}
        engine.step()
        engine.step()
        assert engine.abort("r2")
        assert not engine.abort("nobody")
        while engine.has_unfinished_requests():
            for output in engine.step():
                assert output.request_id != "r2"
                if output.finished:
                    finished[output.request_id] = output
        assert sorted(finished) == ["r0", "r1", "r3"]
        check_invariants(engine.scheduler)
        assert engine.step() == []


def test_counters_prove_that_toggles_fired(tiny: Path) -> None:
    prompts = prompts_of(12, shared=24)
    params = [
        SamplingParams(temperature=0, max_tokens=4 + 3 * (i % 4), ignore_eos=True)
        for i in range(len(prompts))
    ]
    for toggles in ({}, {"batching": "chunked", "prefix_cache": True, "overlap": True}):
        with LLM(str(tiny), **SMALL, optimizations=toggles) as llm:
            llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            for name, counters in llm.toggles().items():
                assert (counters["engaged"] > 0) == (name in toggles), name
            if toggles:
                assert llm.toggles()["prefix_cache"]["opportunity"] > 0
                assert llm.toggles()["batching"]["opportunity"] > 0
            times = llm.step_times()
            assert len(times) == llm.stats()["steps"]
            assert sum(prefill for _, prefill, _ in times) == llm.stats()["prefill_tokens"]
            llm.reset_stats()
            assert llm.step_times() == []
            assert not any(llm.stats().values())


# Torch's compiler takes ten seconds to import and more to compile for the first time: all tests of it
# in `make test` stand here, side by side, so that one process pays for it.
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None,
    reason="torch.compile needs a C++ compiler on a CPU: apt-get install g++",
)


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
@pytest.mark.parametrize("family", ["llama 3.1", "qwen2"])
def test_compiled_kernels_of_other_families_compute_the_same(tmp_path: Path, family: str) -> None:
    """Of heads without norms, and of a projection with a bias."""
    model = families.random_model(family)
    model.save_pretrained(tmp_path)
    ours = families.logits_of(tmp_path, families.TEXT, kernels="compile")
    families.assert_same(ours, families.hf_logits(model, families.TEXT))


@needs_compiler
@pytest.mark.filterwarnings("ignore")
def test_compiled_kernels_are_the_twins_of_torch(tiny: Path, hf: Any) -> None:
    prompts = prompts_of(6, seed=5)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(
        str(tiny), **SMALL, optimizations={"kernels": "compile", "batching": "chunked"}
    ) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert llm.toggles()["kernels"]["engaged"] > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy(hf, prompt, output.outputs[0].token_ids)


def test_a_closed_engine_says_so_and_gives_memory_back(tiny: Path) -> None:
    llm = LLM(str(tiny), **SMALL)
    model = weakref.ref(llm.runner.model)
    llm.close()
    llm.close()
    gc.collect()
    assert model() is None
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("x")


def test_garbage_collection_passes_over_what_stays(tiny: Path) -> None:
    """Torch's objects above all: looking at them takes 0.1 s, in the middle of a run."""
    gc.unfreeze()
    with LLM(str(tiny), **SMALL):
        assert gc.get_freeze_count() > len(gc.get_objects())
        gc.collect()
        assert gc.get_freeze_count() > 50_000
    assert gc.get_freeze_count() == 0
    forgotten = LLM(str(tiny), **SMALL)
    model = weakref.ref(forgotten.runner.model)
    assert gc.get_freeze_count() > 50_000
    del forgotten  # not closed
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert model() is None


def test_a_failing_step_ends_the_engine_with_its_cause(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(tiny), **SMALL)
    monkeypatch.setattr(type(llm.runner), "submit", lambda self, plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate("x", use_tqdm=False)
    with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
        llm.generate("x", use_tqdm=False)


def test_an_interrupted_generate_leaves_the_engine_usable(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(str(tiny), **SMALL) as llm:
        llm.add_request("2", [1, 2], SamplingParams())
        monkeypatch.setattr(llm, "_num_requests", 0)
        with pytest.raises(ValueError, match="already in use"):  # the third request cannot be added
            llm.generate([[1], [2], [3]], SamplingParams(max_tokens=3), use_tqdm=False)
        llm.abort("2")
        assert not llm.has_unfinished_requests()
        assert (
            len(
                llm.generate(
                    [[1], [2]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False
                )
            )
            == 2
        )


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([[]], {}, ValueError, "empty prompt"),
        ("", {}, ValueError, "empty prompt"),
        ([[1, 2048 * 100]], {}, ValueError, "token id 204800; allowed are integers from 0 to"),
        ([[1, -1]], {}, ValueError, "token id -1"),
        ([[1, 2.5]], {}, ValueError, "token id 2.5"),
        ([[1] * 256], {"max_tokens": 7}, ValueError, "max_model_len=256"),
        ([{"prompt_tokens": [1]}], {}, TypeError, "prompt_token_ids"),
        ([1.5], {}, TypeError, "a prompt is a float"),
    ],
)
def test_bad_requests_are_refused_and_lose_nothing(
    tiny: Path, prompt: Any, params: dict[str, Any], error: type[Exception], message: str
) -> None:
    with LLM(str(tiny), **SMALL) as llm:
        with pytest.raises(error, match=message):
            llm.generate(
                prompt if not isinstance(prompt, list) else [[1, 2], *prompt],
                SamplingParams(**params),
                use_tqdm=False,
            )
        assert not llm.has_unfinished_requests()
        assert (
            len(
                llm.generate(
                    [[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False
                )[0]
                .outputs[0]
                .token_ids
            )
            == 2
        )


def test_a_request_larger_than_the_cache(tiny: Path) -> None:
    bytes_a_block = 4 * 2 * 2 * 64 * 8 * 4
    with LLM(str(tiny), **SMALL, kv_cache_memory_bytes=3 * bytes_a_block) as llm:
        with pytest.raises(ValueError, match=r"needs 4 KV blocks.*has 3"):
            llm.generate([[1] * 20], SamplingParams(max_tokens=5), use_tqdm=False)
        assert llm.generate(
            [[1] * 20], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False
        )[0].finished
    with pytest.raises(ValueError, match="one block of 8 tokens takes"):
        LLM(str(tiny), **SMALL, kv_cache_memory_bytes=bytes_a_block - 1)


def test_one_sampling_params_for_each_prompt(tiny: Path) -> None:
    with (
        LLM(str(tiny), **SMALL) as llm,
        pytest.raises(ValueError, match="2 prompts and 1 sampling_params"),
    ):
        llm.generate([[1], [2]], [SamplingParams()], use_tqdm=False)


def test_a_fraction_of_memory_counts_other_processes(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanovllm.engine import kv_cache

    block = 4 * 2 * 2 * 64 * 8 * 4
    # others hold 60 of 100
    monkeypatch.setattr(kv_cache, "memory_within", lambda free, total: (40 * block, 100 * block))
    with LLM(str(tiny), **SMALL, gpu_memory_utilization=0.9) as llm:
        assert llm.resolved_config()["num_kv_blocks"] == 30  # 90 of 100 at most are in use
