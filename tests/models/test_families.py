"""Model families are chosen by config.json: a family is a file and a row."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm import BASELINE, LLM, SamplingParams
from nanovllm.models.config import load_hf_config
from nanovllm.models.families import FAMILIES, model_class

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
