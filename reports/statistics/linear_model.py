"""The ordinary linear model of a two-level factorial, full or fractional: block effects and an
effect for each column.

    log metric = block + sum over columns c of beta_c x_c + noise        x_c: product of +1 (on) and -1 (off)

A column is what the design can tell apart: one effect, or the sum of several that a fraction mixes
(aliases). All columns are in the model, those of high order too, so the residual is what the same
cell does in different blocks, with (cells - 1) (blocks - 1) degrees of freedom: at few blocks
narrower intervals than a contrast by blocks has, for which it assumes that every cell is equally
noisy. It stands beside the contrasts (contrasts.py), which assume less.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from experiments.study import designs
from reports.statistics.intervals import Judged, Rule, ratio_of


class Column(Judged):
    """The effect of one column of the design: a main effect (order 1) or a pair (order 2)."""

    terms: list[str]
    order: int
    n: int
    df: int
    ratio: float


def fit(
    log_values: Mapping[str, Mapping[int, float]],
    runs: Mapping[str, frozenset[str]],
    factors: Sequence[str],
    generators: Mapping[str, Sequence[str]],
    rule: Rule,
) -> list[Column]:
    """Estimates one effect for each column of main effects and pairs; `judge` adds the verdicts
    later.

    log_values: {cell: {block: log metric}}; runs: {cell: the factors that are on}. terms: the
    effects whose sum the column is, e.g. ["kernels*overlap", "-batching*cuda_graphs"]. [] where too
    little was counted to tell the columns apart.
    """
    columns = _columns(factors, generators, len(runs))
    rows = [
        (cell, block, value) for cell in runs for block, value in sorted(log_values[cell].items())
    ]
    if not rows:
        return []
    blocks = sorted({block for _, block, _ in rows})
    design = np.array(
        [
            [float(block == b) for b in blocks] + [_sign(effect, runs[cell]) for effect in columns]
            for cell, block, _ in rows
        ]
    ).reshape(len(rows), -1)
    if len(rows) <= design.shape[1] or np.linalg.matrix_rank(design) < design.shape[1]:
        return []
    # takes a second to import, with pandas, and only factorial designs need it
    from statsmodels.regression.linear_model import OLS

    # without any spread a p-value is 0, or 0/0 where there is no effect either
    with np.errstate(all="ignore"):
        result = OLS(np.array([value for _, _, value in rows]), design).fit()
        intervals, p_values = result.conf_int(rule.alpha), np.nan_to_num(result.pvalues, nan=1.0)
    effects: list[Column] = []
    for group in designs.alias_groups(factors, generators):
        effect = group[0][1]
        index, scale = len(blocks) + columns.index(effect), 2 ** len(effect)
        beta, (low, high) = float(result.params[index]), map(float, intervals[index])
        effects.append(
            {
                "terms": [
                    ("" if sign > 0 else "-") + designs.effect_name(other, factors)
                    for sign, other in group
                ],
                "order": len(effect),
                "n": len(blocks),
                "df": int(result.df_resid),
                "ratio": math.exp(scale * beta),
                "low": ratio_of(scale * low),
                "high": ratio_of(scale * high),
                "p": float(p_values[index]),
            }
        )
    return effects


def _columns(
    factors: Sequence[str], generators: Mapping[str, Sequence[str]], num_runs: int
) -> list[frozenset[str]]:
    """The shortest effect of each of the design's num_runs - 1 columns."""
    columns: list[frozenset[str]] = []
    # constant in the fraction: the blocks' own column
    seen: set[frozenset[str]] = set(designs.defining_words(generators))
    for size in range(1, len(factors) + 1):
        for names in combinations(factors, size):
            effect: frozenset[Any] = frozenset(names)
            if effect not in seen and len(columns) < num_runs - 1:
                columns.append(effect)
                seen |= {effect, *(other for _, other in designs.aliases(effect, generators))}
    return columns


def _sign(effect: frozenset[str], on: frozenset[str]) -> float:
    return float((-1) ** len(effect - on))
