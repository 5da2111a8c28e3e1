"""The types of an analysis: what `analyse` returns and every page is made from. The types are the standard
library's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from reports.statistics.intervals import Estimate
from reports.statistics.linear_model import Column
from reports.statistics.price import Prices


class Company(TypedDict, total=False):
    """In what both sides of a comparison with everything on differ from it (toggles that are off,
    toggles that are on), and whether the factor is part of everything on.
    """

    without: list[str]
    beside: list[str]
    part_of_all: bool


class Effect(Estimate, Company):
    """An effect on one metric and workload, with its verdict.

    An effect of a cell: its `cell`, its `role`, and the `question` whose tests are corrected
    together (empty where all questions are one family); compared with another engine or cell: that
    cell is its `reference`. An effect of a factor: `kind` (a key of text.KINDS), `factor` and `level`;
    where it compares two cells: those (`on`, `off`), and what else differs from everything on
    (Company). An interaction: its two toggles, `first` and `second`.
    """

    metric: str
    workload: str
    cell: NotRequired[str]
    role: NotRequired[str]
    reference: NotRequired[str]
    question: NotRequired[str]
    kind: NotRequired[str]
    factor: NotRequired[str]
    level: NotRequired[Any]
    on: NotRequired[str]
    off: NotRequired[str]
    first: NotRequired[str]
    second: NotRequired[str]


class LinearEffect(Column):
    """An effect of the linear model of a factorial, on one workload."""

    metric: str
    workload: str


class Counts(TypedDict):
    """How many launches and blocks were planned, counted and excluded.

    complete_blocks: in which every cell counts; run_blocks: in which every cell ran to its end.
    """

    planned_launches: int
    planned_blocks: int
    counted_launches: int
    complete_blocks: int
    run_blocks: int
    excluded_launches: int
    duplicates: int


class Rate(TypedDict):
    """A metric of a cell over its counted blocks."""

    metric: str
    workload: str
    cell: str
    mean: float | None
    n: int
    min: float | None
    max: float | None


class Comparison(TypedDict):
    """A pair of cells that the study compares. effects: {metric: {workload: Effect}}, empty where the
    rule is broken (`breaches`). twins: {workload: Effect} with the A/A twin in place of `ours`.
    """

    name: str
    rule: str
    ours: str
    theirs: str
    our_engine: str
    engine: str
    version: str | None
    breaches: list[str]
    differences: list[list[Any]]
    effects: dict[str, dict[str, Effect]]
    twins: dict[str, Effect]


class ShownMetric(TypedDict):
    key: str
    label: str
    unit: str
    better: str


class ShownRule(TypedDict):
    """The rule of the verdicts; band: the ratios that are too close to 1 to matter."""

    alpha: float
    confidence: float
    smallest_effect: float
    band: list[float]
    power: float


class WorkloadAnswer(TypedDict):
    workload: str
    sentence: str
    verdict: str


class Answer(TypedDict):
    """The result in words; answer.py says how it is made."""

    sentence: str
    by_workload: list[WorkloadAnswer]
    verdict: str
    output: str
    caveats: list[str]


class Analysis(TypedDict):
    """The whole analysis of a study; `answer` is made last, from all the rest."""

    schema: int
    study: Mapping[str, Any]
    plan_hash: str
    metric: ShownMetric
    rule: ShownRule
    statistics: Mapping[str, Any]
    precision: dict[str, Any] | None
    baseline: str
    cells: dict[str, dict[str, Any]]
    shown: dict[str, str]
    workloads: dict[str, dict[str, Any]]
    waves: dict[str, list[int]]
    counts: Counts
    rates: list[Rate]
    effects: list[Effect]
    references: list[Effect]
    comparisons: list[Comparison]
    costs: dict[str, list[dict[str, Any]]]
    factors: list[Effect]
    interactions: list[Effect]
    combinations: list[Effect]
    residuals: dict[str, dict[str, Any]]
    linear_model: list[LinearEffect]
    ceiling: list[dict[str, Any]]
    gate: dict[str, Any]
    toggles: dict[str, Any]
    not_applicable: list[dict[str, Any]]
    excluded: list[dict[str, Any]]
    unjudged: Any
    checks: dict[str, Any]
    order: Any
    hardware: dict[str, Any]
    notes: list[str]
    days: list[str]
    answer: NotRequired[Answer]
    by_cell: NotRequired[dict[str, dict[str, Any]]]
    load: NotRequired[dict[str, Any]]
    energy: NotRequired[list[dict[str, Any]]]
    price: NotRequired[Prices]
