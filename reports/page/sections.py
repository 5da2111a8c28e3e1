"""What a report says, section by section, from an analysis: the results first, then why they may be
believed.

results() holds effects, factors, references, ceiling and latency; evidence.py holds the other half.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from reports import text
from reports.analysis.compare import against_engines
from reports.page.compare_sections import compare_sections, pairs_of_ours
from reports.page.document import Column, Section, Table
from reports.statistics.intervals import MIN_BLOCKS_BOOTSTRAP
from reports.statistics.metrics import LATENCIES, METRICS, PERCENTILES
from reports.statistics.moderation import MOST_PRIOR

Analysis = Mapping[str, Any]
CELL, WORKLOAD, VERDICT = (
    Column("cell", "code"),
    Column("workload", "code"),
    Column("verdict", "verdict"),
)
KINDS = {
    "alone": "alone",
    "left out": "left out of all",
    "average": "on average",
    "Shapley": "Shapley's share",
}


def results(analysis: Analysis) -> Iterator[Section]:
    """The sections that answer the question, those that the design has numbers for."""
    yield from compare_sections(analysis)
    yield _effects(analysis)
    yield from _factors(analysis)
    yield from _interactions(analysis)
    yield from pairs_of_ours(analysis)
    # a study that names its pairs has said which of them are fair
    if not against_engines(analysis):
        yield from _references(analysis)
    yield _ceiling(analysis)
    yield from _latency(analysis)


def confidence(analysis: Analysis) -> str:
    return text.percent(analysis["rule"]["confidence"], 0)


def numbers(*titles: str) -> list[Column]:
    return [Column(title, "number") for title in titles]


def _ratio_columns(analysis: Analysis) -> list[Column]:
    return [
        Column("ratio", "number"),
        Column(f"{confidence(analysis)} interval", "number"),
        VERDICT,
    ]


def _ratio_cells(effect: Mapping[str, Any]) -> list[str]:
    return [
        text.ratio(effect["ratio"]),
        text.interval(effect["low"], effect["high"]),
        effect["verdict"],
    ]


def _effects(analysis: Analysis) -> Section:
    metric, rule = analysis["metric"], analysis["rule"]
    low, high = rule["band"]
    rows = [effect for effect in analysis["effects"] if effect["metric"] == metric["key"]]
    columns = [
        WORKLOAD,
        CELL,
        *_ratio_columns(analysis),
        *numbers("bootstrap", "p (Holm)", "detectable", "blocks"),
        *(numbers("degrees of freedom") if moderated(analysis) else ()),
    ]
    table = Table(
        "Effects",
        columns,
        [
            [
                effect["workload"],
                effect["cell"],
                *_ratio_cells(effect),
                text.interval(effect["boot_low"], effect["boot_high"])
                if effect["boot_low"] is not None
                else text.ABSENT,
                text.probability(effect["p_holm"]),
                text.percent(effect["detectable"]),
                str(effect["n"]),
                *([_freedom(effect)] if moderated(analysis) else ()),
            ]
            for effect in rows
        ],
        grouped=True,
    )
    lead = [
        f"Ratio of {metric['label']} to the baseline of the same block: geometric mean over blocks, Student's t "
        f"interval, and the BCa bootstrap beside it from {MIN_BLOCKS_BOOTSTRAP} blocks on. "
        f"{'Above' if metric['better'] == 'higher' else 'Below'} ×1 is better.",
        f"Equivalent: the whole interval lies between {text.interval(low, high, ' and ')}. Faster or slower: "
        f"Holm's test over {_family(analysis)} rejects equality at {text.percent(rule['alpha'], 0)}. Inconclusive: neither. "
        f"Detectable: the change that this noise and this many blocks would find in {text.percent(rule['power'], 0)} "
        "of studies.",
        *_variance_words(analysis),
    ]
    tables = [table, *([_variances(analysis)] if moderated(analysis) else ())]
    return Section("effects", "What each change buys", lead, "forest", tables)


def moderated(analysis: Analysis) -> bool:
    """Whether the study asks for moderated variances."""
    return bool(analysis["statistics"]["variance"] == "moderated")


def _freedom(effect: Mapping[str, Any]) -> str:
    """Degrees of freedom of an effect's interval: those of the moderated variance, or its own."""
    return f"{effect.get('df', effect['n'] - 1):.3g}" if effect["n"] > 1 else text.ABSENT


def _family(analysis: Analysis) -> str:
    if analysis["statistics"]["families"] == "joint":
        return "all treatments"
    return "the treatments of the same question (one switch alone; everything on; the cells between them)"


def _variance_words(analysis: Analysis) -> list[str]:
    if not moderated(analysis):
        return []
    words = (
        "The variance is moderated (Smyth 2004): what the ratios of all cells to the same one tell of this machine's noise "
        "counts like d0 more degrees of freedom of each effect, at most half as many as the effect has by itself, and no "
        "effect is taken to be less noisy than it looks. The method and its simulated coverage: docs/methodology.md."
    )
    if not analysis["statistics"]["priors"]:
        words = (
            f"The study asks for moderated variances, which need {analysis['statistics']['least_effects']} effects with two "
            "blocks or more; there are fewer, so each effect is judged by its own variance."
        )
    return [words]


def _variances(analysis: Analysis) -> Table:
    """The priors of the study's metric: noise that all effects share, and what it counts for."""
    blocks = {
        effect["n"]
        for effect in analysis["effects"]
        if effect["metric"] == analysis["metric"]["key"] and effect["n"] > 1
    }
    rows = []
    for prior in analysis["statistics"]["priors"]:
        if prior["metric"] == analysis["metric"]["key"]:
            used = [
                min(math.inf if prior["d0"] is None else prior["d0"], MOST_PRIOR * (n - 1))
                for n in blocks
            ]
            rows.append(
                [
                    prior["workload"],
                    prior["shared"],
                    str(prior["effects"]),
                    text.percent(math.expm1(prior["sd"])),
                    "∞" if prior["d0"] is None else f"{prior['d0']:.3g}",
                    _between(used),
                    _between([d0 + n - 1 for d0, n in zip(used, blocks, strict=True)]),
                ]
            )
    columns = [
        WORKLOAD,
        Column("ratios to", "code"),
        *numbers("ratios", "noise of one", "d0, estimated", "d0, used", "degrees of freedom"),
    ]
    return Table("The moderated variance", columns, rows, grouped=True)


def _between(values: list[float]) -> str:
    low, high = (f"{bound(values):.3g}" for bound in (min, max))
    return low if low == high else f"{low} to {high}"


def _factors(analysis: Analysis) -> Iterator[Section]:
    rows = sorted(
        analysis["factors"], key=lambda row: (row["workload"], row["factor"], str(row["level"]))
    )
    if all(row["kind"] == "alone" for row in rows):
        return
    columns = [
        WORKLOAD,
        Column("factor", "code"),
        Column("measured"),
        *_ratio_columns(analysis),
        *numbers("blocks"),
    ]
    table = Table(
        "Factors",
        columns,
        [
            [
                row["workload"],
                f"{row['factor']}={row['level']}",
                _measured(row),
                *_ratio_cells(row),
                str(row["n"]),
            ]
            for row in rows
        ],
        grouped=True,
    )
    lead = [
        "Alone: switched on over the baseline. Left out: what everything on loses without it. On average: over all "
        "settings of the other factors. Shapley's share: the mean over all orders of switching on; the shares "
        "multiply to the whole effect.",
    ]
    if any(row.get("without") for row in rows):
        lead.append(
            "Left out, without another: the other needs this one, so it is off on both sides of the comparison."
        )
    if any(row.get("beside") or not row.get("part_of_all", True) for row in rows):
        lead.append(
            "On top of all: no part of everything on, and compared with it; beside another: it needs the other, which "
            "is on on both sides."
        )
    yield Section("factors", "Each factor alone and in company", lead, "factors", [table])


def _measured(row: Mapping[str, Any]) -> str:
    """How an effect of a factor was measured, in the words of the table."""
    if not row.get("part_of_all", True):
        beside = f", beside {', '.join(row['beside'])}" if row.get("beside") else ""
        return f"on top of all{beside}"
    without = f", without {', '.join(row['without'])}" if row.get("without") else ""
    return KINDS[row["kind"]] + without


def _interactions(analysis: Analysis) -> Iterator[Section]:
    rows = analysis["interactions"]
    if not rows:
        return
    columns = [
        WORKLOAD,
        Column("first", "code"),
        Column("second", "code"),
        *_ratio_columns(analysis),
        *numbers("p (Holm)", "blocks"),
    ]
    table = Table(
        "Interactions",
        columns,
        [
            [
                row["workload"],
                row["first"],
                row["second"],
                *_ratio_cells(row),
                text.probability(row["p_holm"]),
                str(row["n"]),
            ]
            for row in rows
        ],
        grouped=True,
    )
    lead = [
        "How many times more a pair buys together than the product of what each buys; ×1 is no interaction."
    ]
    yield Section("interactions", "Which factors interact", lead, "interactions", [table])


def _references(analysis: Analysis) -> Iterator[Section]:
    rows = analysis["references"]
    if not rows:
        return
    columns = [
        WORKLOAD,
        CELL,
        Column("against", "code"),
        *_ratio_columns(analysis),
        *numbers("p (Holm)", "blocks"),
    ]
    table = Table(
        "References",
        columns,
        [
            [
                row["workload"],
                row["cell"],
                row["reference"],
                *_ratio_cells(row),
                text.probability(row["p_holm"]),
                str(row["n"]),
            ]
            for row in rows
        ],
        grouped=True,
    )
    lead = [
        "The same work on another engine, in the same blocks: is the baseline a fair one, and how far does everything "
        "on go beyond?"
    ]
    devices = {row["cell"]: row["devices"] for row in analysis["ceiling"]}
    for cell, reference in dict.fromkeys((row["cell"], row["reference"]) for row in rows):
        if devices[cell] != devices[reference]:
            here, there = text.count_of(devices[cell], "device"), devices[reference]
            lead.append(
                f"Not on equal devices: {cell} ran on {here}, {reference} on {there}; their ratio is not of engines alone."
            )
    yield Section("references", "Against other engines", lead, None, [table])


def _ceiling(analysis: Analysis) -> Section:
    rates = {
        (row["workload"], row["cell"]): row
        for row in analysis["rates"]
        if row["metric"] == "output_tokens_per_s"
    }
    columns = [WORKLOAD, CELL, *numbers("tok/s", "least", "most", "bound", "reached", "blocks")]
    rows = []
    for row in analysis["ceiling"]:
        rate = rates[row["workload"], row["cell"]]
        rows.append(
            [
                row["workload"],
                row["cell"],
                *(text.number(rate[key]) for key in ("mean", "min", "max")),
                text.number(row["bound"]["tokens_per_s"]),
                text.percent(row["share"]),
                str(rate["n"]),
            ]
        )
    parts = []
    for workload, bound, devices in {
        (row["workload"], tuple(row["bound"].items()), row["devices"]): None
        for row in analysis["ceiling"]
    }:
        part = dict(bound)
        parts.append(
            [
                workload,
                str(devices),
                text.seconds(part["seconds"]),
                text.seconds(part["prefill_s"]),
                f"{part['prefill_flops'] / 1e12:.4g}",
                text.seconds(part["decode_s"]),
                part["decode_limit"],
                text.number(part["decode_steps"]),
                f"{part['weight_bytes'] / 1e9:.4g}",
                f"{part['kv_bytes'] / 1e9:.4g}",
            ]
        )
    tables = [
        Table("Throughput (harmonic mean over blocks) and its bound", columns, rows, grouped=True),
        Table(
            "What the bound is made of",
            [
                WORKLOAD,
                *numbers("devices", "least time", "prefill", "TFLOP", "decode"),
                Column("limited by"),
                *numbers("steps", "weights, GB", "KV, GB"),
            ],
            parts,
            folded=True,
        ),
    ]
    profile = analysis["hardware"]["profile"]
    lead = [
        "The bound is a roofline: no engine in which prefill and decode take turns can pass it with "
        f"{float(profile['bandwidth_bytes_per_s']) / 1e9:,.4g} GB/s and {float(profile['peak_flops']) / 1e12:,.4g} "
        "TFLOP/s a device. A decode step reads all weights once, and the context of its requests, what they share of it "
        "once for all; prefill computes each distinct prompt token once; the two do not overlap (reports/statistics/ceiling.py has "
        "the formula).",
    ]
    if profile.get("note", text.ABSENT) not in ("", "-", text.ABSENT):
        lead.append(str(profile["note"]))
    return Section("ceiling", "How much is left to win", lead, "ceiling", tables)


def _latency(analysis: Analysis) -> Iterator[Section]:
    means = {(row["workload"], row["cell"], row["metric"]): row for row in analysis["rates"]}
    rows, verdicts = [], []
    for workload in analysis["workloads"]:
        for cell in analysis["cells"]:
            values = [means[workload, cell, metric.key]["mean"] for metric in LATENCIES]
            if any(value is not None for value in values):
                rows.append([workload, cell, *map(text.seconds, values)])
    for effect in analysis["effects"]:
        if METRICS[effect["metric"]] in LATENCIES and effect["n"]:
            verdicts.append(
                [
                    METRICS[effect["metric"]].label,
                    effect["workload"],
                    effect["cell"],
                    *_ratio_cells(effect),
                    text.probability(effect["p_holm"]),
                    str(effect["n"]),
                ]
            )
    if not rows:
        return
    columns = [
        WORKLOAD,
        CELL,
        *numbers(*(f"{kind} p{p}" for kind in ("first", "each") for p in PERCENTILES)),
    ]
    tables = [
        Table(
            "Latency: time to the first token, and time per output token after it",
            columns,
            rows,
            grouped=True,
        ),
        Table(
            "Latency against the baseline",
            [
                Column("metric"),
                WORKLOAD,
                CELL,
                *_ratio_columns(analysis),
                *numbers("p (Holm)", "blocks"),
            ],
            verdicts,
            grouped=True,
            folded=True,
        ),
    ]
    lead = [
        "All requests of a wave arrive together, so a first token waits for its turn. A percentile is taken over the "
        "requests of a launch, and the mean over the blocks is shown."
    ]
    yield Section("latency", "What a request waits for", lead, None, tables)
