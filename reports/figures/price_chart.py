"""The picture of a study with lossy configurations: price against speed."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reports import text
from reports.figures.layout import shorten
from reports.figures.svg import LIGHT, PIXELS_PER_INCH
from reports.statistics.price import PriceRow, of

Analysis = Mapping[str, Any]
Point = tuple[Mapping[str, Any], PriceRow]
"""An effect of the study's metric, and the price of its configuration."""
COLORS = {"within margin": "faster", "outside": "slower", "undecided": "inconclusive"}
PANEL_PX, TITLE_PX, AXIS_PX, LEFT_PX, RIGHT_PX = 200, 26, 40, 58, 22


def price(analysis: Analysis, width: int) -> Figure | None:
    """KL divergence per token against the ratio of the study's metric, a panel for each workload, with
    intervals of both and the margin as a line. None without a lossy configuration that counts.
    """
    panels = points(analysis)
    if not panels:
        return None
    height = len(panels) * (TITLE_PX + PANEL_PX + AXIS_PX)
    figure = Figure(
        figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH
    )
    for number, (workload, found) in enumerate(panels.items()):
        top = number * (TITLE_PX + PANEL_PX + AXIS_PX) + TITLE_PX
        axes = figure.add_axes(
            (
                LEFT_PX / width,
                1 - (top + PANEL_PX) / height,
                (width - LEFT_PX - RIGHT_PX) / width,
                PANEL_PX / height,
            )
        )
        _panel(axes, analysis, found, 20 if width < 400 else 40)
        axes.set_title(workload, loc="left", fontsize=11, fontweight="bold", color=LIGHT["muted"])
        axes.set_xlabel(f"{analysis['metric']['label']} over {_start(analysis)}")
    return figure


def points(analysis: Analysis) -> dict[str, list[Point]]:
    """By workload: the configurations that have both a price and a ratio."""
    prices = {row["cell"]: row for row in (analysis.get("price") or {"rows": ()})["rows"]}
    found: dict[str, list[Point]] = {}
    for effect in analysis["effects"]:
        if (
            effect["metric"] == analysis["metric"]["key"]
            and effect["workload"] in analysis["workloads"]
            and effect["n"]
            and effect["role"] != "aa"
            and effect["cell"] in prices
        ):
            found.setdefault(effect["workload"], []).append((effect, prices[effect["cell"]]))
    return found


def _panel(axes: Axes, analysis: Analysis, found: Sequence[Point], most: int) -> None:
    margin = analysis["price"]["margins"]["kl"]
    highest = margin
    for effect, row in found:
        kl = of(row, "kl")
        color = LIGHT[COLORS[row["verdict"]]]
        x, y = effect["ratio"], kl["price"]
        axes.plot([x, x], [kl["low"], kl["high"]], color=color, linewidth=1.6)
        if effect["low"] is not None:
            axes.plot([effect["low"], effect["high"]], [y, y], color=color, linewidth=1.6)
        axes.plot([x], [y], "o", color=color, markersize=5, markeredgewidth=0)
        highest = max(highest, kl["high"])
    axes.axhline(margin, color=LIGHT["muted"], linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"margin, {margin:g} nats",
        (1, margin),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=10,
        color=LIGHT["muted"],
    )
    axes.axvline(1, color=LIGHT["rule"], linewidth=1)
    low, high = axes.get_xlim()
    low, high = min(low, 0.95), max(high, 1.05)
    axes.set_xlim(low, high + 0.1 * (high - low))
    for effect, row in found:  # names point inwards
        left = effect["ratio"] > (low + high) / 2
        axes.annotate(
            shorten(text.plain_name(analysis, effect["cell"]), most),
            (effect["ratio"], of(row, "kl")["price"]),
            xytext=(-6 if left else 6, 5),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=10.5,
        )
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.15 * highest)
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True, axis="y", color=LIGHT["rule"], linewidth=0.6)


def _start(analysis: Analysis) -> str:
    return str(analysis["shown"][analysis["baseline"]])
