"""From the texts of a workload's file to the token ids of a plan: by the model's own tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

from experiments import workload_files
from experiments.host.model_files import ModelError, last_line_of

_TOKENIZE = (
    "import sys; from experiments.study.prompts import tokenize_here; "
    "print(tokenize_here(sys.argv[1], sys.stdin.read(), sys.argv[2] == 'chat'))"
)


def tokenize(folder: str, content: str, *, as_chat: bool) -> str:
    """The lines of a file of prompts (workload_files.pack) with token ids instead of texts, made in another
    process, which has torch. as_chat: a prompt is what a user says in the model's chat template.

    Raises ModelError where the model has no tokenizer for them, or no chat template.
    """
    how = "chat" if as_chat else "text"
    try:
        return last_line_of(_TOKENIZE, folder, how, given=content)
    except ModelError as error:
        raise ModelError(f"its prompts cannot be tokenized for {folder}: {error}") from error


def tokenize_here(folder: str, content: str, as_chat: bool) -> str:
    """The same in this process. Raises ValueError, FileNotFoundError or TypeError as LLM.chat does."""
    from nanovllm.engine.llm_engine import load_tokenizer
    from nanovllm.requests import chat

    tokenizer = load_tokenizer(folder)

    def ids(line: workload_files.Line) -> list[int]:
        if "prompt_token_ids" in line:
            return line["prompt_token_ids"]  # type: ignore[no-any-return]
        if "prompt" in line and not as_chat:
            return tokenizer.encode(line["prompt"]).ids
        said = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
        text = chat.render(
            chat.template_of(Path(folder), with_tools=False),
            chat.conversations_of(said)[0],
            {
                **chat.special_tokens(Path(folder)),
                "tools": None,
                "documents": None,
                "add_generation_prompt": True,
            },
        )
        return tokenizer.encode(text, add_special_tokens=False).ids

    lines = []
    for number, line in enumerate(workload_files.unpack(content), 1):
        if not (found := ids(line)):
            raise ValueError(f"prompt {number} has no token; allowed: one or more")
        answer = {"output_tokens": line["output_tokens"]} if "output_tokens" in line else {}
        lines.append({"prompt_token_ids": found, **answer})
    if (total := sum(len(line["prompt_token_ids"]) for line in lines)) > workload_files.MOST_TOKENS:
        raise ValueError(
            f"the prompts have {total:,} tokens; allowed: at most {workload_files.MOST_TOKENS:,}: lower num_requests"
        )
    return workload_files.pack(lines)
