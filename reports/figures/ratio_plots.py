"""Pictures of ratios with their intervals, around the band of what is too small to matter: forest,
A/A panel, factors.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from reports import text
from reports.figures.layout import (
    HEAD,
    WIDE,
    Analysis,
    Effect,
    canvas,
    lines,
    log_ticks,
    primary,
)
from reports.figures.svg import LIGHT
from reports.switches import by_switch, whole_configurations

_EDGE = 1000.0
"""The farthest ratio that is drawn, and its inverse."""
_LONG = 10
"""From so many rows on, a group's heading repeats the ticks of the axis, which is far below."""


def forest(analysis: Analysis, width: int) -> Figure | None:
    """Effects on the study's metric, by workload: interval, verdict, and the ratio of each block as
    a faint dot. The rows are those of the table.
    """
    groups: dict[str, list[tuple[str, Effect]]] = {name: [] for name in analysis["workloads"]}
    for label, effect in comparisons(analysis):
        groups[effect["workload"]].append((label, effect))
    # all workloads together is a row of the table of effects
    for label, effect in configurations(analysis):
        groups[effect["workload"]].append((label, effect))
    return _ratio_plot(analysis, width, [(name, rows) for name, rows in groups.items() if rows])


def configurations(analysis: Analysis) -> list[tuple[str, Effect]]:
    """(name, effect) of the configurations on the study's metric, workload by workload; of every toggle
    alone and added last in a study that measured both (reports/switches.py).
    """
    tested = [effect for effect in primary(analysis) if effect["n"]]
    found = []
    for workload in analysis["workloads"]:
        own = [effect for effect in tested if effect["workload"] == workload]
        for effect in whole_configurations(analysis, workload, own):
            found.append((analysis["shown"][effect["cell"]], effect))
        found += [(label, row) for row, label in by_switch(analysis, workload) if row["n"]]
    return found


def comparisons(analysis: Analysis) -> list[tuple[str, Effect]]:
    """("vs vLLM 0.33.0, best", effect) of every pair with another engine, on the study's metric."""
    return [
        (text.pair(analysis, entry), effect)
        for entry in analysis["comparisons"]
        if entry["engine"] != entry["our_engine"]
        for effect in entry["effects"].get(analysis["metric"]["key"], {}).values()
        if effect["n"]
    ]


def aa_panel(analysis: Analysis, width: int) -> Figure | None:
    """The A/A twin on its own scale: the noise of this machine."""
    effects = [effect for effect in primary(analysis) if effect["role"] == "aa" and effect["n"]]
    return _ratio_plot(
        analysis,
        width,
        [("", [(effect["workload"], effect) for effect in effects])] if effects else [],
    )


def factors(analysis: Analysis, width: int) -> Figure | None:
    """Alone, added last, on average and Shapley's share of each factor; only where a design tells
    more than "alone".
    """
    if all(effect["kind"] == "alone" for effect in analysis["factors"]):
        return None
    groups: dict[str, list[tuple[str, Effect]]] = {}
    effects = sorted(
        analysis["factors"],
        key=lambda effect: (effect["workload"], effect["factor"], str(effect["level"])),
    )
    several = len({effect["workload"] for effect in effects}) > 1
    for effect in effects:
        title = f"{effect['factor']}={effect['level']}" + (
            f" on {effect['workload']}" if several else ""
        )
        if effect["n"]:
            groups.setdefault(title, []).append((text.KINDS[effect["kind"]], effect))
    return _ratio_plot(analysis, width, list(groups.items()))


def _ratio_plot(
    analysis: Analysis, width: int, groups: Sequence[tuple[str, Sequence[tuple[str, Effect]]]]
) -> Figure | None:
    """Rows of ratios with intervals around the band of what does not matter, on one log axis."""
    if not groups:
        return None
    wide = width == WIDE
    head_px, axis_px = (34, 44) if wide else (32, 44)
    left_px, right_px = (190, 212) if wide else (14, 14)
    labels = {label: lines(label, 29) for _, rows in groups for label, _ in rows}
    # a long label takes several lines: within the row of a desk, above the interval on a phone
    row_px = {
        label: 27 + 13 * (len(found) > 2) if wide else 25 + 15 * len(found)
        for label, found in labels.items()
    }
    content_px = sum(
        (head_px if title else 8) + sum(row_px[label] for label, _ in rows)
        for title, rows in groups
    )
    figure, axes = canvas(width, content_px + axis_px, left_px, right_px, axis_px)
    axes.set_ylim(content_px, 0)
    axes.set_xscale("log")
    low, high = _range(analysis, [effect for _, rows in groups for _, effect in rows])
    axes.set_xlim(low, high)
    across = axes.get_yaxis_transform()
    axes_px = width - left_px - right_px
    _ratio_axis(axes)
    if wide:
        _draw_band(axes, analysis, 0, content_px)
        axes.grid(axis="x", color=LIGHT["rule"], linewidth=0.8)
        axes.set_axisbelow(True)
    y = 0.0
    for title, rows in groups:
        if title:
            axes.text(-left_px / axes_px, y + head_px - 11, title, transform=across, **HEAD)
            if wide and len(rows) >= _LONG:
                _repeat_ticks(axes, y + head_px - 11)
        y += head_px if title else 8
        for label, effect in rows:
            color = LIGHT.get(effect["verdict"], LIGHT["ink"])
            if wide:
                middle = y + row_px[label] / 2
                axes.plot(
                    [0, 1],
                    [middle, middle],
                    "-",
                    transform=across,
                    color=LIGHT["rule"],
                    linewidth=0.8,
                    zorder=0.5,
                )
                axes.text(
                    -left_px / axes_px,
                    middle,
                    "\n".join(labels[label]),
                    transform=across,
                    va="center",
                    fontsize=12 if len(labels[label]) == 1 else 10.5,
                    linespacing=1.05,
                )
                axes.text(
                    1 + 82 / axes_px,
                    middle,
                    text.ratio(effect["ratio"]),
                    transform=across,
                    va="center",
                    ha="right",
                    color=color,
                )
                axes.text(
                    1 + 94 / axes_px,
                    middle,
                    text.verdict(effect),
                    transform=across,
                    va="center",
                    color=color,
                )
            else:  # the words stand above the interval, on plain paper
                bottom = y + row_px[label]
                middle = bottom - 12
                _draw_band(axes, analysis, bottom - 22, bottom - 2)
                for i, line in enumerate(labels[label]):
                    axes.text(-left_px / axes_px, y + 13 + 15 * i, line, transform=across)
                axes.text(
                    1 + right_px / axes_px,
                    y + 13,
                    f"{text.ratio(effect['ratio'])}  {text.verdict(effect)}",
                    transform=across,
                    ha="right",
                    color=color,
                    fontsize=11 if text.is_suggestive(effect) else 12,
                )
            _draw_effect(axes, middle, effect)
            y += row_px[label]
    axes.set_xlabel("ratio, log scale; shaded: too small to matter")
    return figure


def _draw_band(axes: Axes, analysis: Analysis, top: float, bottom: float) -> None:
    low, high = analysis["rule"]["band"]
    axes.add_patch(
        Rectangle((low, top), high - low, bottom - top, color=LIGHT["band"], linewidth=0, zorder=0)
    )
    axes.plot(
        [1, 1],
        [top, bottom],
        "-",
        color=LIGHT["muted"],
        linewidth=1,
        solid_capstyle="butt",
        zorder=1,
    )


def _draw_effect(axes: Axes, y: float, effect: Effect) -> None:
    color = LIGHT.get(effect["verdict"], LIGHT["ink"])
    blocks = list(effect["by_block"].values())
    axes.plot(
        blocks,
        [y] * len(blocks),
        "o",
        color=color,
        markersize=4,
        alpha=0.28,
        markeredgewidth=0,
        zorder=2,
    )
    if effect["low"] is not None:
        axes.plot(
            [_drawn(effect["low"]), _drawn(effect["high"])],
            [y, y],
            "-",
            color=color,
            linewidth=2.5,
            zorder=3,
        )
    hollow = effect["verdict"] == "inconclusive"
    axes.plot(
        [effect["ratio"]],
        [y],
        "o",
        color=color,
        markersize=6.5,
        markeredgewidth=1.6,
        zorder=4,
        markerfacecolor=LIGHT["paper"] if hollow else color,
    )


def _range(analysis: Analysis, effects: Sequence[Effect]) -> tuple[float, float]:
    """Limits of the ratio axis that hold every dot, interval and the band, with a margin."""
    values = [
        value
        for effect in effects
        for value in (
            *effect["by_block"].values(),
            *(_drawn(end) for end in (effect["low"], effect["high"]) if end is not None),
        )
    ]
    low, high = min(analysis["rule"]["band"][0], *values), max(analysis["rule"]["band"][1], *values)
    margin = (high / low) ** 0.06
    return low / margin, high * margin


def _drawn(end: float) -> float:
    """An end of an interval, or the edge of the picture where it lies far outside: beyond any ratio
    that is worth an axis.
    """
    return min(max(end, 1 / _EDGE), _EDGE)


def _repeat_ticks(axes: Axes, y: float) -> None:
    low, high = axes.get_xlim()
    for tick in axes.get_xticks():
        if low <= tick <= high:
            axes.text(
                tick,
                y,
                _times(tick),
                ha="center",
                color=LIGHT["muted"],
                fontsize=11,
                bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1},
            )


def _times(ratio: float) -> str:
    return f"×{ratio:.4g}"


def _ratio_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(log_ticks(*axes.get_xlim()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _times(value)))
