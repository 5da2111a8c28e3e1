"""The gate's word on each output, recomputed from the figures that it states.

A gate record says `pass` beside the figures that the rules of experiments/gate/rules.py decide by.
Records may be edited or damaged, so a report does not take the word: `contradictions` applies the
rules to the figures again, and a pass that they do not support is treated as a failure, with the
reason in the report. What only the tokens can show (the margins themselves) cannot be seen here.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy import stats

from experiments.gate.chance.event_counts import evidence_of_count
from experiments.records.types import Plan, ServedWorkload

Record = Mapping[str, Any]

DEFAULTS = {"factor": 2.0, "alpha": 1e-6, "quantile": 0.999}
"""Settings of the gate that a plan may change (GateParams in experiments/gate/rules.py)."""
_TOLERANCE = 1e-6
"""Relative, for a figure that is computed again from others."""


class Gate:
    """The gate's word on each (workload, tokens digest). Judged again, the later line replaces the
    earlier (equivalence.py).
    """

    def __init__(self, records: Sequence[Record], plan: Plan) -> None:
        own = [record for record in records if record.get("plan_hash") == plan["plan_hash"]]
        lines = [record for record in own if record["kind"] == "gate"]
        self.negative_controls = [line for line in lines if line["is_negative_control"]]
        generated: dict[tuple[str, str], set[int]] = {}
        for record in own:
            if record["kind"] == "launch":
                for name, work in record["workloads"].items():
                    generated.setdefault((name, work["tokens_digest"]), set()).add(
                        work["output_tokens"]
                    )
        self.lines: dict[tuple[str, str], Record] = {}
        for line in lines:
            if not line["is_negative_control"]:
                key = (line["workload"], line["tokens_digest"])
                self.lines[key] = _believed(line, plan, generated.get(key, set()))

    def objection(self, workload: str, work: ServedWorkload) -> str | None:
        """Why what a launch generated is not accepted, or None where it passed."""
        line = self.lines.get((workload, work["tokens_digest"]))
        if line is None:
            return f"the gate did not check its tokens ({workload})"
        if line["status"] != "pass":
            return f"gate: {line['status']} on {workload}: {line.get('reason') or 'no reason recorded'}"
        if line["tokens_checked"] != work["output_tokens"]:
            return f"gate: judged {line['tokens_checked']:,} of {work['output_tokens']:,} tokens of {workload}"
        return None


def _believed(line: Record, plan: Plan, generated: set[int]) -> Record:
    """The line, or, where it says `pass` and its own figures say otherwise, a failure in its place."""
    if line["status"] != "pass":
        return line
    found = list(contradictions(line, plan))
    if generated and line.get("tokens_checked") not in generated:
        found.append(
            f"{line.get('tokens_checked')} tokens were judged, {max(generated):,} were generated"
        )
    if not found:
        return line
    return {
        **line,
        "status": "fail",
        "reason": f"recorded as a pass, which its own figures contradict: {'; '.join(found)}",
    }


def contradictions(line: Record, plan: Plan) -> Iterator[str]:
    """How a gate record that says `pass` contradicts itself, its plan, or the gate's rules. Nothing
    for an honest pass.
    """
    calibration = line.get("calibration") or {}
    figures = {name: line.get(name) for name in _FIGURES}
    figures |= {name: calibration.get(name) for name in _CALIBRATION}
    figures["hf_error"] = (calibration.get("hf_error") or {}).get("max")
    figures["largest of the margins"] = (calibration.get("margin") or {}).get("max")
    unstated = [name for name, value in figures.items() if not _is_figure(value)]
    if unstated:
        yield f"it does not state {', '.join(unstated)}"
        return
    yield from _its_words(line, plan)
    yield from _its_rules(figures, plan)
    yield from _its_parts(figures, calibration)


_FIGURES = ("tokens_checked", "mismatches", "within_bound", "max_margin", "bound")
_CALIBRATION = (
    "factor",
    "alpha",
    "floor",
    "hf_mismatches",
    "above_typical_bound",
    "allowed_above_typical_bound",
    "excess_mismatches_z",
    "z_limit",
)


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _its_words(line: Record, plan: Plan) -> Iterator[str]:
    if line.get("dtype") != plan["model"]["dtype"]:
        yield f"it is of {line.get('dtype')}, the plan of {plan['model']['dtype']}"
    if line.get("reason") or line.get("first_offender"):
        yield "it names what failed"


def _its_rules(figures: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    """Rules 2 to 4 of docs/methodology.md, with limits computed again from the plan's settings."""
    settings = DEFAULTS | plan.get("gate", {})
    for name in ("factor", "alpha"):
        if figures[name] != settings[name]:
            yield f"{name} is {figures[name]:g}, the plan's {settings[name]:g}"
    tokens, mismatches = figures["tokens_checked"], figures["mismatches"]
    for name in ("tokens_checked", *_COUNTS):
        if figures[name] != int(figures[name]) or not 0 <= figures[name] <= max(tokens, 1):
            yield f"{name} is {figures[name]:g} of {tokens:g} tokens"
    if tokens < 1:
        yield "it judged no token"
        return
    if figures["within_bound"] != mismatches:
        yield f"noise explains {figures['within_bound']:,} of {mismatches:,} mismatches"
    bound = settings["factor"] * figures["hf_error"] + figures["floor"]
    if not math.isclose(figures["bound"], bound, rel_tol=_TOLERANCE):
        yield f"the bound is {figures['bound']:.3g}, HF's error makes it {bound:.3g}"
    if not 0 <= figures["max_margin"] <= figures["bound"]:
        yield f"the largest margin is {figures['max_margin']:.3g}, the bound {figures['bound']:.3g}"
    allowed = int(stats.binom.isf(settings["alpha"], int(tokens), 1 - settings["quantile"]))
    beyond, stated = figures["above_typical_bound"], figures["allowed_above_typical_bound"]
    if stated > allowed + 1:  # the gate sums in another order
        yield f"{stated:,} tokens may exceed the typical bound, chance explains {allowed:,}"
    if beyond > stated:
        yield f"{beyond:,} tokens exceed the typical bound, {stated:,} are allowed"
    limit = float(stats.norm.isf(settings["alpha"]))
    if not math.isclose(figures["z_limit"], limit, rel_tol=_TOLERANCE):
        yield f"the limit of z is {figures['z_limit']:.2f}, its level makes it {limit:.2f}"
    if figures["excess_mismatches_z"] > limit * (1 + _TOLERANCE):
        yield f"it differs more often than HF (z = {figures['excess_mismatches_z']:.1f}, limit {limit:.1f})"


_COUNTS = (
    "mismatches",
    "within_bound",
    "hf_mismatches",
    "above_typical_bound",
    "allowed_above_typical_bound",
)


def _its_parts(figures: Mapping[str, Any], calibration: Record) -> Iterator[str]:
    """Rule 5, and what is stated twice: by position, and as quantiles."""
    tokens, margin = figures["tokens_checked"], figures["max_margin"]
    if figures["largest of the margins"] != margin:
        yield f"the largest margin is {margin:.3g} and {figures['largest of the margins']:.3g}"
    if drawn := calibration.get("distribution"):
        yield from _its_distribution(drawn, tokens, figures["alpha"])
    if ranges := calibration.get("by_position"):  # not in the oldest records
        yield from _its_ranges(ranges, figures)


def _its_distribution(drawn: Record, tokens: int, alpha: float) -> Iterator[str]:
    names = ("z", "z_limit", "largest_log_evidence", "log_evidence_limit", "tokens")
    if not all(_is_figure(drawn.get(name)) for name in names):
        yield "it does not state how its tokens follow the distribution"
        return
    z, limit, evidence, evidence_limit, judged = (drawn[name] for name in names)
    if abs(z) > limit:
        yield f"its tokens do not follow the distribution (z = {z:.1f}, limit {limit:.1f})"
    if evidence > evidence_limit:
        yield f"a request is too unlikely (log evidence {evidence:.1f}, limit {evidence_limit:.1f})"
    for name, limit_name, most, what in (
        (
            "dispersion_z",
            "dispersion_limit",
            float(stats.norm.isf(alpha)),
            "some requests are too likely and others too unlikely",
        ),
        (
            "end_log_evidence",
            "end_log_evidence_limit",
            -math.log(alpha),
            "the ends of answers are too unlikely",
        ),
        (
            "outside_log_evidence",
            "outside_log_evidence_limit",
            -math.log(alpha),
            "too many tokens lie outside of what is kept",
        ),
    ):
        if name not in drawn and limit_name not in drawn:
            continue  # a record from before 2026-11-29, or one without max_tokens
        found, stated = drawn.get(name, math.nan), drawn.get(limit_name, math.nan)
        if not (_is_figure(found) and _is_figure(stated)):
            yield f"it does not state {name} and {limit_name}"
        elif not math.isclose(stated, most, rel_tol=_TOLERANCE):
            yield f"{limit_name} is {stated:.2f}, its level makes it {most:.2f}"
        elif found > most:
            yield f"{what} ({found:.1f}, limit {most:.1f})"
    if "outside" in drawn:
        counted: Any = drawn["outside"]
        explained: Any = drawn.get("outside_explained")
        if not (_is_figure(counted) and _is_figure(explained) and counted >= 0 <= explained):
            yield "it does not state how many tokens lie outside of what is kept"
        elif not math.isclose(
            evidence_of_count(counted, explained),
            drawn.get("outside_log_evidence", math.nan),
            rel_tol=_TOLERANCE,
            abs_tol=_TOLERANCE,
        ):
            yield f"{counted} tokens outside of what is kept are not the evidence that it states"
    if not 0 <= judged <= tokens:
        yield f"the distribution is of {judged:,} of {tokens:,} tokens"


def _its_ranges(ranges: Sequence[Record], figures: Mapping[str, Any]) -> Iterator[str]:
    for name, total in (
        ("tokens", "tokens_checked"),
        ("mismatches", "mismatches"),
        ("hf_mismatches", "hf_mismatches"),
    ):
        found: list[Any] = [part.get(name) for part in ranges]
        if not all(map(_is_figure, found)) or sum(found) != figures[total]:
            yield f"{name} by position do not add up to {figures[total]:,}"
    for name, most in (("margin", "max_margin"), ("hf_error", "hf_error")):
        found = [(part.get(name) or {}).get("max") for part in ranges]
        if not all(map(_is_figure, found)) or max(found) != figures[most]:
            yield f"{name} by position does not reach {figures[most]:.3g}"
