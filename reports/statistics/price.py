"""The prices of a study's lossy configurations: which of them are known, and the verdicts on them.

A configuration that changes the output on purpose has no speed without a price: where its price
record is missing or cannot be believed, its launches do not count (analysis/counting.py), so no
table, chart or sentence shows them.
"""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from experiments.price.rules import METRICS
from experiments.price.verdicts import Judgement, PriceVerdict, judge, of_all
from experiments.records.types import Levels, Plan, PlannedPrice, PriceRecord, Record


class PriceRow(TypedDict):
    """The price of one configuration. kept: share of tokens whose most likely one is the reference's;
    kept_by_floor: the same of the reference with rounding injected.
    """

    cell: str
    levels: Levels
    prompts: int
    tokens: int
    dtype: str
    reference_dtype: str
    step_tokens: int
    judgements: list[Judgement]
    engine_kl: dict[str, float]
    floor_kl: dict[str, float]
    kept: float
    kept_by_floor: float
    verdict: PriceVerdict


class Prices(TypedDict):
    """rows: of the configurations with a price; unknown: why others have none, by configuration."""

    margins: dict[str, float]
    level: float
    rows: list[PriceRow]
    unknown: dict[str, str]


def prices(records: Sequence[Record], plan: Plan, code: str = "") -> Prices | None:
    """None for a plan without lossy configurations. code: as in `unpriced`."""
    if (rules := plan.get("price")) is None:
        return None
    unknown = unpriced(records, plan, code)
    found = _last(records, plan)
    return {
        "margins": rules["margins"],
        "level": rules["level"],
        "rows": [_row(found[cell], plan, rules) for cell in rules["cells"] if cell not in unknown],
        "unknown": unknown,
    }


def unpriced(records: Iterable[Record], plan: Plan, code: str = "") -> dict[str, str]:
    """{lossy configuration without a price that can be believed: why}. code: the digest of the code
    that its launches measured, where known.
    """
    if (rules := plan.get("price")) is None:
        return {}
    found = _last(records, plan)
    return {
        cell: reason
        for cell in rules["cells"]
        if (reason := _objection(found.get(cell), rules, cell, code)) is not None
    }


def _last(records: Iterable[Record], plan: Plan) -> dict[str, PriceRecord]:
    """The last price record of each configuration."""
    return {
        record["cell"]: record
        for record in records
        if record["kind"] == "price" and record["plan_hash"] == plan["plan_hash"]
    }


def _objection(record: PriceRecord | None, rules: PlannedPrice, cell: str, code: str) -> str | None:
    """Why a price record cannot be used; None if it can."""
    if record is None:
        return "it was not measured; run `python -m experiments.price --plan PLAN --out FOLDER`"
    figures = record["figures"]
    if record["status"] != "ok" or figures is None:
        return f"it could not be measured: {record['reason']}"
    if record["fingerprint"] != rules["prompts"]["fingerprint"]:
        return "it was measured with other prompts than the plan's"
    if record["levels"] != rules["cells"][cell]:
        return f"it is that of {record['levels']}, the plan has {rules['cells'][cell]}"
    if code and record["code_digest"] != code:
        return "it was measured with other code than the launches"
    tokens = figures["prompts"]["tokens"]
    planned = rules["prompts"]["prompt_tokens"] - rules["prompts"]["num_requests"]
    if (len(tokens), sum(tokens)) != (rules["prompts"]["num_requests"], planned):
        return f"it contradicts the plan: {sum(tokens)} tokens of {len(tokens)} prompts instead of {planned}"
    for side in (figures["prompts"]["engine"], figures["prompts"]["floor"]):
        if sorted(side) != sorted(METRICS) or any(len(side[m]) != len(tokens) for m in METRICS):
            return "it lacks sums of some prompts"
        # KL is no less than 0, but for rounding; no prompt loses more tokens than it has
        if min(side["kl"]) < -1e-9 or any(
            not 0 <= lost <= n for lost, n in zip(side["top_choice"], tokens, strict=True)
        ):
            return "it contradicts itself: sums that no distribution can give"
    return None


def _row(record: PriceRecord, plan: Plan, rules: PlannedPrice) -> PriceRow:
    figures = record["figures"]
    assert figures is not None  # _objection has looked
    prompts = figures["prompts"]
    judgements = judge(
        prompts, rules["margins"], rules["level"], f"{plan['plan_hash']}/{record['cell']}"
    )
    tokens = sum(prompts["tokens"])
    return {
        "cell": record["cell"],
        "levels": record["levels"],
        "prompts": len(prompts["tokens"]),
        "tokens": tokens,
        "dtype": record["dtype"],
        "reference_dtype": record["reference_dtype"],
        "step_tokens": figures["step_tokens"],
        "judgements": judgements,
        "engine_kl": figures["engine_kl"],
        "floor_kl": figures["floor_kl"],
        "kept": 1 - sum(prompts["engine"]["top_choice"]) / tokens,
        "kept_by_floor": 1 - sum(prompts["floor"]["top_choice"]) / tokens,
        "verdict": of_all(judgements),
    }


def of(row: PriceRow, metric: str) -> Judgement:
    """The judgement on one metric of a price."""
    return next(found for found in row["judgements"] if found["metric"] == metric)
