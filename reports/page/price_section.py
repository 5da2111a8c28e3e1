"""What only a study has whose configurations change the output: their prices beside their speeds."""

from collections.abc import Iterator

from experiments.price.rules import METRICS
from reports import text
from reports.analysis import names
from reports.analysis.types import Analysis
from reports.figures.price_chart import points
from reports.page.document import Column, Section, Table
from reports.page.overview import CONFIGURATION, VERDICT, WORKLOAD, confidence, name, numbers
from reports.statistics.price import Prices, of


def price_head(analysis: Analysis) -> Iterator[Section]:
    """What everybody reads: the sentence, the chart, one table."""
    prices = analysis.get("price")
    if prices is None:
        return
    share = text.percent(1 - prices["level"], 0)
    table = Table(
        "Price and speed",
        [
            WORKLOAD,
            CONFIGURATION,
            *numbers("speedup" if _is_throughput(analysis) else "ratio"),
            *numbers(f"{confidence(analysis)} interval", "nats per token", f"{share} interval"),
            *numbers("top choice kept"),
            VERDICT,
        ],
        [
            [
                workload,
                text.plain_name(analysis, effect["cell"]),
                text.ratio(effect["ratio"]),
                text.interval(effect["low"], effect["high"]),
                text.nats(of(row, "kl")["price"]),
                _between(of(row, "kl")["low"], of(row, "kl")["high"]),
                text.percent(row["kept"]),
                row["verdict"],
            ]
            for workload, found in points(analysis).items()
            for effect, row in found
        ],
        grouped=True,
    )
    yield Section(
        "price",
        "What the lossy configurations cost",
        list(_sentences(analysis, prices)),
        "price",
        [table],
        notes=[_margin_words(prices)],
    )


def price_folded(analysis: Analysis) -> Iterator[Section]:
    """Every metric with its interval, noise floor, margin and test."""
    prices = analysis.get("price")
    if prices is None or not prices["rows"]:
        return
    columns = [
        CONFIGURATION,
        Column("metric"),
        *numbers("engine", "rounding alone", "price", "low", "high", "margin"),
        *numbers("p within (Holm)", "p outside (Holm)"),
        VERDICT,
    ]
    metrics = Table(
        "Prices by metric, per token",
        columns,
        [
            [
                text.plain_name(analysis, row["cell"]),
                METRICS[found["metric"]],
                *(text.nats(found[key]) for key in ("engine", "floor", "price", "low", "high")),  # type: ignore[literal-required]
                f"{found['margin']:g}",
                text.probability(found["p_within"]),
                text.probability(found["p_outside"]),
                found["verdict"],
            ]
            for row in prices["rows"]
            for found in row["judgements"]
        ],
        grouped=True,
    )
    tails = Table(
        "KL divergence of single tokens, in nats",
        [CONFIGURATION, Column("of"), *numbers("median", "99 %", "99.9 %", "largest")],
        [
            [text.plain_name(analysis, row["cell"]), side, *map(text.nats, quantiles.values())]
            for row in prices["rows"]
            for side, quantiles in (
                ("engine", row["engine_kl"]),
                ("rounding alone", row["floor_kl"]),
            )
        ],
        grouped=True,
    )
    first = prices["rows"][0]
    yield Section(
        "price-evidence",
        "How the prices were measured",
        [
            f"Each lossy configuration read the {first['prompts']} held prompts of the plan, {first['step_tokens']} tokens a "
            f"step, and its distribution was compared at {first['tokens']:,} positions with that of the unquantized model in "
            f"{first['reference_dtype']} (HF transformers).",
            f"Rounding alone: the same reference with the outputs of its layers rounded to {first['dtype']}. It is subtracted "
            "prompt by prompt: the price is what the engine loses beyond its dtype. Intervals are those of the bootstrap-t with "
            "prompts as clusters.",
            f"Within margin: a one-sided test rejects that the price is the margin or more, with errors in at most "
            f"{text.percent(prices['level'], 0)} of studies; outside: one rejects that it is the margin or less; undecided: "
            "neither. p-values are adjusted by Holm's method over the metrics of a configuration, intervals are not.",
        ],
        None,
        [metrics, tails],
        gist=", ".join(
            f"{text.plain_name(analysis, row['cell'])}: {row['verdict']}" for row in prices["rows"]
        ),
    )


def _sentences(analysis: Analysis, prices: Prices) -> Iterator[str]:
    """Of each configuration its speed and its price, in one sentence; or why it has neither."""
    metric, start = analysis["metric"]["label"], name(analysis, analysis["baseline"])
    told: dict[str, list[str]] = {}
    for workload, found in points(analysis).items():
        for effect, _ in found:
            before = told.setdefault(effect["cell"], [])
            of_start = "" if before else f" the {metric} of {start}"
            bounds = text.interval(effect["low"], effect["high"])
            before.append(
                f"{text.ratio(effect['ratio'])[1:]} times{of_start} on {workload} ({bounds})"
            )
    for row in prices["rows"]:
        plain = text.plain_name(analysis, row["cell"])
        speed = f"gives {names.listed(told[row['cell']])}, at" if row["cell"] in told else "costs"
        yield f"{plain} {speed} {names.price(row, prices['level'])}."
    for cell, reason in prices["unknown"].items():
        plain = text.plain_name(analysis, cell)
        yield f"{plain}: no speed is shown, because its price is unknown: {reason.rstrip('.')}."


def _margin_words(prices: Prices) -> str:
    margins = ", ".join(f"{prices['margins'][key]:g} ({words})" for key, words in METRICS.items())
    return (
        f"Margins, fixed in the plan before anything ran: {margins}. The price is measured against the unquantized model on "
        "held prompts; that a configuration is within its margins does not mean that its output is the same."
    )


def _between(low: float, high: float) -> str:
    return f"{text.nats(low)} to {text.nats(high)}"


def _is_throughput(analysis: Analysis) -> bool:
    return bool(analysis["metric"]["key"] == "output_tokens_per_s")
