"""Finds the outputs to judge in a folder of records, and turns verdicts into gate records.

Needs no torch: an audit reads tokens with it.
"""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import workloads
from experiments.records import store
from experiments.records.types import GateRecord, LaunchRecord, Plan, Verdict

if TYPE_CHECKING:
    from experiments.gate.rules import GateResult

NATIVE_ENGINES = {"nanovllm", "nanovllm_server"}
"""Engines that sample with our random generator. Sampled tokens of others are judged by their distribution."""


class GateError(Exception):
    """Outputs that cannot be judged; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Work:
    """One output of a workload and the launches that generated it."""

    workload: str
    tokens_digest: str
    launches: tuple[LaunchRecord, ...]

    @property
    def key(self) -> tuple[str, str]:
        return self.workload, self.tokens_digest

    @property
    def unknown_noise(self) -> bool:
        return all(launch["engine"] not in NATIVE_ENGINES for launch in self.launches)

    def __str__(self) -> str:
        engines = ", ".join(sorted({launch["engine"] for launch in self.launches}))
        return f"{self.workload} {self.tokens_digest[:12]} ({engines})"


def find_work(all_records: list[store.Record], plan_hash: str) -> list[Work]:
    """The distinct outputs of the launches that count, in order of appearance."""
    found: dict[tuple[str, str], list[LaunchRecord]] = {}
    for launch in store.counted(all_records):
        if launch["plan_hash"] == plan_hash:
            for name, served in launch["workloads"].items():
                found.setdefault((name, served["tokens_digest"]), []).append(launch)
    return [Work(name, digest, tuple(launches)) for (name, digest), launches in found.items()]


def read_tokens(folder: Path, digest: str) -> list[list[int]]:
    """The outputs with a digest. Raises GateError if they are missing or do not match it."""
    path = folder / store.TOKENS
    lines = path.read_text().splitlines() if path.exists() else []
    encoded = next(
        (entry["tokens"] for entry in map(json.loads, lines) if entry["digest"] == digest), None
    )
    if encoded is None:
        raise GateError(
            f"{path}: no tokens with digest {digest}; tokens are written before the record, so the file was truncated"
        )
    outputs: list[list[int]] = json.loads(zlib.decompress(base64.b64decode(encoded)))
    if (actual := workloads.tokens_digest(outputs)) != digest:
        raise GateError(
            f"{path}: the tokens stored under digest {digest} have digest {actual}; the file was modified"
        )
    return outputs


def gate_record(
    plan: Plan, work: Work, result: GateResult | str, *, negative_control: bool = False
) -> GateRecord:
    """The gate record of a verdict, or of an error if `result` is an error message."""
    verdict: Verdict = (
        {
            "status": "error",
            "reason": result,
            "tokens_checked": 0,
            "mismatches": 0,
            "within_bound": 0,
            "max_margin": None,
            "bound": None,
            "calibration": {},
            "first_offender": None,
            "duration_s": 0.0,
        }
        if isinstance(result, str)
        else result.as_verdict()
    )
    return {
        "kind": "gate",
        "schema": store.SCHEMA,
        "study": plan["study"]["name"],
        "plan_hash": plan["plan_hash"],
        "workload": work.workload,
        "tokens_digest": work.tokens_digest,
        "dtype": plan["model"]["dtype"],
        **verdict,
        "is_negative_control": negative_control,
    }
