"""The part of docs/claims.md on hardware that is not at hand: what `python -m experiments predict` says of
it, beside what was published. It decides nothing.

The predictions are files of experiments/prediction/claimed, each made by one command (docs/prediction.md).
"""

import json
from pathlib import Path
from typing import Any

from reports import text
from reports.page.document import Column, Section, Table

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "prediction" / "claimed"
CANONICAL = "canonical"
CARDS = {
    "rtx4070-laptop": ("RTX 4070 Laptop, 8 GB", "1,434 (nano-vllm), 1,362 (vLLM 0.8.5.post1)"),
    "rtx4070": ("RTX 4070, 12 GB", text.ABSENT),
}
"""Profiles: their cards, and the published tokens per second of other engines on them."""
PARALLEL = {
    "tp8": "tensor parallelism over 8 GPUs",
    "tp8-symmetric": "the same, sums in symmetric memory",
    "dp8": "8 replicas",
}


def section() -> Section:
    """Predicted rates and efficiencies, with their 90 % intervals."""
    rates = [_rate(profile, *shown) for profile, shown in CARDS.items()]
    efficiencies = [_efficiency(cell, words) for cell, words in PARALLEL.items()]
    return Section(
        "predicted",
        "Predicted, never reproduced",
        [
            "What the hardware of the claims would give, by a model that has not seen it: a prediction decides nothing. On an "
            "H100, which it had not seen either, its median error was 14 % (docs/prediction.md)."
        ],
        tables=[
            Table(
                "Output tokens per second on canonical, everything on, 5 GiB of KV cache, qwen3-0.6b in bfloat16",
                [
                    Column("card"),
                    Column("published, other engines"),
                    Column("predicted", "number"),
                    Column("90 % interval", "number"),
                    Column("where the time goes"),
                ],
                rates,
            ),
            Table(
                "Scaling efficiency of canonical on 8 H200 of one host, qwen3-0.6b in bfloat16",
                [
                    Column("how"),
                    Column("published"),
                    Column("predicted", "number"),
                    Column("90 % interval", "number"),
                ],
                efficiencies,
            ),
        ],
        notes=[
            "The cards are data-sheet figures, of which copies and matrix products are taken to reach the shares that they reach "
            "on an H200. Sums over more than two GPUs were never measured. To replace a prediction by a measurement: make ablate "
            "STUDY=gpu-8gb on that card, make ablate STUDY=scaling on that host."
        ],
    )


def _read(profile: str) -> dict[str, dict[str, Any]]:
    """The predicted cells of canonical, by name."""
    said = json.loads((FOLDER / f"{profile}.json").read_text(encoding="utf-8"))
    return {row["cell"]: row for row in said["cells"] if row["workload"] == CANONICAL}


def _rate(profile: str, card: str, published: str) -> list[str]:
    row = _read(profile)["baseline"]
    shares = sorted(
        ((seconds / row["duration_s"], part) for part, seconds in row["parts"].items()),
        reverse=True,
    )
    return [
        card,
        published,
        f"{row['output_tokens_per_s']:,.0f}",
        f"{row['low']:,.0f} to {row['high']:,.0f}",
        ", ".join(f"{part} {share:.0%}" for share, part in shares[:3]),
    ]


def _efficiency(cell: str, words: str) -> list[str]:
    row = _read("8gpu")[cell]
    value, low, high = (row[name] / 8 for name in ("ratio_to_baseline", "ratio_low", "ratio_high"))
    return [
        words,
        "85 %, not said how",
        f"{100 * value:.0f} %",
        f"{100 * low:.0f} to {100 * high:.0f} %",
    ]
