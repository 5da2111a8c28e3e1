"""Simulates what intervals and verdicts of a price promise, and writes the table of
docs/methodology.md:

    python -m experiments.price.coverage --write docs/methodology.md

A synthetic study draws prompts of random lengths. Each prompt has a price of its own, drawn from a
skewed distribution of mean 1, and its tokens scatter around it. All methods see the same studies.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from experiments.price.clusters import mean_per_token, ratio
from experiments.price.rules import LEVEL

Array = NDArray[np.float64]
SHAPES = {
    "alike": 0.25,
    "skewed": 0.6,
    "very skewed": 1.0,
}
"""The standard deviation of the logarithm of a prompt's price."""
PROMPTS = (32, 64, 128)
METHODS = ("Student's t", "percentile bootstrap", "bootstrap-t")
START, END = "<!-- python -m experiments.price.coverage -->", "<!-- end of price coverage -->"


def draw(rng: np.random.Generator, prompts: int, sd_log: float) -> tuple[Array, Array]:
    """Sums over the tokens of each prompt, and the numbers of tokens: [prompts] each. The true mean per
    token is 1: lengths and prices are independent.
    """
    tokens = rng.integers(32, 97, prompts).astype(np.float64)
    price = np.exp(rng.normal(-(sd_log**2) / 2, sd_log, prompts))
    # a sum of so many exponential prices of tokens, each of the prompt's mean
    return price * rng.gamma(tokens), tokens


def interval(
    totals: Array, tokens: Array, method: str, level: float, draws: int, seed: int
) -> tuple[float, float]:
    """The two-sided interval of one study by a method of METHODS, that misses with this probability."""
    if method == "bootstrap-t":
        found = mean_per_token(totals.tolist(), tokens.astype(int).tolist(), str(seed), draws)
        return found.interval(level)
    mean, error = ratio(totals, tokens)
    if method == "Student's t":
        half = stats.t.ppf(1 - level / 2, len(totals) - 1) * error
        return float(mean - half), float(mean + half)
    drawn = np.random.default_rng(seed).integers(len(totals), size=(draws, len(totals)))
    low, high = np.quantile(ratio(totals[drawn], tokens[drawn])[0], [level / 2, 1 - level / 2])
    return float(low), float(high)


def coverage(
    method: str, prompts: int, sd_log: float, studies: int, draws: int = 499, seed: int = 0
) -> tuple[float, float]:
    """(share of studies whose interval at LEVEL holds the truth, share that would be called `within
    margin` although the truth is at the margin: the whole interval lies below it).
    """
    rng = np.random.default_rng([seed, prompts, round(100 * sd_log)])
    held = within = 0
    for number in range(studies):
        low, high = interval(*draw(rng, prompts, sd_log), method, LEVEL, draws, number)
        held += low <= 1 <= high
        within += high < 1
    return held / studies, within / studies


def table(studies: int) -> str:
    """The table of docs/methodology.md, in Markdown."""
    lines = [
        "| prices of prompts | method | " + " | ".join(map(str, PROMPTS)) + " |",
        "| --- | --- |" + " --: |" * len(PROMPTS),
    ]
    for shape, sd_log in SHAPES.items():
        for method in METHODS:
            found = [coverage(method, prompts, sd_log, studies) for prompts in PROMPTS]
            cells = " | ".join(f"{100 * held:.1f} / {100 * within:.1f} %" for held, within in found)
            lines.append(f"| {shape} | {method} | {cells} |")
    lines += [
        "",
        f"By number of prompts: coverage of {100 * (1 - LEVEL):.0f} % intervals / share of studies called *within margin* when the "
        f"truth is at the margin, which may be at most {100 * LEVEL:.0f} %. {studies:,} synthetic studies each.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.price.coverage")
    parser.add_argument("--studies", type=int, default=2000, help="synthetic studies per entry")
    parser.add_argument("--write", type=Path, help="the page that holds the table")
    options = parser.parse_args(arguments)
    made = table(options.studies)
    print(made)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        between = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
        if not between.search(page):
            parser.error(f"{options.write} does not have the lines {START!r} and {END!r}")
        options.write.write_text(
            between.sub(lambda _: f"{START}\n\n{made}\n\n{END}", page), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
