"""Sends whole blocks to workers and collects their records in one folder. Standard library only;
independent of Ray.

    Dispatcher --start(slot, job)--> Workers --> worker: experiments.launch.Runner over one block,
    in a folder of its own
        ^                                                      |
        +----- start / end (record, tokens, log) / done -------+        lost: the worker died; refused: it cannot run this plan

Only the dispatcher writes records. It receives them launch by launch, so that finished launches
survive the loss of their worker. A block that lost its worker is marked superseded and restarted
from its beginning, on another worker if there is one. So is a block found unfinished when a run
begins.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Literal, Protocol, Required, TypedDict

from experiments.host import provenance
from experiments.host.machine_lock import gpus_needed
from experiments.records import store
from experiments.records.ledger import Ledger
from experiments.records.types import LaunchEntry, LaunchRecord, Plan, Tokens

LOSSES = 3
"""The run ends after a block has lost this many workers: either the block kills them, or the cluster is unstable."""
PATIENCE_S = 60.0
"""How long to wait for a machine to appear, or to come back."""


class Job(TypedDict):
    """A block for a worker. earlier: attempts recorded so far, by launch."""

    plan: Plan
    block: int
    earlier: dict[str, int]
    code_digest: str


class WorkerEvent(TypedDict, total=False):
    """An event on a worker; `event` says which of the other keys are there."""

    event: Required[Literal["start", "end", "message", "done", "refused", "lost"]]
    text: str
    reason: str
    launch: LaunchEntry
    record: LaunchRecord
    tokens: Tokens
    logs: dict[str, str]
    environments: dict[str, str]


class WorkerError(Exception):
    """No worker can run a block; the message says what to do."""


class Workers(Protocol):
    """The machines that run blocks. A slot runs one block at a time: it is a machine for a study on
    the CPU, else one or more GPUs of a machine.
    """

    def slots(self) -> dict[str, str]:
        """All live slots and their display names."""

    def start(self, slot: str, job: Job) -> None:
        """Starts a block on an idle slot."""

    def poll(self, timeout_s: float) -> list[tuple[str, WorkerEvent]]:
        """Events since the last call, in order for each slot."""


class Dispatcher:
    """One execution of a plan over workers, into one ledger."""

    def __init__(self, ledger: Ledger, workers: Workers, patience_s: float = PATIENCE_S) -> None:
        self.ledger, self.workers, self.patience_s = ledger, workers, patience_s
        self.listener = ledger.listener
        self.running: dict[str, int] = {}
        self.queue: list[int] = []
        self.aside: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.losses: Counter[int] = Counter()
        self.lost_on: dict[int, set[str]] = {}
        self.is_late = False
        self._git = provenance.git_state()

    def run(self, blocks: Iterable[int] | None = None, deadline: float | None = None) -> bool:
        """Runs unfinished blocks. Starts none that is expected to end after `deadline`, a value of
        time.monotonic(). True if all ran. Raises WorkerError, RecordError.
        """
        self.queue = sorted({entry["block"] for entry in self.ledger.pending(blocks)})
        self._begin_again()
        self._tell_pending()
        alone_since = time.monotonic()
        while self.queue or self.running:
            self._assign(deadline)
            if self.is_late and not self.running:
                self.listener(
                    "message",
                    {"text": "stopped: no further block would finish before the deadline"},
                )
                return False
            if self.running:
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > self.patience_s:
                raise WorkerError(self._nobody())
            for slot, event in self.workers.poll(1.0):
                self._take(slot, event)
        return True

    def _begin_again(self) -> None:
        found = [r for r in self.ledger.folder.records if r["kind"] == "launch"]
        for block in self.queue:
            self.ledger.supersede(
                block,
                f"block {block} was not finished when the run was stopped; it is restarted",
            )
        if found:
            self.ledger.note_resumed(provenance.boot_id())

    def _assign(self, deadline: float | None) -> None:
        """Assigns blocks to idle slots: the first that was not lost there, or one that was lost on
        all other slots, too.
        """
        alive = self.workers.slots()
        self.names |= alive
        usable = [slot for slot in alive if slot not in self.aside]
        if not usable and not self.running and self.aside:
            raise WorkerError(self._nobody())
        for slot in usable:
            if slot in self.running or not self.queue:
                continue
            untried = [b for b in self.queue if slot not in self.lost_on.get(b, ())]
            hopeless = [b for b in self.queue if self.lost_on.get(b, set()) >= set(usable)]
            if not (untried or hopeless):
                continue
            block = (untried or hopeless)[0]
            expected_s = sum(
                self.ledger.expected_launch_s(e["cell"])
                for e in self.ledger.plan["launches"]
                if e["block"] == block
            )
            if deadline is not None and time.monotonic() + expected_s > deadline:
                self.is_late = True
                return
            self.queue.remove(block)
            self.running[slot] = block
            names = [
                entry["launch"] for entry in self.ledger.plan["launches"] if entry["block"] == block
            ]
            earlier = {name: self.ledger.attempts(name) for name in names}
            self.workers.start(
                slot,
                {
                    "plan": self.ledger.plan,
                    "block": block,
                    "earlier": earlier,
                    "code_digest": self.ledger.code_digest,
                },
            )
            self.listener("workers", {"count": len(self.running)})

    def _take(self, slot: str, event: WorkerEvent) -> None:
        block, kind = self.running[slot], event["event"]
        if kind == "start":
            self.listener("start", {"launch": event["launch"]})
        elif kind == "end":
            self._record(event)
        elif kind == "message":
            self.listener("message", {"text": f"{self.names[slot]}: {event['text']}"})
        else:
            del self.running[slot]
            if kind == "lost":
                self._lost(slot, block, event["reason"])
            elif kind == "refused":
                self.aside[slot] = event["reason"]
                self._requeue(
                    block, f"{self.names[slot]} cannot run block {block}: {event['reason']}"
                )

    def _record(self, event: WorkerEvent) -> None:
        record = event["record"]
        # The worker's copy of the code is not a git repository. Its digest equals ours, so our git
        # state applies.
        record["provenance"]["git"] = record["provenance"]["git"] or self._git
        for name, text in event["logs"].items():
            store.write_whole(self.ledger.out / store.LOGS / name, text)
        for name, text in event["environments"].items():
            if not (self.ledger.out / name).exists():
                store.write_whole(self.ledger.out / name, text)
        self.ledger.folder.append(record, event["tokens"])
        self.listener("end", {"launch": event["launch"], "record": record})

    def _lost(self, slot: str, block: int, reason: str) -> None:
        self.losses[block] += 1
        self.lost_on.setdefault(block, set()).add(slot)
        self._requeue(
            block, f"the worker on {self.names[slot]} was lost in block {block} ({reason})"
        )
        if self.losses[block] >= LOSSES:
            raise WorkerError(
                f"block {block} lost its worker {LOSSES} times, the last time on {self.names[slot]} ({reason}). Check whether the "
                "workers run out of memory or crash. Finished blocks are recorded; run the same command to resume."
            )

    def _requeue(self, block: int, reason: str) -> None:
        self.ledger.supersede(block, f"{reason}; the block is restarted")
        self.queue.insert(0, block)
        self.listener("message", {"text": f"{reason}; the block is restarted"})
        self._tell_pending()

    def _tell_pending(self) -> None:
        blocks = {*self.queue, *self.running.values()}
        self.listener("pending", {"launches": self.ledger.pending(blocks)})

    def _nobody(self) -> str:
        reasons = "; ".join(f"{self.names[slot]}: {reason}" for slot, reason in self.aside.items())
        why = (
            reasons
            or f"no machine with {needs_of(self.ledger.plan)} was available for {self.patience_s:g} s"
        )
        return f"no worker can run block {self.queue[0]}: {why}. Finished blocks are recorded; run the same command to resume."


def needs_of(plan: Plan) -> str:
    """The resources that a slot must have, as text."""
    number = gpus_needed(plan)
    return f"{number} GPU{'s' if number > 1 else ''}" if number else "a CPU"
