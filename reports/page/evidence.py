"""Why the results may be believed, and how to get them again: the second half of a report."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanovllm.models.checkpoint import DIGESTS
from reports import text
from reports.page.document import Column, Section, Table
from reports.page.sections import CELL, VERDICT, WORKLOAD, numbers

Analysis = Mapping[str, Any]


def evidence(plan: Mapping[str, Any], analysis: Analysis, digest: str) -> Iterator[Section]:
    """The sections on validity; digest: of the records that the report was made from."""
    if analysis["unjudged"]:
        yield _unjudged(analysis)
    else:
        yield _against_itself(analysis)
        yield _order(analysis)
        yield _equivalence(analysis)
        yield _toggles(analysis)
    yield _not_applicable(analysis)
    yield _excluded(analysis)
    yield _reproduce(plan, analysis, digest)


def _unjudged(analysis: Analysis) -> Section:
    lead = [
        "The weights of this model were made on the GPUs, and no reference judged the outputs: none of these launches counts, "
        "and nothing is concluded from them here. This is what they measured; no interval, no ratio, no verdict.",
        "A decode step is the median of a launch's steps without prefill, and of those the median; replicas record none.",
    ]
    columns = [
        WORKLOAD,
        CELL,
        *numbers("launches", "least tok/s", "median tok/s", "most tok/s", "decode step"),
    ]
    rows = [
        [
            row["workload"],
            row["cell"],
            str(row["n"]),
            *(text.number(row[key]) for key in ("least", "median", "most")),
            text.seconds(row["step_s"]),
        ]
        for row in analysis["unjudged"]
    ]
    return Section(
        "unjudged",
        "Descriptive: measured, not judged",
        lead,
        None,
        [Table("As measured", columns, rows, grouped=True)],
    )


def _against_itself(analysis: Analysis) -> Section:
    arms = [
        e
        for e in analysis["effects"]
        if e["role"] == "aa" and e["metric"] == analysis["metric"]["key"]
    ]
    lead = [
        "The baseline runs twice in every block. Whatever differs between the two is what this machine makes up by "
        "itself: the arm should be called equivalent, or at worst inconclusive."
    ]
    lead += [
        f"{arm['workload']}: {text.ratio(arm['ratio'])}, {text.interval(arm['low'], arm['high'])}, {arm['verdict']}; a "
        f"change of {text.percent(arm['detectable'])} would be found."
        for arm in arms
        if arm["n"]
    ]
    if not arms:
        lead = ["This study has no A/A arm."]
    return Section("aa", "The machine against itself", lead, "aa")


def _order(analysis: Analysis) -> Section:
    lead = [
        "Each dot is a launch, as its distance from the mean of its own cell, in the order in which launches ran. A "
        "trend within the blocks would be an effect of order; one across the blocks cancels in the ratios."
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
    return Section("order", "The order of the launches", lead, "order", [table])


def _equivalence(analysis: Analysis) -> Section:
    gate = analysis["gate"]
    lead = [
        "The very tokens of the timed work are rescored by HF transformers, position by position, in a higher "
        "precision. A token passes if the reference picks it too, or if its margin is within the bound, which is "
        "calibrated on HF's own error in the engine's dtype. Identical outputs are judged once."
    ]
    if not gate["rows"]:
        lead.append("The gate has not judged any tokens: no launch counts.")
    foreign = [row for row in gate["rows"] if _distribution(row)]
    if foreign:
        level = foreign[0]["calibration"]["alpha"]
        lead.append(
            "Sampled tokens of an engine with its own random generator cannot be replayed and have no margin (a dash). Given "
            "the tokens before it, log p(token) + entropy has mean 0 under the reference: z is the sum over its standard "
            f"deviation, a two-sided test at level {level:g}, and its limit is widened by what HF's own error shifts the sum. No "
            "single request may be incredible either."
        )
    columns = [
        WORKLOAD,
        Column("cells"),
        VERDICT,
        *numbers("tokens", "differ", "within bound", "largest margin", "bound"),
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
                ", ".join(row["cells"]) or "none counted",
                row["status"],
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
        "Deliberately broken engines went through the same gate."
        if controls
        else "No deliberately broken engine was sent through the gate with these records; make check does so."
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
    return Section("gate", "Is the output still the same", lead, None, tables)


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
        CELL,
        Column("factor", "code"),
        *numbers("engaged", "opportunity"),
        Column("note"),
        *numbers("launches"),
    ]
    rows = []
    for row in sorted(
        toggles["rows"], key=lambda row: list(analysis["workloads"]).index(row["workload"])
    ):
        idle = row["opportunity"] is not None and row["opportunity"][1] == 0
        rows.append(
            [
                row["workload"],
                row["cell"],
                f"{row['factor']}={row['level']}",
                text.level_range(row["engaged"]),
                text.level_range(row["opportunity"]),
                "no opportunity in this workload" if idle else "",
                str(row["launches"]),
            ]
        )
    lead = [
        "Engaged counts how often a toggle ran in a launch (least to most): more than 0 when on, 0 when off, or the "
        "launch is invalid. Opportunity counts what there was for it to do.",
        f"Off and silent: {toggles['off_checked'] - toggles['off_engaged']:,} of {toggles['off_checked']:,} counters "
        "of toggles at their baseline read 0.",
    ]
    return Section(
        "toggles",
        "Did each toggle fire",
        lead,
        None,
        [Table("Toggles that were on", columns, rows, grouped=True)],
    )


def _not_applicable(analysis: Analysis) -> Section:
    rows = [
        [str(row["factor"]), str(row["level"]), row["reason"]] for row in analysis["not_applicable"]
    ]
    lead = [] if rows else ["Every factor of the study could run on this machine."]
    return Section(
        "not-applicable",
        "What could not run here",
        lead,
        None,
        [
            Table(
                "Not applicable",
                [Column("factor", "code"), Column("level", "code"), Column("reason")],
                rows,
            )
        ],
    )


def _excluded(analysis: Analysis) -> Section:
    counts = analysis["counts"]
    lead = [
        f"{text.count_of(counts['counted_launches'], 'launch')} counted of {counts['planned_launches']} planned; "
        f"{text.count_of(counts['excluded_launches'], 'record')} excluded; "
        f"{text.count_of(counts['duplicates'], 'duplicated record')} counted once."
    ]
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
        "Noticed while reading the records",
        [Column("note")],
        [[note] for note in analysis["notes"]],
    )
    return Section(
        "excluded",
        "What was left out",
        lead,
        None,
        [Table("Excluded launches", columns, rows), notes],
    )


def reproduce_command(plan: Mapping[str, Any]) -> str:
    """The one command that asks the same question again; a model from outside is named by its
    folder.
    """
    study, model = plan["study"], plan["model"]
    words = [
        f"STUDY={study['name']}",
        f"PROFILE={plan['profile']['name']}",
        f"MODEL={model['preset'] or model['path']}",
    ]
    target = (
        "compare-vllm"
        if any(cell["engine"] == "vllm" for cell in plan["cells"].values())
        else "ablate"
    )
    given = [f"{key}={_yaml(value)}" for key, value in study.get("overrides", {}).items()]
    # make would take such a word for two
    if any(len(word.split()) != 1 for word in [*words, *given]):
        options = [
            part
            for word in words
            for part in ("--" + word.split("=")[0].lower(), word.split("=", 1)[1])
        ]
        options += [part for word in given for part in ("--set", word)]
        verb = "compare --with vllm" if target == "compare-vllm" else target
        return f".venv/bin/python -m experiments {verb} " + " ".join(map(shlex.quote, options))
    return f"make {target} " + " ".join(
        map(shlex.quote, [*words, *(["SET=" + " ".join(given)] if given else [])])
    )


def _yaml(value: Any) -> str:
    """A value as `--set key=value` reads it back, without spaces where it can be."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _reproduce(plan: Mapping[str, Any], analysis: Analysis, digest: str) -> Section:
    found = analysis["hardware"]
    commands = [
        ("Ask the same question again", reproduce_command(plan)),
        (
            "Run this very plan, on this or another host",
            "python -m experiments.launch --plan plan.json --out DIR --resume",
        ),
        ("Rebuild this report from its records", "python -m reports render FOLDER"),
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
        _pairs("Provenance, the same for all counted launches", found["provenance"]),
        _pairs(
            "Provenance that differs between launches",
            {key: "; ".join(values) for key, values in found["varying"].items()},
        ),
    ]
    return Section(
        "reproduce", "How to get this again", list(_other_weights(plan)), None, tables, commands
    )


def _other_weights(plan: Mapping[str, Any]) -> Iterator[str]:
    """What a reader has to know where the plan's preset gives another checkpoint today than it was
    made for.
    """
    preset, digest = plan["model"].get("preset"), plan["model"].get("digest")
    today = DIGESTS.get(preset)
    if digest and today and digest != today:
        yield (
            f"This plan was made for a checkpoint of digest {digest[:16]}. The preset {preset} has changed since and gives "
            f"{today[:16]} today: the same question is then asked of other weights, and this very plan is refused unless --model "
            "names a folder with the old ones."
        )


def _pairs(caption: str, values: Mapping[str, str]) -> Table:
    rows: Sequence[Sequence[str]] = [
        [key, value] for key, value in values.items() if value not in ("", "-")
    ]
    return Table(caption, [Column("key", "code"), Column("value", "long")], rows, folded=True)
