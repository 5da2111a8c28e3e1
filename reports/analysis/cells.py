"""What each configuration of a study came to, in the few numbers that people compare: one flat row
a cell, for tools that show runs side by side.

Every number is taken from the analysis as it stands; nothing is computed again.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reports.analysis.compare import against_engines, throughput_rows
from reports.analysis.types import Analysis
from reports.statistics.metrics import GOODPUT, SUSTAINABLE, THROUGHPUT
from reports.text import interval, is_suggestive, ratio, uncorrected, verdict

SHORT = {
    THROUGHPUT.key: "output_tokens_per_s",
    "time_to_first_token_p50_s": "ttft_p50_s",
    "time_per_output_token_p50_s": "tpot_p50_s",
    GOODPUT.key: GOODPUT.key,
    SUSTAINABLE.key: SUSTAINABLE.key,
    "time_to_first_token_p90_s": "ttft_p90_s",
    "inter_token_latency_p99_s": "itl_p99_s",
    "end_to_end_p90_s": "e2e_p90_s",
}
"""The rates that a row has, by the names that they have there."""
ADDED_LAST = "as_last"
"""The metric of `all-but-X`: what X gains, added last; the speedup of that cell says little about X."""
UNDER_LOAD = ("ttft_p90_s", "itl_p99_s", "e2e_p90_s", GOODPUT.key, SUSTAINABLE.key)
"""Those of studies whose requests arrive over time."""
CURVES = {
    "time_to_first_token": ("90", "ttft_p90_s"),
    "inter_token_latency": ("99", "itl_p99_s"),
    "end_to_end": ("90", "e2e_p90_s"),
}


def by_cell(analysis: Analysis) -> dict[str, dict[str, Any]]:
    """{cell: its row}, in the order of the plan.

    metrics: {"<workload>/speedup", "_low", "_high", "/output_tokens_per_s", "/ttft_p50_s",
    "/tpot_p50_s": number}, "/as_last" of everything on but one, and ratios to other engines.
    A study of another metric than throughput
    has the ratio of its own metric too.
    verdicts: {workload: verdict} on the study's metric; intervals: {workload: "0.644–0.920"}, as text;
    verdict: the one for all workloads together where there is one, else what all of them share,
    `mixed` where they do not; None for a cell that is not compared with the baseline.
    gate: pass, fail, or descriptive where its outputs were not judged.
    evidence: `intervals` (two blocks or more), `single block`, `descriptive` (not judged), `none`.
    curves: under load alone: {latency: [[requests per second, seconds], ...]}, by rising rate.
    says: the ratios as a reader sees them, one line each.
    """
    pairs = _pairs(analysis)
    return {cell: _row(analysis, cell, pairs) for cell in analysis["cells"]}


def _row(
    analysis: Analysis, cell: str, pairs: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    effects = [effect for effect in analysis["effects"] if effect["cell"] == cell and effect["n"]]
    own = [effect for effect in effects if effect["metric"] == analysis["metric"]["key"]]
    verdicts = {effect["workload"]: verdict(effect) for effect in own}
    together = next((v for name, v in verdicts.items() if name not in analysis["workloads"]), None)
    distinct = set(verdicts.values())
    ours = [(name, effect) for name, effect in pairs if effect["cell"] == cell and effect["n"]]
    curves = {"curves": _curves(analysis, cell)} if "load" in analysis else {}
    return {
        **curves,
        "shown": analysis["shown"][cell],
        "role": analysis["cells"][cell]["role"],
        "metrics": dict(_metrics(analysis, cell, effects, ours)),
        "verdicts": verdicts,
        "intervals": {
            effect["workload"]: interval(effect["low"], effect["high"], "–")
            for effect in own
            if effect["low"] is not None
        },
        "verdict": together
        or (next(iter(distinct)) if len(distinct) == 1 else "mixed" if distinct else None),
        "gate": _gate(analysis, cell),
        "evidence": _evidence(analysis, cell),
        "says": [
            *(_says(analysis["shown"][analysis["baseline"]], effect) for effect in own),
            *(_says(analysis["shown"][effect["reference"]], effect) for _, effect in ours),
            *(
                f"{row['factor']}, added last: {_says(analysis['shown'][cell], row)}"
                for row in _added_last(analysis, cell)
            ),
        ],
    }


def _curves(analysis: Analysis, cell: str) -> dict[str, list[list[float]]]:
    """Latency against the rate of the workloads with a rate of their own."""
    searched = {row["workload"] for row in analysis["load"]["found"]}
    rows = [
        row
        for row in analysis["load"]["rows"]
        if row["cell"] == cell and row["workload"] not in searched and row["offered"]
    ]
    return {
        short: sorted(
            [row["offered"], row["quantiles"][metric][percentile]["mean"]]
            for row in rows
            if percentile in row["quantiles"].get(metric, {})
        )
        for metric, (percentile, short) in CURVES.items()
    }


def _metrics(
    analysis: Analysis,
    cell: str,
    effects: Sequence[Mapping[str, Any]],
    ours: Sequence[tuple[str, Mapping[str, Any]]],
) -> Iterator[tuple[str, float]]:
    if cell == analysis["baseline"]:
        for row in analysis["rates"]:  # ×1 by definition, as the report says
            if row["cell"] == cell and row["metric"] == THROUGHPUT.key and row["n"]:
                yield f"{row['workload']}/speedup", 1.0
    for effect in effects:
        if effect["metric"] == THROUGHPUT.key:
            yield from _bounds("speedup", effect)
        elif effect["metric"] == analysis["metric"]["key"]:
            yield from _bounds(f"{effect['metric']}_ratio", effect)
    for name, effect in ours:
        yield from _bounds(name, effect)
    for effect in _added_last(analysis, cell):
        yield f"{effect['workload']}/{ADDED_LAST}", effect["ratio"]
    for row in analysis["rates"]:
        short = SHORT.get(row["metric"])
        if row["cell"] != cell or row["mean"] is None or short is None:
            continue
        if short not in UNDER_LOAD or "load" in analysis:
            yield f"{row['workload']}/{SHORT[row['metric']]}", row["mean"]
    for row in analysis["unjudged"]:
        if row["cell"] == cell:
            yield f"{row['workload']}/{SHORT[THROUGHPUT.key]}", row["median"]


def _added_last(analysis: Analysis, cell: str) -> list[Any]:
    """The effects, one for each workload, of the optimization that `cell` lacks of everything on."""
    return [
        effect
        for effect in analysis["factors"]
        if effect["kind"] == "left out"
        and effect.get("part_of_all", True)
        and effect.get("off") == cell
        and effect["ratio"] is not None
    ]


def _pairs(analysis: Analysis) -> list[tuple[str, Mapping[str, Any]]]:
    """(name of the metric, effect) of ratios to other cells than the baseline: those that the report
    shows.
    """
    compared = [effect for _, effect in throughput_rows(analysis, analysis["comparisons"])]
    if not against_engines(analysis):
        compared += analysis["references"]
    kind = {THROUGHPUT.key: "speedup"}
    return [
        (
            f"{kind.get(effect['metric'], effect['metric'] + '_ratio')}_over_{effect['reference']}",
            effect,
        )
        for effect in compared
    ]


def _bounds(name: str, effect: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, bound in (("", "ratio"), ("_low", "low"), ("_high", "high")):
        if effect[bound] is not None:
            yield f"{effect['workload']}/{name}{key}", effect[bound]


def _says(start: str, effect: Mapping[str, Any]) -> str:
    within = "" if effect["low"] is None else f" ({interval(effect['low'], effect['high'])})"
    why = f"; {uncorrected(effect['tests'])}" if is_suggestive(effect) else ""
    return f"{effect['workload']}: {ratio(effect['ratio'])}{within} relative to {start}: {verdict(effect)}{why}"


def _gate(analysis: Analysis, cell: str) -> str:
    """A launch whose outputs failed is excluded, and its cell is not among those of a gate's row."""
    failed = any(
        row["cell"] == cell and row["reason"].startswith("gate:") for row in analysis["excluded"]
    )
    statuses = {row["status"] for row in analysis["gate"]["rows"] if cell in row["cells"]}
    if failed or statuses - {"pass"}:
        return "fail"
    return "pass" if statuses else "descriptive"


def _evidence(analysis: Analysis, cell: str) -> str:
    blocks = max((row["n"] for row in analysis["rates"] if row["cell"] == cell), default=0)
    if blocks:
        return "intervals" if blocks > 1 else "single block"
    unjudged = any(row["cell"] == cell for row in analysis["unjudged"])
    return "descriptive" if unjudged else "none"
