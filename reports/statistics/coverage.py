"""How often a 95 % interval holds the truth, by simulation: python -m reports.statistics.coverage [--write
docs/methodology.md].

Synthetic studies with a planted ratio. Noise is planted in the log of the times of a treatment and
of its reference, as a
machine would: a part that a block shares, which must cancel, and one of each launch's own. An
honest 95 % interval holds the planted ratio in 95 of 100 studies, whatever the number of blocks.
The estimators are those of the reports (intervals.py).
"""

import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from scipy import stats

from experiments.study.block_count import MAX_BLOCKS, MIN_BLOCKS, MIN_BLOCKS_BOOTSTRAP
from reports import text
from reports.statistics import moderated_coverage
from reports.statistics.intervals import t_interval

Noise = Literal["normal", "heavy", "skewed", "lopsided"]
NOISES: dict[Noise, str] = {
    "normal": "normal",
    "heavy": "heavy-tailed: Student's t, 4 degrees of freedom",
    "skewed": "strong skew: exponential, in both",
    "lopsided": "strong skew: exponential, in the treatment alone",
}
STUDIES = 2_000
RATIO = 1.3
BLOCKS_SHOWN = (2, 3, 4, 6, 8, 12, 24, MAX_BLOCKS)
BEGIN, END = (
    "<!-- python -m reports.statistics.coverage --write docs/methodology.md -->",
    "<!-- end of coverage -->",
)
BEGIN_MODERATED, END_MODERATED = (
    "<!-- moderated variances, by the same command -->",
    "<!-- end of moderated variances -->",
)

app = typer.Typer(add_completion=False)


def noise(
    rng: np.random.Generator, kind: Noise, size: tuple[int, ...], sd: float
) -> NDArray[np.float64]:
    """Noise of log times with mean 0 and standard deviation sd. lopsided: only where the last axis
    is 0 is there any.
    """
    if kind == "normal":
        return rng.normal(0, sd, size)
    if kind == "heavy":
        return rng.standard_t(4, size) * sd / math.sqrt(2)
    drawn = (rng.exponential(1, size) - 1) * sd
    if kind == "lopsided":
        drawn[..., 1:] = 0
    return drawn


def log_ratios(
    kind: Noise,
    blocks: int,
    ratio: float = RATIO,
    sd: float = 0.03,
    seed: int = 0,
    studies: int = STUDIES,
) -> NDArray[np.float64]:
    """[studies, blocks] logs of treatment over reference, of rates with a true ratio and this noise
    in their times.
    """
    rng = np.random.default_rng([seed, blocks])
    block = rng.normal(0, 0.2, (studies, blocks, 1))
    log_times = block + noise(rng, kind, (studies, blocks, 2), sd)
    log_times[:, :, 0] -= math.log(ratio)  # the treatment's times
    return log_times[:, :, 1] - log_times[:, :, 0]


def t_coverage(kind: Noise, blocks: int, seed: int = 0) -> float:
    """The share of synthetic studies whose Student's t interval holds the planted ratio."""
    return _share(*t_interval(log_ratios(kind, blocks, seed=seed), 0.05))


def bootstrap_coverage(
    kind: Noise, blocks: int, method: Literal["percentile", "BCa"], seed: int = 0
) -> float:
    """The same for a bootstrap interval of 999 resamples, on the first quarter of the studies (it
    is slow).
    """
    samples = log_ratios(kind, blocks, seed=seed)[: STUDIES // 4]
    found = stats.bootstrap(
        (samples,),
        np.mean,
        axis=-1,
        n_resamples=999,
        method=method,
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return _share(found.low, found.high)


def _share(low: NDArray[np.float64], high: NDArray[np.float64]) -> float:
    return float(((low <= math.log(RATIO)) & (math.log(RATIO) <= high)).mean())


def table() -> str:
    """The table of the methodology page, in Markdown."""
    head = ["noise of a launch", "interval", *(f"{n}" for n in BLOCKS_SHOWN)]
    rows = [
        [words, "Student's t", *(f"{t_coverage(kind, n):.1%}" for n in BLOCKS_SHOWN)]
        for kind, words in NOISES.items()
    ]
    shown: tuple[Noise, ...] = ("normal", "lopsided")
    for kind in shown:
        for method in ("percentile", "BCa"):
            at = [n if MIN_BLOCKS_BOOTSTRAP <= n <= 24 else None for n in BLOCKS_SHOWN]
            cells = [f"{bootstrap_coverage(kind, n, method):.1%}" if n else "" for n in at]
            rows.append([NOISES[kind], f"{method} bootstrap", *cells])
    lines = [head, ["---", "---", *("--:" for _ in BLOCKS_SHOWN)], *rows]
    worst = {
        kind: min((t_coverage(kind, n), n) for n in range(MIN_BLOCKS, MAX_BLOCKS + 1))
        for kind in NOISES
    }
    least = "; ".join(
        f"{NOISES[kind].partition(':')[0] if kind != 'lopsided' else 'skew in one alone'} {share:.1%} (at {n})"
        for kind, (share, n) in worst.items()
    )
    note = (
        f"Coverage of 95 % intervals by number of blocks, {STUDIES:,} synthetic studies each ({STUDIES // 4} for a bootstrap). "
        f"Lowest of Student's t over every number of blocks from {MIN_BLOCKS} to {MAX_BLOCKS}: {least}."
    )
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", note])


def put_into(page: str) -> str:
    """A page with its tables replaced by fresh ones. Raises ValueError where it has no place for
    one.
    """
    page = text.put_between(page, BEGIN, END, table())
    return text.put_between(page, BEGIN_MODERATED, END_MODERATED, moderated_coverage.table())


@app.command()
def main(
    write: Annotated[
        Path | None, typer.Option(help="page to put the table into; it is printed if not given")
    ] = None,
) -> None:
    """Print the coverage of the intervals, or write it into a page."""
    if write is None:
        print(table(), moderated_coverage.table(), sep="\n\n")
    else:
        write.write_text(put_into(write.read_text()))


if __name__ == "__main__":
    app()
