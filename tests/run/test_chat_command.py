"""`nanovllm chat`: the answers of LLM.chat, token by token, and a conversation that goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments import chat
from experiments.__main__ import app
from experiments.host import environment, provenance
from nanovllm import LLM, SamplingParams

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
ENGINE: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 256,
    "max_num_seqs": 2,
    "kv_cache_memory_bytes": 1 << 23,
}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture
def talk(tiny: Path) -> Iterator[chat.Conversation]:
    talk = chat.Conversation(
        str(tiny), system="Be brief.", template=TEMPLATE, settings=GREEDY, engine=ENGINE
    )
    yield talk
    talk.close()


def test_a_conversation_goes_on_and_says_what_llm_chat_says(
    tiny: Path, talk: chat.Conversation
) -> None:
    lines = iter(["one two", "  ", "three"])
    written: list[str] = []

    def read() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    chat.converse(talk, read, written.append)
    expected = [{"role": "system", "content": "Be brief."}]
    with LLM(str(tiny), **ENGINE) as llm:
        for question in ("one two", "three"):
            expected.append({"role": "user", "content": question})
            (output,) = llm.chat(
                expected, SamplingParams(**GREEDY), use_tqdm=False, chat_template=TEMPLATE
            )
            expected.append({"role": "assistant", "content": output.outputs[0].text})
    assert talk.messages == expected
    assert "".join(written) == "".join(f"{expected[i]['content']}\n" for i in (2, 4))
    assert len(written) > 4, "in pieces, as the tokens come"


def test_a_conversation_that_outgrows_the_context_can_go_on(talk: chat.Conversation) -> None:
    before = list(talk.messages)
    with pytest.raises(chat.ChatError, match="256"):
        list(talk.answer("word " * 400))
    assert talk.messages == before
    assert "".join(talk.answer("one two"))


def test_an_answer_that_nobody_reads_on_leaves_the_engine_free(talk: chat.Conversation) -> None:
    pieces = talk.answer("one two")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert not talk._llm.has_unfinished_requests()
    assert [message["role"] for message in talk.messages] == ["system"]


def test_a_model_without_a_template_says_what_to_do(tiny: Path) -> None:
    with pytest.raises(chat.ChatError) as found:
        chat.Conversation(str(tiny), engine=ENGINE)
    said = str(found.value)
    assert "--chat-template FILE" in said
    assert "smollm2" in said
    assert "Qwen/Qwen3-0.6B" in said
    assert "LLM.generate" not in said, "a hint for Python does not help on the command line"


def test_a_template_that_is_not_there_is_a_message() -> None:
    done = CliRunner().invoke(app, ["chat", "tiny", "--chat-template", "no-such-file.jinja"])
    assert done.exit_code == 2
    assert "no-such-file.jinja: there is no such file" in done.stderr
    assert isinstance(done.exception, SystemExit)


def test_what_cannot_begin_is_one_message() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "chat", "no-such-model"],
        capture_output=True,
        text=True,
        cwd=provenance.ROOT,
        env=environment.for_subprocess(),
        input="",
        check=False,
    )
    assert done.returncode == 2
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr
