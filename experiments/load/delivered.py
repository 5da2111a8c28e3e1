"""What the generator delivered, as it stands in a record, and the rules that make a launch invalid
whose client was the bottleneck.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import zlib

from experiments.load.driving import Timeline
from experiments.records.types import Load, LoadRules, Schedule


def record(line: Timeline, schedule: Schedule) -> Load:
    """The part of a record that tells of the load. Times are rounded to a microsecond."""
    late = sorted(each for each in line.lateness_s if each is not None)
    return {
        "asked_rate": schedule["rate"],
        "delivered": _delivered(line, schedule),
        "never_sent": line.sent_s.count(None),
        "sent_s": [None if each is None else round(each, 6) for each in line.sent_s],
        "lateness_p50_s": round(_quantile(late, 0.5), 6),
        "lateness_p99_s": round(_quantile(late, 0.99), 6),
        "lateness_max_s": round(late[-1], 6) if late else 0.0,
        "token_gaps_us": pack(line.token_s),
    }


def objections(load: Load, rules: LoadRules) -> list[str]:
    """The rules on the delivered load that a launch broke, each with what was observed and what is
    allowed.
    """
    found = []
    if load["never_sent"]:
        found.append(f"{load['never_sent']} requests were never sent; allowed: 0")
    if load["lateness_p99_s"] > rules["max_lateness_s"]:
        found.append(
            f"the load generator was late by {load['lateness_p99_s']:.4f} s at p99; allowed: {rules['max_lateness_s']:g} s"
        )
    delivered = load["delivered"]
    if delivered is not None and delivered < rules["min_delivered"]:
        found.append(
            f"the load generator delivered {delivered:.1%} of the rate asked for; allowed: {rules['min_delivered']:.1%} or more"
        )
    return found


def pack(token_s: list[list[float]]) -> str:
    """The gaps between the tokens of each request in microseconds, as compressed JSON in base64."""
    gaps = [[round((b - a) * 1e6) for a, b in itertools.pairwise(times)] for times in token_s]
    return base64.b64encode(
        zlib.compress(json.dumps(gaps, separators=(",", ":")).encode(), 6)
    ).decode()


def unpack(packed: str) -> list[list[int]]:
    """The gaps of each request in microseconds; the reverse of `pack`."""
    gaps: list[list[int]] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return gaps


def _delivered(line: Timeline, schedule: Schedule) -> float | None:
    """The rate delivered over the rate asked for, without the engine's share: a request reaches the
    engine's queue at its due time plus the generator's own lateness. None without two requests of an
    open process.
    """
    sent = sorted(
        (due, due + late)
        for due, late, after in zip(line.due_s, line.lateness_s, schedule["after"], strict=True)
        if after is None and due is not None and late is not None
    )
    if schedule["rate"] is None or len(sent) < 2:
        return None
    asked_s, took_s = sent[-1][0] - sent[0][0], sent[-1][1] - sent[0][1]
    return round(asked_s / took_s, 6) if took_s > 0 else 1.0


def _quantile(ordered: list[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed; 0 without any."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
