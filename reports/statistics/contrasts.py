"""What each factor buys in company: contrasts over the lattice of configurations that a design has
visited.

A *point* is the set of (factor, level) pairs in which a cell differs from everything off, the empty
point. With v(S) the log of the metric at point S in one block, a design is asked for

    alone(t)          v({t}) - v({})                                    add one in
    left out(t)       v(A) - v(A - {t})                                 A: the point with everything on; see `company`
    average(t)        mean over backgrounds S of v(S + t) - v(S)        the main effect of a factorial
    Shapley(t)        sum over S in A - {t} of |S|! (k - |S| - 1)! / k! (v(S + t) - v(S))     (Shapley 1953; k = |A|)
    interaction(t, u) mean over backgrounds S of v(S + t + u) - v(S + t) - v(S + u) + v(S)
    combination       v(A) - v({}) - sum over t in A of (v({t}) - v({}))    more than the parts, on the log scale

A fractional factorial (experiments/study/designs.py) has no pairs of points that differ in one factor
alone. Its average is the mean over the cells with t minus the mean over those without, its
interaction the difference of the two means of the sign product; an interaction that the fraction
mixes with another is absent here and named as a sum in linear_model.py.

Every contrast is a weighted sum of log-metrics of cells of one block, so blocks stay the sample of
every interval. What a design cannot estimate is absent, never guessed.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import factorial
from typing import Any

from experiments.study import designs

Toggle = tuple[str, Any]  # (factor, level)
Point = frozenset[Toggle]
Contrast = dict[str, float]  # cell -> weight
LATTICE_ROLES = ("baseline", "treatment", "all")


class Lattice:
    """The points that a plan's cells stand on; cells of other engines and the A/A arm are not part
    of it.

    off: each factor's level in the empty point; the reference's, if not given (it is everything on
    in leave_one_out).
    generators: of a fractional factorial.
    """

    def __init__(
        self,
        cells: Mapping[str, Mapping[str, Any]],
        off: Mapping[str, Any] | None = None,
        generators: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        baselines = [name for name, cell in cells.items() if cell["role"] == "baseline"]
        if len(baselines) != 1:
            raise ValueError(
                f"a plan has exactly one baseline cell, this one has {len(baselines)}: {', '.join(baselines) or 'none'}"
            )
        self.baseline = baselines[0]
        start = cells[self.baseline]
        self.off = {**start["levels"], **(off or {})}
        self.generators = dict(generators or {})
        self.cell: dict[Point, str] = {}
        self.everything: Point | None = None
        for name, cell in cells.items():
            if cell["role"] not in LATTICE_ROLES or cell["engine"] != start["engine"]:
                continue
            point = frozenset(
                (factor, level)
                for factor, level in cell["levels"].items()
                if self.off.get(factor) != level
            )
            self.cell.setdefault(point, name)
            if cell["role"] == "all" or (name == self.baseline and point):
                self.everything = point
        self.toggles: list[Toggle] = sorted(
            {toggle for point in self.cell for toggle in point}, key=str
        )
        self.factors = [factor for factor in self.off if factor in dict(self.toggles)]
        self.two_level = len(self.factors) == len(self.toggles)

    def factorial_cells(self) -> dict[str, frozenset[str]]:
        """{cell: the factors that are on} of a full or regular fractional two-level factorial; {}
        of any other design.
        """
        if not self.two_level or not (self.generators or self._is_full_factorial()):
            return {}
        on = {frozenset(factor for factor, _ in point): name for point, name in self.cell.items()}
        runs = designs.fraction(self.factors, self.generators)
        return {on[run]: run for run in runs} if all(run in on for run in runs) else {}

    def factor_contrasts(self) -> dict[str, dict[Toggle, Contrast]]:
        """{kind: {toggle: contrast}} for the kinds alone, left out, average and Shapley."""
        result: dict[str, dict[Toggle, Contrast]] = {
            "alone": {},
            "left out": {},
            "average": {},
            "Shapley": {},
        }
        for toggle in self.toggles:
            backgrounds = [
                point
                for point in self.cell
                if self._free_of(point, toggle) and point | {toggle} in self.cell
            ]
            if frozenset() in backgrounds:
                result["alone"][toggle] = self._step(frozenset(), toggle)
            if (background := self.company(toggle)) is not None:
                result["left out"][toggle] = self._step(background, toggle)
            if len(backgrounds) > 1 and self._is_full_factorial():
                result["average"][toggle] = _mean(
                    [self._step(point, toggle) for point in backgrounds]
                )
        result["Shapley"] = self._shapley()
        if self.generators:
            result["average"] = {
                toggle: self._signs([toggle[0]])
                for toggle in self.toggles
                if self.factorial_cells()
            }
        return result

    def company(self, toggle: Toggle) -> Point | None:
        """The background of what a toggle adds to all others: everything on without it, where it is
        part of that, else (it stands apart) everything on. Where a cell of that is impossible, the
        visited pair of points that is nearest to it: without what cannot run once the toggle is
        off, or with what the toggle needs beside it. None where no pair was visited.
        """
        if self.everything is None:
            return None
        wanted = self.everything - {toggle}
        pairs = [
            point
            for point in self.cell
            if point and self._free_of(point, toggle) and point | {toggle} in self.cell
        ]
        part_of_all = toggle in self.everything
        if wanted in pairs:
            return wanted if wanted else None
        near = [
            point
            for point in pairs
            if (point < wanted if part_of_all else point > wanted) and len(point ^ wanted) <= 2
        ]
        return min(
            near, key=lambda point: (len(point ^ wanted), sorted(map(str, point))), default=None
        )

    def interactions(self) -> dict[tuple[Toggle, Toggle], Contrast]:
        """Two-way interactions of every pair of toggles that some background lets be seen."""
        if self.generators:
            return self._clear_interactions()
        result = {}
        for first, second in combinations(self.toggles, 2):
            quads = [
                point
                for point in self.cell
                if self._free_of(point, first)
                and self._free_of(point, second)
                and all(
                    point | extra in self.cell for extra in ({first}, {second}, {first, second})
                )
            ]
            if quads and first[0] != second[0]:
                result[first, second] = _mean(
                    [
                        _add(self._step(point | {first}, second), self._step(point, second), -1.0)
                        for point in quads
                    ]
                )
        return result

    def combination(self) -> Contrast:
        """How many times more everything on buys than the product of what each of its toggles buys
        alone; {} unless each of them was tried alone.
        """
        parts = sorted(self.everything or (), key=str)
        points = [frozenset(), frozenset(parts), *(frozenset({part}) for part in parts)]
        if len(parts) < 2 or any(point not in self.cell for point in points):
            return {}
        contrast: Contrast = {self.cell[frozenset(parts)]: 1.0, self.cell[frozenset()]: -1.0}
        for part in parts:
            contrast = _add(contrast, self._step(frozenset(), part), -1.0)
        return contrast

    def _clear_interactions(self) -> dict[tuple[Toggle, Toggle], Contrast]:
        """The two-way interactions of a fraction that are mixed with no main effect and no other
        two-way interaction.
        """
        if not self.factorial_cells():
            return {}
        groups = designs.alias_groups(self.factors, self.generators)
        clear = {effect for group in groups if len(group) == 1 for _, effect in group}
        return {
            (first, second): self._signs([first[0], second[0]])
            for first, second in combinations(self.toggles, 2)
            if {first[0], second[0]} in clear
        }

    def _signs(self, effect: Sequence[str]) -> Contrast:
        """The contrast of an effect in a factorial: the product of the signs of its factors (+ on,
        - off), scaled so that a main effect is a difference of means, and an interaction the
        difference of two such differences.
        """
        runs = self.factorial_cells()
        scale = 2 ** len(effect) / len(runs)
        return {
            cell: scale * (-1) ** sum(factor not in on for factor in effect)
            for cell, on in runs.items()
        }

    def _shapley(self) -> dict[Toggle, Contrast]:
        """Needs every subset of the point with everything on; {} where one is missing or nothing
        can be shared.
        """
        if self.everything is None or len(self.everything) < 2:
            return {}
        players = sorted(self.everything, key=str)
        k = len(players)
        if any(subset not in self.cell for subset in _subsets(players)):
            return {}
        result = {}
        for toggle in players:
            contrast: Contrast = {}
            for subset in _subsets([player for player in players if player != toggle]):
                weight = factorial(len(subset)) * factorial(k - len(subset) - 1) / factorial(k)
                contrast = _add(contrast, self._step(subset, toggle), weight)
            result[toggle] = contrast
        return result

    def _is_full_factorial(self) -> bool:
        """Only then is a background as frequent with a toggle as without it, and an average free of
        other effects.
        """
        levels: dict[str, int] = {}
        for factor, _ in self.toggles:
            levels[factor] = levels.get(factor, 1) + 1
        combinations_ = 1
        for count in levels.values():
            combinations_ *= count
        return len(self.cell) == combinations_

    def _step(self, point: Point, toggle: Toggle) -> Contrast:
        return {self.cell[point | {toggle}]: 1.0, self.cell[point]: -1.0}

    @staticmethod
    def _free_of(point: Point, toggle: Toggle) -> bool:
        return all(factor != toggle[0] for factor, _ in point)


def evaluate(contrast: Contrast, log_values: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """{block: weighted sum} over the blocks in which every cell of the contrast has a value; {cell:
    {block: log value}} in.
    """
    blocks = set.intersection(*(set(log_values.get(cell, {})) for cell in contrast))
    return {
        block: sum(weight * log_values[cell][block] for cell, weight in contrast.items())
        for block in sorted(blocks)
    }


def _subsets(players: list[Toggle]) -> Iterable[Point]:
    return (
        frozenset(subset)
        for size in range(len(players) + 1)
        for subset in combinations(players, size)
    )


def _add(left: Contrast, right: Contrast, scale: float) -> Contrast:
    total = dict(left)
    for cell, weight in right.items():
        total[cell] = total.get(cell, 0.0) + scale * weight
    return total


def _mean(contrasts: list[Contrast]) -> Contrast:
    total: Contrast = {}
    for contrast in contrasts:
        total = _add(total, contrast, 1 / len(contrasts))
    return total
