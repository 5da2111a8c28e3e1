"""The answer of a study in one or two sentences, for a table of many studies; the whole answer, with
numbers of blocks and tests, is on the study's page.

A loss from switching something off is said as what the switch gains: `cuda_graphs: ×13.8` instead of
"no-cuda-graphs gives 0.072 times".
"""

from collections.abc import Iterator

from experiments.records.cell_names import ALL_ON, engine, is_off
from reports import text
from reports.analysis import compare, names
from reports.analysis.answer import added_last
from reports.analysis.types import Analysis, Effect
from reports.statistics.intervals import measured_ratio
from reports.statistics.metrics import THROUGHPUT


def short_answer(analysis: Analysis) -> str:
    """At most two sentences: one for each of two workloads, or one for all of more."""
    answer = analysis["answer"]
    if any(not part["workload"] for part in answer["by_workload"]):  # no answer, and why
        return answer["sentence"]
    if compare.headline(analysis):
        return _against(analysis)
    said = [(part["workload"], _of(analysis, part["workload"])) for part in answer["by_workload"]]
    if len(said) <= 2:
        return " ".join(f"On {workload}, {found}." for workload, found in said)
    return "; ".join(f"{workload}: {found}" for workload, found in said) + "."


def _against(analysis: Analysis) -> str:
    """Ours over the other engine, on all workloads."""
    entry = compare.headline(analysis)
    assert entry is not None
    found = ", ".join(
        f"{effect['workload']} {_numbers(effect, text.verdict(effect))}"
        for effect in entry["effects"][THROUGHPUT.key].values()
        if effect["n"]
    )
    ours = analysis["shown"][entry["ours"]]
    what = f", {text.comparison(entry['name'], ours)}" if entry["name"] == "best" else ""
    return f"{entry['our_engine']} over {engine(entry['engine'], entry['version'])}{what}: {found}."


def _of(analysis: Analysis, workload: str) -> str:
    tested = [
        effect
        for effect in analysis["effects"]
        if effect["metric"] == analysis["metric"]["key"]
        and effect["workload"] == workload
        and effect["role"] in ("treatment", "all")
        and effect["n"]
    ]
    whole = next((effect for effect in tested if effect["role"] == "all"), None)
    if whole is not None:
        return f"everything on {_found(whole)}{''.join(_helpers(analysis, workload, tested))}"
    gains = [effect for effect in tested if effect["verdict"] == "faster"]
    losses = [effect for effect in tested if effect["verdict"] == "slower"]
    higher = analysis["metric"]["better"] == "higher"
    if gains:
        best = (max if higher else min)(gains, key=measured_ratio)
        return f"{analysis['shown'][best['cell']]} {_found(best)}"
    if losses:
        worst = (min if higher else max)(losses, key=measured_ratio)
        return _lost(analysis, worst)
    return "nothing tested is significantly faster or slower"


def _helpers(analysis: Analysis, workload: str, tested: list[Effect]) -> Iterator[str]:
    """What helps most: added last where that was measured and found, else alone."""
    if gains := added_last(analysis, workload):
        yield f"; added last, {names.listed(gains)}"
        return
    single = [
        effect
        for effect in tested
        if effect["verdict"] == "faster" and len(names.changes(analysis, effect["cell"])) == 1
    ]
    if single:
        best = (max if analysis["metric"]["better"] == "higher" else min)(
            single, key=measured_ratio
        )
        yield f"; alone, {analysis['shown'][best['cell']]} {text.ratio(best['ratio'])}"


def _lost(analysis: Analysis, worst: Effect) -> str:
    """The largest loss. One from switching off is turned around: what is gained by what is missing."""
    start, shown = str(analysis["shown"][analysis["baseline"]]), analysis["shown"][worst["cell"]]
    changed = [change.split("=", 1) for change in names.changes(analysis, worst["cell"])]
    switched_off = [factor for factor, level in changed if is_off(factor, level)]
    if start != ALL_ON or not changed or len(switched_off) < len(changed):
        return f"{shown} {_found(worst)}"
    gained: Effect = {
        **worst,
        "ratio": 1 / measured_ratio(worst),
        "low": 1 / worst["high"] if worst["high"] else None,
        "high": 1 / worst["low"] if worst["low"] else None,
    }
    what = switched_off[0] if len(switched_off) == 1 else f"{start} over {shown}"
    return f"{what}: {_numbers(gained)}"


def _found(effect: Effect) -> str:
    """A ratio with interval and verdict: "×2.67 (2.24 to 3.18), faster"."""
    return f"{_numbers(effect)}, {text.verdict(effect)}"


def _numbers(effect: Effect, *more: str) -> str:
    """ "×2.67 (2.24 to 3.18)", with more in the brackets."""
    within = ", ".join([text.interval(effect["low"], effect["high"]), *more])
    return f"{text.ratio(effect['ratio'])} ({within})"
