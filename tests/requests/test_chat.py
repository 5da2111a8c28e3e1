"""LLM.chat: prompts are those of transformers' apply_chat_template, and errors say what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nanovllm import LLM, SamplingParams
from nanovllm.requests import chat

SMALL: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 512,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 1 << 23,
}
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\nTools: ' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if loop.index0 > 8 %}{% break %}{% endif %}
    {% if message['role'] == 'assistant' %}
{% generation %}{{ '<|im_start|>assistant\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endgeneration %}
    {% else %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{% endif %}
{% if messages[0]['content'] == 'no' %}{{ raise_exception('the first message says no') }}{% endif %}
"""
HELLO = [{"role": "user", "content": "Hello <there> & 'you'"}]
LONG = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  Zwölf Boxkämpfer?  "},
    {"role": "assistant", "content": "日本 🙂"},
    {"role": "user", "content": "Again"},
]
TOOLS = [{"type": "function", "function": {"name": "zählen", "parameters": {"type": "object"}}}]


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(tiny, tmp_path / "chat"))
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


@pytest.mark.parametrize("messages", [HELLO, LONG])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"add_generation_prompt": False},
        {"tools": TOOLS},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
    ids=str,
)
def test_a_prompt_is_that_of_transformers(
    folder: Path, messages: list[dict[str, str]], how: dict[str, Any]
) -> None:
    with LLM(str(folder), **SMALL) as llm:
        (output,) = llm.chat(messages, PARAMS, use_tqdm=False, **how)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = {"add_generation_prompt": True, **how}
    more = given.pop("chat_template_kwargs", {})
    expected = tokenizer.apply_chat_template(messages, tokenize=False, **given, **more)
    assert output.prompt == expected
    assert output.prompt_token_ids == tokenizer(expected, add_special_tokens=False).input_ids
    assert len(output.outputs[0].token_ids) == 4


def test_several_conversations_and_parts_of_contents(folder: Path) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    with LLM(str(folder), **SMALL) as llm:
        first, second, third = llm.chat(
            [HELLO, LONG, [{"role": "user", "content": parts}]], PARAMS, use_tqdm=False
        )
        assert first.prompt == llm.chat(HELLO, PARAMS, use_tqdm=False)[0].prompt
        assert second.prompt == llm.chat(LONG, PARAMS, use_tqdm=False)[0].prompt
        assert "Hello\nthere" in (third.prompt or "")
        again = llm.chat(HELLO, PARAMS, False, lora_request=None)
        assert again[0].outputs[0].token_ids == first.outputs[0].token_ids
        own = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        (output,) = llm.chat(HELLO, PARAMS, use_tqdm=False, chat_template=own)
        assert output.prompt == "user: Hello <there> & 'you'\n"


def test_templates_of_tokenizer_config(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": "one"}))
    assert chat.template_of(tmp_path, False) == "one"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    file.write_text(json.dumps({"chat_template": named}))
    assert (chat.template_of(tmp_path, False), chat.template_of(tmp_path, True)) == ("d", "t")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert chat.template_of(tmp_path, False) == "file"


def test_the_end_of_a_message_is_found() -> None:
    assert chat.without_end("<u>Yes <end>\n", "Yes ") == "<u>Yes "
    assert chat.without_end("<u>Yes<end>\n", " Yes ") == "<u>Yes"
    with pytest.raises(ValueError, match="cannot be continued"):
        chat.without_end("<u>YES<end>", "Yes")


@pytest.mark.parametrize(
    ("messages", "how", "error", "message"),
    [
        (
            [{"role": "bot", "content": "x"}],
            {},
            ValueError,
            "message 0 has role='bot'; allowed are system",
        ),
        ([{"content": "x"}], {}, ValueError, "role=None"),
        ([{"role": "user"}], {}, ValueError, "content=None"),
        (
            [*HELLO, {"role": "user", "content": [{"type": "image_url"}]}],
            {},
            ValueError,
            "message 1.*'image_url'.*text only",
        ),
        (
            [{"role": "user", "content": "no"}],
            {},
            ValueError,
            "refuses these messages: the first message says no",
        ),
        ("hello", {}, TypeError, "messages is a str"),
        (["hello"], {}, TypeError, "message 0 is a str"),
        ([], {}, ValueError, "conversation is empty"),
        (HELLO, {"chat_template": "{% if %}"}, ValueError, "chat template"),
        (HELLO, {"chat_template": "{{ ''.__class__.__mro__ }}"}, ValueError, "unsafe"),
        (HELLO, {"continue_final_message": True}, ValueError, "set one of them to False"),
        (HELLO, {"no_such_argument": 1}, TypeError, "no_such_argument"),
        (HELLO, {"lora_request": "x"}, ValueError, "lora_request='x' is not built"),
    ],
)
def test_errors_say_what_is_wrong(
    folder: Path, messages: Any, how: dict[str, Any], error: type[Exception], message: str
) -> None:
    with LLM(str(folder), **SMALL) as llm:
        with pytest.raises(error, match=message):
            llm.chat(messages, PARAMS, **how)
        assert not llm.has_unfinished_requests()


def test_a_file_with_a_template_is_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert chat.read_template(file) == file.read_text()
    broken, binary = tmp_path / "broken.jinja", tmp_path / "binary.jinja"
    broken.write_text("{% if %}")
    binary.write_bytes(b"\xff\xfe\x00")
    for given, why in (
        (tmp_path / "absent.jinja", "there is no such file"),
        (tmp_path, "Is a directory"),
        (broken, "not a Jinja template"),
        (binary, "not UTF-8 text"),
    ):
        with pytest.raises(ValueError, match=rf"--chat-template .*{given.name}: {why}.*; give the"):
            chat.read_template(given)


def test_a_checkpoint_without_a_template(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "base"))
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with (
        LLM(str(copy), **SMALL) as llm,
        pytest.raises(ValueError, match=r"no chat template.*give chat_template"),
    ):
        llm.chat(HELLO, PARAMS)
    with (
        LLM(str(copy), skip_tokenizer_init=True, **SMALL) as llm,
        pytest.raises(ValueError, match="needs a tokenizer"),
    ):
        llm.chat(HELLO, PARAMS)
