"""Scores an engine's tokens with HF transformers, by teacher forcing.

Two models read the same tokens: the *reference*, in a precision whose own error is negligible
(float64 for a float32 engine, float32 without TF32 for a bfloat16 or float16 one; see
`reference_model.make_exact`), and HF *in the engine's dtype*, whose error against the reference
shows how much noise this precision causes on this sample. The weights of both are rounded to the
engine's dtype first.

Hidden states are computed in batches of similar length, then logits a few rows at a time: all
logits of the canonical workload would take 81 GB.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from experiments.gate.edited_logits import edited, has_options
from experiments.gate.logit_margins import Rows
from experiments.gate.lossy.recipe import EXACT, Recipe
from experiments.gate.lossy.reference import make_lossy
from experiments.gate.reference_model import check_decomposition, last_hidden_states, make_exact
from experiments.gate.same_work import read_vocabulary
from experiments.gate.scoring import Scores, logprob, score_rows
from experiments.records.types import Request
from nanovllm.models import generated
from nanovllm.models.config import load_hf_config
from nanovllm.models.families import model_class

REFERENCE_DTYPE = {
    "float32": torch.float64,
    "bfloat16": torch.float32,
    "float16": torch.float32,
}
DTYPE = {name: getattr(torch, name) for name in REFERENCE_DTYPE}
SMALL_ROW_BYTES = 2**19
"""Rows of logits up to this size are scored on one thread."""

Mutation = Callable[[nn.Module], None]


class Rescorer:
    """Holds both models. `score` caches the scores of each (request, output), because the outputs of
    two launches of one workload often differ in a few requests only.

    dtype: the engine's, one of REFERENCE_DTYPE. recipe: what the engine rounds beyond that, which both models then round
    alike. mutate: breaks both models in place (negative
    controls). batch_tokens: limit on the padded tokens of a forward pass. logits_bytes: limit on
    the memory of one table of logits. known_tokens: size of the cache in output tokens, of some 250
    bytes each (half a gigabyte by default).
    """

    def __init__(
        self,
        model_dir: str | Path,
        dtype: str,
        *,
        device: str | None = None,
        mutate: Mutation | None = None,
        batch_tokens: int = 4096,
        logits_bytes: int = 2**26,
        known_tokens: int = 2**21,
        recipe: Recipe = EXACT,
    ) -> None:
        if dtype not in DTYPE:
            raise ValueError(f"dtype={dtype!r} cannot be rescored; allowed: {', '.join(DTYPE)}")
        if not (Path(model_dir) / "config.json").is_file():
            raise FileNotFoundError(
                f"{model_dir} has no config.json; give the folder of a checkpoint"
            )
        torch.set_float32_matmul_precision("highest")  # no TF32, no bfloat16 matmuls
        self.dtype, self.batch_tokens, self.logits_bytes, self.known_tokens = (
            dtype,
            batch_tokens,
            logits_bytes,
            known_tokens,
        )
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.hf, self.reference = (
            self._load(model_dir),
            self._load(model_dir).to(REFERENCE_DTYPE[dtype]),
        )
        make_exact(self.reference)
        if recipe != EXACT:
            for model in (self.hf, self.reference):
                make_lossy(model, recipe, DTYPE[dtype])
        if mutate is not None:
            mutate(self.hf)
            mutate(self.reference)
        check_decomposition(self.reference)
        self.eos, _ = read_vocabulary(Path(model_dir))
        self._known: dict[str, Scores] = {}

    def _load(self, model_dir: str | Path) -> Any:
        folder, how = (
            Path(model_dir),
            {"dtype": DTYPE[self.dtype], "attn_implementation": "sdpa", "trust_remote_code": False},
        )
        if (folder / generated.RECIPE).is_file():  # generated weights, which are not stored
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(
                    AutoConfig.from_pretrained(folder, local_files_only=True), **how
                )
            family = model_class(load_hf_config(folder).architecture)
            generated.fill_whole(model.named_parameters(), folder, family.packed_modules_mapping)
            return model.eval()
        return (
            AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **how)
            .to(self.device)
            .eval()
        )

    @torch.inference_mode()
    def score(
        self,
        requests: Sequence[Request],
        outputs: Sequence[Sequence[int]],
        *,
        unknown_noise: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Scores]:
        """One Scores per request. unknown_noise: tokens were sampled with another random generator.
        progress: called with (done, total) tokens.
        """
        if empty := [i for i, output in enumerate(outputs) if not output]:
            raise ValueError(
                f"the output of request {empty[0]} is empty; every output must have at least one token"
            )
        keys = [
            _key(request, output, unknown_noise)
            for request, output in zip(requests, outputs, strict=True)
        ]
        found = {key: self._known[key] for key in keys if key in self._known}
        todo = {key: i for i, key in enumerate(keys) if key not in found}
        work = [(key, requests[i], list(outputs[i])) for key, i in todo.items()]
        lengths = [len(request["prompt_token_ids"]) + len(output) for _, request, output in work]
        done, total = 0, sum(lengths)
        for batch in batches_of_similar_length(lengths, self.batch_tokens):
            members = [work[i] for i in batch]
            scores = self._score_batch(
                [request for _, request, _ in members],
                [output for _, _, output in members],
                unknown_noise,
            )
            for (key, _, _), result in zip(members, scores, strict=True):
                found[key] = result
            done += sum(lengths[i] for i in batch)
            if progress is not None:
                progress(done, total)
        self._keep(found)
        return [found[key] for key in keys]

    def _keep(self, found: dict[str, Scores]) -> None:
        """Adds scores to the cache and evicts the least recently used ones."""
        self._known = {
            key: scores for key, scores in self._known.items() if key not in found
        } | found
        kept = sum(map(len, self._known.values()))
        for key in list(self._known):
            if kept <= self.known_tokens:
                break
            kept -= len(self._known.pop(key))

    def _score_batch(
        self, requests: list[Request], outputs: list[list[int]], unknown_noise: bool
    ) -> list[Scores]:
        sequences = [
            request["prompt_token_ids"] + output
            for request, output in zip(requests, outputs, strict=True)
        ]
        # the last token predicts nothing
        ids = torch.zeros(len(sequences), max(map(len, sequences)) - 1, dtype=torch.int64)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence) - 1] = torch.tensor(sequence[:-1])
        # Padding is on the right, so causal attention alone hides it and needs no mask.
        last = [len(sequence) - 1 for sequence in sequences]
        hidden, hf_hidden = (
            torch.cat(
                [
                    states[i, n - len(output) : n]
                    for i, (n, output) in enumerate(zip(last, outputs, strict=True))
                ]
            )
            for states in (
                last_hidden_states(model, ids.to(self.device))
                for model in (self.reference, self.hf)
            )
        )
        tokens = torch.tensor([token for output in outputs for token in output], device=self.device)
        rows = rows_of(requests, outputs, unknown_noise, self.device)
        # of every output token: the request and its number, where options edit its logits
        edits = [
            (i, j) if has_options(request) else None
            for i, (request, output) in enumerate(zip(requests, outputs, strict=True))
            for j in range(len(output))
        ]
        vocab_size = self.reference.get_output_embeddings().weight.shape[0]
        row_bytes = REFERENCE_DTYPE[self.dtype].itemsize * vocab_size
        step = max(1, self.logits_bytes // row_bytes)
        parts = []
        for i in range(0, len(tokens), step):
            part = slice(i, i + step)
            logits = self.reference.get_output_embeddings()(hidden[part])
            hf_logits = self.hf.get_output_embeddings()(hf_hidden[part])
            with (
                one_thread()
                if self.device == "cpu" and row_bytes <= SMALL_ROW_BYTES
                else nullcontext()
            ):
                todo = [(at, *edit) for at, edit in enumerate(edits[part]) if edit is not None]
                raw, hf_raw = logits, hf_logits
                if todo:
                    # HF's in float32, as engines edit them
                    logits, hf_logits = logits.clone(), hf_logits.to(torch.float32, copy=True)
                for at, i, j in todo:
                    for table in (logits, hf_logits):
                        table[at] = edited(table[at], requests[i], outputs[i][:j], self.eos)
                scores = score_rows(logits, hf_logits, rows[part], tokens[part])
                if todo:  # log-probabilities are the model's own
                    scores = dataclasses.replace(
                        scores,
                        logprob=logprob(raw, tokens[part]).double().cpu(),
                        hf_logprob=logprob(hf_raw.float(), tokens[part]).double().cpu(),
                    )
                parts.append(scores)
        return Scores.cat(parts).split([len(output) for output in outputs])


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread. Waking more threads costs more than it gains for small tables, and
    ten times as much on a busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows_of(
    requests: Sequence[Request], outputs: Sequence[Sequence[int]], unknown_noise: bool, device: str
) -> Rows:
    """The sampling parameters of every output position, all requests in order."""
    counts = torch.tensor([len(output) for output in outputs])

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return (
            torch.tensor([request[name] for request in requests], dtype=dtype)  # type: ignore[literal-required]
            .repeat_interleave(counts)
            .to(device)
        )

    position = torch.cat(
        [
            len(r["prompt_token_ids"]) + torch.arange(len(o))
            for r, o in zip(requests, outputs, strict=True)
        ]
    )
    return Rows(
        temperature=column("temperature", torch.float32),
        top_k=column("top_k", torch.int64),
        top_p=column("top_p", torch.float32),
        seed=column("seed", torch.int64),
        position=position.to(device),
        unknown_noise=torch.full((len(position),), unknown_noise, device=device),
        min_p=torch.tensor([request.get("min_p", 0.0) for request in requests], dtype=torch.float32)
        .repeat_interleave(counts)
        .to(device),
    )


def batches_of_similar_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of indices, such that size times longest length is at most `batch_tokens`. A longer
    sequence forms a batch of its own.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _key(request: Request, output: Sequence[int], unknown_noise: bool) -> str:
    return hashlib.sha256(
        json.dumps([request, list(output), unknown_noise], sort_keys=True).encode()
    ).hexdigest()
