"""Tracks which launches of a plan are done, in one folder of records. Standard library only.

Used by both executors: `launch.Runner` on one machine, `dispatch.Dispatcher` for many.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from experiments.records import store
from experiments.records.store import Folder, RecordError
from experiments.records.types import Event, Head, LaunchEntry, LaunchRecord, Plan

Listener = Callable[[str, Event], None]
"""Called with ("workers" | "pending" | "start" | "end" | "message", details) during a run."""


class Ledger:
    """The records of one plan in one folder. A context manager that locks the folder."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        code_digest: str,
        *,
        resume: bool,
        listener: Listener | None = None,
    ) -> None:
        """Raises RecordError if `out` holds records of another plan or of other code, or any records
        without `resume`.
        """
        self.plan, self.out, self.code_digest = plan, out, code_digest
        self.listener = listener or (lambda event, details: None)
        self.folder = Folder(out)
        try:
            for message in self.folder.messages:
                self.listener("message", {"text": message})
            self._check(resume)
            try:
                (out / store.LOGS).mkdir(exist_ok=True)
                for leftover in (out / store.LOGS).glob("*.result*"):
                    leftover.unlink()  # of an engine process whose runner was killed
            except OSError as error:
                raise RecordError(
                    f"{out / store.LOGS}: cannot be written ({error}). {store.INTACT}"
                ) from error
            if not (out / store.PLAN).exists():
                store.write_plan(plan, out / store.PLAN)
        except BaseException:
            self.folder.close()
            raise

    def close(self) -> None:
        self.folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def head(self) -> Head:
        """The keys that every record of this plan starts with, after its kind."""
        return {
            "schema": store.SCHEMA,
            "study": self.plan["study"]["name"],
            "plan_hash": self.plan["plan_hash"],
        }

    def pending(self, blocks: Iterable[int] | None = None) -> list[LaunchEntry]:
        """The launches without a finished record, in plan order."""
        wanted = None if blocks is None else set(blocks)
        done = {
            r["launch"] for r in store.launches(self.folder.records) if r["status"] in store.DONE
        }
        return [
            entry
            for entry in self.plan["launches"]
            if entry["launch"] not in done and (wanted is None or entry["block"] in wanted)
        ]

    def attempts(self, launch: str) -> int:
        """The number of attempts at a launch, including superseded ones."""
        return sum(r["kind"] == "launch" and r["launch"] == launch for r in self.folder.records)

    def expected_launch_s(self, cell: str) -> float:
        """The median duration of this cell's launches so far, else of all launches, else what the
        plan expects.
        """
        finished = [
            r
            for r in self.folder.records
            if r["kind"] == "launch" and r["total_s"] is not None and r["status"] in store.DONE
        ]
        own = [r["total_s"] for r in finished if r["cell"] == cell]
        every = [r["total_s"] for r in finished]
        return statistics.median(
            own or every or [self.plan["expected_s"] / max(1, len(self.plan["launches"]))]
        )

    def supersede(
        self, block: int, reason: str, which: Callable[[LaunchRecord], bool] = lambda record: True
    ) -> None:
        """Marks the launches of a block as superseded, because the block is restarted."""
        for record in store.launches(self.folder.records):
            if record["block"] == block and which(record):
                self.folder.append(
                    {
                        "kind": "superseded",
                        **self.head,
                        "launch": record["launch"],
                        "attempt": record["attempt"],
                        "reason": reason,
                    }
                )

    def note_resumed(self, boot_id: str) -> None:
        self.folder.append({"kind": "resumed", **self.head, "boot_id": boot_id, "at": utc_now()})

    def _check(self, resume: bool) -> None:
        existing = self.folder.records
        if not existing:
            return
        if not resume:
            raise RecordError(
                f"{self.out} already holds {len(existing)} records; add --resume to continue, or give another --out"
            )
        if foreign := {r["plan_hash"] for r in existing} - {self.plan["plan_hash"]}:
            raise RecordError(
                f"{self.out} holds records of another plan ({foreign.pop()[:12]}); give another --out"
            )
        made_by = {r["provenance"]["code_digest"] for r in existing if r["kind"] == "launch"}
        if other := made_by - {self.code_digest}:
            raise RecordError(
                f"{self.out} holds records of another version of the code (digest {other.pop()[:12]}, now "
                f"{self.code_digest[:12]}), which must not be compared with new ones. "
                "Start again with another --out, or check out that version."
            )


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
