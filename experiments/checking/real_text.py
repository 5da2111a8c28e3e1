"""A trained model on text: ten greedy answers through the gate, and what text changes in comparison with random
tokens.

    python -m experiments.checking.real_text ten      # `make real-weights` runs it once
    python -m experiments.checking.real_text study    # the figures in docs/methodology.md, as lines of JSON

Both take --model: a preset, by default the trained one, or a folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from experiments import workload_files, workloads
from experiments.engines import hf
from experiments.gate.chance.significance import quantiles
from experiments.gate.rescoring import Rescorer
from experiments.gate.rules import GateParams, GateResult, judge
from experiments.gate.same_work import read_vocabulary, same_work
from experiments.gate.scoring import Scores
from experiments.host import model_files, provenance, real_weights
from experiments.records.types import JsonObject, Request
from experiments.study.prompts import tokenize_here
from nanovllm import ALL, BASELINE, SamplingParams
from nanovllm.engine.llm_engine import LLM

QUESTION = "What is the capital of France?"
ANSWER_TOKENS = 32
ENGINES = {"everything off": BASELINE, "everything on": ALL}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.checking.real_text", description=__doc__.splitlines()[0]
    )
    parser.add_argument("what", choices=("ten", "study"))
    parser.add_argument("--model", default=real_weights.NAME)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=8, help="of the study of margins")
    given = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        folder = model_of(given.model)
    except model_files.ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.what == "ten":
        return 0 if ten(folder, given.dtype) else 1
    for part in study(folder, given.prompts):
        print(json.dumps(part), flush=True)
    return 0


def model_of(name: str) -> Path:
    """The folder of a model. Raises ModelError."""
    given = (None, name) if (Path(name) / "config.json").is_file() else (name, None)
    return Path(model_files.inspect(*given, here=True)["path"])


def requests_of(folder: Path, name: str, lines: slice, output_tokens: int) -> list[Request]:
    """Greedy requests for some lines of a set of prompts, each in the model's chat template."""
    content = workload_files.read(name, None, workloads.MOST_OF)
    chosen = [
        {key: value for key, value in line.items() if key != "output_tokens"}
        for line in workload_files.unpack(content)[lines]
    ]
    params = {
        "content": tokenize_here(str(folder), workload_files.pack(chosen), as_chat=True),
        "default_output_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": False,
    }
    (wave,) = workloads.build(name, "file", params)["waves"]
    return wave


def engine(folder: Path, dtype: str, optimizations: Any, **more: Any) -> LLM:
    made: LLM = LLM(
        str(folder),
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        optimizations=optimizations,
        **more,
    )
    return made


def serve(llm: LLM, requests: list[Request]) -> tuple[list[list[int]], list[str]]:
    """(token ids, finish reasons) of every answer."""
    found = llm.generate(
        [{"prompt_token_ids": request["prompt_token_ids"]} for request in requests],
        [
            SamplingParams(
                max_tokens=request["max_tokens"],
                temperature=request["temperature"],
                ignore_eos=request["ignore_eos"],
            )
            for request in requests
        ],
        use_tqdm=False,
    )
    answers = [output.outputs[0] for output in found]
    return [list(answer.token_ids) for answer in answers], [
        str(answer.finish_reason) for answer in answers
    ]


def ten(folder: Path, dtype: str) -> bool:
    """Ten greedy answers of the engine, with everything off and everything on, each judged by itself. Prints
    them; notes the result beside the trained model. True if all twenty pass.
    """
    requests = requests_of(folder, "everyday", slice(0, 50, 5), ANSWER_TOKENS)
    served: dict[str, tuple[list[list[int]], list[str]]] = {}
    texts: list[str] = []
    for name, optimizations in ENGINES.items():
        with engine(folder, dtype, optimizations) as llm:
            served[name] = serve(llm, requests)
            assert llm.tokenizer is not None
            texts = [llm.tokenizer.decode(output) for output in served[name][0]]
            if name == list(ENGINES)[-1]:
                said = [{"role": "user", "content": QUESTION}]
                params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
                answer = llm.chat(said, params, use_tqdm=False)[0].outputs[0].text
    rescorer, passed, lines = Rescorer(folder, dtype), {}, []
    eos, vocab_size = read_vocabulary(folder)
    for name, (outputs, reasons) in served.items():
        counts = {reason: reasons.count(reason) for reason in set(reasons)}
        if problems := same_work(requests, outputs, counts, eos, vocab_size):
            print(f"{name}: not the same work: {'; '.join(problems[:3])}")
            return False
        results = [judge([s], dtype, GateParams()) for s in rescorer.score(requests, outputs)]
        passed[name] = sum(result.passed for result in results)
        lines += [_line(name, *row) for row in zip(requests, reasons, results, strict=True)]
    print("\n".join([_HEAD, *lines]))
    for text in texts:
        print(f"- {' '.join(text.split())[:110]}")
    verdict = f"passes {' and '.join(f'{n} of {len(requests)} with {name}' for name, n in passed.items())}, {dtype}"
    good = all(n == len(requests) for n in passed.values())
    print(f"the gate {verdict}\nasked    {QUESTION}\nanswered {answer}")
    if (folder / real_weights.SOURCE).is_file():
        real_weights.note(
            folder, {"good": good, "verdict": verdict, "question": QUESTION, "answer": answer}
        )
    return good


_HEAD = f"{'engine':16} {'prompt':>6} {'answer':>6}  {'ends':8} {'differ':>6} {'margin':>9} {'allowed':>9}  gate"


def _line(name: str, request: Request, reason: str, result: GateResult) -> str:
    return (
        f"{name:16} {len(request['prompt_token_ids']):6} {result.tokens_checked:6}  {reason:8} {result.mismatches:6} "
        f"{result.max_margin:9.2g} {result.bound:9.2g}  {result.status}"
    )


def study(folder: Path, prompts: int) -> Iterator[JsonObject]:
    """What text changes, part by part. Lengths and shares are of greedy answers of at most ANSWER_TOKENS
    tokens; margins and texts of HF are of `prompts` short prompts, because bfloat16 is slow on many CPUs.
    """
    yield {"model": folder.name, "cpu": provenance.cpu_model()}
    random = {
        "output_tokens": ANSWER_TOKENS,
        "vocab_size": read_vocabulary(folder)[1],
        "temperature": 0,
        "ignore_eos": False,
    }
    many = random | {"num_requests": 16, "prompt_tokens": [32, 256]}
    work = {
        "everyday": requests_of(folder, "everyday", slice(0, 16), ANSWER_TOKENS),
        "library-desk": requests_of(folder, "library-desk", slice(None), ANSWER_TOKENS),
        "random tokens": workloads.build("random", "random", many)["waves"][0],
    }
    for name, requests in work.items():
        with engine(folder, "float32", ALL) as llm:
            outputs, reasons = serve(llm, requests)
            stats = llm.stats()
        lengths = sorted(map(len, outputs))
        yield {
            "served": name,
            "requests": len(requests),
            "prompt_tokens": sum(len(r["prompt_token_ids"]) for r in requests),
            "prefix_hit_tokens": stats["prefix_hit_tokens"],
            "answers_ended_by_eos": reasons.count("stop"),
            "answer_tokens": sum(lengths),
            "shortest_and_longest": [lengths[0], lengths[-1]],
        }
    few = random | {"num_requests": prompts, "prompt_tokens": [32, 64]}
    text = requests_of(folder, "everyday", slice(6, 6 + prompts), ANSWER_TOKENS)
    work = {
        "text": text,
        "random tokens": workloads.build("random", "random", few)["waves"][0],
    }
    with engine(folder, "float32", ALL) as llm:
        served = {name: serve(llm, requests)[0] for name, requests in work.items()}
    for dtype in ("float32", "bfloat16"):
        rescorer = Rescorer(folder, dtype)
        for name, requests in work.items():
            yield {"margins": name, "dtype": dtype, **margins(rescorer, requests, served[name])}
        del rescorer
    yield from hf_texts(folder, [{**r, "ignore_eos": True} for r in text])


def margins(rescorer: Rescorer, requests: list[Request], outputs: list[list[int]]) -> JsonObject:
    """How far the reference's best token is before its second, in logits, beside HF's error in this dtype
    and the bound that follows from it. outputs: of the engine in float32.
    """
    scores = Scores.cat(rescorer.score(requests, outputs))
    result = judge([scores], rescorer.dtype, GateParams())
    ahead = scores.best_scores[:, 0] - scores.best_scores[:, 1]
    return {
        "tokens": len(scores),
        "best_over_second": {
            f"q{percent}": round(float(ahead.quantile(percent / 100)), 4)
            for percent in (1, 5, 25, 50)
        },
        "hf_error": quantiles(scores.error),
        "bound": result.bound,
        "nearer_than_the_bound": int((ahead <= result.bound).sum()),
        "hf_chooses_another_token": result.calibration["hf_mismatches"],
    }


def hf_texts(folder: Path, requests: list[Request]) -> Iterator[JsonObject]:
    """How many greedy texts of HF transformers change with the precision and with the size of the batch, and
    the positions at which they begin to.
    """
    many = len(requests)
    outputs: dict[tuple[str, int], list[list[int]]] = {}

    def compare(one: tuple[str, int], other: tuple[str, int]) -> JsonObject:
        first = [
            next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), None)
            for x, y in zip(outputs[one], outputs[other], strict=True)
        ]
        return {
            "hf_texts": f"{one[0]} in batches of {one[1]} beside {other[0]} in batches of {other[1]}",
            "texts": many,
            "differ": sum(at is not None for at in first),
            "first_differences": sorted(at for at in first if at is not None),
        }

    for dtype in ("float32", "bfloat16"):
        for size in (1, many):
            adapter = hf.Adapter(str(folder), {"dtype": dtype, "max_num_seqs": size})
            adapter.load()
            outputs[dtype, size] = adapter.serve(requests)["outputs"]
            adapter.close()
            if dtype == "bfloat16":
                yield compare(("bfloat16", size), ("float32", size))
        yield compare((dtype, many), (dtype, 1))


if __name__ == "__main__":
    sys.exit(main())
