"""n > 1: several answers to one prompt. Loaded when a request asks for them.

Each answer is a request of its own, with n=1. Together they are one RequestOutput, as in vLLM. With
the prefix cache on, the prompt is computed once.
"""

import dataclasses
from typing import Any

from nanovllm.outputs import RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams


def generate(
    llm: Any, batch: list[tuple[Any, SamplingParams]], use_tqdm: bool
) -> list[RequestOutput]:
    """LLM.generate for prompts of which some ask for several answers; one output for each prompt."""
    counts = [params.n for _, params in batch]
    singles = [
        (prompt, single(params, i) if n > 1 else params)
        for (prompt, params), n in zip(batch, counts, strict=True)
        for i in range(n)
    ]
    prompts, params = (list(column) for column in zip(*singles, strict=True))
    outputs = iter(llm.generate(prompts, params, use_tqdm=use_tqdm))
    return [merged([next(outputs) for _ in range(n)]) for n in counts]


def single(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of answer `index`. As in vLLM its seed is seed + index; without a seed each
    answer gets one of its own from the engine, as every request does.
    """
    seed = params.seed
    if seed is not None:  # stays within 64 bits
        seed = (seed + index + 2**63) % 2**64 - 2**63
    return dataclasses.replace(params, n=1, seed=seed)  # type: ignore[call-arg]


def merged(answers: list[RequestOutput]) -> RequestOutput:
    """One output of all answers to a prompt. Its times are those of the first token and of the last."""
    if len(answers) == 1:
        return answers[0]
    for index, answer in enumerate(answers):
        answer.outputs[0].index = index
    metrics = [answer.metrics for answer in answers]
    started = [m.first_token_time for m in metrics if m.first_token_time is not None]
    ended = [m.finished_time for m in metrics if m.finished_time is not None]
    return dataclasses.replace(
        answers[0],
        outputs=[answer.outputs[0] for answer in answers],
        finished=all(answer.finished for answer in answers),
        metrics=RequestMetrics(
            min(m.arrival_time for m in metrics),
            min(started, default=None),
            max(ended) if len(ended) == len(answers) else None,
        ),
    )
