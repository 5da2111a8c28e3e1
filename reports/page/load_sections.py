"""What only a study has whose requests arrive over time: latency against the rate, goodput, the
sustainable rate, how the load was delivered; and the energy of any study whose power was sampled.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from reports import text
from reports.analysis.types import Analysis
from reports.analysis.under_load import ITL_P99, highest_rate
from reports.page.document import Column, Section, Table
from reports.page.overview import CONFIGURATION, VERDICT, WORKLOAD, confidence, name, numbers
from reports.statistics.metrics import EVERY
from reports.statistics.under_load import LEAST_REQUESTS, OVERLOAD_GROWTH

SHORT = {
    "time_to_first_token": "TTFT",
    "time_per_output_token": "TPOT",
    "inter_token_latency": "ITL",
    "end_to_end": "E2E",
}
STATES = {
    "steady": "steady",
    "too short": "too short",
    "trend": "with a trend",
    "overloaded": "overloaded",
}


TERMS = (
    "TTFT, time to first token: from the time when a request was due to its first output token. TPOT, time per output "
    "token: the mean time between the later tokens of a request. ITL, inter-token latency: the time between two tokens, each "
    "gap counted by itself. E2E, end to end: to the last token."
)


def load_head(analysis: Analysis) -> Iterator[Section]:
    """What everybody reads of a study under load."""
    load = analysis.get("load")
    if load is None:
        return
    rows = [row for row in load["rows"] if row["quantiles"]]
    percentiles = [("time_to_first_token", p) for p in ("50", "90", "99")]
    percentiles += [("inter_token_latency", p) for p in ("50", "99")]
    percentiles += [("end_to_end", p) for p in ("50", "90", "99")]
    table = Table(
        "Latency at each rate, mean over launches",
        [
            WORKLOAD,
            CONFIGURATION,
            *numbers("rate, req/s", *(f"{SHORT[metric]} p{p}" for metric, p in percentiles)),
            *numbers("goodput, req/s", "within the SLO"),
        ],
        [
            [
                row["workload"],
                name(analysis, row["cell"]),
                text.number(row["offered"]),
                *(_claimed(row["quantiles"].get(metric, {}).get(p)) for metric, p in percentiles),
                text.number(row["goodput"]["mean"]) if row["goodput"] else text.ABSENT,
                text.percent(row["attained"]),
            ]
            for row in rows
        ],
        grouped=True,
    )
    yield Section(
        "load",
        "Under load",
        [TERMS, _objective_words(load["rules"]), *_verdicts(analysis)],
        "curves",
        [table, *_found(analysis)],
        notes=[*_too_few(rows), *_states(load["rows"])],
    )


def latency_summary(analysis: Analysis) -> tuple[str, list[str], list[list[str]]] | None:
    """Latencies at the highest fixed rate and the sustainable rate of each configuration, for a terminal:
    title, names of the columns, rows of text. None for a study without arrivals over time.
    """
    load = analysis.get("load")
    workload = highest_rate(analysis) if load else ""
    if not load or not workload:
        return None
    rows = [row for row in load["rows"] if row["workload"] == workload and row["quantiles"]]
    found = {row["cell"]: row for row in load["found"]}
    percentiles = [("time_to_first_token", "90"), ("inter_token_latency", "99")]
    columns = [f"{SHORT[metric]} p{p}" for metric, p in percentiles] + ["within the SLO"]
    columns += ["sustainable, req/s"] * bool(found)
    lines = []
    for row in rows:
        line = [name(analysis, row["cell"])]
        line += [_claimed(row["quantiles"].get(metric, {}).get(p)) for metric, p in percentiles]
        line.append(text.percent(row["attained"], 0))
        if found:
            line.append(_sustained(found.get(row["cell"])))
        lines.append(line)
    return f"latency on {workload}", columns, lines


def _sustained(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return text.ABSENT
    below = f"below {text.number(row['lowest'])}"
    if row["mean"] is None:
        return below
    none = row["none"]
    return f"{below} in {none} of {row['launches']}" if none else text.number(row["mean"])


def load_folded(analysis: Analysis) -> Iterator[Section]:
    """The evidence behind it: intervals, what was delivered, steadiness."""
    load = analysis.get("load")
    if load is None:
        return
    intervals = Table(
        f"Percentiles with {confidence(analysis)} intervals",
        [
            WORKLOAD,
            CONFIGURATION,
            Column("percentile", "code"),
            *numbers("mean", "over launches", "launches", "within a launch", "samples", "needed"),
        ],
        [
            [
                row["workload"],
                name(analysis, row["cell"]),
                f"{SHORT[metric]} p{p}",
                text.seconds(found["mean"]),
                _times(found["low"], found["high"]),
                str(row["launches"]),
                _times(found["within"]["low"], found["within"]["high"]),
                text.number(int(found["within"]["samples"])),
                text.number(found["within"]["needed"]),
            ]
            for row in load["rows"]
            for metric, by_percentile in row["quantiles"].items()
            for p, found in by_percentile.items()
        ],
        grouped=True,
    )
    delivered = Table(
        "The load as delivered",
        [
            WORKLOAD,
            CONFIGURATION,
            *numbers("requests", "delivered, least", "generator late, p99", "cut, most", "kept"),
            *numbers("backlog growth"),
            Column("state"),
        ],
        [
            [
                row["workload"],
                name(analysis, row["cell"]),
                text.number(row["requests"]),
                text.percent(row["delivered"]),
                text.seconds(row["lateness_p99_s"]),
                str(row["cut"]),
                str(row["kept"]),
                f"{row['growth']:+.2f}",
                ", ".join(f"{n} {STATES[state]}" for state, n in row["states"].items()),
            ]
            for row in load["rows"]
        ],
        grouped=True,
    )
    effects = Table(
        f"Latency relative to {name(analysis, analysis['baseline'])}",
        [
            Column("metric"),
            WORKLOAD,
            CONFIGURATION,
            *numbers("ratio", f"{confidence(analysis)} interval"),
            VERDICT,
            *numbers("p (Holm)", "blocks"),
        ],
        [
            [
                EVERY[effect["metric"]].label,
                effect["workload"],
                name(analysis, effect["cell"]),
                text.ratio(effect["ratio"]),
                text.interval(effect["low"], effect["high"]),
                text.verdict(effect),
                text.probability(effect["p_holm"]),
                str(effect["n"]),
            ]
            for effect in analysis["effects"]
            if EVERY[effect["metric"]].unit == "s" and effect["n"]
        ],
        grouped=True,
        folded=True,
    )
    rules = load["rules"]
    yield Section(
        "load-evidence",
        "The load, its steadiness, and what the percentiles rest on",
        [
            "Over launches: Student's t on the logarithms of one percentile a launch. Within a launch: order statistics of "
            "the launch in the middle, with an effective number of samples, because requests that wait for each other are "
            "not independent; none where there are fewer samples than the percentile needs. All launches serve the same "
            "arrivals, so intervals over launches tell of the noise of the machine, and ratios of these arrivals.",
            f"A launch is invalid if its generator was late by itself by more than {text.seconds(rules['max_lateness_s'])} at "
            f"p99, delivered less than {text.percent(rules['min_delivered'])} of the rate, or left a request unsent. Cut: "
            "the initial transient, which finds the queue empty, left out of every latency and of goodput: MSER-5 (White, 1997) "
            "on the mean time to first token over all launches of a workload, which are thus judged on the same requests. "
            f"State: too short to tell where MSER-5 finds no cut in the first half, or leaves fewer than {LEAST_REQUESTS} "
            f"requests; overloaded means that the backlog grew, in a trend, by more than {OVERLOAD_GROWTH:g} requests per arrival.",
        ],
        "pareto",
        [intervals, delivered, effects],
    )


def energy_section(analysis: Analysis) -> Iterator[Section]:
    """Energy beside throughput; for a study under load without power, that there is none."""
    rows = analysis.get("energy")
    if not rows:
        if "load" in analysis:
            yield Section(
                "energy",
                "Energy",
                [
                    "No power was sampled: the machine reports neither that of a GPU nor, through RAPL, that of its CPU."
                ],
                gist="not measured",
            )
        return
    rates = {
        (row["workload"], row["cell"]): row["mean"]
        for row in analysis["rates"]
        if row["metric"] == "output_tokens_per_s"
    }
    table = Table(
        "Energy",
        [
            WORKLOAD,
            CONFIGURATION,
            Column("power of"),
            *numbers("W", "tok/s", "J per output token", "J per request", "launches"),
        ],
        [
            [
                row["workload"],
                name(analysis, row["cell"]),
                row["source"].upper(),
                text.number(row["watts"]),
                text.number(rates.get((row["workload"], row["cell"]))),
                text.number(row["joules_per_output_token"]),
                text.number(row["joules_per_request"]),
                str(row["launches"]),
            ]
            for row in rows
        ],
        grouped=True,
    )
    yield Section(
        "energy",
        "Energy",
        [
            "Mean sampled power while a workload was served, times its duration. It is the power of whole GPUs or CPU "
            "packages, idle power included; where requests arrive over time, waiting for them costs energy too."
        ],
        None,
        [table],
    )


def _claimed(found: Mapping[str, Any] | None) -> str:
    """A percentile; an asterisk where a launch has too few samples for it."""
    if found is None:
        return text.ABSENT
    few = found["within"]["low"] is None
    return text.seconds(found["mean"]) + ("*" if few else "")


def _too_few(rows: list[dict[str, Any]]) -> Iterator[str]:
    wanting: dict[str, tuple[int, int]] = {}
    for row in rows:
        for by_percentile in row["quantiles"].values():
            for percentile, found in by_percentile.items():
                within = found["within"]
                if within["low"] is None:
                    least, _ = wanting.get(percentile, (within["samples"], 0))
                    wanting[percentile] = (
                        min(int(within["samples"]), int(least)),
                        within["needed"],
                    )
    if wanting:
        needs = "; ".join(
            f"p{percentile} needs {needed} independent samples a launch, and there are as few as {samples}"
            for percentile, (samples, needed) in sorted(wanting.items())
        )
        yield f"* Not claimed: {needs}. Longer runs (num_requests) would have them."


def _states(rows: list[dict[str, Any]]) -> Iterator[str]:
    for state in ("overloaded", "too short", "trend"):
        found = [
            f"{row['cell']} at {row['workload']}" for row in rows if row["states"].get(state, 0)
        ]
        if found:
            shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
            yield f"In at least one launch {STATES[state]}: {shown}."


def _objective_words(rules: Mapping[str, Any]) -> str:
    if rules["slo"] is None:
        return (
            "Latencies count from the time when a request was due, waiting in the client included."
        )
    limits = ", ".join(
        f"{key.removesuffix('_s').upper()} at most {text.seconds(limit)}"
        for key, limit in rules["slo"].items()
        if limit is not None
    )
    preset = f" ({rules['slo_name']})" if rules.get("slo_name") else ""
    return (
        f"The service level objective (SLO) of a request: {limits}{preset}. Goodput: requests per second that meet it. "
        "Latencies count from the time when a request was due, waiting in the client included."
    )


def _verdicts(analysis: Analysis) -> Iterator[str]:
    """The verdicts on the sustainable rate and, at the highest fixed rate, on goodput and on the gaps
    between tokens, in words.
    """
    load = analysis["load"]
    searched = {row["workload"] for row in load["found"]}
    highest = highest_rate(analysis)
    for metric, label, workloads in (
        ("sustainable_requests_per_s", "Sustainable rate", searched),
        ("goodput_requests_per_s", f"Goodput on {highest}", {highest}),
        (ITL_P99, f"ITL p99 on {highest}", {highest}),
    ):
        said = [
            f"{name(analysis, effect['cell'])} {text.ratio(effect['ratio'])} "
            f"({text.interval(effect['low'], effect['high'])}), {text.verdict(effect)}"
            for effect in analysis["effects"]
            if effect["metric"] == metric
            and effect["workload"] in workloads
            and effect["n"]
            and effect["role"] != "aa"
        ]
        if said:
            yield f"{label}, relative to {name(analysis, analysis['baseline'])}: {'; '.join(said)}."


def _found(analysis: Analysis) -> Iterator[Table]:
    load = analysis["load"]
    if not load["found"]:
        return
    share = text.percent(load["rules"]["attainment"], 0)
    yield Table(
        f"Sustainable rate: the highest at which {share} of requests meet the SLO",
        [
            WORKLOAD,
            CONFIGURATION,
            *numbers("req/s", f"{confidence(analysis)} interval", "launches", "trials"),
            Column("note"),
        ],
        [
            [
                row["workload"],
                name(analysis, row["cell"]),
                text.number(row["mean"]),
                "no interval"
                if row["low"] is None
                else f"{text.number(row['low'])} to {text.number(row['high'])}",
                str(row["launches"]),
                str(row["trials"]),
                _search_note(row),
            ]
            for row in load["found"]
        ],
        grouped=True,
    )


def _search_note(row: Mapping[str, Any]) -> str:
    said = []
    if row["none"]:
        said.append(f"below {text.number(row['lowest'])} in {row['none']}")
    if row["beyond"]:
        said.append(f"beyond the highest rate tried in {row['beyond']}")
    return "; ".join(said) or text.ABSENT


def _times(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "no interval"
    return f"{text.seconds(low)} to {text.seconds(high)}"
