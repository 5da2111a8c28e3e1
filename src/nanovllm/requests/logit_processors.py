"""What options do to the logits, on the device, between the model and the sampler. Loaded by a runner
when a request has such options.

    logits -> bad words -> not yet the end -> bias -> penalties -> min_p -> sampler (temperature, top-k, top-p, noise)

Everything is a function of a request's own tokens, so its tokens depend on neither its neighbours
nor its history (batching, preemption, prefix cache). The last token is read on the device, where
the sampler left it: a step can be submitted before the host knows the tokens of the one before it.
A request that starts, or starts again after a preemption, brings its tokens along (`StepPlan.new_rows`).

options.py has the definitions; the gate computes them again in experiments/gate/edited_logits.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanovllm.engine.scheduler import StepPlan
from nanovllm.kernels.torch.logprobs import logprobs

ROWS = 128
"""Prompt tokens whose logits are in memory at a time."""
Spec = tuple[dict[str, Any], int, list[int]]
"""What sequences.edits_of says, the length of the prompt, and all known tokens."""


@dataclass
class RowState:
    """One request's options and tokens. counts: [vocab] int32, how often the answer has each token;
    in_prompt: [vocab] bool; recent: the last tokens of the answer, as many as the longest bad word
    has but one, -1 where there is none.
    """

    edits: dict[str, Any]
    num_prompt_tokens: int
    counts: Tensor | None
    in_prompt: Tensor | None
    recent: Tensor | None
    words: list[Tensor] = field(default_factory=list)
    has_sampled: bool = False  # a token that is not counted yet is in last_tokens

    @classmethod
    def of(cls, spec: Spec, vocab_size: int, device: torch.device) -> "RowState":
        edits, num_prompt_tokens, token_ids = spec
        tokens = torch.tensor(token_ids, device=device)
        prompt, answer = tokens[:num_prompt_tokens], tokens[num_prompt_tokens:]
        state = cls(edits, num_prompt_tokens, None, None, None)
        if "penalties" in edits:
            state.counts = torch.bincount(answer, minlength=vocab_size).int()
            state.in_prompt = torch.bincount(prompt, minlength=vocab_size) > 0
        if "bad_words" in edits:
            state.words = [torch.tensor(word, device=device) for word in edits["bad_words"]]
            before = max(map(len, state.words)) - 1
            none = torch.full((before,), -1, dtype=torch.int64, device=device)
            state.recent = torch.cat((none, answer))[len(answer) :]
        return state

    def count(self, token: Tensor) -> None:
        """Takes the token ([1] int64) that was sampled last."""
        if self.counts is not None:
            self.counts[token] += 1
        if self.recent is not None:
            self.recent = torch.cat((self.recent, token))[1:]

    def edit(self, logits: Tensor, position: int) -> None:
        """Changes logits [vocab] (float32) in place. position: the index in its sequence of the token
        that they are for.
        """
        for word in self.words:
            *before, last = word.split(1)
            if not before:
                logits[last] = -torch.inf
            elif self.recent is not None:
                is_next = (self.recent[-len(before) :] == word[:-1]).all()
                logits[last] = logits[last].masked_fill(is_next, -torch.inf)
        if "not_yet" in self.edits:
            min_tokens, ends = self.edits["not_yet"]
            if position < self.num_prompt_tokens + min_tokens:
                logits[ends] = -torch.inf
        if "logit_bias" in self.edits:
            tokens, biases = (
                list(column) for column in zip(*self.edits["logit_bias"].items(), strict=True)
            )
            logits[tokens] += torch.tensor(biases, device=logits.device)
        if self.counts is not None and self.in_prompt is not None:
            repetition, frequency, presence = self.edits["penalties"]
            in_answer = self.counts > 0
            penalized = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits.copy_(torch.where(self.in_prompt | in_answer, penalized, logits))
            logits -= frequency * self.counts
            logits -= presence * in_answer
        if "min_p" in self.edits:
            min_p, temperature = self.edits["min_p"]
            least = logits.max() + temperature * math.log(min_p)
            logits.masked_fill_(logits < least, -torch.inf)


class LogitProcessors:
    """The requests of a runner that have options, by row.

    reader: where set, gets the logits of prompts whose log-probabilities are asked for, as they are
    computed: [up to ROWS positions, vocab], in order; those of several requests one after the other.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.reader: Callable[[Tensor], None] | None = None
        self.specs: dict[int, Spec] = {}
        self.states: dict[int, RowState] = {}
        self.prompts: dict[int, list[Tensor]] = {}

    def __contains__(self, row: int) -> bool:
        return row in self.specs

    def renew(self, rows: list[int], specs: list[Spec | None]) -> None:
        """Rows that were given to other requests."""
        for row, spec in zip(rows, specs, strict=True):
            self.specs.pop(row, None)
            self.states.pop(row, None)
            self.prompts.pop(row, None)
            if spec is not None:
                edits, num_prompt_tokens, token_ids = spec
                self.specs[row] = edits, num_prompt_tokens, list(token_ids)

    def edit(self, logits: Tensor, hidden: Tensor, plan: StepPlan) -> Tensor:
        """The logits to sample from: [sampling entries, this rank's part of the vocabulary], float32,
        or `logits` itself where no entry has options. Every rank computes the whole vocabulary.
        hidden: [tokens of the step, hidden], for log-probabilities of prompts.
        """
        if not self.specs:
            return logits
        self._read_prompts(hidden, plan)
        ends = [
            (row, start + length)
            for row, start, length, samples in zip(
                plan.rows, plan.starts, plan.query_lens, plan.samples, strict=True
            )
            if samples
        ]
        if not any(row in self.specs for row, _ in ends):
            return logits
        tp, size = self.runner.tp, logits.shape[1]
        edited = tp.all_gather(logits).to(torch.float32, copy=True)
        for i, (row, position) in enumerate(ends):
            if row not in self.specs:
                continue
            if row not in self.states:
                self.states[row] = RowState.of(self.specs[row], edited.shape[1], edited.device)
            state = self.states[row]
            if state.has_sampled:
                state.count(self.runner.last_tokens[row : row + 1])
            state.edit(edited[i], position)
            state.has_sampled = True
        return edited[:, tp.rank * size : (tp.rank + 1) * size]

    def _read_prompts(self, hidden: Tensor, plan: StepPlan) -> None:
        """Computes the log-probabilities of the prompt tokens that this step has read."""
        end = 0
        for row, start, length in zip(plan.rows, plan.starts, plan.query_lens, strict=True):
            begin, end = end, end + length
            edits, num_prompt_tokens, token_ids = self.specs.get(row, ({}, 0, []))
            # the last prompt token predicts the first one of the answer
            count = min(length, num_prompt_tokens - 1 - start)
            if "prompt_logprobs" not in edits or count < 1:
                continue
            targets = torch.tensor(token_ids[start + 1 : start + 1 + count], device=hidden.device)
            for part in torch.arange(count, device=hidden.device).split(ROWS):
                logits = self.runner.tp.all_gather(self.runner.model.logits(hidden[begin + part]))
                if self.reader is not None:
                    self.reader(logits)
                chosen, ranks, largest, ids = logprobs(
                    logits, targets[part], edits["prompt_logprobs"]
                )
                columns = chosen[:, None], ranks[:, None], largest, ids
                found = torch.cat([column.double() for column in columns], dim=1)
                self.prompts.setdefault(row, []).append(found)

    def of_prompts(self, plan: StepPlan) -> tuple[Tensor, ...]:
        """Log-probabilities of the prompts that were read to their end: nothing, or one tensor
        [sampling entries, prompt tokens, 2 + 2 k], NaN where there is none. Of a token: its own, its
        rank, the k largest, their token ids.
        """
        rows = [row for row, samples in zip(plan.rows, plan.samples, strict=True) if samples]
        found = {
            i: torch.cat(self.prompts.pop(row)) for i, row in enumerate(rows) if row in self.prompts
        }
        if not found:
            return ()
        shape = (max(t.shape[0] for t in found.values()), max(t.shape[1] for t in found.values()))
        result = torch.full(
            (len(rows), *shape), torch.nan, dtype=torch.float64, device=self.runner.device
        )
        for i, table in found.items():
            half = (table.shape[1] - 2) // 2
            largest = 2 + (shape[1] - 2) // 2
            result[i, : len(table), : 2 + half] = table[:, : 2 + half]
            result[i, : len(table), largest : largest + half] = table[:, 2 + half :]
        return (result,)


def renew(runner: Any, rows: list[int], specs: list[Spec | None]) -> None:
    """Tells a runner's processors, which it gets here, of rows that were given to other requests."""
    runner.processors = runner.processors or LogitProcessors(runner)
    runner.processors.renew(rows, specs)
