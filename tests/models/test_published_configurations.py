"""The rows of docs/published-models.md: the config.json of each published model loads, and computes at reduced
width what HF does; or it is refused with the name of the setting.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanovllm.models.config import load_hf_config
from tests.models.test_families_against_hf import assert_same, hf_logits, logits_of

ROOT = Path(__file__).parents[2]
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests/support/data/published_configurations.json").read_text()
)
REFUSED = {"mistralai/Mistral-7B-v0.1": "sliding_window=4096"}
WIDTH = {"vocab_size": 96, "intermediate_size": 48, "num_hidden_layers": 2}


def reduced(config: dict[str, Any]) -> dict[str, Any]:
    """The same model, narrow: as many query heads to a KV head, heads of the same size, one KV head or two."""
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    kv_heads = 2 if group < 4 else 1
    heads = group * kv_heads
    hidden = config["hidden_size"] * heads // config["num_attention_heads"]
    return (
        config
        | WIDTH
        | {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "hidden_size": hidden if "head_dim" not in config else 32 * heads,
            "head_dim": head_dim,
            "bos_token_id": None,
            "eos_token_id": 3,
            "torch_dtype": "float32",
        }
        | ({"num_experts": 16, "moe_intermediate_size": 32} if "num_experts" in config else {})
    )


def rows() -> dict[str, list[str]]:
    """Cells of the page's table, by model."""
    page = (ROOT / "docs/published-models.md").read_text(encoding="utf-8")
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("| `")
    ]
    return {row[0].strip("`"): row[1:] for row in cells}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration(name: str, tmp_path: Path) -> None:
    config, row = PUBLISHED[name], rows()[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if name in REFUSED:
        with pytest.raises(ValueError, match=re.escape(REFUSED[name])):
            load_hf_config(tmp_path)
        assert row[-2] == f"refused: `{REFUSED[name]}`"
        return
    read = load_hf_config(tmp_path)
    assert row[:-1] == [
        read.architecture.removesuffix("ForCausalLM"),
        str(read.head_dim),
        f"{read.num_attention_heads} / {read.num_key_value_heads}",
        (config.get("rope_scaling") or {"rope_type": "default"})["rope_type"],
        f"{read.max_position_embeddings:,}",
        "yes" if read.tie_word_embeddings else "no",
        "accepted",
    ]
    (tmp_path / "config.json").write_text(json.dumps(reduced(config)))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(tmp_path)
    text = torch.randint(WIDTH["vocab_size"], (40,)).tolist()
    # as transformers 5 has just written it, and as it was published
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written
    theirs = hf_logits(model, text)
    assert_same(logits_of(tmp_path, text), theirs)
    (tmp_path / "config.json").write_text(json.dumps(reduced(config)))
    assert_same(logits_of(tmp_path, text), theirs)


def test_the_page_lists_them_all_and_says_where_each_was_looked_up() -> None:
    assert list(rows()) == list(PUBLISHED)
    page = (ROOT / "docs/published-models.md").read_text(encoding="utf-8")
    sources = re.findall(r"^(\d)\. .*https://github\.com/", page, re.MULTILINE)
    assert sources == ["1", "2", "3"]
    assert {number for row in rows().values() for number in row[-1].split(", ")} == set(sources)
