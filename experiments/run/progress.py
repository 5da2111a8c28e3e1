"""Progress of a run and the time left: a bar on a terminal, one line per launch elsewhere."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from experiments.launch.runner import print_event
from experiments.records.cell_names import shown_names
from experiments.records.types import Event, Plan


class ProgressBar:
    """Pass `listen` to a runner. Redrawn only once per second, because the machine is being
    measured.
    """

    def __init__(self, plan: Plan, console: Console) -> None:
        self._console = console
        self._names = shown_names(plan)
        self._remaining = Counter(entry["cell"] for entry in plan["launches"])
        self._total = len(plan["launches"])
        self._expected_s = plan["expected_s"] / max(1, len(plan["launches"]))
        self._times: dict[str, list[float]] = {}
        self._workers = 1
        self._progress = Progress(
            TextColumn("{task.fields[left]}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=console,
            refresh_per_second=1,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=self._total, left="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def listen(self, event: str, details: Event) -> None:
        if event == "pending":
            self._remaining = Counter(entry["cell"] for entry in details["launches"])
            self._progress.update(self._task, completed=self._total - self._remaining.total())
        elif event == "start":
            cell = self._names[details["launch"]["cell"]]
            self._progress.update(
                self._task,
                description=f"block {details['launch']['block']}: {cell}",
                left=self._left(),
            )
        elif event == "end":
            record = details["record"]
            self._remaining[record["cell"]] -= 1
            self._times.setdefault(record["cell"], []).append(record["total_s"])
            self._progress.update(self._task, advance=1, left=self._left())
        elif event == "workers":
            self._workers = max(self._workers, details["count"])
        if event == "message":
            self._console.print(details["text"], style="yellow", markup=False)
        elif not self._console.is_terminal or (
            event == "end" and details["record"]["status"] != "ok"
        ):
            print_event(event, details, self._names)

    def remaining_s(self) -> float:
        """The expected time of the remaining launches, divided by the number of workers. A launch
        is expected to take the median of its cell so far; without one, the median of all cells;
        without any, what the plan expects.
        """
        every = [seconds for times in self._times.values() for seconds in times]
        fallback = statistics.median(every) if every else self._expected_s
        alone = sum(
            count * statistics.median(self._times.get(cell) or [fallback])
            for cell, count in self._remaining.items()
        )
        return alone / self._workers

    def _left(self) -> str:
        seconds = self.remaining_s()
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"
