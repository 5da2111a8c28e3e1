"""Model families are chosen by config.json: a family is a file and a row."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from nanovllm import BASELINE, LLM, SamplingParams
from nanovllm.models.config import load_hf_config
from nanovllm.models.families import FAMILIES, model_class
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from tests.docs.pages import block

FAMILY = '''
from nanovllm.models.qwen3 import Qwen3ForCausalLM

class MadeUpForCausalLM(Qwen3ForCausalLM):
    """Computes what Qwen3 does, and keeps count."""

    calls = 0

    def forward(self, batch, kv_caches):
        type(self).calls += 1
        return super().forward(batch, kv_caches)
'''


def checkpoint(tiny: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_family_is_a_file_and_a_row(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up_family.py").write_text(FAMILY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(
        FAMILIES, "MadeUpForCausalLM", ("made_up_family", {"model_type": "made_up"})
    )
    folder = checkpoint(
        tiny, tmp_path / "model", architectures=["MadeUpForCausalLM"], model_type="made_up"
    )
    tokens = []
    for model in (tiny, folder):
        with LLM(
            str(model),
            device="cpu",
            max_model_len=64,
            max_num_seqs=2,
            skip_tokenizer_init=True,
            optimizations=BASELINE,
        ) as llm:
            (output,) = llm.generate(
                {"prompt_token_ids": [5, 6, 7]},
                SamplingParams(temperature=0, max_tokens=4),
                use_tqdm=False,
            )
            tokens.append(output.outputs[0].token_ids)
    assert tokens[0] == tokens[1]
    assert model_class("MadeUpForCausalLM").calls >= 4


def test_an_unknown_family_says_what_is_allowed(tiny: Path, tmp_path: Path) -> None:
    folder = checkpoint(tiny, tmp_path / "model", architectures=["GPT2LMHeadModel"])
    with pytest.raises(
        ValueError, match=r"architectures=\['GPT2LMHeadModel'\].*Qwen3ForCausalLM.*families\.py"
    ):
        load_hf_config(folder)


def test_a_familys_settings_are_its_own(tiny: Path, tmp_path: Path) -> None:
    folder = checkpoint(tiny, tmp_path / "model", model_type="llama")
    with pytest.raises(ValueError, match=r"model_type='llama'.*Qwen3ForCausalLM.*'qwen3' only"):
        load_hf_config(folder)


def test_a_family_is_loaded_only_when_asked_for() -> None:
    code = (
        "import sys, nanovllm.models.config, nanovllm.models.families\n"
        "sys.exit('nanovllm.models.qwen3' in sys.modules or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        check=False,
    )
    assert done.returncode == 0


def test_a_family_without_norms_of_heads_computes_what_hf_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module of docs/extending/model-family.md, in a Llama."""
    module = ModuleType("llama_family")
    exec(
        block("docs/extending/model-family.md", "python", "class AttentionWithoutNorms"),
        vars(module),
    )

    class LlamaForCausalLM(Qwen3ForCausalLM):
        def __init__(self, config: Any, length: int, kernels: Any, attention: Any, tp: Any) -> None:
            super().__init__(config, length, kernels, attention, tp)
            for layer in self.model.layers:
                layer.self_attn = module.AttentionWithoutNorms(config, kernels, attention, tp)

    module.LlamaForCausalLM = LlamaForCausalLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_family", module)
    monkeypatch.setitem(
        FAMILIES, "LlamaForCausalLM", ("llama_family", {"model_type": "llama", "mlp_bias": False})
    )
    torch.manual_seed(3)
    hf = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            eos_token_id=None,
        )
    ).eval()
    hf.save_pretrained(tmp_path / "llama")
    prompts = [[5, 6, 7], [9, 3, 100, 20, 41, 8]]
    with LLM(
        str(tmp_path / "llama"),
        device="cpu",
        dtype="float32",
        max_num_seqs=2,
        skip_tokenizer_init=True,
        optimizations=BASELINE,
    ) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
            use_tqdm=False,
        )
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)[
            0, len(prompt) :
        ]
        assert list(output.outputs[0].token_ids) == expected.tolist()
