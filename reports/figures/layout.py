"""What all pictures share: two widths, figures measured in CSS pixels, and the rows of an analysis
that they draw.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullLocator

from reports.figures.svg import LIGHT, PIXELS_PER_INCH

WIDE, NARROW = 720, 360
HEAD: dict[str, Any] = {"color": LIGHT["muted"], "fontsize": 11, "fontweight": "bold"}
Analysis = Mapping[str, Any]
Effect = Mapping[str, Any]


def canvas(
    width: float, height: float, left: float, right: float, bottom: float
) -> tuple[Figure, Axes]:
    """A figure of this many pixels with one axes inside these margins."""
    figure = Figure(
        figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH
    )
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom) / height)
    )
    axes.yaxis.set_major_locator(NullLocator())
    return figure, axes


def log_ticks(low: float, high: float) -> Locator:
    """Ticks of a log axis: at 1, 2 and 5 of each power of ten; if fewer than two of them are in sight, at
    all digits; else at round numbers.
    """
    for digits in ((1, 2, 5), range(1, 10)):
        locator = LogLocator(subs=digits)
        if sum(low <= tick <= high for tick in locator.tick_values(low, high)) >= 2:
            return locator
    return MaxNLocator(3)


def lines(label: str, most: int) -> list[str]:
    """A label in lines of at most `most` characters, broken after spaces and before plus signs; only
    a word that is longer than a line is cut.
    """
    found = [""]
    for part in re.split(r"(?<= )|(?=\+)", label):
        if found[-1] and len(found[-1] + part.rstrip()) > most:
            found.append("")
        found[-1] += part
    return [shorten(line.rstrip(), most) for line in found]


def shorten(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def primary(analysis: Analysis) -> list[Effect]:
    return [
        effect for effect in analysis["effects"] if effect["metric"] == analysis["metric"]["key"]
    ]


def by_workload(rows: Sequence[Effect]) -> Iterable[tuple[str, list[Effect]]]:
    groups: dict[str, list[Effect]] = {}
    for row in rows:
        groups.setdefault(row["workload"], []).append(row)
    return groups.items()
