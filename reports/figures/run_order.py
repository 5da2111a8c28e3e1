"""The picture of the run order: drift, warm-up and throttling would show here as a trend within or
across blocks.
"""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from reports.figures.svg import LIGHT, PIXELS_PER_INCH

TELEMETRY_LABELS = {
    "gpu0_sm_mhz": "GPU clock, MHz",
    "cpu_mhz": "CPU clock, MHz",
    "gpu0_celsius": "GPU, °C",
    "cpu_busy": "CPU busy, share",
}
LEAST_PERCENT = 0.1
"""The axis shows at least this much to both sides: less is nothing, and has labels too long for their place."""
COLORS = {"baseline": "ink", "aa": "inconclusive", "reference": "slower"}
NAMES = {"aa": "A/A twin", "other": "others", "reference": "reference"}


def run_order(analysis: Mapping[str, Any], width: int) -> Figure | None:
    """The study's metric of each launch, relative to its own cell's mean, against the order of the
    launches; telemetry below.

    Relative to its cell, because the cells differ by design: what is left is what order and time
    did.
    """
    launches = analysis["order"]["launches"]
    points = _relative(analysis)
    if not points:
        return None
    series = analysis["order"]["telemetry_series"]
    legend_px, main_px, small_px, gap_px, axis_px, left_px, right_px = 26, 170, 62, 20, 36, 52, 8
    height = legend_px + main_px + (small_px + gap_px) * len(series) + axis_px
    figure = Figure(
        figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH
    )
    top = legend_px
    for panel in ("main", *series):
        panel_px = main_px if panel == "main" else small_px
        axes = figure.add_axes(
            (
                left_px / width,
                1 - (top + panel_px) / height,
                (width - left_px - right_px) / width,
                panel_px / height,
            )
        )
        top += panel_px + gap_px
        axes.set_xlim(-0.7, len(launches) - 0.3)
        axes.xaxis.set_major_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(5 if panel == "main" else 2, min_n_ticks=2))
        for first, last, block in _blocks(launches):
            if block % 2 == 0:
                axes.axvspan(
                    first - 0.5, last + 0.5, color=LIGHT["band"], alpha=0.55, linewidth=0, zorder=0
                )
        if panel == "main":
            if max(abs(y) for _, y, _ in points) < LEAST_PERCENT:
                axes.set_ylim(-LEAST_PERCENT, LEAST_PERCENT)
            axes.axhline(0, color=LIGHT["muted"], linewidth=1, zorder=1)
            for role in ("other", "reference", "aa", "baseline"):
                own = [(x, y) for x, y, point_role in points if point_role == role]
                axes.plot(
                    [x for x, _ in own],
                    [y for _, y in own],
                    "o",
                    markersize=5 if width > 400 else 3.8,
                    markeredgewidth=0,
                    alpha=0.5 if role == "other" else 0.95,
                    color=LIGHT[COLORS.get(role, "faster")],
                    zorder=2,
                )
            axes.yaxis.set_major_formatter(
                FuncFormatter(
                    lambda value, _: f"{value:+.3g} %".replace("-", "−") if value else "0"
                )
            )
        else:
            values = [(x, row["telemetry"].get(panel)) for x, row in enumerate(launches)]
            axes.plot(
                [x for x, v in values if v is not None],
                [v for _, v in values if v is not None],
                "-",
                color=LIGHT["equivalent"],
                linewidth=1.2,
            )
            axes.margins(y=0.25)
            axes.ticklabel_format(axis="y", useOffset=False)
            axes.text(
                0,
                1.08,
                TELEMETRY_LABELS.get(panel, panel),
                transform=axes.transAxes,
                color=LIGHT["muted"],
                fontsize=10.5,
            )
    for first, last, block in _blocks(launches):
        axes.text(
            (first + last) / 2,
            -0.08,
            str(block),
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            color=LIGHT["muted"],
            fontsize=10.5,
        )
    axes.set_xlabel("block, launches in the order in which they ran", labelpad=18)
    drawn = {point[2] for point in points}
    roles = [role for role in ("baseline", *NAMES) if role in drawn]
    _legend(figure, roles, analysis["shown"][analysis["baseline"]], width, height)
    return figure


def _relative(analysis: Mapping[str, Any]) -> list[tuple[int, float, str]]:
    """(place in the order, per cent off its cell's mean, role) of each launch that has the metric,
    on the study's last workload.

    The last one is all workloads together where there are several.
    """
    key = analysis["metric"]["key"]
    means = {
        (row["workload"], row["cell"]): row["mean"]
        for row in analysis["rates"]
        if row["metric"] == key
    }
    workload = next(
        reversed([row["workload"] for row in analysis["rates"] if row["metric"] == key]), None
    )
    points = []
    for x, row in enumerate(analysis["order"]["launches"]):
        value, mean = row["values"].get(workload), means.get((workload, row["cell"]))
        if value is not None and mean:
            role = analysis["cells"][row["cell"]]["role"]
            points.append((x, 100 * (value / mean - 1), role if role in COLORS else "other"))
    return points


def _blocks(launches: list[Mapping[str, Any]]) -> list[tuple[int, int, int]]:
    """(first place, last place, block) of each run of launches of one block."""
    runs: list[tuple[int, int, int]] = []
    for x, row in enumerate(launches):
        if runs and runs[-1][2] == row["block"]:
            runs[-1] = (runs[-1][0], x, row["block"])
        else:
            runs.append((x, x, row["block"]))
    return runs


def _legend(figure: Figure, roles: list[str], start: str, width: int, height: int) -> None:
    x = 52.0
    for role in roles:
        label = NAMES.get(role, start)
        figure.text(
            x / width,
            1 - 13 / height,
            "●",
            color=LIGHT[COLORS.get(role, "faster")],
            fontsize=9,
            va="center",
        )
        figure.text(
            (x + 13) / width,
            1 - 13 / height,
            label,
            color=LIGHT["muted"],
            fontsize=11,
            va="center",
        )
        x += 13 + len(label) * 6.6 + 16
