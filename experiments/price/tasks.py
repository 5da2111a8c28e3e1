"""Small tasks that need no network: does a lossy model still do what the unquantized one does?

    python -m experiments.price.tasks MODEL [--dtype bfloat16] kv_cache_dtype=fp8_e4m3 [FACTOR=LEVEL ...]

asks both engines the same questions (arithmetic, copying, retrieval at several depths of a long
prompt), greedily, and compares which of them each answers exactly. A distribution can be close on
average and still have lost one ability; that is what this looks for.

The comparison is paired: only questions that one engine answers and the other does not tell
anything. Their numbers are compared by McNemar's exact test (McNemar, *Note on the sampling error of
the difference between correlated proportions or percentages*, 1947: under equality each of them is a
fair coin). How much may have been lost is bounded by the exact interval of Clopper and Pearson
(*The use of confidence or fiducial limits illustrated in the case of the binomial*, 1934) for the
share of questions that only the unquantized engine answers; what the other one gains is not offset.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from experiments.price.rules import LEVEL
from experiments.records.factor_levels import level_value

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where in a long prompt the fact is that is asked for, from its begin to its end."""
MARGIN = 0.05
"""The share of a task's answers that may be lost, where none is stated."""
ANSWER_TOKENS = 16
_WORDS = (
    "amber anchor basket bridge candle copper desert engine falcon garden harbor island jacket kettle "
    "ladder marble needle orange pencil quartz ribbon saddle temple umbrella velvet window yellow zipper"
)

Answerer = Callable[[Sequence[str]], Sequence[str]]
"""Prompts -> what a model writes after each."""


@dataclass(frozen=True)
class Question:
    """A prompt and the only right beginning of what follows it."""

    task: str
    prompt: str
    answer: str


def questions(each: int = 100, seed: int = 0, facts: int = 24) -> list[Question]:
    """`each` questions of every task, and of retrieval at every depth; the same for the same seed.
    facts: how many there are in a prompt of retrieval. Raises ValueError for numbers out of range.
    """
    if each < 1 or not 2 <= facts <= 9000:
        raise ValueError(
            f"each={each}, facts={facts}; allowed: one question or more, and 2 to 9,000 facts in a prompt"
        )
    rng = random.Random(seed)
    found = [arithmetic(rng) for _ in range(each)] + [copying(rng) for _ in range(each)]
    for depth in DEPTHS:
        found += [retrieval(rng, facts, depth) for _ in range(each)]
    return found


def arithmetic(rng: random.Random) -> Question:
    """The sum of two numbers below 50, after three examples."""
    pairs = [(rng.randrange(50), rng.randrange(50)) for _ in range(4)]
    *examples, (a, b) = pairs
    shown = "".join(f"{x} + {y} = {x + y}\n" for x, y in examples)
    return Question("arithmetic", f"{shown}{a} + {b} =", str(a + b))


def copying(rng: random.Random) -> Question:
    """Five words in the order in which they were given, after an example."""
    example, asked = (" ".join(rng.sample(_WORDS.split(), 5)) for _ in range(2))
    prompt = f"Input: {example}\nCopy: {example}\nInput: {asked}\nCopy:"
    return Question("copying", prompt, asked)


def retrieval(rng: random.Random, facts: int, depth: float) -> Question:
    """The number of one of many boxes; `depth` says which, 0 for the first and 1 for the last."""
    names, codes = rng.sample(range(1000, 10_000), facts), rng.sample(range(1000, 10_000), facts)
    at = round(depth * (facts - 1))
    lines = "".join(
        f"Box {name} holds the code {code}.\n" for name, code in zip(names, codes, strict=True)
    )
    return Question(
        f"retrieval at {depth:.0%}", f"{lines}Box {names[at]} holds the code", str(codes[at])
    )


def is_right(text: str, answer: str) -> bool:
    """Whether a text begins with the answer, up to white space, and does not go on with it: "12" is no
    beginning of "123".
    """
    words = r"\s+".join(map(re.escape, answer.split()))
    return re.match(rf"\s*{words}(?!\w)", text) is not None


def right(asked: Sequence[Question], answer: Answerer) -> list[bool]:
    """Which questions are answered exactly. Raises ValueError for another number of answers."""
    texts = answer([question.prompt for question in asked])
    if len(texts) != len(asked):
        raise ValueError(
            f"{len(texts)} answers to {len(asked)} questions; there must be one to each"
        )
    return [is_right(text, question.answer) for text, question in zip(texts, asked, strict=True)]


@dataclass(frozen=True)
class Paired:
    """Two engines on the same questions of a task.

    lost: how many only the unquantized engine answers; gained: how many only the other. p: McNemar's
    exact test, two-sided. most_lost: the upper limit, at the one-sided level, for the share lost.
    """

    questions: int
    before: int
    after: int
    lost: int
    gained: int
    p: float
    most_lost: float

    def verdict(self, margin: float = MARGIN, level: float = LEVEL) -> str:
        """`within margin` if the limit is; `worse` if McNemar's test finds a loss; else `undecided`."""
        if self.most_lost <= margin:
            return "within margin"
        return "worse" if self.p <= level and self.lost > self.gained else "undecided"


def paired(before: Sequence[bool], after: Sequence[bool], level: float = LEVEL) -> Paired:
    """Compares two engines, question by question. Raises ValueError for lists of different lengths, or
    none.
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"{len(before)} results before and {len(after)} after; there must be as many of both, and one at least"
        )
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    # Clopper and Pearson's upper limit
    most = (
        float(stats.beta.ppf(1 - level, lost + 1, len(before) - lost))
        if lost < len(before)
        else 1.0
    )
    return Paired(len(before), sum(before), sum(after), lost, gained, p, most)


def by_task(
    asked: Sequence[Question], before: Sequence[bool], after: Sequence[bool]
) -> dict[str, Paired]:
    """The comparison of each task, in the order of the questions."""
    places: dict[str, list[int]] = {}
    for place, question in enumerate(asked):
        places.setdefault(question.task, []).append(place)
    return {
        task: paired([before[i] for i in at], [after[i] for i in at]) for task, at in places.items()
    }


def table(found: dict[str, Paired], margin: float = MARGIN) -> str:
    """A line for each task, as text."""
    lines = [
        f"{'task':<18} {'questions':>9} {'before':>7} {'after':>7} {'lost':>5} {'gained':>6} {'p':>7} {'most lost':>9}  verdict"
    ]
    lines += [
        f"{task:<18} {row.questions:>9} {row.before:>7} {row.after:>7} {row.lost:>5} {row.gained:>6} {row.p:>7.3g} "
        f"{row.most_lost:>9.1%}  {row.verdict(margin)}"
        for task, row in found.items()
    ]
    return "\n".join(lines)


def engine(model: str, dtype: str, levels: Mapping[str, object]) -> Answerer:
    """nanovllm with everything on and these levels, answering greedily; a new one for each call."""
    from nanovllm import ALL, SamplingParams
    from nanovllm.engine.llm_engine import LLM

    def answer(prompts: Sequence[str]) -> list[str]:
        params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
        with LLM(model, dtype=dtype, optimizations={**vars(ALL), **levels}) as llm:
            found = llm.generate(list(prompts), params, use_tqdm=False)
        return [output.outputs[0].text for output in found]

    return answer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.price.tasks", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", help="a checkpoint's folder or a preset, with a tokenizer")
    parser.add_argument(
        "levels", nargs="+", metavar="FACTOR=LEVEL", help="what the other engine has on"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--each", type=int, default=100, help="questions of each task")
    parser.add_argument("--margin", type=float, default=MARGIN, help="share that may be lost")
    options = parser.parse_args(arguments)
    if wrong := [given for given in options.levels if "=" not in given]:
        parser.error(f"{wrong[0]!r}: write FACTOR=LEVEL, such as quantization=int8")
    levels = {name: level_value(level) for name, level in (g.split("=", 1) for g in options.levels)}
    asked = questions(options.each)
    before = right(asked, engine(options.model, options.dtype, {}))
    after = right(asked, engine(options.model, options.dtype, levels))
    print(table(by_task(asked, before, after), options.margin))
    return 0


if __name__ == "__main__":
    sys.exit(main())
