"""The pictures of a report, each drawn twice: for a desk (720 px wide) and for a phone (360 px).

Each function takes an analysis and a width and returns a Figure, or None where there is nothing to
show. Coordinates are CSS pixels. pictures() lists those that an analysis has the numbers for, with
words for readers who cannot see them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from reports import text
from reports.figures import load_curves, price_chart
from reports.figures.layout import (
    HEAD,
    NARROW,
    WIDE,
    Analysis,
    Effect,
    by_workload,
    canvas,
    lines,
    primary,
    shorten,
)
from reports.figures.ratio_plots import (
    aa_panel,
    comparisons,
    configurations,
    factors,
    forest,
)
from reports.figures.run_order import run_order
from reports.figures.svg import LIGHT, style
from reports.switches import by_switch


@dataclass(frozen=True)
class Picture:
    """One figure of a report: its name on the page, its title, what it shows in words, and how it
    is drawn.
    """

    name: str
    title: str
    description: str
    draw: Callable[[Analysis, int], Figure | None]


def pictures(analysis: Analysis) -> list[Picture]:
    """Every picture that this analysis has the numbers for."""
    band = text.interval(*analysis["rule"]["band"])
    shown = analysis["shown"]
    start = shown[analysis["baseline"]]
    effects = [(shown[effect["cell"]], effect) for effect in primary(analysis) if effect["n"]]
    split = any(by_switch(analysis, workload) for workload in analysis["workloads"])
    found = [
        Picture(
            "forest",
            "Speedup of each optimization, alone and added last"
            if split and analysis["metric"]["better"] == "higher"
            else f"Speedup of each configuration relative to {start}"
            if analysis["metric"]["better"] == "higher"
            else f"{analysis['metric']['label']} of each configuration relative to {start}",
            f"Ratios with intervals on a log axis; the band {band} is too small to matter. "
            f"{_in_words([*comparisons(analysis), *configurations(analysis)])}",
            forest,
        ),
        Picture(
            "aa",
            f"{start} against itself",
            "The ratio of the A/A twin in each block. "
            f"{_in_words([(label, e) for label, e in effects if e['role'] == 'aa'])}",
            aa_panel,
        ),
        Picture(
            "factors",
            "Each optimization alone and together",
            f"Ratios with intervals: added to {start}, added last, on average, and Shapley's share; see the table.",
            factors,
        ),
        Picture(
            "interactions",
            "Two-way interactions",
            " ".join(
                f"{e['first']} with {e['second']} on {e['workload']}: {text.ratio(e['ratio'])}, {e['verdict']}."
                for e in analysis["interactions"]
            ),
            interactions,
        ),
        Picture(
            "ceiling",
            "Throughput against its roofline bound",
            " ".join(
                f"{shown[row['cell']]} on {row['workload']} reaches {text.percent(row['share'])} of the bound."
                for row in analysis["ceiling"]
                if row["share"] is not None
            ),
            ceiling,
        ),
        Picture(
            "curves",
            "Latency against the rate",
            "Latencies of each configuration at each rate, on a log axis, with intervals over launches; see the table.",
            load_curves.curves,
        ),
        Picture(
            "pareto",
            "Throughput against latency",
            "A point for each configuration and rate: output tokens per second against latency, on a log axis. The grey line "
            "joins those that no other point beats.",
            load_curves.pareto,
        ),
        Picture(
            "price",
            "Price against speed",
            "KL divergence from the unquantized model against the ratio to the starting point, with intervals of both; the "
            "dashed line is the margin of the study. "
            + " ".join(
                f"{shown[e['cell']]} on {e['workload']}: {text.ratio(e['ratio'])}, {row['verdict']}."
                for found in price_chart.points(analysis).values()
                for e, row in found
            ),
            price_chart.price,
        ),
        Picture(
            "order",
            "Run order",
            "Each launch relative to the mean of its own configuration, in the order in which the launches ran, with "
            "telemetry below.",
            run_order,
        ),
    ]
    with style():
        return [picture for picture in found if picture.draw(analysis, NARROW) is not None]


def draw(picture: Picture, analysis: Analysis, width: int) -> Figure:
    with style():
        figure = picture.draw(analysis, width)
    assert figure is not None, f"{picture.name} has nothing to show"
    return figure


def interactions(analysis: Analysis, width: int) -> Figure | None:
    """A matrix for each workload: how many times more a pair buys than the product of what each
    buys.
    """
    rows = analysis["interactions"]
    if not rows:
        return None
    names = sorted({row[side] for row in rows for side in ("first", "second")})
    groups = list(by_workload(rows))
    left_px, tile_px, head_px = (190, 62, 56) if width == WIDE else (140, 52, 56)
    group_px = head_px + tile_px * (len(names) - 1)
    height = len(groups) * group_px + 4
    figure, axes = canvas(width, height, 0, 0, 0)
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    for number, (workload, group) in enumerate(groups):
        top = number * group_px + head_px  # of the first row of tiles
        axes.text(0, top - head_px + 18, workload, **HEAD)
        for row in group:
            column, line = sorted((names.index(row["first"]), names.index(row["second"])))
            _draw_tile(
                axes, left_px + column * tile_px, top + (line - 1) * tile_px, tile_px - 3, row
            )
        for i, name in enumerate(names):
            if i > 0:
                axes.text(
                    0,
                    top + (i - 0.5) * tile_px,
                    shorten(name, 26 if width == WIDE else 19),
                    va="center",
                )
            # above the first tile of its column, where the triangle leaves room
            if i < len(names) - 1:
                axes.text(
                    left_px + i * tile_px,
                    top + i * tile_px - 9,
                    name,
                    color=LIGHT["muted"],
                    fontsize=11,
                )
    return figure


def _draw_tile(axes: Axes, x: float, y: float, size: float, row: Effect) -> None:
    colors = {
        "help each other": "faster",
        "stand in each other's way": "slower",
        "independent": "band",
        "inconclusive": "band",
    }
    color = LIGHT[colors[row["verdict"]]]
    axes.add_patch(
        Rectangle(
            (x, y),
            size,
            size,
            facecolor=color,
            alpha=1 if color == LIGHT["band"] else 0.3,
            linewidth=0,
        )
    )
    axes.text(
        x + size / 2,
        y + size / 2,
        text.ratio(row["ratio"]),
        ha="center",
        va="center",
        fontsize=11.5,
    )
    if row["verdict"] == "inconclusive":
        axes.text(x + size - 7, y + 12, "?", ha="center", color=LIGHT["muted"])


def ceiling(analysis: Analysis, width: int) -> Figure | None:
    """Each cell's throughput as a bar within the track of its bound."""
    rows = [row for row in analysis["ceiling"] if row["share"] is not None]
    if not rows:
        return None
    wide = width == WIDE
    row_px, head_px, left_px, right_px = (26, 34, 190, 176) if wide else (40, 34, 1, 1)
    groups = list(by_workload(rows))
    labels = {row["cell"]: lines(analysis["shown"][row["cell"]], 28) for row in rows}
    rows_px = {
        cell: row_px + (0 if wide else 15 * (len(found) - 1)) for cell, found in labels.items()
    }
    height = sum(head_px + sum(rows_px[row["cell"]] for row in group) for _, group in groups) + 8
    figure, axes = canvas(width, height, left_px, right_px, 0)
    axes.set_axis_off()
    axes.set_xlim(0, max(1.0, *(row["share"] for row in rows)))
    axes.set_ylim(height, 0)
    across = axes.get_yaxis_transform()
    axes_px = width - left_px - right_px
    y = 0.0
    for workload, group in groups:
        one = min(group, key=lambda row: row["devices"])
        title = f"{workload}: at most {text.number(one['bound']['tokens_per_s'])} tok/s" + (
            " per device" if one is not group[-1] and group[-1]["devices"] > 1 else ""
        )
        axes.text(-left_px / axes_px, y + head_px - 11, title, transform=across, **HEAD)
        y += head_px
        for row in group:
            bottom, label = y + rows_px[row["cell"]], labels[row["cell"]]
            middle = y + row_px / 2 if wide else bottom - 12
            axes.barh(middle, 1, height=9, color=LIGHT["band"], linewidth=0)
            ours = analysis["cells"][row["cell"]]["role"] in ("treatment", "all")
            axes.barh(
                middle,
                row["share"],
                height=9,
                color=LIGHT["faster" if ours else "equivalent"],
                linewidth=0,
            )
            axes.text(
                -left_px / axes_px if wide else 0,
                middle if wide else y + 4,
                "\n".join(label),
                transform=across,
                va="center" if wide else "top",
                fontsize=10.5 if wide and len(label) > 1 else 12,
                linespacing=1.05,
            )
            rate, share = f"{text.number(row['tokens_per_s'])} tok/s", text.percent(row["share"])
            if wide:
                axes.text(
                    1 + 100 / axes_px,
                    middle,
                    rate,
                    transform=across,
                    ha="right",
                    va="center",
                    color=LIGHT["muted"],
                )
                axes.text(
                    1 + right_px / axes_px, middle, share, transform=across, ha="right", va="center"
                )
            else:
                axes.text(
                    1,
                    y + 14,
                    f"{rate}, {share}",
                    transform=across,
                    ha="right",
                    color=LIGHT["muted"],
                )
            y = bottom
    return figure


def _in_words(effects: Sequence[tuple[str, Effect]]) -> str:
    return " ".join(
        f"{label} on {e['workload']}: {text.ratio(e['ratio'])}, {text.interval(e['low'], e['high'])}, {text.verdict(e)}."
        for label, e in effects
    )
