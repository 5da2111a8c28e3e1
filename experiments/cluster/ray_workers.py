"""Workers of a Ray cluster. The only module that imports Ray, and only if a run uses it
(docs/adr/0005-ray.md).

A block is one streaming Ray task on a node chosen here. Ray copies the code to the node, which
needs Python, the packages and the checkpoint (unless it is a preset), but no clone of the
repository.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

from experiments.cluster.dispatch import Job, WorkerError, WorkerEvent
from experiments.host import provenance
from experiments.host.environment import WORKPLACE
from experiments.host.machine_lock import gpus_needed
from experiments.host.model_files import ModelError
from experiments.launch.runner import Runner
from experiments.records import store
from experiments.records.store import RecordError
from experiments.records.types import Plan, Tokens

_NOT_SENT = [
    "/.git",
    "/.venv*",
    "/.ci",
    "/runs",
    "/docs",
    "/reports",
    "/ablations",
    "/mlartifacts",
    "/mlruns",
    "/mlflow.db*",
    "/.*cache",
    "/.hypothesis",
    "/.benchmarks",
    "__pycache__",
    "*.pyc",
    "*.safetensors",
]
# for a Ray started here: records and tokens are small, and Ray's default is 30 % of memory
_OBJECT_STORE_BYTES = 256 << 20


class Context(TypedDict):
    """What a worker needs to know about the machine on which the command runs."""

    pythons: dict[str, str]
    boot_id: str
    threads: str | None
    cache: str


class RayWorkers:
    """Ray's nodes as slots. A context manager; a Ray that was started here is shut down with it."""

    def __init__(
        self,
        plan: Plan,
        address: str | None = None,
        pythons: dict[str, str] | None = None,
    ) -> None:
        """address: of a running cluster (host:port, or `auto` for the one on this machine). Defaults
        to $RAY_ADDRESS; without both, starts Ray on this machine. Raises WorkerError.
        """
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # with Ray's default of 15, launches would yield to all other processes
            os.environ.setdefault("RAY_worker_niceness", "0")
            # silences a warning; see _NOT_SENT
            os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
            import ray
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        except ImportError as error:
            raise WorkerError(
                "--executor ray needs Ray; install it with: pip install -c constraints.txt -e '.[ray]'"
            ) from error
        address = address or os.environ.get("RAY_ADDRESS") or None
        if address and address.startswith("ray://"):
            raise WorkerError(
                f"--ray-address {address}: the Ray client protocol is not supported. Give host:port of the head node (usually port "
                "6379), and run the command on a machine of the cluster."
            )
        self._ray, self._affinity = ray, NodeAffinitySchedulingStrategy
        self._gpus, self._pythons = gpus_needed(plan), pythons or {}
        self._nodes: dict[str, dict[str, Any]] = {}
        self._dead: set[str] = set()
        self._streams: dict[Any, str] = {}
        local: dict[str, Any] = (
            {}
            if address
            else {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        )
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                runtime_env={"working_dir": str(provenance.ROOT), "excludes": _NOT_SENT},
                **local,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise WorkerError(
                f"cannot reach Ray at {address or 'this machine'} ({error}); is `ray start --head` running?"
            ) from error
        # no retries by Ray: the dispatcher restarts a block that lost its worker, and records that
        self._run_block = ray.remote(max_retries=0, num_returns="streaming")(run_block)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in self._streams:
            with contextlib.suppress(Exception):  # the cluster itself may have failed
                self._ray.cancel(stream, force=True)
        self._ray.shutdown()

    def slots(self) -> dict[str, str]:
        """One slot per node for a study on the CPU. Otherwise a slot has as many GPUs of a node as
        the widest cell needs.
        """
        found = {}
        for node in self._ray.nodes():
            if not node["Alive"] or node["NodeID"] in self._dead:
                continue
            self._nodes[node["NodeID"]] = node["Resources"]
            name = f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})"
            if self._gpus:
                for index in range(int(node["Resources"].get("GPU", 0)) // self._gpus):
                    found[f"{node['NodeID']}:{index}"] = f"{name} slot {index}"
            elif node["Resources"].get("CPU"):
                found[f"{node['NodeID']}:0"] = name
        return found

    def start(self, slot: str, job: Job) -> None:
        node = slot.partition(":")[0]
        # A study on the CPU requests all cores of the node, so that Ray runs nothing else there.
        resources = (
            {"num_cpus": 1, "num_gpus": self._gpus}
            if self._gpus
            else {"num_cpus": self._nodes[node]["CPU"]}
        )
        task = self._run_block.options(
            scheduling_strategy=self._affinity(node_id=node, soft=False), **resources
        )
        context: Context = {
            "pythons": self._pythons,
            "boot_id": provenance.boot_id(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "cache": os.environ.get("NANOVLLM_CACHE") or str(WORKPLACE / ".cache" / "nanovllm"),
        }
        self._streams[task.remote(job, context)] = slot

    def poll(self, timeout_s: float) -> list[tuple[str, WorkerEvent]]:
        if not self._streams:
            time.sleep(timeout_s)
            return []
        ready, _ = self._ray.wait(list(self._streams), num_returns=1, timeout=timeout_s)
        events = []
        for stream in ready:
            slot, event = self._streams[stream], self._next(stream)
            events.append((slot, event))
            if event["event"] in ("done", "refused", "lost"):
                del self._streams[stream]
            if event["event"] == "lost":
                # It may still be running. Streams that ended normally are not canceled: a forced
                # cancellation might arrive late and kill the worker's next block.
                with contextlib.suppress(Exception):
                    self._ray.cancel(stream, force=True)
        return events

    def _next(self, stream: Any) -> WorkerEvent:
        exceptions = self._ray.exceptions
        try:
            event: WorkerEvent = self._ray.get(next(stream))
        except StopIteration:
            event = {"event": "lost", "reason": "its task ended without a result"}
        except exceptions.RayTaskError as error:
            event = {"event": "refused", "reason": str(error)[-1500:]}
        except exceptions.RayError as error:
            event = {"event": "lost", "reason": type(error).__name__}
            if isinstance(error, (exceptions.NodeDiedError, exceptions.TaskUnschedulableError)):
                self._dead.add(self._streams[stream].partition(":")[0])
        return event


def run_block(job: Job, context: Context) -> Iterator[WorkerEvent]:
    """Runs one block in a worker. Each record is yielded before the next launch starts."""
    _be_as_local(context)
    try:
        if (found := provenance.code_digest()) != job["code_digest"]:
            raise RecordError(
                f"its code has digest {found[:12]}, but the run's code has {job['code_digest'][:12]}"
            )
        with tempfile.TemporaryDirectory(prefix="nanovllm-block-") as scratch:
            folder = Path(scratch)
            with Runner(
                job["plan"],
                folder,
                resume=False,
                pythons=context["pythons"],
                earlier=job["earlier"],
            ) as runner:
                if nice := os.nice(0):
                    text = f"launches run with niceness {nice}, so other processes slow them; start Ray with RAY_worker_niceness=0"
                    yield {"event": "message", "text": text}
                tokens: dict[str, Tokens] = {}
                runner.listener = lambda event, details: tokens.update(
                    {event: details.get("tokens", {})}
                )
                for entry in runner.pending([job["block"]]):
                    yield {"event": "start", "launch": entry}
                    record = runner.run_launch(entry)
                    logs = {
                        log.name: log.read_text(errors="replace")
                        for log in (folder / store.LOGS).glob("*.log")
                    }
                    reports = {
                        report.name: report.read_text()
                        for report in folder.glob(store.ENVIRONMENTS)
                    }
                    yield {
                        "event": "end",
                        "launch": entry,
                        "record": record,
                        "tokens": tokens["end"],
                        "logs": logs,
                        "environments": reports,
                    }
    except (RecordError, ModelError) as error:
        yield {"event": "refused", "reason": str(error)}
        return
    yield {"event": "done"}


def _be_as_local(context: Context) -> None:
    """Reverts what Ray sets in a worker's environment, so that launches run as they do without Ray."""
    if context["threads"] is None:
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to the CPUs of the task
    else:
        os.environ["OMP_NUM_THREADS"] = context["threads"]
    # Ray deletes the folder of the code; keep built checkpoints elsewhere.
    here = provenance.boot_id() == context["boot_id"]
    os.environ.setdefault(
        "NANOVLLM_CACHE", context["cache"] if here else str(Path.home() / ".cache" / "nanovllm")
    )
