"""The result of a study in a sentence for each workload, and what to know before believing it.

The sentences are made from verdicts by fixed rules; nobody chooses what they say after seeing the
numbers.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from experiments.records.cell_names import ALL_ON
from reports import text
from reports.analysis import compare, names, under_load
from reports.analysis.gate_and_launches import same_output
from reports.analysis.types import Analysis, Answer, Effect, WorkloadAnswer
from reports.statistics.intervals import measured_ratio
from reports.statistics.metrics import EVERY
from reports.switches import title
from reports.text import count_of, interval, percent, ratio

NOTICED_FOREIGN_CPU = 0.2
"""The mean share of the CPU that other processes took during a launch, from which on it is said."""


def answer(analysis: Analysis) -> Answer:
    """From a finished analysis:

    sentence: the whole answer. by_workload: {"workload", "sentence", "verdict"}, the same answer
    apart for each workload; one entry without a workload where there is no answer.
    verdict: the one that all workloads share, `mixed` where they do not.
    output: whether the output is the same, in a sentence. caveats: what a reader must know before
    believing it.
    """
    if reason := _no_answer(analysis):
        parts: list[WorkloadAnswer] = [
            {"workload": "", "sentence": reason, "verdict": "inconclusive"}
        ]
    elif compare.headline(analysis):
        parts = compare.by_workload(analysis)
    else:
        parts = [_of_workload(analysis, workload) for workload in analysis["workloads"]]
    found = {part["verdict"] for part in parts}
    return {
        "sentence": " ".join(part["sentence"] for part in parts),
        "by_workload": parts,
        "verdict": found.pop() if len(found) == 1 else "mixed",
        "output": " ".join([same_output(analysis), *names.prices(analysis)]),
        "caveats": list(_caveats(analysis)),
    }


def _primary(analysis: Analysis) -> list[Effect]:
    return [
        effect for effect in analysis["effects"] if effect["metric"] == analysis["metric"]["key"]
    ]


def _tested(analysis: Analysis) -> list[Effect]:
    return [
        effect
        for effect in _primary(analysis)
        if effect["role"] in ("treatment", "all")
        and effect["n"]
        and effect["workload"] in analysis["workloads"]
    ]


def _no_answer(analysis: Analysis) -> str | None:
    """Why the whole study has no answer; None if it has one."""
    counts = analysis["counts"]
    if not counts["counted_launches"] and analysis["unjudged"]:
        launches = count_of(counts["excluded_launches"], "launch")
        return f"Descriptive: {launches} of generated weights, measured and not judged; no ratio and no verdict."
    if not counts["counted_launches"]:
        made = (
            count_of(counts["excluded_launches"], "launch") + " excluded"
            if counts["excluded_launches"]
            else "none recorded"
        )
        return (
            f"No answer: not one launch was counted ({made}, {counts['planned_launches']} planned)."
        )
    if compare.headline(analysis):
        return None
    tested = _tested(analysis)
    if not tested:
        return f"No answer: no block holds both {_start(analysis)} and another configuration."
    if all(effect["low"] is None for effect in tested):
        blocks = count_of(max(effect["n"] for effect in tested), "block")
        return f"Undecided: {blocks}, too few for an interval, and so for a verdict on any of {count_of(len(tested), 'effect')}."
    return None


def _of_workload(analysis: Analysis, workload: str) -> WorkloadAnswer:
    """The answer for one workload: everything on, what helps most by itself, the strongest
    interaction; or, in a study without everything on, the largest gain or loss.
    """
    if "load" in analysis and (found := under_load.sustained(analysis, workload)) is not None:
        said, verdict = found
        return {"workload": workload, "sentence": f"On {workload}, {said}.", "verdict": verdict}
    tested = [effect for effect in _tested(analysis) if effect["workload"] == workload]
    everything = next((effect for effect in tested if effect["role"] == "all"), None)
    others = [effect for effect in tested if effect["role"] == "treatment"]
    if everything is not None:
        said, verdict = _together(analysis, everything, others, workload), everything["verdict"]
    elif others:
        said, verdict = _apart(analysis, others)
    else:
        said = f"no block holds both {_start(analysis)} and another configuration"
        verdict = "inconclusive"
    if "load" in analysis:
        said += under_load.paced(analysis, workload)
    return {"workload": workload, "sentence": f"On {workload}, {said}.", "verdict": verdict}


def _together(
    analysis: Analysis, everything: Effect, others: Sequence[Effect], workload: str
) -> str:
    price = text.price_of(analysis, everything["cell"])
    said = f"everything on{price} {_says(everything, analysis)}"
    if workload == next(iter(analysis["workloads"])):  # what it holds is said once
        held = ", ".join(names.changes(analysis, everything["cell"]))
        said = f"everything on ({held}){price} {_says(everything, analysis)}"
    single = [effect for effect in others if len(names.changes(analysis, effect["cell"])) == 1]
    best = _largest(analysis, [e for e in single if e["verdict"] == "faster"])
    if best is not None:
        said += f"; on its own, {_name(best, analysis)} helps most ({_short(best)})"
    elif leads := [e for e in single if text.is_suggestive(e) and _gains(analysis, e)]:
        best = _largest(analysis, leads)
        assert best is not None
        said += (
            f"; on its own, {_name(best, analysis)} comes first ({_short(best)}, {text.verdict(best)}; "
            f"{text.uncorrected(best['tests'])})"
        )
    elif single:
        said += "; none of them is significantly faster on its own"
        best = _largest(analysis, single)
        if best is not None and _gains(analysis, best):
            said += f" (the most: {_name(best, analysis)}, {_short(best)})"
    if gains := added_last(analysis, workload):
        said += f"; added last{_added_last_words(analysis, workload)}, {names.listed(gains)} "
        said += "gains most" if len(gains) == 1 else "gain most"
    said += _better_without(analysis, everything)
    pairs = [
        row
        for row in analysis["interactions"]
        if row["workload"] == workload and row["verdict"] in _INTERACTS
    ]
    if pairs:
        pair = max(pairs, key=lambda row: abs(math.log(measured_ratio(row))))
        said += f"; strongest interaction: {pair['first']} and {pair['second']} {pair['verdict']} ({_short(pair)})"
    return said + _combined(analysis, everything, bool(pairs))


def _combined(analysis: Analysis, everything: Effect, pair_is_named: bool) -> str:
    """Says when everything on brings more, or less, than the product of its parts, unless the
    strongest pair has said so, and names the counter that shows why.
    """
    workload = everything["workload"]
    row = next((row for row in analysis["combinations"] if row["workload"] == workload), None)
    told = row is not None and (row["verdict"] in _INTERACTS or text.is_suggestive(row))
    if row is None or not told:
        return ""
    said = ""
    if not pair_is_named:
        product = ratio(measured_ratio(everything) / measured_ratio(row))
        sure = "bring" if row["verdict"] in _INTERACTS else "may bring"
        times, within = ratio(row["ratio"])[1:], interval(row["low"], row["high"])
        said = f". Together they {sure} {times} times ({within}) what their single speedups multiply to, {product}"
    why = names.why_together(analysis, workload) if _gains(analysis, row) else ""
    return said + (f". What the counters show: {why}" if why else "")


def _added_last_words(analysis: Analysis, workload: str) -> str:
    """What `added last` means, at the first workload that has it."""
    first = next(name for name in analysis["workloads"] if added_last(analysis, name))
    if first != workload:
        return ""
    return " (everything on over everything on without it; such gains overlap and do not multiply)"


MOST_GAINS = 3
"""How many gains of optimizations that are added last an answer names."""


def added_last(analysis: Analysis, workload: str) -> list[str]:
    """The largest significant gains of optimizations that are added last, as "cuda_graphs ×10.8"; what
    a study does not measure in that way, or does not find, is not named.
    """
    rows = [
        row
        for row in analysis["factors"]
        if row["kind"] == "left out"
        and row["workload"] == workload
        and row["n"]
        and row.get("part_of_all", True)
    ]
    gains = sorted(
        (row for row in rows if row["verdict"] == "faster"),
        key=measured_ratio,
        reverse=analysis["metric"]["better"] == "higher",
    )
    return [
        f"{title(rows, row)}{text.price_of(analysis, row['on'])} {ratio(row['ratio'])}"
        for row in gains[:MOST_GAINS]
    ]


def _better_without(analysis: Analysis, everything: Effect) -> str:
    """Names the toggle that measures worst when it is added last, if it is slower or suggestively so,
    by more than the smallest effect that matters. A toggle that the study does not expect to act on
    this workload is left out.
    """
    ratios = {
        effect["cell"]: effect
        for effect in _primary(analysis)
        if effect["workload"] == everything["workload"] and effect["n"]
    }
    low, high = analysis["rule"]["band"]
    factors = analysis["study"].get("factors", {})
    worse = [
        row
        for row in analysis["factors"]
        if row["kind"] == "left out"
        and everything["workload"]
        in (factors.get(row["factor"], {}).get("workloads") or analysis["workloads"])
        and row["workload"] == everything["workload"]
        and row["on"] == everything["cell"]
        and row["off"] in ratios
        and row["n"]
        and not low <= measured_ratio(row) <= high
        and not _gains(analysis, row)
        and (row["verdict"] == "slower" or text.is_suggestive(row))
    ]
    worst = _largest(analysis, worse, turned=True)
    if worst is None:
        return ""
    without = ratio(ratios[worst["off"]]["ratio"])
    makes = "makes" if worst["verdict"] == "slower" else "may make"
    return (
        f"; {worst['factor']}={worst['level']}, added last, {makes} it worse ({_short(worst)}, {text.verdict(worst)}; "
        f"without it {without})"
    )


_INTERACTS = ("help each other", "stand in each other's way")


def _apart(analysis: Analysis, others: Sequence[Effect]) -> tuple[str, str]:
    start = _start(analysis)
    gains = [effect for effect in others if effect["verdict"] == "faster"]
    losses = [effect for effect in others if effect["verdict"] == "slower"]
    if (best := _largest(analysis, gains)) is not None:
        rank = f", {_rank(gains, 'gain')} among {count_of(len(others), 'change')}"
        return (
            f"{_name(best, analysis)} {_says(best, analysis)}{rank * (len(others) > 1)}",
            "faster",
        )
    worst = _largest(analysis, losses, turned=True)
    lost = f"{_name(worst, analysis)} {_says(worst, analysis)}" if worst else ""
    if len(others) == 1:
        return f"{_name(others[0], analysis)} {_says(others[0], analysis)}", others[0]["verdict"]
    found = {effect["verdict"] for effect in others}
    verdict = found.pop() if len(found) == 1 else "mixed"
    if start == ALL_ON and worst:
        rank = f"{_rank(losses, 'loss')} among {count_of(len(others), 'change')}"
        return f"{lost}, {rank}", verdict
    tally = Counter(text.verdict(effect) for effect in others)
    said = f"nothing tested is significantly faster than {start}: of {count_of(len(others), 'change')}, "
    said += ", ".join(f"{n} {word}" for word, n in sorted(tally.items()))
    return said + (f"; the largest loss: {lost}" if lost else ""), verdict


def _gains(analysis: Analysis, effect: Effect) -> bool:
    return bool((measured_ratio(effect) > 1) == (analysis["metric"]["better"] == "higher"))


def _largest(analysis: Analysis, effects: Sequence[Effect], turned: bool = False) -> Effect | None:
    """The effect with the best ratio; turned: with the worst."""
    best = max if (analysis["metric"]["better"] == "higher") != turned else min
    return best(effects, key=measured_ratio) if effects else None


def _name(effect: Effect, analysis: Analysis) -> str:
    return str(analysis["shown"][effect["cell"]])


_ABBREVIATIONS = {
    "TTFT": "time to first token",
    "TPOT": "time per output token",
    "ITL": "inter-token latency",
    "E2E": "end-to-end latency",
    "SLO": "service level objective",
}


def _spelled(label: str) -> str:
    """A metric's label with its abbreviation explained."""
    for short, full in _ABBREVIATIONS.items():
        label = label.replace(short, f"{full} ({short})")
    return label


def _start(analysis: Analysis) -> str:
    """The name of the configuration that all others are compared with, for use in a sentence."""
    shown = str(analysis["shown"][analysis["baseline"]])
    return f"the {shown}" if shown == "baseline" else shown


def _rank(effects: Sequence[Effect], noun: str) -> str:
    return (
        f"the only {noun}"
        if len(effects) == 1
        else f"the largest of {count_of(len(effects), noun)}"
    )


def _bounds(effect: Effect) -> str:
    return f"{ratio(effect['ratio'])} ({interval(effect['low'], effect['high'])})"


def _short(effect: Effect) -> str:
    return f"{ratio(effect['ratio'])}, {interval(effect['low'], effect['high'])}"


def _says(effect: Effect, analysis: Analysis) -> str:
    metric, start = _spelled(analysis["metric"]["label"]), _start(analysis)
    blocks = count_of(effect["n"], "block")
    times = f"{ratio(effect['ratio'])[1:]} times the {metric} of {start}"
    if effect["low"] is None:
        return f"measures {times} in {blocks}: too few for an interval, so inconclusive"
    found = f"{percent(analysis['rule']['confidence'], 0)} interval {interval(effect['low'], effect['high'])}, {blocks}"
    shown = text.verdict(effect)
    if text.is_suggestive(effect):
        return f"measures {times} ({found}): {shown}; {text.uncorrected(effect['tests'])}"
    if shown == "inconclusive":
        return f"cannot be told from {start} in {metric} ({found})"
    if shown == "equivalent":
        margin = percent(analysis["rule"]["smallest_effect"], 0)
        return f"is as good as {start} in {metric}, within {margin} ({found})"
    return f"gives {times} ({found})"


def _caveats(analysis: Analysis) -> Iterator[str]:
    counts = analysis["counts"]
    for entry in analysis["comparisons"]:
        if entry["breaches"]:
            sides = (analysis["shown"][entry[side]] for side in ("ours", "theirs"))
            pair = f"{' / '.join(sides)} ({entry['name']})"
            yield f"Not a fair comparison, so without a ratio: {pair}: {'; '.join(entry['breaches'])}."
    start = _start(analysis)
    yield from _noise(analysis)
    own = [
        effect
        for effect in analysis["effects"]
        if effect["role"] == "aa" and effect["verdict"] in ("faster", "slower")
    ]
    sizes: dict[str, list[str]] = {}
    for effect in own:
        if effect["metric"] != analysis["metric"]["key"]:
            size = f"{ratio(effect['ratio'])} on {effect['workload']}"
            sizes.setdefault(EVERY[effect["metric"]].label, []).append(size)
    labels = list(sizes)
    differing = [  # an abbreviation is explained once
        f"{label if any(label[:4] == earlier[:4] for earlier in labels[:i]) else _spelled(label)} "
        f"({', '.join(sizes[label])})"
        for i, label in enumerate(labels)
    ]
    if differing:
        yield f"The A/A twin differs from {start} in {names.listed(differing)}: distrust differences of that size there."
    if not any(cell["role"] == "aa" for cell in analysis["cells"].values()):
        yield "There is no A/A twin: nothing shows how large an effect the noise of this machine can look like."
    yield from _busy(analysis)
    failed = [row for row in analysis["gate"]["rows"] if row["status"] != "pass"]
    if failed:
        yield f"The gate did not pass {count_of(len(failed), 'output')}; the launches that produced them are excluded."
    controls = analysis["gate"]["negative_controls"]
    if any(control["status"] != "fail" for control in controls):
        yield "A deliberately broken engine was not caught by the gate: until that is understood, a pass means little."
    incomplete = (
        counts["planned_blocks"]
        - counts["run_blocks" if analysis["unjudged"] else "complete_blocks"]
    )
    if incomplete:
        blocks = count_of(counts["planned_blocks"], "block")
        unfinished = f"Incomplete: {incomplete} of {blocks} did not run to the end."
        paired = (
            ""
            if analysis["unjudged"]
            else " An effect uses the blocks in which both its sides were counted."
        )
        yield f"{unfinished}{paired}"
    failed_checks = [check for check in analysis["checks"]["failed"] if not check["hard"]]
    if failed_checks:
        yield f"{count_of(len(failed_checks), 'soft consistency check')} failed; see the table of checks."
    launches = analysis["order"]["launches"]
    throttled = [row for row in launches if row["throttle_reasons"]]
    if throttled:
        reasons = Counter(
            reason.replace("_", " ") for row in throttled for reason in row["throttle_reasons"]
        )
        why = ", ".join(f"{reason} in {n}" for reason, n in sorted(reasons.items()))
        yield f"The GPU lowered its clock during {len(throttled)} of {count_of(len(launches), 'counted launch')}: {why}."


def _noise(analysis: Analysis) -> Iterator[str]:
    """What the A/A twin shows of the noise of the study's metric, where it is not equivalent: by how much
    two runs of the same configuration differed, and which effects are too small to believe therefore.
    """
    twins = [
        effect
        for effect in _primary(analysis)
        if effect["role"] == "aa"
        and effect["verdict"] in ("faster", "slower", "inconclusive")
        and effect["low"]
        and effect["workload"] in analysis["workloads"]
    ]
    twins.sort(key=lambda effect: -_apart_by(effect))
    low, high = analysis["rule"]["band"]
    far = [twin for twin in twins if not low <= measured_ratio(twin) <= high]
    near = [twin for twin in twins if twin not in far]
    if far:
        differed = [
            f"{percent(abs(measured_ratio(twin) - 1), 0)} on {twin['workload']} ({interval(twin['low'], twin['high'])})"
            for twin in far
        ]
        sizes = [_about(_reach(twin)) for twin in far]
        where = (
            f"about {sizes[0]} there"
            if len(set(sizes)) == 1
            else "about "
            + names.listed(
                [f"{size} on {twin['workload']}" for size, twin in zip(sizes, far, strict=True)]
            )
        )
        sure = [twin for twin in far if twin["verdict"] != "inconclusive"]
        why = (
            f" On {names.listed([twin['workload'] for twin in sure])} the difference is significant: something besides the "
            "factors varies."
            if sure
            else ""
        )
        yield (
            f"Noise: two runs of the same configuration (the A/A twin) differed by "
            f"{names.listed(differed)}: distrust single effects smaller than {where}.{why}"
        )
    if near:
        read = names.listed([f"{_bounds(twin)} on {twin['workload']}" for twin in near])
        sizes = [f"{_about(_reach(twin))} on {twin['workload']}" for twin in near]
        yield (
            f"Noise: the A/A twin, which is {_start(analysis)} run a second time, reads {read}: distrust single effects "
            f"smaller than about {names.listed(sizes)}."
        )


def _apart_by(effect: Effect) -> float:
    """How far a ratio is from 1, as a factor above 1: 0.8 -> 1.25."""
    return math.exp(abs(math.log(measured_ratio(effect))))


def _reach(effect: Effect) -> float:
    """How far the far end of an interval is from 1, as a factor above 1: 0.61 to 0.94 -> 1.64."""
    ends = (effect["low"], effect["high"], effect["ratio"])
    return max(math.exp(abs(math.log(end))) for end in ends if end)


def _about(times: float) -> str:
    """A factor in few digits, rounded up: 1.3211 -> "×1.4", 1.0638 -> "×1.07"."""
    if times >= 10:
        return f"×{math.ceil(times)}"
    digits = 2 if times < 1.1 else 1
    return f"×{math.ceil(times * 10**digits - 1e-9) / 10**digits:.{digits}f}"


def _busy(analysis: Analysis) -> Iterator[str]:
    """Warns of load from other programs."""
    shares = [
        share
        for row in analysis["order"]["launches"]
        if (share := row["telemetry"].get("cpu_foreign")) is not None
    ]
    busy = sum(share > NOTICED_FOREIGN_CPU for share in shares)
    if busy:
        yield (
            f"Other processes used more than {percent(NOTICED_FOREIGN_CPU, 0)} of the CPU during {busy} of "
            f"{count_of(len(shares), 'counted launch')} ({percent(sum(shares) / len(shares), 0)} on average): "
            "intervals are wider than on an idle machine."
        )
