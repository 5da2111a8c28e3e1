"""The cells that a design runs, and the aliases of a fractional factorial. Pure functions; standard
library only.

A factor is off at its baseline, and on at the last of its levels that can run. With factors a, b, c
of one level each:

    one_at_a_time          a, b, c                       each level of each factor alone
    add_one_in             a, b, c, all                  the same, and everything on
    leave_one_out          all, all-but-a, -b, -c        everything on (the reference), then one factor at a time off
    both                   a, b, c, all, all-but-...     add_one_in and leave_one_out, relative to everything off
    full_factorial         every combination of levels
    fractional_factorial   a balanced subset of them     two levels per factor; see below
    listed                 only the study's `cells`

The reference runs twice in each block (the A/A arm). It is everything off, except in leave_one_out.

A factor that stands *apart*, such as the number of GPUs, is not part of everything on. It is
switched on alone, and on top of everything on (`all+a=on`). If other factors need factor a to run,
`all-but-a` switches those off as well, and reports/statistics/contrasts.py compares it with the
cell that only lacks the others. So each factor has a pair of cells that differ in it alone.

A regular fraction of 2^k (Box, Hunter and Hunter, *Statistics for Experimenters*, ch. 12): some
factors vary freely; each of the others, a *generated* factor, is on exactly where an odd number of
the factors that generate it are on. So everything off is part of the fraction. {factor} + its
generators is a word; words multiply (symmetric difference) to the defining relation. Its shortest
word is the resolution: at IV no main effect is aliased with a two-way interaction, at V no two-way
interaction with another. Without stated generators, the smallest fraction of at least the requested
resolution is used, and among those one of the highest resolution; for up to seven factors these are
the textbook designs of minimum aberration (Fries and Hunter, Technometrics 1980).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Literal

from experiments.records.factor_levels import Level

Kind = Literal[
    "one_at_a_time",
    "add_one_in",
    "leave_one_out",
    "both",
    "full_factorial",
    "fractional_factorial",
    "listed",
]
Role = Literal["treatment", "all"]
Levels = dict[str, Level]
Generators = Mapping[str, Sequence[str]]
Effect = frozenset[str]
"""A main effect ({a}) or an interaction ({a, b}), by its factors."""

FACTORIALS = ("full_factorial", "fractional_factorial")
"""Designs that need all of their cells, because every estimate uses all of them."""
ALL = "all"


def cells(
    kind: Kind,
    off: Mapping[str, Level],
    levels: Mapping[str, Sequence[Level]],
    generators: Generators,
    *,
    apart: Collection[str] = (),
    can_run: Callable[[Levels], bool] = lambda point: True,
) -> dict[str, tuple[Role, Levels]]:
    """{cell: (role, level of every factor)} of a design, without the reference.

    off: the baseline of every factor. levels: the other levels of each factor; everything on uses
    the last one. apart: factors that everything on leaves at their baseline. can_run: whether a
    combination of levels can run; if it cannot because a factor was left out, the factors that need
    it are left out as well.
    """
    everything = _everything(off, levels, apart)
    alone = [{**off, factor: level} for factor, found in levels.items() for level in found]
    points: dict[str, Levels] = {}
    if kind in ("one_at_a_time", "add_one_in", "both"):
        points |= {point_name(point, off): point for point in alone}
    if kind in ("add_one_in", "both"):
        points.setdefault(ALL, everything)
    if kind in ("leave_one_out", "both"):
        for factor, found in levels.items():
            if found and factor not in apart:
                points[f"{ALL}-but-{factor}"] = _first(_without(factor, everything, off), can_run)
    if kind in ("add_one_in", "leave_one_out", "both"):
        for factor in (factor for factor in levels if factor in apart):
            for level in levels[factor]:
                point = _first(_on_top(factor, level, everything, levels, apart), can_run)
                points[f"{ALL}+{point_name(point, everything)}"] = point
    if kind == "full_factorial":
        every = [
            dict(zip(levels, point, strict=True))
            for point in product(*([off[f], *found] for f, found in levels.items()))
        ]
        points |= {ALL if point == everything else point_name(point, off): point for point in every}
    if kind == "fractional_factorial":
        for on in fraction(list(levels), generators):
            point = {
                factor: everything[factor] if factor in on else level
                for factor, level in off.items()
            }
            points[ALL if point == everything else point_name(point, off)] = point
        points.setdefault(ALL, everything)
    reference = everything if kind == "leave_one_out" else dict(off)
    made: dict[str, tuple[Role, Levels]] = {}
    for name, point in points.items():
        # two factors: all-but-a is b alone
        if point != reference and not any(point == other for _, other in made.values()):
            made[name] = ("all" if name == ALL else "treatment", point)
    return made


def reference(
    kind: Kind,
    off: Mapping[str, Level],
    levels: Mapping[str, Sequence[Level]],
    apart: Collection[str] = (),
) -> tuple[str, Levels]:
    """The name and levels of the cell that ratios are relative to, and that runs twice."""
    if kind == "leave_one_out":
        return ALL, _everything(off, levels, apart)
    return "baseline", dict(off)


def _everything(
    off: Mapping[str, Level], levels: Mapping[str, Sequence[Level]], apart: Collection[str]
) -> Levels:
    return {
        **off,
        **{factor: found[-1] for factor, found in levels.items() if found and factor not in apart},
    }


def _without(factor: str, everything: Levels, off: Mapping[str, Level]) -> Iterator[Levels]:
    """Everything on without a factor; then also without one, and without two, of the others."""
    others = [
        other for other, level in everything.items() if other != factor and level != off[other]
    ]
    for size in range(3):
        for also in combinations(others, size):
            yield {**everything, **{name: off[name] for name in (factor, *also)}}


def _on_top(
    factor: str,
    level: Level,
    everything: Levels,
    levels: Mapping[str, Sequence[Level]],
    apart: Collection[str],
) -> Iterator[Levels]:
    """Yields everything on plus a factor that stands apart; then also with one other such factor,
    at each of its levels.
    """
    yield {**everything, factor: level}
    for other in levels:
        if other in apart and other != factor:
            for beside in levels[other]:
                yield {**everything, other: beside, factor: level}


def _first(points: Iterator[Levels], can_run: Callable[[Levels], bool]) -> Levels:
    """The first point that can run. If none can, the first, so that the plan can say why."""
    plain = next(points)
    if can_run(plain):
        return plain
    return next((point for point in points if can_run(point)), plain)


def point_name(point: Mapping[str, Level], off: Mapping[str, Level]) -> str:
    """What differs from everything off, e.g. "kernels=triton+overlap=on"."""
    return (
        "+".join(f"{factor}={level}" for factor, level in point.items() if level != off[factor])
        or "baseline"
    )


# ------------------------------------------------------------------------------------------------
# fractions of 2^k


def fraction(factors: Sequence[str], generators: Generators) -> list[Effect]:
    """The cells of a regular fraction, each as the set of factors that are on; everything off is first."""
    free = [factor for factor in factors if factor not in generators]
    runs = []
    for signs in product((False, True), repeat=len(free)):
        on = {factor for factor, is_on in zip(free, signs, strict=True) if is_on}
        runs.append(
            frozenset(on | {g for g, parents in generators.items() if len(on & set(parents)) % 2})
        )
    return runs


def defining_words(generators: Generators) -> list[Effect]:
    """All products of the generators' words: the defining relation without the identity."""
    words: list[Effect] = []
    for factor, parents in generators.items():
        word = frozenset({factor, *parents})
        words += [word, *(word ^ other for other in words)]
    return words


def resolution(generators: Generators) -> int:
    """The length of the shortest word; 0 for a full factorial, which has no generators."""
    return min(map(len, defining_words(generators)), default=0)


def choose_generators(factors: Sequence[str], least: int) -> dict[str, list[str]]:
    """Generators of the smallest fraction of at least this resolution; among those, of the highest
    resolution. Raises ValueError if there is none.
    """
    for generated in range(len(factors) - 1, 0, -1):
        free = list(factors[: len(factors) - generated])
        parents = [
            list(c) for size in range(least - 1, len(free) + 1) for c in combinations(free, size)
        ]
        found = [
            dict(zip(factors[len(free) :], chosen, strict=True))
            for chosen in combinations(parents, generated)
        ]
        fitting = [generators for generators in found if resolution(generators) >= least]
        if fitting:
            return max(fitting, key=resolution)
    raise ValueError(
        f"{len(factors)} factors have no fraction of resolution {least}; "
        f"use kind: full_factorial ({2 ** len(factors)} cells), or a lower design.resolution"
    )


def aliases(effect: Iterable[str], generators: Generators) -> list[tuple[int, Effect]]:
    """The aliases of an effect as (sign, effect), shortest first. With sign -1 the difference of the
    two effects is estimated, else their sum.
    """
    wanted = frozenset(effect)
    found = [(-1 if len(word) % 2 else 1, wanted ^ word) for word in defining_words(generators)]
    return sorted(found, key=lambda alias: (len(alias[1]), sorted(alias[1])))


def alias_groups(
    factors: Sequence[str], generators: Generators, order: int = 2
) -> list[list[tuple[int, Effect]]]:
    """Main effects and two-way interactions, grouped by alias; signs are relative to the first."""
    groups: list[list[tuple[int, Effect]]] = []
    seen: set[Effect] = set()
    for size in range(1, order + 1):
        for names in combinations(factors, size):
            effect = frozenset(names)
            if effect not in seen:
                short = [
                    (sign, other)
                    for sign, other in aliases(effect, generators)
                    if 0 < len(other) <= order
                ]
                groups.append([(1, effect), *short])
                seen |= {effect, *(other for _, other in short)}
    return groups


def effect_name(effect: Iterable[str], factors: Sequence[str]) -> str:
    """The factors in the order of the study, e.g. "kernels*overlap"."""
    wanted = set(effect)
    return "*".join(factor for factor in factors if factor in wanted)


def say_aliases(factors: Sequence[str], generators: Generators) -> list[str]:
    """The groups of aliased effects as text; empty if no main effect or two-way interaction is
    aliased with another.
    """
    lines = []
    for group in alias_groups(factors, generators):
        if len(group) > 1:
            head, *rest = [(sign, effect_name(effect, factors)) for sign, effect in group]
            lines.append(
                head[1] + "".join(f" {'+' if sign > 0 else '-'} {name}" for sign, name in rest)
            )
    return lines
