"""What everybody reads of a report: the chart, one table of results, the workloads, the machine.

The statistics behind the table follow, folded, in sections.py and evidence.py.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.records.types import Plan
from reports import text
from reports.analysis import names
from reports.analysis.compare import against_engines, throughput_rows
from reports.analysis.noise import ALONE, BETWEEN, TOGETHER
from reports.analysis.types import Analysis, Comparison, Effect
from reports.page.document import Column, Section, Table
from reports.statistics.metrics import THROUGHPUT
from reports.switches import by_switch

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
    """One row for each configuration: throughput, ratio to the baseline, verdict, gate. In a study
    that measures every toggle alone and added last, a row for each of these takes the place of their
    configurations, whose ratio to everything off says little about one toggle.
    """
    metric = analysis["metric"]
    throughput = metric["key"] == THROUGHPUT.key
    tested = [
        effect
        for effect in analysis["effects"]
        if effect["metric"] == metric["key"]
        and effect["n"]
        and effect["workload"] in analysis["workloads"]
    ]
    rows: list[list[str]] = []
    tests: dict[str, int] = {}
    twins = max((effect["tests"] for effect in tested if effect["role"] == "aa"), default=0)
    told = list(tested)
    for workload in analysis["workloads"]:
        effects = {effect["cell"]: effect for effect in tested if effect["workload"] == workload}
        switches = by_switch(analysis, workload)
        rows += _configurations(analysis, workload, effects, switches)
        rows += _switches(analysis, workload, switches)
        for effect in effects.values():
            if effect["role"] != "aa" and not (switches and effect["role"] != "all"):
                tests[_ASKED.get(effect["question"], _ALL_ASKED)] = effect["tests"]
        tests |= {_TESTED[effect["kind"]]: effect["tests"] for effect, _ in switches}
        for effect in analysis["references"] if switches else ():
            tests["against another engine"] = effect["tests"]
        told += [effect for effect, _ in switches]
    ratio = "speedup" if throughput else f"ratio of {metric['label']}"
    columns = [
        WORKLOAD,
        CONFIGURATION,
        *numbers("tok/s", ratio, f"{confidence(analysis)} interval"),
        VERDICT,
        Column("gate", "verdict"),
    ]
    lead = [
        _ratio_words(analysis, throughput),
        *(
            [_switch_words(rows), *names.on_both_sides(analysis)]
            if _TESTED["alone"] in tests
            else names.left_out_together(analysis)
        ),
        _verdict_words(analysis, told),
        *_correction_words(analysis, told, tests, twins),
        *_reference_words(analysis, rows),
    ]
    return Section(
        "results",
        "Results",
        [],
        "forest",
        [Table("Throughput and speedup", columns, rows, grouped=True)],
        notes=lead,
    )


def _reference_words(analysis: Analysis, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Where the ratios to other engines are, if rows of theirs have none."""
    bare = {row[1] for row in rows if row[3] == text.ABSENT}
    named = [
        name(analysis, cell)
        for cell, entry in analysis["cells"].items()
        if entry["role"] == "reference" and name(analysis, cell) in bare
    ]
    if named and analysis["references"]:
        yield (
            f"{names.listed(named)}: the same work on another engine; ratios to it are in the evidence below."
        )


def _configurations(
    analysis: Analysis,
    workload: str,
    effects: Mapping[str, Effect],
    switches: Sequence[tuple[Effect, str]],
) -> Iterator[list[str]]:
    """Rows of whole configurations; without those that rows of single toggles tell of."""
    rates, start = _rates(analysis, workload), analysis["baseline"]
    told = {effect[side] for effect, _ in switches for side in ("on", "off")}
    if switches:
        told |= {effect["reference"] for effect in analysis["references"]}
    for cell, entry in analysis["cells"].items():
        effect = effects.get(cell)
        if cell == start:
            found = ["×1", "", ""]
        elif cell in told and entry["role"] != "all":
            continue
        elif effect is None:
            found = [text.ABSENT, text.ABSENT, ""]
        else:
            found = [
                text.ratio(effect["ratio"]),
                text.interval(effect["low"], effect["high"]),
                text.verdict(effect),
            ]
        rate = text.number(rates.get(cell))
        yield [workload, name(analysis, cell), rate, *found, gate(analysis, [cell], workload)]


def _switches(
    analysis: Analysis, workload: str, switches: Sequence[tuple[Effect, str]]
) -> Iterator[list[str]]:
    """Rows of single toggles, and of everything on or off over another engine: two configurations
    each.
    """
    rates = _rates(analysis, workload)
    pairs = [(effect, title, effect["off"], effect["on"]) for effect, title in switches]
    for effect in analysis["references"] if switches else ():
        if effect["workload"] == workload:
            theirs = name(analysis, effect["reference"]).removeprefix("reference: ")
            title = f"{name(analysis, effect['cell'])} / {theirs}"
            pairs.append((effect, title, effect["reference"], effect["cell"]))
    for effect, title, below, above in pairs:
        yield [
            workload,
            title,
            f"{text.number(rates.get(below))} → {text.number(rates.get(above))}",
            text.ratio(effect["ratio"]),
            text.interval(effect["low"], effect["high"]),
            text.verdict(effect),
            gate(analysis, [below, above], workload),
        ]


def _rates(analysis: Analysis, workload: str) -> dict[str, float | None]:
    return {
        row["cell"]: row["mean"]
        for row in analysis["rates"]
        if row["metric"] == THROUGHPUT.key and row["workload"] == workload and row["n"]
    }


def _switch_words(rows: Sequence[Sequence[str]]) -> str:
    on_top = " On top: everything on and this one, over everything on."
    has_some = any(row[1].endswith(", on top") for row in rows)
    return (
        "Alone: the optimization on, over everything off. Added last: everything on, over everything on without it; such "
        f"gains overlap, so they do not multiply to the whole.{on_top * has_some} tok/s: without → with it."
    )


def _ratio_words(analysis: Analysis, throughput: bool) -> str:
    start = name(analysis, analysis["baseline"])
    better = "above" if analysis["metric"]["better"] == "higher" else "below"
    says = "Speedup" if throughput else "Ratio"
    blocks = text.count_of(analysis["counts"]["complete_blocks"], "complete block")
    held = names.settings(analysis, analysis["baseline"])
    return (
        f"tok/s: output tokens per second. {says}: relative to {start} ({held}) in the same block, {better} 1 is better. "
        f"A block is every configuration once, each in a fresh process, in random order; there are {blocks}. tok/s is the "
        "harmonic mean over blocks, which is all tokens over all time; the ratio is the geometric mean of the ratios within "
        f"blocks, so it differs a little from the quotient of two means. The A/A twin is {start} run a second time: what it "
        "shows is noise."
    )


def _verdict_words(analysis: Analysis, effects: Sequence[Effect]) -> str:
    """What the verdicts that occur here mean."""
    low, high = analysis["rule"]["band"]
    band = text.interval(low, high)
    found = {text.verdict(effect) for effect in effects}
    said = []
    if found & {"faster", "slower"}:
        said.append(
            "faster, slower: statistically significant, also after correction for several tests"
        )
    if "equivalent" in found:
        said.append(f"equivalent: the whole interval lies within {band}, too small to matter")
    if any(text.is_suggestive(effect) for effect in effects):
        said.append(
            f"suggestive: faster or suggestive: slower: the interval excludes 1, but the difference is {uncorrected(effects)}"
        )
    if "inconclusive" in found:
        said.append("inconclusive: the data allow both a difference that matters and none")
    said.append(
        "gate: pass means that HF transformers, in a higher precision, confirmed the very tokens that were timed"
    )
    return "; ".join(said) + "."


def uncorrected(effects: Sequence[Effect]) -> str:
    """What keeps the suggestive ones of these effects from being significant, in words."""
    tests = {effect["tests"] for effect in effects if text.is_suggestive(effect)}
    if len(tests) == 1:
        return text.uncorrected(tests.pop())
    return "not significant after correction for the tests of the same question"


_ASKED = {
    ALONE: "one optimization alone",
    TOGETHER: "everything on",
    BETWEEN: "the configurations between",
}
_ALL_ASKED = "whole configurations"
"""Where a study does not correct each question by itself: all configurations are one family."""
_TESTED = {"alone": "one optimization alone", "left out": "added last or on top"}


def _correction_words(
    analysis: Analysis, effects: Sequence[Effect], tests: Mapping[str, int], twins: int = 0
) -> list[str]:
    """What `after correction` means, where a verdict depends on it. tests: of each question, how
    many are made together; twins: the same of the A/A twin, whose tests are a family of their own.
    """
    said_of = {text.verdict(effect) for effect in effects} & {"faster", "slower"}
    if max(tests.values(), default=0) < 2 or not (
        said_of or any(text.is_suggestive(effect) for effect in effects)
    ):
        return []
    among = text.count_of(max(tests.values()), "test")
    if len(tests) > 1:
        among = "the tests of one question"
    said = (
        f"Correction: each of {among} may find a difference by chance alone. Holm's method therefore asks for "
        "stronger evidence from each, so that the probability of even one false faster or slower among them is at most "
        f"{text.percent(analysis['rule']['alpha'], 0)}. "
    )
    if len(tests) > 1:
        counts = [f"{question}: {n}" for question, n in tests.items()]
        counts += [f"A/A twin: {twins}"] if twins else []
        said += f"Tests of each question: {', '.join(counts)}. The fewer tests, the less evidence each needs. "
    elif twins:
        said += (
            f"The A/A twin is corrected apart, for {text.count_of(twins, 'test')} of its own: one a workload, and, where "
            "there are several, one of all together. "
        )
    return [said + "An example is in docs/reading-a-report.md#the-correction."]


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
    tests = {"": max((effect["tests"] for effect in effects), default=0)}
    for entry, effect in shown:
        workload, pair = effect["workload"], [entry["ours"], entry["theirs"]]
        rates = _rates(analysis, workload)
        rows.append(
            [
                workload,
                text.pair(analysis, entry),
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
        *(
            f"{_theirs(analysis, cell)}: {own}."
            for cell in dict.fromkeys(entry["theirs"] for entry in entries)
            if (own := _own_settings(analysis, cell))
        ),
        _verdict_words(analysis, effects),
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


def _theirs(analysis: Analysis, cell: str) -> str:
    return name(analysis, cell).removeprefix("reference: ")


def _own_settings(analysis: Analysis, cell: str) -> str:
    """What a configuration of another engine was told, in that engine's names, without what it shares
    with every configuration of nanovllm: "async_scheduling=false, enforce_eager=true".
    """
    ours = {
        key
        for entry in analysis["cells"].values()
        if entry["engine"] == "nanovllm"
        for key in entry["config"]
    }
    config = analysis["cells"][cell]["config"]
    return ", ".join(
        f"{key}={json.dumps(value)}" for key, value in config.items() if key not in ours
    )


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


def subtitle(analysis: Analysis) -> list[str]:
    """What a result is a result of, in a line for all: the machine, the model and its dtype, the days;
    and what was served, in a line for all workloads that differ only in when requests arrive.
    """
    model = analysis["hardware"]["model"]
    called = next(
        (value for key in ("preset", "path") if (value := model.get(key, "-")) != "-"), ""
    )
    days = analysis["days"]
    of_all = [
        machine(analysis),
        f"{called.rsplit('/', 1)[-1]} in {model['dtype']}",
        *dict.fromkeys([days[0], days[-1]] if days else ()),
    ]
    alike: dict[str, list[str]] = {}
    for workload in analysis["workloads"]:
        named, _, work = served(workload, analysis).partition(": ")
        if "arrivals" in analysis["workloads"][workload]["params"]:
            named += f" ({_arrivals(analysis['workloads'][workload], [])})"
        alike.setdefault(work, []).append(named)
    return [", ".join(of_all), *(f"{', '.join(names)}: {work}" for work, names in alike.items())]


def served(workload: str, analysis: Analysis) -> str:
    """A workload in a few words: "mixed: 64 requests, prompt 32 to 256, output 8 to 64 tokens"."""
    entry = analysis["workloads"][workload]
    kind, params = entry["kind"], entry["params"]
    if kind == "shared_prefix":
        prefixes = text.count_of(params["num_prefixes"], "prefix")
        shared, own = _range(params["prefix_tokens"]), _range(params["own_tokens"])
        prompt = f"prompt {shared} of {prefixes} + {own}"
    elif kind == "conversation":
        turns = f"{params['num_conversations']} conversations of {params['turns']} turns"
        prompt = f"{turns}, {_range(params['user_tokens'])} new in each"
    else:
        prompt = f"prompt {_prompts(entry)}"
    requests = text.count_of(entry["num_requests"], "request")
    output = _lengths(entry, "output_tokens", "answer_tokens")
    return f"{workload}: {requests}, {prompt}, output {output} tokens"


def machine(analysis: Analysis) -> str:
    """The machine by name: the title of its profile, or for a CPU the model that the launches
    found.
    """
    profile, found = analysis["hardware"]["profile"], analysis["hardware"]["provenance"]
    if profile["device"] == "cpu" and "cpu.model" in found and "cpu.cores" in found:
        return f"{found['cpu.model']}, {text.count_of(int(found['cpu.cores']), 'core')}"
    return str(profile.get("title") or profile["name"])


def _arrivals(entry: Mapping[str, Any], waves: Sequence[int]) -> str:
    """When requests come; waves: how many requests each has."""
    params = entry["params"]
    if entry["kind"] == "trace":
        speed = "" if params["speed"] == 1 else f" at {params['speed']:g} times its speed"
        return f"replay of a trace{speed}"
    if "arrivals" in params:
        return _process(params["arrivals"])
    if entry["kind"] == "conversation":
        return f"{params['turns']} turns of {params['num_conversations']} conversations"
    if len(waves) == 1:
        return "all at once"
    return f"{len(waves)} waves of {_range([min(waves), max(waves)])}"


def _process(arrivals: Mapping[str, Any]) -> str:
    """An arrival process in words."""
    kind = arrivals["process"]
    if kind == "closed":
        return f"closed loop of {arrivals['users']} users, {arrivals['think_s']:g} s to think"
    search = arrivals.get("search")
    if search:
        rate = f"searched from {search['low']:g} to {search['high']:g}"
    else:
        rate = f"{arrivals['rate']:g}"
    burst = f", burstiness {arrivals['burstiness']:g}" if kind == "gamma" else ""
    own = ", turns with the engine's own answers" if arrivals.get("answers") == "own" else ""
    return f"{kind}, {rate} per second{burst}{own}"


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
