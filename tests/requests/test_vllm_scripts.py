"""Scripts written for vLLM run by changing the import: its arguments, its limits, its defaults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from nanovllm import BASELINE, LLM, EngineConfig, SamplingParams
from nanovllm.config import ALL, Optimizations
from nanovllm.engine.invariants import check_invariants
from nanovllm.engine.llm_engine import EngineDeadError, load_tokenizer
from nanovllm.models.config import load_hf_config
from nanovllm.toggles import vllm_names
from property_tests.support.ranks import in_place_of_processes

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 64,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 1 << 22,
}


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit_json(file: Path, **settings: Any) -> None:
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**before, **settings}))


@pytest.mark.parametrize(
    "arguments",
    [
        {"trust_remote_code": False, "disable_log_stats": True, "tokenizer_mode": "auto"},
        {"trust_remote_code": True, "swap_space": 4, "quantization": None, "revision": None},
        {"load_format": "auto", "kv_cache_dtype": "auto", "pipeline_parallel_size": 1},
        {"cpu_offload_gb": 0, "runner": "generate", "hf_overrides": {}, "enable_lora": False},
    ],
)
def test_arguments_that_change_no_result_are_taken(arguments: dict[str, Any]) -> None:
    assert EngineConfig.from_kwargs("m", **arguments) == EngineConfig(model="m")
    beside = EngineConfig.from_kwargs("m", optimizations=BASELINE, **arguments)
    assert beside.optimizations == BASELINE
    eager = EngineConfig.from_kwargs("m", enforce_eager=True, **arguments)
    assert eager.optimizations.cuda_graphs is False
    assert EngineConfig(model="m").optimizations == ALL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization", "fp8"),
        ("tokenizer_mode", "slow"),
        ("kv_cache_dtype", "fp8"),
        ("pipeline_parallel_size", 2),
        ("enable_lora", True),
        ("speculative_config", {"method": "ngram"}),
        ("hf_overrides", {"rope_theta": 1}),
        ("revision", "main"),
        ("runner", "pooling"),
    ],
)
def test_what_would_change_results_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*is not built in this engine"):
        EngineConfig.from_kwargs("m", **{name: value})


def test_no_argument_is_in_two_lists() -> None:
    own = set(EngineConfig.__dataclass_fields__)
    assert not vllm_names.WITHOUT_EFFECT & vllm_names.ONLY.keys()
    assert not (vllm_names.WITHOUT_EFFECT | vllm_names.ONLY.keys()) & (
        own | set(vllm_names.SWITCHES)
    )


def test_an_answer_ends_where_the_context_does(tiny: Path) -> None:
    with LLM(str(tiny), **SMALL) as llm:
        params = SamplingParams(temperature=0, max_tokens=10_000, ignore_eos=True)
        long, short = llm.generate([[5] * 60, [6, 7]], params, use_tqdm=False)
        assert len(long.outputs[0].token_ids) == 4
        assert len(short.outputs[0].token_ids) == 62
        assert long.outputs[0].finish_reason == "length"
        (unlimited,) = llm.generate(
            [[6, 7]],
            SamplingParams(temperature=0, max_tokens=None, ignore_eos=True),
            use_tqdm=False,
        )
        assert unlimited.outputs[0].token_ids == short.outputs[0].token_ids
        with pytest.raises(ValueError, match=r"64 prompt tokens.*max_model_len=64"):
            llm.generate([[5] * 64], params, use_tqdm=False)


def test_the_recommended_parameters_of_a_checkpoint_apply(copy: Path) -> None:
    edit_json(
        copy / "generation_config.json",
        temperature=0.5,
        top_k=7,
        repetition_penalty=1.2,
        min_p=0.1,
        max_new_tokens=3,
    )
    with LLM(str(copy), **SMALL) as llm:
        default: Any = llm.get_default_sampling_params()
        assert (default.temperature, default.top_k, default.max_tokens) == (0.5, 7, 3)
        assert (default.repetition_penalty, default.min_p) == (1.2, 0.1)
        mine = SamplingParams(
            temperature=0.5, top_k=7, repetition_penalty=1.2, min_p=0.1, max_tokens=3
        )
        assert mine == default
        first, second = (
            llm.generate([[5, 6, 7]] * 2, given, use_tqdm=False)[1].outputs[0]
            for given in (None, mine)
        )
        assert len(first.token_ids) <= 3
        assert len(second.token_ids) <= 3


def test_values_that_change_nothing_load_no_options(copy: Path) -> None:
    edit_json(copy / "generation_config.json", repetition_penalty=1.0, min_p=0.0)
    with LLM(str(copy), **SMALL) as llm:
        assert type(llm.get_default_sampling_params()) is SamplingParams


def test_the_tokenizer_of_transformers(tiny: Path) -> None:
    with LLM(str(tiny), **SMALL) as llm:
        theirs = llm.get_tokenizer()
        assert llm.tokenizer is not None
        assert (
            theirs("Beautiful is better").input_ids
            == llm.tokenizer.encode("Beautiful is better").ids
        )


def test_a_checkpoint_without_an_end_of_sequence_warns(copy: Path) -> None:
    (copy / "generation_config.json").unlink(missing_ok=True)
    edit_json(copy / "config.json", eos_token_id=None)
    with pytest.warns(UserWarning, match="names an eos_token_id, so that no answer ends"):
        llm = LLM(str(copy), **SMALL)
    llm.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(str(copy))  # of a model that is not known


def test_what_is_no_text_model_is_named(copy: Path) -> None:
    edit_json(copy / "config.json", architectures=["Qwen3ForSequenceClassification"])
    with pytest.raises(ValueError, match=r"Qwen3ForSequenceClassification.*generates none"):
        load_hf_config(copy)
    edit_json(copy / "config.json", architectures=["Qwen3Model"])
    with pytest.raises(ValueError, match=r"Qwen3Model.*makes embeddings"):
        load_hf_config(copy)
    method = {"quant_method": "gptq", "bits": 4}
    edit_json(copy / "config.json", architectures=["Qwen3ForCausalLM"], quantization_config=method)
    with pytest.raises(ValueError, match=r"gptq.*is quantized.*unquantized checkpoint"):
        load_hf_config(copy)


def test_qwen3_embedding_is_named(copy: Path) -> None:
    """Its config says Qwen3ForCausalLM; its tensors have other names, and modules.json lies beside."""
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(renamed, copy / "model.safetensors")
    edit_json(copy / "modules.json", idx=0)
    with pytest.raises(ValueError, match=r"sentence-transformers.*embeddings"):
        LLM(str(copy), **SMALL)


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("optimizations", [BASELINE, ALL], ids=["everything off", "everything on"])
def test_ctrl_c_in_a_step_leaves_an_engine_that_works(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, optimizations: Optimizations
) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(str(tiny), **SMALL, optimizations=optimizations) as llm:
        before = llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].token_ids
        llm.add_request("other", [7, 8], params)
        for name in ("submit", "collect"):
            with monkeypatch.context() as patch:
                patch.setattr(type(llm.runner), name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    llm.generate([[5, 6], [9]], params, use_tqdm=False)
            assert not llm.has_unfinished_requests()
            check_invariants(llm.scheduler)
            assert llm.scheduler.blocks.num_free == llm.scheduler.blocks.num_blocks
        assert llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].token_ids == before


def test_ctrl_c_in_a_step_of_ranks_says_that_the_engine_is_over(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_place_of_processes():
        llm = LLM(str(tiny), **SMALL, tensor_parallel_size=2)
    monkeypatch.setattr(type(llm.runner), "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6]], use_tqdm=False)
    with pytest.raises(EngineDeadError, match=r"KeyboardInterrupt.*make a new one"):
        llm.generate([[5, 6]], use_tqdm=False)


def test_a_step_that_fails_otherwise_ends_the_engine(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ArithmeticError("no such sum")

    llm = LLM(str(tiny), **SMALL)
    monkeypatch.setattr(type(llm.runner), "collect", fails)
    with pytest.raises(ArithmeticError):
        llm.generate([[5, 6]], use_tqdm=False)
    with pytest.raises(EngineDeadError, match=r"ArithmeticError: no such sum.*make a new one"):
        llm.generate([[5, 6]], use_tqdm=False)


def test_a_second_ctrl_c_while_the_first_is_handled_ends_the_engine(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(tiny), **SMALL)
    monkeypatch.setattr(type(llm.runner), "collect", interrupted)
    monkeypatch.setattr(type(llm.loop), "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6]], use_tqdm=False)
    with pytest.raises(EngineDeadError, match=r"Ctrl-C came again.*make a new one"):
        llm.generate([[5, 6]], use_tqdm=False)


INTERRUPT_OFTEN = """
import os, random, signal, sys, threading
from nanovllm import ALL, BASELINE, LLM, SamplingParams
from nanovllm.engine.invariants import check_invariants

model, which = sys.argv[1:]
prompts = [[5 + i, 6, 7] for i in range(6)]
params = [SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=24, ignore_eos=True) for i in range(6)]
rng = random.Random(which)
with LLM(model, device="cpu", max_model_len=64, max_num_seqs=4, block_size=4, kv_cache_memory_bytes=2**18,
         optimizations={"off": BASELINE, "on": ALL}[which]) as llm:

    def tokens():
        return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]

    expected, interrupted = tokens(), 0
    for i in range(12):
        timer = threading.Timer(rng.uniform(0.0, 0.05), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while True:
                assert tokens() == expected
        except KeyboardInterrupt:
            interrupted += 1
        check_invariants(llm.scheduler)
        assert not llm.scheduler.num_unfinished
        assert llm.scheduler.blocks.num_free == llm.scheduler.blocks.num_blocks
        assert tokens() == expected
print(interrupted)
"""


@pytest.mark.parametrize("which", ["off", "on"])
def test_sigint_at_any_moment_leaves_an_engine_that_works(tiny: Path, which: str) -> None:
    """A signal to a process of its own, in the middle of whatever it is doing."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPT_OFTEN, str(tiny), which],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12"]


def test_ctrl_c_between_steps_leaves_an_engine_that_works(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(str(tiny), **SMALL) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        before = llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].token_ids
        advance, calls = llm.advance, []

        def interrupted() -> Any:
            calls.append(0)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return advance()

        monkeypatch.setattr(llm, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5, 6], [7]], params, use_tqdm=False)
        monkeypatch.undo()
        assert not llm.scheduler.num_unfinished
        assert llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].token_ids == before
