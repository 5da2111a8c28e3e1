"""The result of a study in one sentence, and what a reader must know before believing it.

The sentence is made from verdicts by fixed rules; nobody chooses what it says after seeing the
numbers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from reports.analysis import compare
from reports.statistics.metrics import METRICS
from reports.text import count_of, interval, percent, ratio

Analysis = Mapping[str, Any]


def answer(analysis: Analysis) -> dict[str, Any]:
    """{"sentence", "verdict", "caveats"} from a finished analysis."""
    compares = bool(compare.headline(analysis) and analysis["counts"]["counted_launches"])
    return {
        "sentence": compare.sentence(analysis) if compares else _sentence(analysis),
        "verdict": compare.verdict(analysis) if compares else _headline_verdict(analysis),
        "caveats": list(_caveats(analysis)),
    }


def _headline(analysis: Analysis) -> Mapping[str, Any] | None:
    """The effect of everything on, over all workloads together where there are several."""
    effects = [effect for effect in _primary(analysis) if effect["role"] == "all" and effect["n"]]
    return effects[-1] if effects else None  # all workloads together comes last


def _primary(analysis: Analysis) -> list[Mapping[str, Any]]:
    return [
        effect for effect in analysis["effects"] if effect["metric"] == analysis["metric"]["key"]
    ]


def _headline_verdict(analysis: Analysis) -> str:
    headline = _headline(analysis)
    if headline is not None:
        return str(headline["verdict"])
    found = {effect["verdict"] for effect in _primary(analysis) if effect["role"] == "treatment"}
    return found.pop() if len(found) == 1 else "mixed" if found else "inconclusive"


def _sentence(analysis: Analysis) -> str:
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
    headline, tested = (
        _headline(analysis),
        [effect for effect in _primary(analysis) if effect["role"] == "treatment" and effect["n"]],
    )
    if headline is None and not tested:
        return "No answer: no block holds both the baseline and another cell."
    better = max if analysis["metric"]["better"] == "higher" else min
    gains = [effect for effect in tested if effect["verdict"] == "faster"]
    best = better(gains, key=lambda effect: effect["ratio"]) if gains else None
    if headline is not None:
        single = [effect for effect in gains if _factors_changed(effect["cell"], analysis) == 1]
        best = better(single, key=lambda effect: effect["ratio"]) if single else None
        found = (
            f"the largest single gain that is told from chance: {_place(best, analysis)}"
            if best
            else ""
        )
        tail = f"; {found} ({ratio(best['ratio'])})" if best else ""
        return f"Everything on {_says(headline, analysis)}{tail}."
    if best is not None:
        rank = f"the largest of {count_of(len(gains), 'gain')} among {len(tested)} effects"
        return f"{_place(best, analysis)} {_says(best, analysis)}, {rank}."
    losses = [effect for effect in tested if effect["verdict"] == "slower"]
    worst = (
        (min if better is max else max)(losses, key=lambda effect: effect["ratio"])
        if losses
        else None
    )
    if analysis["study"].get("design", {}).get("kind") == "leave_one_out" and worst:
        rank = f"the largest of {count_of(len(losses), 'loss')} among {len(tested)} effects"
        return f"From everything on, the baseline of this study: {_place(worst, analysis)} {_says(worst, analysis)}, {rank}."
    if all(effect["low"] is None for effect in tested):
        blocks = count_of(max(effect["n"] for effect in tested), "block")
        return f"Undecided: {blocks}, too few for an interval, and so for a verdict on any of {count_of(len(tested), 'effect')}."
    tally = Counter(effect["verdict"] for effect in tested)
    found = ", ".join(f"{n} {verdict}" for verdict, n in sorted(tally.items()))
    tail = (
        f"; the largest loss: {_place(worst, analysis)} {_says(worst, analysis)}" if worst else ""
    )
    return f"Nothing tested is faster than the baseline: of {count_of(len(tested), 'effect')}, {found}{tail}."


def _factors_changed(cell: str, analysis: Analysis) -> int:
    levels, start = (analysis["cells"][name]["levels"] for name in (cell, analysis["baseline"]))
    return sum(start.get(factor) != level for factor, level in levels.items())


def _place(effect: Mapping[str, Any], analysis: Analysis) -> str:
    return (
        f"{effect['cell']} on {effect['workload']}"
        if len(analysis["workloads"]) > 1
        else str(effect["cell"])
    )


def _says(effect: Mapping[str, Any], analysis: Analysis) -> str:
    metric = analysis["metric"]
    blocks = count_of(effect["n"], "block")
    if effect["low"] is None:
        found = f"measured {ratio(effect['ratio'])[1:]} times the baseline's {metric['label']} in {blocks}"
        return f"{found}: too few for an interval, so inconclusive"
    evidence = f"{percent(analysis['rule']['confidence'], 0)} interval {interval(effect['low'], effect['high'])}, {blocks}"
    if effect["verdict"] == "inconclusive":
        return f"could not be told from the baseline in {metric['label']} ({evidence})"
    if effect["verdict"] == "equivalent":
        margin = percent(analysis["rule"]["smallest_effect"], 0)
        return f"is as good as the baseline in {metric['label']}, within {margin} ({evidence})"
    return f"gives {ratio(effect['ratio'])[1:]} times the baseline's {metric['label']} ({evidence})"


def _caveats(analysis: Analysis) -> Iterator[str]:
    counts = analysis["counts"]
    for entry in analysis["comparisons"]:
        if entry["breaches"]:
            pair = f"{entry['ours']} / {entry['theirs']} ({entry['name']})"
            yield f"Not a fair comparison, so without a ratio: {pair}: {'; '.join(entry['breaches'])}."
    for effect in _primary(analysis):
        if effect["role"] == "aa" and effect["verdict"] in ("faster", "slower"):
            yield (
                f"The A/A arm is called {effect['verdict']} on {effect['workload']} "
                f"({interval(effect['low'], effect['high'])}): the baseline differs from itself, so something besides "
                "the factors varies; distrust effects of that size."
            )
    own = [
        effect
        for effect in analysis["effects"]
        if effect["role"] == "aa" and effect["verdict"] in ("faster", "slower")
    ]
    labels = dict.fromkeys(
        METRICS[effect["metric"]].label
        for effect in own
        if effect["metric"] != analysis["metric"]["key"]
    )
    if labels:
        yield f"The A/A arm differs from the baseline in {'; '.join(labels)}: distrust differences of that size there."
    if not any(cell["role"] == "aa" for cell in analysis["cells"].values()):
        yield "There is no A/A arm: nothing shows how large an effect this machine makes up by itself."
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
        unfinished = f"Incomplete: {incomplete} of {blocks} not run to the end."
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
