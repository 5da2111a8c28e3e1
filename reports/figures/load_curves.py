"""The pictures of a study under load: latency against the rate, and throughput against latency."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from reports import text
from reports.figures.layout import log_ticks, shorten
from reports.figures.svg import LIGHT, PIXELS_PER_INCH

Analysis = Mapping[str, Any]

PANELS = (
    ("time_to_first_token", "90", "TTFT p90"),
    ("inter_token_latency", "99", "ITL p99"),
    ("end_to_end", "90", "E2E p90"),
)
"""Percentiles that a launch of a few hundred requests can tell."""
DASHES = ("-", (0, (5, 2)), (0, (1, 1.6)), (0, (5, 1.5, 1, 1.5)))
MARKS = ("o", "s", "^", "D", "v", "P", "X")
LEGEND_ROW_PX = 18


def curves(analysis: Analysis, width: int) -> Figure | None:
    """Each latency against the rate at which requests came, a line for each configuration; bars are
    intervals over launches. None with fewer than two rates.
    """
    rows = _rows(analysis)
    if len({row["workload"] for row in rows}) < 2:
        return None
    columns = 3 if width > 400 else 1
    figure, panels, cells = _canvas(analysis, rows, width, columns, len(PANELS))
    for axes, (metric, percentile, label) in zip(panels, PANELS, strict=True):
        for number, cell in enumerate(cells):
            points = [
                (row["offered"], row["quantiles"][metric][percentile])
                for row in rows
                if row["cell"] == cell and percentile in row["quantiles"].get(metric, {})
            ]
            points.sort(key=lambda point: point[0])
            _line(axes, number, [x for x, _ in points], [found for _, found in points])
        _finish(axes, label, "requests per second")
    return figure


def pareto(analysis: Analysis, width: int) -> Figure | None:
    """Output tokens per second against the gap between tokens and the time to the first one; a point
    for each configuration and rate. What lies to the lower right of another point is better.
    """
    rows = _rows(analysis)
    rates = {
        (row["workload"], row["cell"]): row["mean"]
        for row in analysis["rates"]
        if row["metric"] == "output_tokens_per_s"
    }
    if len({row["workload"] for row in rows}) < 2:
        return None
    columns = 2 if width > 400 else 1
    figure, panels, cells = _canvas(analysis, rows, width, columns, 2)
    for axes, (metric, percentile, label) in zip(panels, PANELS[:2], strict=True):
        front = []
        for number, cell in enumerate(cells):
            points = sorted(
                (rates[row["workload"], cell], row["quantiles"][metric][percentile]["mean"])
                for row in rows
                if row["cell"] == cell
                and percentile in row["quantiles"].get(metric, {})
                and rates.get((row["workload"], cell))
            )
            front += points
            _points(axes, number, points)
        best = pareto_front(front)
        axes.plot(
            [x for x, _ in best],
            [y for _, y in best],
            color=LIGHT["muted"],
            linewidth=1,
            zorder=1,
        )
        _finish(axes, label, "output tokens per second")
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (throughput, latency) that no other beats in one and equals in the other, by rising
    throughput.
    """
    front: list[tuple[float, float]] = []
    for throughput, latency in sorted(set(points), key=lambda point: (-point[0], point[1])):
        if not front or latency < front[-1][1]:
            front.append((throughput, latency))
    return front[::-1]


def _rows(analysis: Analysis) -> list[Mapping[str, Any]]:
    """The rows of workloads with a rate of their own; the A/A twin would hide the baseline."""
    load = analysis.get("load")
    if load is None:
        return []
    searched = {row["workload"] for row in load["found"]}
    return [
        row
        for row in load["rows"]
        if row["offered"]
        and row["workload"] not in searched
        and analysis["cells"][row["cell"]]["role"] != "aa"
    ]


def _canvas(
    analysis: Analysis, rows: Sequence[Mapping[str, Any]], width: int, columns: int, panels: int
) -> tuple[Figure, list[Axes], list[str]]:
    """A figure with a legend above `panels` axes; the cells in the order of the legend."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    per_row = 3 if width > 400 else 1
    legend_px = 8 + LEGEND_ROW_PX * -(-len(cells) // per_row)
    panel_px, title_px, axis_px, left_px, right_px = 190, 26, 40, 56, 10
    lines = -(-panels // columns)
    height = legend_px + lines * (title_px + panel_px + axis_px)
    figure = Figure(
        figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH
    )
    each = width / columns
    found = []
    for panel in range(panels):
        line, column = divmod(panel, columns)
        top = legend_px + line * (title_px + panel_px + axis_px) + title_px
        found.append(
            figure.add_axes(
                (
                    (column * each + left_px) / width,
                    1 - (top + panel_px) / height,
                    (each - left_px - right_px) / width,
                    panel_px / height,
                )
            )
        )
    for number, cell in enumerate(cells):
        line, column = divmod(number, per_row)
        x, y = column * width / per_row + 4, 8 + line * LEGEND_ROW_PX
        handle = figure.add_axes((x / width, 1 - (y + 8) / height, 26 / width, 8 / height))
        handle.set_axis_off()
        _line(handle, number, [0, 1], [{"mean": 0.5, "low": None, "high": None}] * 2)
        handle.set_xlim(-0.2, 1.2)
        handle.set_ylim(0, 1)
        figure.text(
            (x + 34) / width,
            1 - (y + 4) / height,
            shorten(analysis["shown"][cell], 26 if per_row > 1 else 40),
            va="center",
            fontsize=11,
        )
    return figure, found, cells


def _color(number: int) -> str:
    names = ("ink", "faster", "equivalent", "slower", "inconclusive")
    return LIGHT[names[number % len(names)]]


def _line(axes: Axes, number: int, xs: Sequence[float], found: Sequence[Mapping[str, Any]]) -> None:
    for x, each in zip(xs, found, strict=True):
        if each["low"] is not None:
            axes.plot(
                [x, x], [each["low"], each["high"]], color=_color(number), linewidth=1, alpha=0.5
            )
    axes.plot(
        xs,
        [each["mean"] for each in found],
        linestyle=DASHES[number // 5 % len(DASHES)],
        marker=MARKS[number % len(MARKS)],
        markersize=4.5,
        markeredgewidth=0,
        linewidth=1.6,
        color=_color(number),
    )


def _points(axes: Axes, number: int, points: Sequence[tuple[float, float]]) -> None:
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        linestyle="none",
        marker=MARKS[number % len(MARKS)],
        markersize=6,
        markeredgewidth=0,
        color=_color(number),
        zorder=2,
    )


def _finish(axes: Axes, title: str, below: str) -> None:
    """Latencies on a log axis. One that spans less than a power of ten has labels too."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(log_ticks(*axes.get_ylim()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=LIGHT["muted"])
    axes.set_xlabel(below)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text.seconds(value)))
    axes.grid(True, axis="y", color=LIGHT["rule"], linewidth=0.6)
