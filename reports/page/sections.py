"""The statistics behind the results, section by section: effects, factors, references, the roofline
bound, latencies.

overview.py holds what comes before them, evidence.py what comes after.
"""

import math
from collections import Counter
from collections.abc import Iterator

from reports import text
from reports.analysis import names
from reports.analysis.compare import against_engines
from reports.analysis.types import Analysis, Effect
from reports.page.compare_sections import compare_sections, pairs_of_ours
from reports.page.document import Column, Section, Table
from reports.page.overview import CONFIGURATION, VERDICT, WORKLOAD, confidence, name, numbers
from reports.statistics.intervals import MIN_BLOCKS_BOOTSTRAP, measured_ratio
from reports.statistics.metrics import EVERY, LATENCIES, PERCENTILES
from reports.statistics.moderation import MOST_PRIOR
from reports.switches import by_switch, whole_configurations


def results(analysis: Analysis) -> Iterator[Section]:
    """Every section that this study has numbers for."""
    yield from compare_sections(analysis)
    yield _effects(analysis)
    yield from _factors(analysis)
    yield from _interactions(analysis)
    yield from _combinations(analysis)
    yield from pairs_of_ours(analysis)
    # a study that names its pairs has said which of them are fair
    if not against_engines(analysis):
        yield from _references(analysis)
    yield _ceiling(analysis)
    if "load" not in analysis:  # which has its own, by rate
        yield from _latency(analysis)


def _ratio_columns(analysis: Analysis) -> list[Column]:
    return [
        Column("ratio", "number"),
        Column(f"{confidence(analysis)} interval", "number"),
        VERDICT,
    ]


def _ratio_cells(effect: Effect) -> list[str]:
    return [
        text.ratio(effect["ratio"]),
        text.interval(effect["low"], effect["high"]),
        text.verdict(effect),
    ]


def _effects(analysis: Analysis) -> Section:
    metric, rule = analysis["metric"], analysis["rule"]
    low, high = rule["band"]
    rows = [effect for effect in analysis["effects"] if effect["metric"] == metric["key"]]
    columns = [
        WORKLOAD,
        CONFIGURATION,
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
                name(analysis, effect["cell"]),
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
    start = name(analysis, analysis["baseline"])
    lead = [
        f"Ratio of {metric['label']} to {start} in the same block: geometric mean over blocks, with Student's t "
        f"interval and, from {MIN_BLOCKS_BOOTSTRAP} blocks on, the BCa bootstrap beside it. "
        f"{'Above' if metric['better'] == 'higher' else 'Below'} ×1 is better.",
        f"Equivalent: the whole interval lies between {text.interval(low, high, ' and ')}. Faster or slower: "
        f"Holm's test over {_family(analysis)} rejects equality at {text.percent(rule['alpha'], 0)}. Suggestive: the interval "
        "excludes 1 on the side named, but that test does not reject equality. Inconclusive: none of these. Detectable: the "
        f"change that a study with this noise and this many blocks finds in {text.percent(rule['power'], 0)} of cases.",
        *_left_out_words(analysis),
        *_variance_words(analysis),
    ]
    tables = [table, *([_variances(analysis)] if moderated(analysis) else ())]
    tested = [row for row in rows if row["role"] in ("treatment", "all")]
    counted = [
        effect
        for workload in analysis["workloads"]
        for effect in (
            *whole_configurations(
                analysis, workload, [row for row in tested if row["workload"] == workload]
            ),
            *(effect for effect, _ in by_switch(analysis, workload)),
        )
    ]
    tally = Counter(map(text.verdict, counted))
    gist = ", ".join(f"{n} {word}" for word, n in sorted(tally.items()))
    return Section("effects", "Effects and tests", lead, None, tables, gist=gist)


def _left_out_words(analysis: Analysis) -> list[str]:
    """What the rows `all-but-X` show, in a study whose other tables show `X, added last` instead."""
    if not any(by_switch(analysis, workload) for workload in analysis["workloads"]):
        return []
    start = name(analysis, analysis["baseline"])
    return [
        f"all-but-X is everything on without X. Its ratio here is to {start}, so its verdict says nothing about X: what X "
        "gains, added last, is in the results above.",
        *names.left_out_together(analysis),
    ]


def moderated(analysis: Analysis) -> bool:
    """Whether the study asks for moderated variances."""
    return bool(analysis["statistics"]["variance"] == "moderated")


def _freedom(effect: Effect) -> str:
    """Degrees of freedom of an effect's interval: those of the moderated variance, or its own."""
    return f"{effect.get('df', effect['n'] - 1):.3g}" if effect["n"] > 1 else text.ABSENT


def _family(analysis: Analysis) -> str:
    """The tests that are corrected together, counted as `judge` has counted them."""
    treatments = [
        effect
        for effect in analysis["effects"]
        if effect["metric"] == analysis["metric"]["key"] and effect["role"] in ("treatment", "all")
    ]
    single = [effect for effect in treatments if effect["workload"] in analysis["workloads"]]
    if analysis["statistics"]["families"] != "joint":
        return "the treatments of the same question (one switch alone; everything on; the cells between them)"
    if len(single) == len(treatments) or not single:
        return f"all {text.count_of(max((e['tests'] for e in single), default=0), 'treatment')}"
    summary = next(e["tests"] for e in treatments if e["workload"] not in analysis["workloads"])
    return (
        f"the {text.count_of(single[0]['tests'], 'treatment')} of single workloads (the {summary} of all workloads together "
        "are corrected apart)"
    )


def _variance_words(analysis: Analysis) -> list[str]:
    if not moderated(analysis):
        return []
    words = (
        "The variance of each effect is moderated (Smyth 2004): it is drawn towards the mean variance of all effects, which "
        "adds d0 degrees of freedom, at most half as many as the effect has by itself; and it is never less than the "
        "effect's own. The method and its simulated coverage: docs/methodology.md."
    )
    if not analysis["statistics"]["priors"]:
        words = (
            f"The study asks for moderated variances, which need {analysis['statistics']['least_effects']} effects with two "
            "blocks or more; there are fewer, so each effect is judged by its own variance."
        )
    return [words]


def _variances(analysis: Analysis) -> Table:
    """The priors of the study's metric: the noise that all effects share, and how many degrees of
    freedom it adds.
    """
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
        *numbers("p (Holm)", "blocks"),
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
                text.probability(row["p_holm"]),
                str(row["n"]),
            ]
            for row in rows
        ],
        grouped=True,
    )
    lead = [
        f"Alone: switched on, compared with {name(analysis, analysis['baseline'])}. Added last: all on over all on without it. "
        "On average: over all settings of the other factors. Shapley's share: the mean over all orders in which the factors "
        "can be switched on; the shares multiply to the whole effect.",
        "Each of these is a family of tests of its own, corrected apart from the table of effects: the same ratio can have "
        "another p and another verdict there.",
    ]
    if any(row.get("without") for row in rows):
        lead.append(
            "Added last, without another: the other one needs this one, so it is off in both configurations."
        )
    if any(row.get("beside") or not row.get("part_of_all", True) for row in rows):
        lead.append(
            "On top of all: not part of all on, and compared with it. Beside another: it needs the other one, which is on "
            "in both configurations."
        )
    yield Section("factors", "Each optimization alone and together", lead, "factors", [table])


def _measured(row: Effect) -> str:
    """How an effect of a factor was measured, in the words of the table."""
    if not row.get("part_of_all", True):
        beside = f", beside {', '.join(row['beside'])}" if row.get("beside") else ""
        return f"on top of all{beside}"
    without = f", without {', '.join(row['without'])}" if row.get("without") else ""
    return text.KINDS[row["kind"]] + without


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
        "How many times more two optimizations bring together than the product of what each brings alone; ×1 means that "
        "they are independent."
    ]
    tally = Counter(row["verdict"] for row in rows)
    gist = ", ".join(f"{n} {word}" for word, n in sorted(tally.items()))
    yield Section("interactions", "Interactions", lead, "interactions", [table], gist=gist)


def _combinations(analysis: Analysis) -> Iterator[Section]:
    rows = [row for row in analysis["combinations"] if row["n"]]
    if not rows:
        return
    whole = {
        effect["workload"]: effect
        for effect in analysis["effects"]
        if effect["role"] == "all" and effect["metric"] == analysis["metric"]["key"]
    }
    columns = [
        WORKLOAD,
        *numbers("all on", "product of the single ones"),
        Column("all on over that product", "number"),
        *_ratio_columns(analysis)[1:],
        *numbers("p (Holm)", "blocks"),
    ]
    table = Table(
        "Everything on and its parts",
        columns,
        [
            [
                row["workload"],
                text.ratio(whole[row["workload"]]["ratio"]),
                text.ratio(measured_ratio(whole[row["workload"]]) / measured_ratio(row)),
                *_ratio_cells(row),
                text.probability(row["p_holm"]),
                str(row["n"]),
            ]
            for row in rows
        ],
    )
    lead = [
        "Each optimization of all on was also tried alone. If they did not act on each other, all on would bring the product of "
        "what each brings alone. Above ×1, they help each other.",
        *(
            f"{row['workload']}: {why}."
            for row in rows
            if (why := names.why_together(analysis, row["workload"]))
        ),
    ]
    gist = ", ".join(f"{row['workload']}: {text.verdict(row)}" for row in rows)
    yield Section("together", "More together than alone?", lead, None, [table], gist=gist)


def _references(analysis: Analysis) -> Iterator[Section]:
    rows = analysis["references"]
    if not rows:
        return
    columns = [
        WORKLOAD,
        CONFIGURATION,
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
                name(analysis, row["cell"]),
                name(analysis, row["reference"]).removeprefix("reference: "),
                *_ratio_cells(row),
                text.probability(row["p_holm"]),
                str(row["n"]),
            ]
            for row in rows
        ],
        grouped=True,
    )
    lead = [
        "The same work on another engine, in the same blocks: is the starting point a fair one, and how far does all on go "
        "beyond it?"
    ]
    devices = {row["cell"]: row["devices"] for row in analysis["ceiling"]}
    for cell, reference in dict.fromkeys((row["cell"], row["reference"]) for row in rows):
        if devices[cell] != devices[reference]:
            here, there = text.count_of(devices[cell], "device"), devices[reference]
            theirs = name(analysis, reference).removeprefix("reference: ")
            lead.append(
                f"Not on equal devices: {name(analysis, cell)} ran on {here}, {theirs} on {there}, so "
                "their ratio does not compare the engines alone."
            )
    equal = [row for row in rows if devices[row["cell"]] == devices[row["reference"]]]
    whole = [row for row in equal if analysis["cells"][row["cell"]]["role"] == "all"]
    gist = ", ".join(
        f"{name(analysis, row['cell'])} {text.ratio(row['ratio'])} on {row['workload']}"
        for row in whole or equal
        if row["workload"] in analysis["workloads"] and row["n"]
    )
    gist = gist or ("not on equal devices" if not equal else "nothing counted")
    yield Section("references", "Against other engines", lead, None, [table], gist=gist)


def _ceiling(analysis: Analysis) -> Section:
    rates = {
        (row["workload"], row["cell"]): row
        for row in analysis["rates"]
        if row["metric"] == "output_tokens_per_s"
    }
    columns = [
        WORKLOAD,
        CONFIGURATION,
        *numbers("tok/s", "least", "most", "bound", "reached", "blocks"),
    ]
    rows = []
    for row in analysis["ceiling"]:
        rate = rates[row["workload"], row["cell"]]
        rows.append(
            [
                row["workload"],
                name(analysis, row["cell"]),
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
        "The bound is a roofline: no engine in which prefill and decode take turns can exceed it with "
        f"{float(profile['bandwidth_bytes_per_s']) / 1e9:,.4g} GB/s and {float(profile['peak_flops']) / 1e12:,.4g} "
        "TFLOP/s per device. A decode step reads all weights once and the KV cache of its requests, a shared prefix only "
        "once; prefill computes each distinct prompt token once; the two do not overlap. The formula is in "
        "reports/statistics/ceiling.py.",
    ]
    if "load" in analysis:
        lead.append(
            "The bound is that of the same requests all at once. Where they arrive over time, throughput cannot exceed what "
            "arrives, and the share says how busy the machine was."
        )
    if profile.get("note", text.ABSENT) not in ("", "-", text.ABSENT):
        lead.append(str(profile["note"]))
    return Section(
        "ceiling",
        "Throughput against the roofline bound",
        lead,
        "ceiling",
        tables,
        gist=_reached(analysis),
    )


def _reached(analysis: Analysis) -> str:
    """The largest share of the bound, and which configuration reaches it."""
    rows = [
        row
        for row in analysis["ceiling"]
        if row["share"] is not None and analysis["cells"][row["cell"]]["role"] != "aa"
    ]
    if not rows:
        return ""
    best = max(rows, key=lambda row: row["share"])
    return (
        f"at most {text.percent(best['share'])}, {name(analysis, best['cell'])}, {best['workload']}"
    )


def _latency(analysis: Analysis) -> Iterator[Section]:
    means = {(row["workload"], row["cell"], row["metric"]): row for row in analysis["rates"]}
    rows, verdicts = [], []
    for workload in analysis["workloads"]:
        for cell in analysis["cells"]:
            values = [means[workload, cell, metric.key]["mean"] for metric in LATENCIES]
            if any(value is not None for value in values):
                rows.append([workload, name(analysis, cell), *map(text.seconds, values)])
    for effect in analysis["effects"]:
        if EVERY[effect["metric"]] in LATENCIES and effect["n"]:
            verdicts.append(
                [
                    EVERY[effect["metric"]].label,
                    effect["workload"],
                    name(analysis, effect["cell"]),
                    *_ratio_cells(effect),
                    text.probability(effect["p_holm"]),
                    str(effect["n"]),
                ]
            )
    if not rows:
        return
    columns = [
        WORKLOAD,
        CONFIGURATION,
        *numbers(*(f"{kind} p{p}" for kind in ("TTFT", "TPOT") for p in PERCENTILES)),
    ]
    tables = [
        Table(
            "TTFT and TPOT",
            columns,
            rows,
            grouped=True,
        ),
        Table(
            f"Latency relative to {name(analysis, analysis['baseline'])}",
            [
                Column("metric"),
                WORKLOAD,
                CONFIGURATION,
                *_ratio_columns(analysis),
                *numbers("p (Holm)", "blocks"),
            ],
            verdicts,
            grouped=True,
            folded=True,
        ),
    ]
    lead = [
        "TTFT, time to first token: from the arrival of a request to its first output token, waiting included. TPOT, time "
        "per output token: the mean time between the later tokens of a request.",
        "All requests of a wave arrive together, so the first token of most of them waits in the queue. p50, p90 and p99 "
        "are percentiles over the requests of a launch; the mean over the blocks is shown.",
    ]
    title = "Latency: time to first token (TTFT) and per output token (TPOT)"
    yield Section("latency", title, lead, None, tables, gist=_tpot(analysis))


def _tpot(analysis: Analysis) -> str:
    """The median time per output token of each workload, with everything off and on."""
    start = analysis["baseline"]
    whole = next((cell for cell, found in analysis["cells"].items() if found["role"] == "all"), "")
    cells = [start, *([whole] if whole else ())]
    means = {
        (row["workload"], row["cell"]): row["mean"]
        for row in analysis["rates"]
        if row["metric"] == "time_per_output_token_p50_s"
    }
    of_workloads = [
        f"{workload} {' → '.join(text.seconds(means[workload, cell]) for cell in cells)}"
        for workload in analysis["workloads"]
    ]
    return (
        f"TPOT p50, {' → '.join(name(analysis, cell) for cell in cells)}: {', '.join(of_workloads)}"
    )
