"""What everybody reads of a report: the chart, one table of results, the workloads, the machine.

The statistics behind the table follow, folded, in results.py and evidence.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.records.types import Plan
from reports import text
from reports.analysis import names
from reports.analysis.compare import against_engines, said, throughput_rows
from reports.analysis.types import Analysis, Comparison, Effect
from reports.page.document import Column, Section, Table
from reports.statistics.metrics import THROUGHPUT

CONFIGURATION, WORKLOAD, VERDICT = (
    Column("configuration", "code"),
    Column("workload", "code"),
    Column("verdict", "verdict"),
)


def numbers(*titles: str) -> list[Column]:
    return [Column(title, "number") for title in titles]


def name(analysis: Analysis, cell: str) -> str:
    """What a configuration is called on the page."""
    return str(analysis["shown"][cell])


def confidence(analysis: Analysis) -> str:
    return text.percent(analysis["rule"]["confidence"], 0)


def gate(analysis: Analysis, cells: Sequence[str], workload: str) -> str:
    """The gate's result for the outputs of these cells: "pass", "fail" or both. Covers all
    workloads if `workload` names none of them.
    """
    rows = [
        row
        for row in analysis["gate"]["rows"]
        if set(cells) & set(row["cells"])
        and (workload == row["workload"] or workload not in analysis["workloads"])
    ]
    return ", ".join(sorted({row["status"] for row in rows})) or text.ABSENT


def overview(plan: Plan, analysis: Analysis) -> Iterator[Section]:
    """The sections that are not folded."""
    if analysis["unjudged"]:
        yield _unjudged(analysis)
    else:
        compares = against_engines(analysis)
        yield _compared(analysis, compares) if compares else _results(analysis)
    yield _workloads(plan, analysis)


def _results(analysis: Analysis) -> Section:
    """One row for each configuration: throughput, ratio to the baseline, verdict, gate."""
    metric = analysis["metric"]
    throughput = metric["key"] == THROUGHPUT.key
    effects = {
        (effect["workload"], effect["cell"]): effect
        for effect in analysis["effects"]
        if effect["metric"] == metric["key"]
    }
    rows, start = [], analysis["baseline"]
    for workload in analysis["workloads"]:
        rates = _rates(analysis, workload)
        for cell in analysis["cells"]:
            effect = effects.get((workload, cell))
            if cell == start:
                found = ["×1", "", ""]
            elif effect is None or not effect["n"]:
                found = [text.ABSENT, text.ABSENT, ""]
            else:
                found = [
                    text.ratio(effect["ratio"]),
                    text.interval(effect["low"], effect["high"]),
                    text.verdict(effect),
                ]
            rate = [text.number(rates.get(cell)), *found]
            rows.append([workload, name(analysis, cell), *rate, gate(analysis, [cell], workload)])
    ratio = "speedup" if throughput else f"ratio of {metric['label']}"
    columns = [
        WORKLOAD,
        CONFIGURATION,
        *numbers("tok/s", ratio, f"{confidence(analysis)} interval"),
        VERDICT,
        Column("gate", "verdict"),
    ]
    tested = [
        effect for key, effect in effects.items() if effect["n"] and key[0] in analysis["workloads"]
    ]
    tests = max((effect["tests"] for effect in tested), default=0)
    lead = [
        _ratio_words(analysis, throughput),
        *names.left_out_together(analysis),
        _verdict_words(analysis, tested, tests),
        *_correction_words(analysis, tested, tests),
    ]
    return Section(
        "results",
        "Results",
        [],
        "forest",
        [Table("Throughput and speedup", columns, rows, grouped=True)],
        notes=lead,
    )


def _rates(analysis: Analysis, workload: str) -> dict[str, float | None]:
    return {
        row["cell"]: row["mean"]
        for row in analysis["rates"]
        if row["metric"] == THROUGHPUT.key and row["workload"] == workload and row["n"]
    }


def _ratio_words(analysis: Analysis, throughput: bool) -> str:
    start = name(analysis, analysis["baseline"])
    better = "above" if analysis["metric"]["better"] == "higher" else "below"
    says = "Speedup" if throughput else "Ratio"
    blocks = text.count_of(analysis["counts"]["complete_blocks"], "complete block")
    held = names.settings(analysis, analysis["baseline"])
    return (
        f"tok/s: output tokens per second. {says}: relative to {start} ({held}) in the same block, {better} 1 is better. "
        "A block is every configuration once, each in a fresh process, in random order; the numbers are means over "
        f"{blocks}. The A/A twin is {start} run a second time: what it shows is noise."
    )


def _verdict_words(analysis: Analysis, effects: Sequence[Effect], tests: int) -> str:
    """What the verdicts that occur here mean; tests: how many are made together."""
    low, high = analysis["rule"]["band"]
    band = text.interval(low, high)
    found = {text.verdict(effect) for effect in effects}
    said = []
    if found & {"faster", "slower"}:
        said.append(
            "faster, slower: statistically significant, also after correction for the number of tests"
        )
    if "equivalent" in found:
        said.append(f"equivalent: the whole interval lies within {band}, too small to matter")
    if "suggestive" in found:
        said.append(
            "suggestive: the interval excludes 1, but the difference is not significant after correction for "
            f"{text.count_of(tests, 'test')}"
        )
    if "inconclusive" in found:
        said.append("inconclusive: a difference that matters is as possible as none")
    said.append(
        "gate: pass means that HF transformers, in a higher precision, confirmed the very tokens that were timed"
    )
    return "; ".join(said) + "."


def _correction_words(analysis: Analysis, effects: Sequence[Effect], tests: int) -> list[str]:
    """What `after correction` means, where a verdict depends on it."""
    if tests < 2 or not {text.verdict(effect) for effect in effects} & {
        "faster",
        "slower",
        "suggestive",
    }:
        return []
    return [
        f"Correction: each of {tests} tests may find a difference by chance alone. Holm's method therefore asks for "
        "stronger evidence from each, so that the probability of even one false faster or slower among them is at most "
        f"{text.percent(analysis['rule']['alpha'], 0)}. An example is in docs/reading-a-report.md#the-correction."
    ]


def _compared(analysis: Analysis, entries: Sequence[Comparison]) -> Section:
    """One row for each pair of engines that is compared: both throughputs, their ratio, verdict,
    gate.
    """
    columns = [
        WORKLOAD,
        Column("comparison"),
        *numbers("ours, tok/s", "theirs, tok/s", "ratio", f"{confidence(analysis)} interval"),
        VERDICT,
        Column("gate", "verdict"),
    ]
    rows = []
    shown = list(throughput_rows(analysis, entries))
    effects = [effect for _, effect in throughput_rows(analysis, analysis["comparisons"])]
    tests = sum(effect["p"] is not None for effect in effects)
    for entry, effect in shown:
        workload, pair = effect["workload"], [entry["ours"], entry["theirs"]]
        rates = _rates(analysis, workload)
        rows.append(
            [
                workload,
                pair_name(analysis, entry),
                *(text.number(rates.get(cell)) for cell in pair),
                text.ratio(effect["ratio"]),
                text.interval(effect["low"], effect["high"]),
                text.verdict(effect),
                gate(analysis, pair, workload),
            ]
        )
    lead = [
        "tok/s: output tokens per second, in steady state: each launch is a fresh process, loaded and warmed up before "
        "anything is timed. Ratio: ours over theirs in the same block, above 1 means that nanovllm is faster. A block "
        "is every configuration once, in random order.",
        *(
            f"{name(analysis, cell)}, of nanovllm: {names.settings(analysis, cell)}."
            for cell in dict.fromkeys(entry["ours"] for entry in entries)
        ),
        _verdict_words(analysis, effects, tests),
        *_correction_words(analysis, effects, tests),
    ]
    return Section(
        "results",
        "Results",
        [],
        "forest",
        [Table("nanovllm against other engines", columns, rows, grouped=True)],
        notes=lead,
    )


def pair_name(analysis: Analysis, entry: Comparison) -> str:
    """A pair of a comparison: "all on / vLLM 0.32.0, both at their best"."""
    theirs = names.engine(entry["engine"], entry["version"])
    return f"{name(analysis, entry['ours'])} / {theirs}, {said(entry['name'])}"


def _unjudged(analysis: Analysis) -> Section:
    lead = [
        "The weights of this model were generated on the GPUs, and no reference checked the outputs. None of these launches "
        "counts, and nothing is concluded from them: this is what they measured, without interval, ratio or verdict.",
        "Decode step: the median over launches of the median step without prefill; replicas record no steps.",
    ]
    columns = [
        WORKLOAD,
        CONFIGURATION,
        *numbers("launches", "least tok/s", "median tok/s", "most tok/s", "decode step"),
    ]
    rows = [
        [
            row["workload"],
            name(analysis, row["cell"]),
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


def _workloads(plan: Plan, analysis: Analysis) -> Section:
    columns = [
        WORKLOAD,
        *numbers("requests"),
        Column("prompt tokens of each"),
        Column("output tokens of each"),
        Column("arrivals"),
        *numbers("temperature"),
    ]
    rows = []
    for workload, entry in plan["workloads"].items():
        params = entry["params"]
        rows.append(
            [
                workload,
                text.number(entry["num_requests"]),
                _prompts(entry),
                _lengths(entry, "output_tokens", "answer_tokens"),
                _arrivals(entry, analysis["waves"][workload]),
                "0 (greedy)" if params["temperature"] == 0 else f"{params['temperature']:g}",
            ]
        )
    sized = plan.get("sized")
    share = sized["share_of_answers"] if sized else 1
    cut = (
        f"Answers were cut to {text.percent(share, 0)} of the length that the study asks for, so that the launches fit "
        "into its budget of time."
    )
    return Section(
        "workloads",
        "Workloads",
        tables=[Table("What each launch serves", columns, rows)],
        notes=[cut] if share < 1 else [],
    )


def _arrivals(entry: Mapping[str, Any], waves: Sequence[int]) -> str:
    """When requests come; waves: how many requests each has."""
    params = entry["params"]
    if entry["kind"] == "conversation":
        return f"{params['turns']} turns of {params['num_conversations']} conversations"
    if len(waves) == 1:
        return "all at once"
    return f"{len(waves)} waves of {_range([min(waves), max(waves)])}"


def _prompts(entry: Mapping[str, Any]) -> str:
    kind, params = entry["kind"], entry["params"]
    if kind == "shared_prefix":
        shared, own = _range(params["prefix_tokens"]), _range(params["own_tokens"])
        return f"{shared} of {text.count_of(params['num_prefixes'], 'shared prefix')}, then {own} of its own"
    if kind == "conversation":
        system, user = _range(params["system_tokens"]), _range(params["user_tokens"])
        return f"{system} of a system prompt, all earlier turns, then {user} new"
    return _lengths(entry, "prompt_tokens")


def _lengths(entry: Mapping[str, Any], *keys: str) -> str:
    """The range that a parameter of one of these names gives; else, of a kind that has none of
    them, the mean.
    """
    for key in keys:
        if key in entry["params"]:
            return _range(entry["params"][key])
    return f"{text.number(entry[keys[0]] / entry['num_requests'])} on average"


def _range(bounds: Sequence[int] | int) -> str:
    low, high = (bounds, bounds) if isinstance(bounds, int) else bounds
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
