"""Workers of a Ray cluster: the only module that imports Ray, and only when a run asks for it
(docs/adr/0005-ray.md).

A block is one streaming Ray task on a node chosen here. The code travels with the run, so that a
node needs Python, the packages and (unless it is a preset) the checkpoint, but no clone.
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
from typing import Any, Self

from experiments.cluster.dispatch import Event, Job, WorkerError
from experiments.host import provenance
from experiments.host.machine_lock import gpus_needed
from experiments.host.model_files import ModelError
from experiments.launch.runner import Runner
from experiments.records import store
from experiments.records.store import RecordError

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
# of a Ray that we start: records and tokens are small, and Ray's default is 30 % of memory
_OBJECT_STORE_BYTES = 256 << 20


class RayWorkers:
    """Ray's nodes as slots. Use it as a context manager; a Ray that was started here ends with it."""

    def __init__(
        self,
        plan: dict[str, Any],
        address: str | None = None,
        pythons: dict[str, str] | None = None,
    ) -> None:
        """address: of a running cluster (host:port, or `auto` for the one on this machine);
        $RAY_ADDRESS if not given, and without both a Ray of this machine alone is started. Raises
        WorkerError.
        """
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # 15 is Ray's default: launches would yield to whatever else runs
            os.environ.setdefault("RAY_worker_niceness", "0")
            # _NOT_SENT says it; without this Ray warns
            os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
            import ray
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        except ImportError as error:
            raise WorkerError(
                "--executor ray needs the package ray: pip install -c constraints.txt -e '.[ray]'"
            ) from error
        address = address or os.environ.get("RAY_ADDRESS") or None
        if address and address.startswith("ray://"):
            raise WorkerError(
                f"--ray-address {address}: Ray's client protocol cannot stream records. Give host:port of the head (usually 6379), "
                "and run the command on a machine of the cluster."
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
        # A block that lost its worker is begun again by the dispatcher, which marks what it left:
        # never by Ray, unseen.
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
            with contextlib.suppress(Exception):  # the cluster may be what has failed
                self._ray.cancel(stream, force=True)
        self._ray.shutdown()

    def slots(self) -> dict[str, str]:
        """One slot a node for a study on the CPU, else one for as many GPUs of a node as the widest
        cell needs.
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
        # A study on the CPU asks for all cores of the node, so that Ray puts nothing beside it.
        resources = (
            {"num_cpus": 1, "num_gpus": self._gpus}
            if self._gpus
            else {"num_cpus": self._nodes[node]["CPU"]}
        )
        task = self._run_block.options(
            scheduling_strategy=self._affinity(node_id=node, soft=False), **resources
        )
        context = {
            "pythons": self._pythons,
            "boot_id": provenance.boot_id(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "cache": os.environ.get("NANOVLLM_CACHE")
            or str(provenance.ROOT / ".cache" / "nanovllm"),
        }
        self._streams[task.remote(job, context)] = slot

    def poll(self, timeout_s: float) -> list[tuple[str, Event]]:
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
                # It may still run there. A stream that told its end is left alone: by the time that
                # a forced cancellation arrives, its worker may have begun the next block, which
                # would die instead.
                with contextlib.suppress(Exception):
                    self._ray.cancel(stream, force=True)
        return events

    def _next(self, stream: Any) -> Event:
        exceptions = self._ray.exceptions
        try:
            event: Event = self._ray.get(next(stream))
        except StopIteration:
            event = {"event": "lost", "reason": "it ended without a word"}
        except exceptions.RayTaskError as error:
            event = {"event": "refused", "reason": str(error)[-1500:]}
        except exceptions.RayError as error:
            event = {"event": "lost", "reason": type(error).__name__}
            if isinstance(error, (exceptions.NodeDiedError, exceptions.TaskUnschedulableError)):
                self._dead.add(self._streams[stream].partition(":")[0])
        return event


def run_block(job: Job, context: dict[str, Any]) -> Iterator[Event]:
    """In a worker: one block through the plan runner, each record handed over before the next
    launch begins.
    """
    _be_as_local(context)
    try:
        if (found := provenance.code_digest()) != job["code_digest"]:
            raise RecordError(
                f"its code has digest {found[:12]}, the run's is {job['code_digest'][:12]}"
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
                    text = f"launches run at niceness {nice} and yield to other processes; start Ray with RAY_worker_niceness=0"
                    yield {"event": "message", "text": text}
                tokens: dict[str, dict[str, str]] = {}
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
                    written = {"tokens": tokens["end"], "logs": logs, "environments": reports}
                    yield {"event": "end", "launch": entry, "record": record, **written}
    except (RecordError, ModelError) as error:
        yield {"event": "refused", "reason": str(error)}
        return
    yield {"event": "done"}


def _be_as_local(context: dict[str, Any]) -> None:
    """Takes back what Ray sets in the environment of a worker, so that launches find what they find
    without Ray.
    """
    if context["threads"] is None:
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to the CPUs of the task
    else:
        os.environ["OMP_NUM_THREADS"] = context["threads"]
    # The code lies in a folder that Ray throws away; built checkpoints are worth keeping.
    here = provenance.boot_id() == context["boot_id"]
    os.environ.setdefault(
        "NANOVLLM_CACHE", context["cache"] if here else str(Path.home() / ".cache" / "nanovllm")
    )
