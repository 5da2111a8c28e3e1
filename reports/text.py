"""How numbers are formatted for people, in one place, so that page, Markdown, table and figures agree.

A value that could not be had is None and written as an en dash.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from experiments.records.cell_names import ALL_ON
from experiments.records.cell_names import engine as engine_name

ABSENT = "–"
SUGGESTIVE = "suggestive"
KINDS = {
    "alone": "alone",
    "left out": "added last",
    "average": "on average",
    "Shapley": "Shapley's share",
}
"""How an effect of a factor was measured: what records call it, and what pages do."""
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def ratio(value: float | None) -> str:
    """1.2345 -> "×1.234", 2.5 -> "×2.50": more decimals near and below 1, where they matter."""
    if value is None:
        return ABSENT
    if value >= 1e6:  # the end of an interval that says nothing
        return "×∞" if math.isinf(value) else f"×{value:.0e}"
    decimals = 3 if value < 2 else 2 if value < 10 else 1 if value < 100 else 0
    return f"×{value:.{decimals}f}"


def interval(low: float | None, high: float | None, between: str = " to ") -> str:
    """An interval of ratios: "2.07 to 2.11"; with more digits where both ends would read the same, as
    those of two blocks that agree: "0.3438 to 0.3442".
    """
    if low is None or high is None:
        return "no interval"
    ends = ratio(low)[1:], ratio(high)[1:]
    if ends[0] == ends[1] and low != high and high < 1e6:
        decimals = len(ends[0].partition(".")[2])
        for more in range(decimals + 1, decimals + 4):
            ends = f"{low:.{more}f}", f"{high:.{more}f}"
            if ends[0] != ends[1]:
                break
    return between.join(ends)


def percent(value: float | None, digits: int = 1) -> str:
    """0.031 -> "3.1 %"."""
    if value is not None and value > 10:
        return "> 1000 %"
    return ABSENT if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None) -> str:
    """Four significant digits, thousands apart: 22970.4 -> "22,970", 182.0 -> "182.0", 0.01234 ->
    "0.01234".
    """
    if value is None:
        return ABSENT
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 1 else f"{value:#.4g}"


def seconds(value: float | None) -> str:
    """0.0123 -> "12.3 ms"."""
    if value is None:
        return ABSENT
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= scale:
            return f"{value / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:.3g} s"


def nats(value: float) -> str:
    """A KL divergence or a difference of log perplexities, two significant digits: "0.0041"."""
    return "0" if abs(value) < 1e-6 else f"{value:.2g}"


def price_of(analysis: Mapping[str, Any], cell: str) -> str:
    """What the name of a configuration that changes the output ends with, " at 0.0041 nats" (per token),
    so that its speed is never shown without; empty for one without a price.
    """
    for row in (analysis.get("price") or {"rows": ()})["rows"]:
        if row["cell"] == cell:
            kl = next(found for found in row["judgements"] if found["metric"] == "kl")
            return f" at {nats(kl['price'])} nats"
    return ""


def plain_name(analysis: Mapping[str, Any], cell: str) -> str:
    """The name of a configuration without its price."""
    return str(analysis["shown"][cell]).removesuffix(price_of(analysis, cell))


def probability(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def quantity(value: float | None, unit: str) -> str:
    """A metric's value with its unit: "tok/s" or "s"."""
    return seconds(value) if unit == "s" else ABSENT if value is None else f"{number(value)} {unit}"


def count_of(number_: int, noun: str) -> str:
    """3, "launch" -> "3 launches"."""
    plural = noun + ("es" if noun.endswith(("ch", "sh", "s", "x")) else "s")
    return f"{number_:,} {noun if number_ == 1 else plural}"


def printable(value: Any) -> Any:
    """The same JSON with control characters and overrides of the writing direction replaced by
    U+FFFD: they would move a terminal's cursor, break an SVG, or make a name read as another.
    """
    if isinstance(value, str):
        return _OBEYED.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {printable(key): printable(inner) for key, inner in value.items()}
    return [printable(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def verdict(effect: Mapping[str, Any]) -> str:
    """The verdict on an effect in the words of a page. Where the interval leaves out 1 and the test,
    corrected for all that are made together, does not reject equality: "suggestive: faster" or
    "suggestive: slower", by the side of 1 on which it lies.
    """
    found, leans = str(effect["verdict"]), effect.get("leans")
    return f"{SUGGESTIVE}: {leans}" if found == "inconclusive" and leans else found


def is_suggestive(effect: Mapping[str, Any]) -> bool:
    """Whether the interval alone speaks for a difference, and the corrected test does not."""
    return verdict(effect).startswith(SUGGESTIVE)


def uncorrected(tests: int) -> str:
    """What `suggestive` means, where the number of tests is known."""
    return f"not significant after correction for {count_of(tests, 'test')}"


def level_range(bounds: list[int] | None) -> str:
    """The least and most of a counter: [3, 3] -> "3", [3, 5] -> "3 to 5"."""
    if bounds is None:
        return ABSENT
    low, high = bounds
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def comparison(name: str, ours: str) -> str:
    """What a comparison of engines compares, as it stands in a sentence. ours: our configuration, as pages
    call it.
    """
    if name == "best" and ours == ALL_ON:
        return "everything on in both"
    return {
        "best": "each at its own settings",
        "like-for-like": "like for like",
        "all-off": "everything off in both",
    }.get(name, f"comparison {name}")


def pair(analysis: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """A pair of a comparison: "all on / vLLM 0.32.0, everything on in both"."""
    ours = str(analysis["shown"][entry["ours"]])
    theirs = engine_name(entry["engine"], entry["version"])
    return f"{ours} / {theirs}, {comparison(entry['name'], ours)}"


def put_between(page: str, begin: str, end: str, fresh: str) -> str:
    """A page with what stands between two of its lines replaced. Raises ValueError where it lacks one."""
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(
            f"the page has no place for the table: write {begin} and {end} on lines of their own"
        )
    return f"{before}{begin}\n\n{fresh}\n\n{end}{after}"
