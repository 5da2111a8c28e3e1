"""The gate's first rule: an engine must have done the work it was asked for. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.records.types import Request


def same_work(
    requests: Sequence[Request],
    outputs: Sequence[Sequence[int]],
    finish_reasons: dict[str, int],
    eos_token_ids: set[int],
    vocab_size: int,
) -> list[str]:
    """Problems with the lengths, EOS tokens, token ids or finish reasons ({"length": n, "stop": m})
    of the outputs.
    """
    if len(outputs) != len(requests):
        return [f"{len(outputs)} outputs for {len(requests)} requests"]
    problems, stopped = [], 0
    for i, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        asked = request["max_tokens"]
        if bad := [token for token in output if not 0 <= token < vocab_size]:
            problems.append(
                f"request {i}: token {bad[0]} is outside the vocabulary of {vocab_size}"
            )
        if request["ignore_eos"]:
            if len(output) != asked:
                problems.append(
                    f"request {i}: {len(output)} tokens instead of exactly {asked} (ignore_eos)"
                )
            continue
        stop = next((j for j, token in enumerate(output) if token in eos_token_ids), None)
        stopped += stop is not None
        expected = asked if stop is None else min(asked, stop + 1)
        if len(output) != expected:
            where = "none" if stop is None else f"at position {stop}"
            problems.append(
                f"request {i}: {len(output)} tokens instead of {expected} (max_tokens {asked}, first EOS: {where})"
            )
    expected_reasons = {"length": len(requests) - stopped, "stop": stopped}
    given = {"length": 0, "stop": 0} | finish_reasons
    if given != expected_reasons:
        problems.append(f"finish reasons are {finish_reasons}, but should be {expected_reasons}")
    return problems


def read_vocabulary(model_dir: Path) -> tuple[set[int], int]:
    """(EOS token ids, vocabulary size) of a checkpoint. EOS is read from generation_config.json if
    it is there.
    """
    config = json.loads((model_dir / "config.json").read_text())
    eos = config.get("eos_token_id")
    if (path := model_dir / "generation_config.json").is_file():
        eos = json.loads(path.read_text()).get("eos_token_id", eos)
    return set(eos if isinstance(eos, list) else [] if eos is None else [eos]), config["vocab_size"]
