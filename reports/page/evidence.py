"""Why the results may be believed, and how to reproduce them: the last part of a report."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.host.model_files import preset_digests
from experiments.records.types import Plan
from reports import text
from reports.analysis import names
from reports.analysis.gate_and_launches import same_tokens
from reports.analysis.types import Analysis
from reports.page.document import Column, Section, Table
from reports.page.overview import CONFIGURATION, VERDICT, WORKLOAD, name, numbers


def evidence(plan: Plan, analysis: Analysis, digest: str) -> Iterator[Section]:
    """The sections on validity; digest: of the records that the report was made from."""
    if not analysis["unjudged"]:
        yield _against_itself(analysis)
        yield _order(analysis)
        yield _equivalence(analysis)
        yield _toggles(analysis)
    yield _not_applicable(analysis)
    yield _excluded(analysis)
    yield _reproduce(plan, analysis, digest)


def _against_itself(analysis: Analysis) -> Section:
    arms = [
        e
        for e in analysis["effects"]
        if e["role"] == "aa" and e["metric"] == analysis["metric"]["key"]
    ]
    start = name(analysis, analysis["baseline"])
    lead = [
        f"{start} runs twice in every block; the second one is called the A/A twin. Both are the same configuration, so "
        "whatever differs between them is noise of this machine: the twin should be equivalent, or at worst inconclusive."
    ]
    lead += [
        f"{arm['workload']}: {text.ratio(arm['ratio'])}, {text.interval(arm['low'], arm['high'])}, {text.verdict(arm)}; a "
        f"change of {text.percent(arm['detectable'])} would be detected."
        for arm in arms
        if arm["n"]
    ]
    if not arms:
        lead = ["This study has no A/A twin."]
    gist = ", ".join(dict.fromkeys(text.verdict(arm) for arm in arms)) or "none"
    return Section("aa", "A/A twin: the noise of this machine", lead, "aa", gist=gist)


def _order(analysis: Analysis) -> Section:
    lead = [
        "Each dot is a launch: its distance from the mean of its own configuration, in the order in which the launches "
        "ran. A trend within the blocks would be an effect of the order; a trend across the blocks cancels in the ratios."
    ]
    made, failed = analysis["checks"]["made"], analysis["checks"]["failed"]
    lead.append(
        f"{sum(made.values()):,} consistency checks of {len(made)} kinds (token counts, clocks, Little's law, "
        f"counters): {len(failed)} failed."
    )
    table = Table(
        "Failed consistency checks",
        [
            Column("launch", "code"),
            WORKLOAD,
            Column("check"),
            Column("found"),
            Column("consequence"),
        ],
        [
            [
                row["launch"],
                row["workload"],
                row["check"],
                row["detail"],
                "excluded" if row["hard"] else "noted",
            ]
            for row in failed
        ],
    )
    gist = f"{sum(made.values()):,} consistency checks, {len(failed)} failed"
    return Section("order", "Order of the launches", lead, "order", [table], gist=gist)


def _equivalence(analysis: Analysis) -> Section:
    gate = analysis["gate"]
    lead = [
        "HF transformers rescores the very tokens of the timed runs, position by position, in a higher precision. A token "
        "passes if the reference picks it too, or if its margin (how far it is from being picked, in logits) is within the "
        "bound, which is calibrated on HF's own rounding error in the engine's number format. Identical outputs are judged once."
    ]
    if gate["rows"]:
        lead += [f"{said}." for said in _same_tokens(analysis)]
    else:
        lead.append("The gate has not judged any tokens, so no launch counts.")
    foreign = [row for row in gate["rows"] if _distribution(row)]
    if foreign:
        level = foreign[0]["calibration"]["alpha"]
        lead.append(
            "Tokens that another engine sampled with its own random generator cannot be replayed and have no margin (shown as "
            "a dash). Given the tokens before it, log p(token) + entropy has mean 0 under the reference; z is the sum of these "
            f"over its standard deviation, a two-sided test at level {level:g}, whose limit is widened by the shift that HF's own "
            "error causes. A single request whose tokens are too improbable fails as well."
        )
    columns = [
        WORKLOAD,
        Column("configurations"),
        VERDICT,
        *numbers("launches", "tokens", "differ", "within bound", "largest margin", "bound"),
        *(numbers("z", "limit of z") if foreign else ()),
        *numbers("HF's error, largest", "HF's error, 99.9 %"),
    ]
    rows = []
    for row in gate["rows"]:
        error, distribution = (row["calibration"] or {}).get("hf_error", {}), _distribution(row)
        no_margin = _sampled_elsewhere(row)
        rows.append(
            [
                row["workload"],
                _makers(analysis, row["cells"]),
                row["status"],
                str(row["launches"]),
                text.number(row["tokens_checked"]),
                *(
                    text.ABSENT if no_margin else text.number(row[key])
                    for key in ("mismatches", "within_bound", "max_margin", "bound")
                ),
                *((_z(distribution.get("z")), _z(distribution.get("z_limit"))) if foreign else ()),
                text.number(error.get("max")),
                text.number(error.get("q999")),
            ]
        )
    controls = [
        [
            "not caught" if row["status"] != "fail" else "caught",
            row["workload"],
            text.number(row["tokens_checked"]),
            row["reason"] or text.ABSENT,
        ]
        for row in gate["negative_controls"]
    ]
    lead.append(
        "Negative controls: deliberately broken engines went through the same gate and must fail."
        if controls
        else "No negative controls (deliberately broken engines) are in these records; make check runs them."
    )
    reasons = [
        [row["workload"], row["tokens_digest"][:12], row["status"], row["reason"] or text.ABSENT]
        for row in gate["rows"]
        if row["status"] != "pass"
    ]
    tables = [
        Table("The gate, in logits", columns, rows, grouped=True),
        Table(
            "What did not pass",
            [WORKLOAD, Column("tokens", "code"), VERDICT, Column("reason")],
            reasons,
        ),
        *_first_offenders(gate["rows"] + gate["negative_controls"]),
        _errors_by_position(gate["rows"]),
        Table(
            "Negative controls",
            [VERDICT, WORKLOAD, *numbers("tokens"), Column("what the gate said")],
            controls,
        ),
    ]
    gist = f"{gate['passed']} of {text.count_of(len(gate['rows']), 'output')} passed"
    return Section("gate", "Gate: is the output still right?", lead, None, tables, gist=gist)


def _same_tokens(analysis: Analysis) -> Iterator[str]:
    """For each workload, how many launches gave the tokens of the baseline, and who did not."""
    for workload, found in analysis["gate"]["same_tokens"].items():
        said = f"{workload}: {same_tokens(analysis, workload)}"
        if found["same"] is not None and found["others"]:
            who = names.listed([name(analysis, cell) for cell in found["others"]])
            said += f". Launches of {who} gave other tokens, which were judged too"
        yield said


def _makers(analysis: Analysis, cells: Sequence[str]) -> str:
    """The configurations that produced these tokens."""
    return ", ".join(name(analysis, cell) for cell in cells) or "none counted"


def _distribution(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the gate found of tokens that another random generator drew; {} where there are none."""
    return (row["calibration"] or {}).get("distribution") or {}


def _sampled_elsewhere(row: Mapping[str, Any]) -> bool:
    """Whether another generator drew every token, and all are of those that top-k and top-p keep:
    then nothing has a margin.
    """
    return bool(_distribution(row)) and _distribution(row)["tokens"] == row["tokens_checked"]


def _z(value: float | None) -> str:
    return text.ABSENT if value is None else f"{value:.2f}"


def _first_offenders(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Where each failure begins: the five best candidates of both models, and their scores in
    logits over temperature, noise included.
    """
    tables = []
    for row in rows:
        if not (offender := row["first_offender"]):
            continue
        lines = [
            [
                str(rank),
                *(
                    part
                    for candidate in pair
                    for part in (str(candidate[0]), text.number(candidate[1]))
                ),
            ]
            for rank, pair in enumerate(
                zip(offender["reference_top5"], offender["hf_top5"], strict=True), start=1
            )
        ]
        caption = (
            f"{row['workload']} {row['tokens_digest'][:12]}: request {offender['request']}, output position "
            f"{offender['position']}: token {offender['token']}, margin {text.number(offender['margin'])} logits"
        )
        columns = numbers(
            "rank", "reference", "its score", "HF in the engine's dtype", "its score there"
        )
        tables.append(Table(caption, columns, lines, folded=True))
    return tables


def _errors_by_position(rows: Sequence[Mapping[str, Any]]) -> Table:
    lines = []
    for row in rows:
        no_margin = _sampled_elsewhere(row)
        for part in (row["calibration"] or {}).get("by_position", []):
            judged = (
                part["mismatches"],
                part["hf_mismatches"],
                part["margin"]["q999"],
                part["margin"]["max"],
            )
            lines.append(
                [
                    row["workload"],
                    row["tokens_digest"][:12],
                    f"{part['first']} to {part['last']}",
                    text.number(part["tokens"]),
                    *(text.ABSENT if no_margin else text.number(value) for value in judged),
                    *(text.number(part["hf_error"][key]) for key in ("q999", "max")),
                ]
            )
    columns = [
        WORKLOAD,
        Column("tokens of", "code"),
        Column("output positions"),
        *numbers(
            "tokens",
            "differ",
            "HF differs",
            "margin, 99.9 %",
            "largest",
            "HF's error, 99.9 %",
            "HF's largest",
        ),
    ]
    return Table(
        "The gate by output position, in logits", columns, lines, grouped=True, folded=True
    )


def _toggles(analysis: Analysis) -> Section:
    toggles = analysis["toggles"]
    columns = [
        WORKLOAD,
        CONFIGURATION,
        Column("factor", "code"),
        Column("what it did in a launch"),
        *numbers("launches"),
    ]
    rows = []
    for row in sorted(
        toggles["rows"], key=lambda row: list(analysis["workloads"]).index(row["workload"])
    ):
        rows.append(
            [
                row["workload"],
                name(analysis, row["cell"]),
                f"{row['factor']}={row['level']}",
                names.did(row),
                str(row["launches"]),
            ]
        )
    silent = toggles["off_checked"] - toggles["off_engaged"]
    lead = [
        "What it did: counted by the engine while it was timed, the least to the most over launches. The first number says how "
        "often it ran: above 0 when it is on and 0 when it is off, or the launch is invalid. The second, where there is one, says "
        "how often that had a use.",
        f"{silent:,} of {toggles['off_checked']:,} counters of optimizations that were not switched on read 0.",
    ]
    return Section(
        "toggles",
        "Did each optimization run?",
        lead,
        None,
        [Table("Optimizations that were on", columns, rows, grouped=True)],
        gist="proof that switches do what they say",
    )


def _not_applicable(analysis: Analysis) -> Section:
    missing = names.not_applicable(analysis)
    rows = [[", ".join(what), reason] for reason, what in missing]
    levels = sum(len(what) for _, what in missing)
    lead = [] if rows else ["Everything in the study could run on this machine."]
    return Section(
        "not-applicable",
        "What could not run here",
        lead,
        None,
        [Table("Not applicable", [Column("configurations", "long"), Column("reason")], rows)],
        gist=f"{text.count_of(levels, 'level')}, {text.count_of(len(rows), 'reason')}"
        if rows
        else "nothing",
    )


def _excluded(analysis: Analysis) -> Section:
    counts = analysis["counts"]
    lead = [
        f"{text.count_of(counts['counted_launches'], 'launch')} counted of {counts['planned_launches']} planned; "
        f"{text.count_of(counts['excluded_launches'], 'record')} excluded; "
        f"{text.count_of(counts['duplicates'], 'duplicated record')} counted once."
    ]
    gist = (
        f"{counts['excluded_launches'] or 'none'}; {counts['counted_launches']} of "
        f"{counts['planned_launches']} planned counted"
    )
    rows = [
        [row["launch"], str(row["attempt"]), str(row["block"]), row["status"], row["reason"]]
        for row in analysis["excluded"]
    ]
    columns = [
        Column("launch", "code"),
        *numbers("attempt", "block"),
        Column("status"),
        Column("reason"),
    ]
    notes = Table(
        "Noted while reading the records",
        [Column("note")],
        [[note] for note in analysis["notes"]],
    )
    return Section(
        "excluded",
        "Excluded launches",
        lead,
        None,
        [Table("Excluded", columns, rows), notes],
        gist=gist,
    )


def reproduce_command(plan: Plan) -> str:
    """The command that runs the same study again; a model without a preset is named by its folder."""
    study, model = plan["study"], plan["model"]
    words = [
        f"STUDY={study['name']}",
        f"PROFILE={plan['profile']['name']}",
        f"MODEL={model['preset'] or model['path']}",
    ]
    engines = {cell["engine"] for cell in plan["cells"].values()}
    online = "vllm_server" in engines
    compares = online or "vllm" in engines
    target = ("compare-vllm-online" if online else "compare-vllm") if compares else "ablate"
    given = [f"{key}={_yaml(value)}" for key, value in study.get("overrides", {}).items()]
    # make would take such a word for two
    if any(len(word.split()) != 1 for word in [*words, *given]):
        options = [
            part
            for word in words
            for part in ("--" + word.split("=")[0].lower(), word.split("=", 1)[1])
        ]
        options += [part for word in given for part in ("--set", word)]
        verb = target.replace("compare-", "compare --with ")
        return f".venv/bin/python -m experiments {verb} " + " ".join(map(shlex.quote, options))
    return f"make {target} " + " ".join(
        map(shlex.quote, [*words, *(["SET=" + " ".join(given)] if given else [])])
    )


def _yaml(value: Any) -> str:
    """A value as `--set key=value` reads it back, without spaces where it can be."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _reproduce(plan: Plan, analysis: Analysis, digest: str) -> Section:
    found = analysis["hardware"]
    commands = [
        ("Run the same study again, as it is today", reproduce_command(plan)),
        (
            "Run exactly this plan, on this or another host",
            "PYTHONPATH=src:. python3 -m experiments.launch --plan plan.json --out DIR --resume",
        ),
        ("Render this report from its records", ".venv/bin/python -m reports render FOLDER"),
    ]
    records = [
        ["plan", analysis["plan_hash"]],
        ["records", digest],
        *(["boot", boot] for boot in found["boots"]),
    ]
    prints = [
        [f"workload {name}", entry["fingerprint"]] for name, entry in analysis["workloads"].items()
    ]
    tables = [
        Table(
            "Fingerprints (SHA-256)", [Column("what"), Column("value", "long")], [*records, *prints]
        ),
        _pairs("Hardware profile", found["profile"]),
        _pairs("Model", found["model"]),
        _pairs("Software and machine, the same for all counted launches", found["provenance"]),
        _pairs(
            "Software and machine where launches differ",
            {key: "; ".join(values) for key, values in found["varying"].items()},
        ),
    ]
    return Section(
        "reproduce",
        "Reproduce",
        list(_other_weights(plan)),
        None,
        [_configurations(analysis), *tables],
        commands,
        gist="commands, configurations, fingerprints, versions",
    )


def _configurations(analysis: Analysis) -> Table:
    """What each name of the page stands for."""
    rows = [
        [
            name(analysis, cell),
            cell,
            entry["engine"],
            ("nothing" if cell == analysis["baseline"] else "")
            or ", ".join(names.changes(analysis, cell))
            or ("nothing" if entry["levels"] else text.ABSENT),
        ]
        for cell, entry in analysis["cells"].items()
    ]
    start = name(analysis, analysis["baseline"])
    return Table(
        "Configurations",
        [
            CONFIGURATION,
            Column("cell in the records", "code"),
            Column("engine"),
            Column(f"changes against {start}", "long"),
        ],
        rows,
    )


def _other_weights(plan: Plan) -> Iterator[str]:
    """A note where the plan's preset gives another checkpoint today than the plan was made for."""
    preset, digest = plan["model"].get("preset"), plan["model"].get("digest")
    today = preset_digests().get(preset or "")
    if digest and today and digest != today:
        yield (
            f"This plan was made for a checkpoint of digest {digest[:16]}. The preset {preset} has changed since and gives "
            f"{today[:16]} today: running the study again uses other weights, and exactly this plan is refused unless --model "
            "names a folder with the old ones."
        )


def _pairs(caption: str, values: Mapping[str, str]) -> Table:
    rows: Sequence[Sequence[str]] = [
        [key, value] for key, value in values.items() if value not in ("", "-")
    ]
    return Table(caption, [Column("key", "code"), Column("value", "long")], rows, folded=True)
