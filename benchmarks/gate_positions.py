"""Would a noise bound for each position, in place of one for all of a sample, make the gate sharper? Does rounding
have the same size at a position however it is computed, how often does a correct engine fail, and what is seen?

    PYTHONPATH=src:. python benchmarks/gate_positions.py simulate [--studies 2000]
    PYTHONPATH=src:. python benchmarks/gate_positions.py measure [--model smollm2] [--dtype bfloat16] [--prompts 8]
    PYTHONPATH=src:. python benchmarks/gate_positions.py controls [--model smollm2] [--dtype bfloat16] [--prompts 8]

`simulate` draws reference logits and the noise of HF and of an engine; no model is needed. `measure`
computes the same tokens in several ways that round differently. `controls` lets HF, intact and broken on purpose,
answer greedily, and judges the answers. All print lines of JSON; the figures are in docs/methodology.md.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from experiments import workloads
from experiments.checking.real_text import ANSWER_TOKENS, engine, model_of, requests_of, serve
from experiments.gate.chance.significance import quantiles
from experiments.gate.logit_margins import Rows
from experiments.gate.negative_controls import controls as broken_models
from experiments.gate.rescoring import DTYPE, Rescorer
from experiments.gate.rules import GateParams, judge
from experiments.gate.same_work import read_vocabulary
from experiments.gate.scoring import Scores, score_rows
from experiments.records.types import Request
from nanovllm import ALL, BASELINE, SamplingParams

PARAMS = GateParams()
WORK = ("text", "random tokens")


def error_spread(logits: Tensor, hf_logits: Tensor) -> Tensor:
    """Standard deviation [n], over the vocabulary, of HF's error at n positions, in logits. logits, hf_logits: [n, V]."""
    return (hf_logits.double() - logits.double()).std(-1, correction=0)


def unit_and_spread(scores: Scores, spread: Tensor) -> tuple[float, Tensor]:
    """The largest error of HF's in units of the spread at its position; the spread of each position [n], but at
    least the median, so that one where rounding happened to cancel is not judged more strictly than usual.
    """
    spread = torch.maximum(spread, spread.median())
    return float((scores.error / spread).max()), spread


def position_bounds(scores: Scores, spread: Tensor, one_bound: float, floor: float) -> Tensor:
    """A noise bound for each position [n]: factor * unit * spread + floor, and no more than the one for all."""
    unit, spread = unit_and_spread(scores, spread)
    return (PARAMS.factor * unit * spread + floor).clamp(max=one_bound)


def simulated(
    generator: torch.Generator,
    *,
    positions: int = 256,
    vocab_size: int = 128,
    directions: int = 16,
    amplified: float = 30.0,
    more_noise: float = 1.0,
) -> tuple[Scores, Tensor]:
    """Scores of a correct engine, greedy, and the spread of HF's error at each position. The engine's noise and
    HF's have the same size at each position and are independent.

    Noise varies from position to position (lognormal, median 0.1 logits, a standard deviation of 0.5 in
    its log), and is `amplified` at one of them. directions: the dimensions in which hidden states are
    wrong; the fewer, the more HF's own error at a position tells about its size by chance only.
    more_noise: the engine's noise relative to HF's.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = 0.1 * (0.5 * normal(positions, 1)).exp()
    size[positions // 2] *= amplified
    head = normal(directions, vocab_size) / directions**0.5
    logits = 3.0 * normal(positions, vocab_size)
    hf_noise, noise = (size * normal(positions, directions) @ head for _ in range(2))
    zeros = torch.zeros(positions)
    rows = Rows(
        temperature=zeros,
        top_k=zeros.long(),
        top_p=zeros + 1,
        seed=zeros.long(),
        position=torch.arange(positions),
        unknown_noise=zeros.bool(),
        min_p=zeros,
    )
    scores = score_rows(logits, logits + hf_noise, rows, (logits + more_noise * noise).argmax(-1))
    return scores, error_spread(logits, logits + hf_noise)


def simulate(studies: int) -> Iterator[dict[str, Any]]:
    for amplified in (1.0, 10.0, 30.0):
        for directions in (4, 16, 64):
            generator = torch.Generator().manual_seed(directions)
            failed, failed_alone, seen, seen_alone = 0, 0, 0.0, 0.0
            for _ in range(studies):
                scores, spread = simulated(generator, directions=directions, amplified=amplified)
                result = judge([scores], "bfloat16", PARAMS)
                bounds = position_bounds(scores, spread, result.bound, result.calibration["floor"])
                failed += result.max_margin > result.bound
                failed_alone += bool((scores.margin > bounds).any())
                ahead = scores.best_scores[:, 0] - scores.best_scores[:, 1]
                seen += float((ahead > result.bound).double().mean()) / studies
                seen_alone += float((ahead > bounds).double().mean()) / studies
            yield {
                "amplified": amplified,
                "directions": directions,
                "studies": studies,
                "correct_engines_that_fail": {"one bound": failed, "of positions": failed_alone},
                "second_choices_seen": {
                    "one bound": round(seen, 3),
                    "of positions": round(seen_alone, 3),
                },
            }


def work_of(folder: Path, prompts: int) -> dict[str, list[Request]]:
    """Short prompts of text in the model's chat template, and as many of random tokens. Greedy."""
    random = {
        "num_requests": prompts,
        "prompt_tokens": [32, 64],
        "output_tokens": ANSWER_TOKENS,
        "vocab_size": read_vocabulary(folder)[1],
        "temperature": 0,
        "ignore_eos": False,
    }
    return {
        "text": requests_of(folder, "everyday", slice(6, 6 + prompts), ANSWER_TOKENS),
        "random tokens": workloads.build("random", "random", random)["waves"][0],
    }


@torch.inference_mode()
def measure(
    folder: Path, dtype: str, prompts: int, kinds: Sequence[str]
) -> Iterator[dict[str, Any]]:
    work = {name: work_of(folder, prompts)[name] for name in kinds}
    with engine(folder, "float32", ALL) as llm:
        outputs = {name: serve(llm, requests)[0] for name, requests in work.items()}
    texts = {
        name: [r["prompt_token_ids"] + o for r, o in zip(requests, outputs[name], strict=True)]
        for name, requests in work.items()
    }
    starts = {
        name: [len(r["prompt_token_ids"]) for r in requests] for name, requests in work.items()
    }
    logprobs: dict[tuple[str, str], list[dict[int, float]]] = {}
    for how, on in (("engine, everything off", BASELINE), ("engine, everything on", ALL)):
        with engine(folder, dtype, on) as llm:
            for name in work:
                params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20)
                asked = [{"prompt_token_ids": text} for text in texts[name]]
                logprobs[how, name] = [
                    {token: float(entry.logprob) for token, entry in at.items()}
                    for output, start in zip(
                        llm.generate(asked, params, use_tqdm=False), starts[name], strict=True
                    )
                    for at in output.prompt_logprobs[start:]
                ]
    rescorer = Rescorer(folder, dtype)
    eager = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=DTYPE[dtype], attn_implementation="eager"
    ).eval()

    def rows(model: Any, name: str) -> Tensor:
        """Logits at the output positions, one text at a time."""
        return torch.cat(
            [
                model(torch.tensor([text[:-1]])).logits[0, start - 1 :].float()
                for text, start in zip(texts[name], starts[name], strict=True)
            ]
        )

    for name, requests in work.items():
        scores = Scores.cat(rescorer.score(requests, outputs[name]))
        reference, alone = rows(rescorer.reference, name), rows(rescorer.hf, name)
        own_spread = error_spread(reference, alone)
        unit, spread = unit_and_spread(scores, own_spread)
        result = judge([scores], dtype, PARAMS)
        bounds = position_bounds(scores, own_spread, result.bound, result.calibration["floor"])
        ahead = scores.best_scores[:, 0] - scores.best_scores[:, 1]
        yield {
            "work": name,
            "tokens": len(scores),
            "one_bound": result.bound,
            "position_bounds": quantiles(bounds),
            "spread": quantiles(own_spread),
            "unit": unit,
            "hf_differs": result.calibration["hf_mismatches"],
            "second_choice_within_one_bound": int((ahead <= result.bound).sum()),
            "second_choice_within_its_bound": int((ahead <= bounds).sum()),
        }
        best = scores.best
        best_logits = reference.gather(1, best)

        def errors(
            logits: Tensor, best: Tensor = best, best_logits: Tensor = best_logits
        ) -> Tensor:
            own = logits.gather(1, best) - best_logits
            return (own - own[:, :1]).abs().amax(-1).double()

        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for how, model in (
            ("HF, eager attention", eager),
            ("HF, noise of half a unit added to every projection", noisy(eager, dtype)),
        ):
            logits = rows(model, name)
            found[how] = errors(logits), error_spread(reference, logits)
        for how in ("engine, everything off", "engine, everything on"):
            error = torch.zeros(len(scores), dtype=torch.float64)
            for i, at in enumerate(logprobs[how, name]):
                first = at.get(int(best[i, 0]))
                if first is None:
                    continue
                error[i] = max(
                    abs(at[token] - first - float(best_logits[i, j] - best_logits[i, 0]))
                    for j, token in enumerate(best[i].tolist())
                    if token in at
                )
            found[how] = error, None
        for how, (error, other) in found.items():
            line = {
                "work": name,
                "computed": how,
                "largest_error": float(error.max()),
                # of which the factor allows 2
                "largest_error_in_units": float((error / spread).max() / unit),
                "largest_error_over_bound": float((error / bounds).max()),
            }
            if other is not None:
                ratio = torch.maximum(other, own_spread.median()) / spread
                line["spread_over_that_of_hf_alone"] = [
                    round(float(ratio.quantile(q)), 3) for q in (0.0, 0.01, 0.5, 0.99, 1.0)
                ]
            yield line
        gc.collect()


def noisy(model: Any, dtype: str) -> Any:
    """A wrapper that adds uniform noise of half a unit in the last place to what every linear layer returns."""
    generator, eps = torch.Generator().manual_seed(0), torch.finfo(DTYPE[dtype]).eps

    def add(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        noise = torch.rand(output.shape, generator=generator) - 0.5
        return (output.float() * (1 + eps * noise)).to(output.dtype)

    def call(ids: Tensor) -> Any:
        hooks = [
            module.register_forward_hook(add)
            for module in model.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        try:
            return model(ids)
        finally:
            for hook in hooks:
                hook.remove()

    return call


@torch.inference_mode()
def controls(
    folder: Path, dtype: str, prompts: int, kinds: Sequence[str]
) -> Iterator[dict[str, Any]]:
    work = {name: work_of(folder, prompts)[name] for name in kinds}
    rescorer = Rescorer(folder, dtype)
    shortest = min(len(r["prompt_token_ids"]) for requests in work.values() for r in requests)
    for control, mutate in ({"intact": None} | broken_models(shortest)).items():
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=DTYPE[dtype]
        ).eval()
        if mutate is not None:
            mutate(model)
        for name, requests in work.items():
            outputs = []
            for request in requests:
                ids = torch.tensor([request["prompt_token_ids"]])
                answer = model.generate(
                    ids, max_new_tokens=request["max_tokens"], do_sample=False, pad_token_id=0
                )
                outputs.append(answer[0, ids.shape[1] :].tolist())
            scores = rescorer.score(requests, outputs)
            result = judge(scores, dtype, PARAMS)
            yield {
                "control": control,
                "work": name,
                "tokens": result.tokens_checked,
                "differ": result.mismatches,
                "hf_differs": result.calibration["hf_mismatches"],
                "largest_margin": result.max_margin,
                "one_bound": result.bound,
                "beyond_the_bound": result.mismatches - result.within_bound,
                "reason": result.reason,
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("simulate", "measure", "controls"))
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=tuple(DTYPE), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    if args.what == "simulate":
        lines = simulate(args.studies)
    else:
        look = measure if args.what == "measure" else controls
        lines = look(model_of(args.model), args.dtype, args.prompts, args.work)
    for line in lines:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
