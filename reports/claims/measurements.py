"""The measurements behind the claims: what each looks for in the published records, and the figures
that it takes from there.

Every function gets the library and the parameters that ablations/claims.yaml gives it, and returns
what it found, which may be nothing. None of them knows what was claimed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.records.types import LaunchRecord, ServedWorkload
from reports import text
from reports.analysis.analyse import ratios
from reports.analysis.unjudged import decode_steps_s
from reports.claims.prefix_work import saved
from reports.claims.published_studies import Library, Study
from reports.claims.scaling_model import AllReduce, Step
from reports.statistics.intervals import Rule, estimate, measured_ratio

Levels = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One figure: what it is of, its value and 95 % interval (None: there is none; low = high: it
    does not vary).

    decides: whether the claim's verdict rests on it. n, when: how many blocks and when they began,
    by which one source is chosen. modelled: from a model, not a measurement; never decides.
    """

    what: str
    value: float
    low: float | None
    high: float | None
    evidence: str
    source: str
    hardware: str
    decides: bool
    n: int = 1
    when: str = ""
    modelled: bool = False


def reference_ratio(
    library: Library, study: str, reference: str, fingerprint: str
) -> Iterator[Finding]:
    """Ratios of our best cell to each configuration of another engine on as many devices, on one
    workload.

    Where that configuration takes another number of devices than our best cell, the cells that
    spread our best one over as many stand in for it; a configuration without such a cell has no
    ratio. The least one of the study of this name decides; what other studies say of the same work
    stands beside it. A pair that broke the rule of its comparison (reports/analysis/compare.py) has no
    ratio.
    """
    for found in library.studies.values():
        unfair = {
            (pair["ours"], pair["theirs"])
            for pair in found.analysis.get("comparisons", [])
            if pair["breaches"]
        }
        names = [
            name
            for name, entry in found.plan["workloads"].items()
            if entry["fingerprint"] == fingerprint
        ]
        rows = [
            row
            for ours, theirs in _on_equal_devices(found, reference)
            if names and (ours, theirs) not in unfair
            for row in ratios(found.records, found.plan, ours, theirs)
            if row["n"] and row["workload"] in names
        ]
        least = min(map(measured_ratio, rows), default=None)
        devices = _devices(found)
        for row in rows:
            memory = found.plan["profile"]["kv_cache_memory_bytes"] / 2**30
            ours, theirs = (found.analysis["shown"][row[side]] for side in ("cell", "reference"))
            what = f"{ours} over {theirs.removeprefix('reference: ')} on {row['workload']}, {_model(found)}, "
            what += f"{memory:.3g} GiB of KV cache"
            if found.plan["profile"]["device"] != "cpu":
                what += (
                    f" per rank, {text.count_of(devices[row['cell']], 'GPU')} each"
                    if devices[row["cell"]] > 1
                    else ""
                )
            yield _of_blocks(
                found, what, row, row["ratio"] == least and found.plan["study"]["name"] == study
            )


SPREAD = {"tensor_parallel_size", "data_parallel_size", "all_reduce"}
"""The factors that say how a configuration lies on several devices, and nothing of what else is on."""


def _on_equal_devices(study: Study, engine: str) -> Iterator[tuple[str, str]]:
    """(our cell, that engine's), the same number of devices each."""
    cells, devices = study.plan["cells"], _devices(study)
    best = next(
        (name for name, cell in cells.items() if cell["role"] == "all"), study.analysis["baseline"]
    )
    treatments = (name for name, cell in cells.items() if cell["role"] == "treatment")
    ours = [best, *(name for name in treatments if _differs_in(cells, name, best) <= SPREAD)]
    for theirs in (
        name
        for name, cell in cells.items()
        if cell["role"] == "reference" and cell["engine"] == engine
    ):
        equal = [name for name in ours if devices[name] == devices[theirs]]
        yield from ((name, theirs) for name in ([best] if best in equal else equal))


def _differs_in(cells: Mapping[str, Mapping[str, Any]], cell: str, other: str) -> set[str]:
    left, right = cells[cell]["levels"], cells[other]["levels"]
    return {
        factor for factor in left.keys() | right.keys() if left.get(factor) != right.get(factor)
    }


def _devices(study: Study) -> dict[str, int]:
    """{cell: the devices it runs on}; a CPU is one, however many ranks share it."""
    return {row["cell"]: row["devices"] for row in study.analysis["ceiling"]}


def scaling(library: Library, devices: int, all_reduce: str | None = None) -> Iterator[Finding]:
    """Throughput with so many ranks over that many times the throughput of one, on machines that
    have the devices.

    all_reduce: of the published results, the all-reduces measured between two GPUs. Then what
    reports/claims/scaling_model.py expects of so many devices stands beside it, from decode steps measured
    on one and on two. It is no measurement and decides nothing.
    """
    if all_reduce is not None and all_reduce in library.results:
        yield from _modelled_scaling(library, devices, library.results[all_reduce]["rows"])
    for study in library.studies.values():
        if study.plan["profile"].get("num_devices", 1) < devices:
            continue
        for effect in study.analysis["effects"]:
            change = _change(study, effect["cell"])
            if (
                effect["metric"] == "output_tokens_per_s"
                and effect["n"]
                and change == {"tensor_parallel_size": (1, devices)}
            ):
                low, high = effect["low"], effect["high"]
                scaled = effect.copy()
                scaled["ratio"] = measured_ratio(effect) / devices
                scaled["low"] = low and low / devices
                scaled["high"] = high and high / devices
                yield _of_blocks(
                    study, f"{devices} GPUs on {effect['workload']}, {_model(study)}", scaled, True
                )


def _modelled_scaling(
    library: Library, devices: int, rows: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    """One figure for each study, workload of equal requests (steady decode), and way to sum."""
    kinds = {"library": "library", "symmetric_memory": "one_shot"}
    sums = {
        level: AllReduce.fit(
            (row["bytes"], row["graph_us"] / 1e6)
            for row in rows
            if row["kind"] == kind and "graph_us" in row
        )
        for level, kind in kinds.items()
    }
    for study in library.studies.values():
        shape, unjudged = study.plan["model"].get("shape") or {}, bool(study.analysis["unjudged"])
        durations = decode_steps_s(
            study.records if unjudged else _all_counted(study), study.plan["workloads"]
        )
        for cell, workload in sorted(durations):
            change, drawn = _change(study, cell), study.plan["workloads"][workload]
            alone = durations.get((study.analysis["baseline"], workload))
            ranges = [drawn["params"].get(name) for name in ("prompt_tokens", "output_tokens")]
            if (
                change.pop("tensor_parallel_size", None) != (1, 2)
                or change.keys() - {"all_reduce"}
                or not alone
            ):
                continue
            if drawn["kind"] != "random" or any(
                not isinstance(ends, list) or ends[0] != ends[1] for ends in ranges
            ):
                continue
            level, batch = (
                str(study.plan["cells"][cell]["levels"].get("all_reduce", "library")),
                drawn["num_requests"],
            )
            num_sums, num_bytes = 2 * shape["num_hidden_layers"], 2 * batch * shape["hidden_size"]
            try:
                step = Step.from_measured(
                    alone, durations[cell, workload], num_sums, num_bytes, sums[level]
                )
            except ValueError:
                continue  # the model does not hold for these two
            says = f"modelled; measured on two GPUs: {text.percent(alone / durations[cell, workload] / 2)}"
            what = f"MODEL, not measured: a decode step of {batch} requests on {devices} GPUs, {_model(study)}, {level} on two"
            efficiency = step.efficiency(devices, sums["symmetric_memory"])
            says += ", outputs not judged" if unjudged else ""
            yield Finding(
                what,
                efficiency,
                None,
                None,
                says,
                study.name,
                study.hardware,
                decides=False,
                modelled=True,
            )


def host_time(library: Library, factor: str, fingerprint: str) -> Iterator[Finding]:
    """Share of the host's time a step that a factor's upper level saves, from cells that differ in
    this factor alone.

    What a step takes beside waiting for the device decides. CPU time, which older records hold
    alone, stands beside it: a host that waits by spinning is as busy as one that works.
    """

    def working(work: ServedWorkload) -> float | None:
        waited_s, steps = work.get("device_wait_s"), work["step_times_s"]
        return (
            None if waited_s is None else (sum(step[0] for step in steps) - waited_s) / len(steps)
        )

    def busy(work: ServedWorkload) -> float | None:
        steps = work["counters"].get("steps")
        return work["host_cpu_s"] / steps if steps and work["host_cpu_s"] else None

    for study in library.studies.values():
        for cell in study.plan["cells"]:
            change = _change(study, cell)
            if set(change) != {factor}:
                continue
            before, after = change[factor]
            on, off = (
                (study.analysis["baseline"], cell)
                if after == "off"
                else (cell, study.analysis["baseline"])
            )
            if {before, after} != {"on", "off"}:
                continue
            for workload, entry in study.plan["workloads"].items():
                if entry["fingerprint"] == fingerprint:
                    where = f"a step saved by {factor} on {workload}, {_model(study)}"
                    yield from _saving(
                        study, f"host time {where}", on, off, workload, working, True
                    )
                    yield from _saving(
                        study,
                        f"CPU time, spinning included, {where}",
                        on,
                        off,
                        workload,
                        busy,
                        False,
                    )


def prefix_hit_rate(library: Library, study: str, workload: str) -> Iterator[Finding]:
    """Prompt tokens found in the prefix cache, over all; `workload` decides, the others stand
    beside it.
    """
    for found, cell in _with_prefix_cache(library, study):
        for name in found.plan["workloads"]:
            rates = sorted(
                work["counters"]["prefix_hit_tokens"] / work["prompt_tokens"]
                for work in (record["workloads"][name] for record in _counted(found, cell))
            )
            if rates:
                middle, number = rates[len(rates) // 2], text.count_of(len(rates), "launch")
                says = (
                    f"the same in {number}"
                    if rates[0] == rates[-1]
                    else f"least and most of {number}"
                )
                what = f"hit rate on {name} ({_turns(found, name)})"
                yield _finding(
                    found, what, middle, rates[0], rates[-1], says, name == workload, len(rates)
                )


def prefix_saving(library: Library, study: str, workload: str) -> Iterator[Finding]:
    """The savings of prefix_cache=on, counted in FLOPs and measured in time: of the prefill alone,
    and of the whole service.
    """
    for found, cell in _with_prefix_cache(library, study):
        for name in found.plan["workloads"]:
            records, turns = _counted(found, cell), _turns(found, name)
            if not records:
                continue
            work = [saved(record, found.plan, name) for record in records]
            for label, shares in (
                ("prefill FLOPs", [one.of_prefill for one in work]),
                ("all FLOPs", [one.of_all for one in work]),
            ):
                deciding = name == workload and label == "prefill FLOPs"
                low, high = min(least for least, _ in shares), max(most for _, most in shares)
                says = "counted, the same in" if low == high else "counted, least and most of"
                evidence = f"{says} {text.count_of(len(work), 'launch')}"
                what = f"{label} saved on {name} ({turns})"
                yield _finding(
                    found, what, (low + high) / 2, low, high, evidence, deciding, len(shares)
                )
            for label, seconds in (("serving time", _serving_s), ("prefill time", _prefill_s)):
                what = f"{label} saved on {name} ({turns})"
                deciding = name == workload and label == "serving time"
                yield from _saving(
                    found, what, cell, found.analysis["baseline"], name, seconds, deciding
                )


def code_lines(library: Library) -> Iterator[Finding]:
    """Shares of code lines saved against vLLM, from the counts of `python -m reports lines`."""
    for source, result in library.results.items():
        if result.get("kind") != "code-lines" or "vllm" not in result:
            continue
        ours, theirs = result["nanovllm"], result["vllm"]
        pairs = (
            ("core", "loaded"),
            ("everything_on", "loaded"),
            ("core", "package"),
            ("package", "package"),
        )
        for mine, other in pairs:
            if mine in ours and other in theirs:
                left, right = ours[mine]["lines"], theirs[other]["lines"]
                share = 1 - left / right
                what = f"{_LINES[mine]} {left:,} against vLLM's {_LINES[other]} {right:,}"
                ran = "" if mine == other == "package" else " in runs on a CPU"
                evidence = f"counted{ran}; vLLM {theirs['version']}"
                decides = (mine, other) == ("core", "loaded")
                yield Finding(
                    what,
                    share,
                    share,
                    share,
                    evidence,
                    source,
                    "",
                    decides,
                    when=str(result.get("made_at", "")),
                )


_LINES = {
    "core": "core",
    "everything_on": "loaded with everything on, on a CPU,",
    "loaded": "loaded modules",
    "package": "whole package",
}


def benchmark(library: Library, ours: str, group: str, implementation: str) -> Iterator[Finding]:
    """How many times slower than `ours` each other implementation of an operation is
    (benchmarks/bench_kernels.py).

    A file is a process; within one, rounds are paired and the interval is over rounds. Several
    files of one folder give one over processes. `implementation` in `group` (operation and shape)
    decides.
    """
    key = f"times_slower_than_{ours}"
    for folder, files in _benchmark_files(library).items():
        ratios: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for result in files:
            for info in _benchmark_rows(result):
                if key in info:
                    ratios.setdefault((info["group"], info["implementation"]), []).append(
                        tuple(info[key])
                    )
        machine = files[0]["machine_info"]
        hardware = str(
            machine.get("device") or machine.get("cpu", {}).get("brand_raw", "not recorded")
        )
        for (case, other), found in sorted(ratios.items()):
            what = f"{other} over {ours}: {case}"
            ratio, low, high = (
                found[0]
                if len(found) == 1
                else _over_processes([one[0] for one in found], folder, what)
            )
            evidence = (
                "rounds of one process" if len(found) == 1 else text.count_of(len(found), "process")
            )
            deciding = (case, other) == (group, implementation)
            when = str(files[0].get("datetime", ""))
            yield Finding(
                what,
                ratio,
                low,
                high,
                f"measured, {evidence}",
                folder,
                hardware,
                deciding,
                len(found),
                when,
            )


def _benchmark_files(library: Library) -> dict[str, list[dict[str, Any]]]:
    """{folder: results of pytest-benchmark in it}."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path, result in library.results.items():
        if isinstance(result.get("benchmarks"), list) and "machine_info" in result:
            found.setdefault(path.rpartition("/")[0], []).append(result)
    return found


def _benchmark_rows(result: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The values that each benchmark entry recorded, with its group. Under pytest, one entry holds
    the rows of all implementations.
    """
    for entry in result["benchmarks"]:
        info = entry.get("extra_info", {})
        yield from info["rows"] if "rows" in info else [{**info, "group": entry.get("group")}]


def _over_processes(
    ratios: Sequence[float], folder: str, what: str
) -> tuple[float, float | None, float | None]:
    effect = estimate(
        {i: math.log(ratio) for i, ratio in enumerate(ratios)}, Rule(seed=folder), what
    )
    return measured_ratio(effect), effect["low"], effect["high"]


MEASUREMENTS: dict[str, Callable[..., Iterator[Finding]]] = {
    measure.__name__: measure
    for measure in (
        reference_ratio,
        scaling,
        host_time,
        prefix_hit_rate,
        prefix_saving,
        code_lines,
        benchmark,
    )
}

# -- what they share -------------------------------------------------------------------------------

Measure = Callable[[ServedWorkload], float | None]


def _serving_s(work: ServedWorkload) -> float | None:
    return float(work["duration_s"])


def _prefill_s(work: ServedWorkload) -> float | None:
    """Seconds spent in prefill steps; None if a step mixed prefill and decode, so that its time
    cannot be attributed.
    """
    steps = [
        (duration, decodes) for duration, prefills, decodes in work["step_times_s"] if prefills
    ]
    return None if any(decodes for _, decodes in steps) else sum(duration for duration, _ in steps)


def _saving(
    study: Study, what: str, on: str, off: str, workload: str, measure: Measure, decides: bool
) -> Iterator[Finding]:
    """1 - on / off of a figure of one workload of each launch, by the ratios within blocks."""
    values = [
        {r["block"]: measure(r["workloads"][workload]) for r in _counted(study, cell)}
        for cell in (on, off)
    ]
    log_ratios = {
        block: math.log(value / other)
        for block, value in sorted(values[0].items())
        if value and (other := values[1].get(block))
    }
    if log_ratios:
        effect = estimate(log_ratios, Rule(seed=study.plan["plan_hash"]), what)
        low, high = (None if end is None else 1 - end for end in (effect["high"], effect["low"]))
        n = len(log_ratios)
        yield _finding(
            study,
            what,
            1 - measured_ratio(effect),
            low,
            high,
            f"measured, {text.count_of(n, 'block')}",
            decides,
            n,
        )


def _of_blocks(study: Study, what: str, effect: Mapping[str, Any], decides: bool) -> Finding:
    evidence = f"measured, {text.count_of(effect['n'], 'block')}"
    return _finding(
        study, what, effect["ratio"], effect["low"], effect["high"], evidence, decides, effect["n"]
    )


def _finding(
    study: Study,
    what: str,
    value: float,
    low: float | None,
    high: float | None,
    evidence: str,
    decides: bool,
    n: int,
) -> Finding:
    when = min(
        (record["started_at"] for record in study.records if record["kind"] == "launch"), default=""
    )
    return Finding(what, value, low, high, evidence, study.name, study.hardware, decides, n, when)


def _counted(study: Study, cell: str) -> list[LaunchRecord]:
    """The counted launches of a cell, as the analysis counted them."""
    names = {row["launch"] for row in study.analysis["order"]["launches"] if row["cell"] == cell}
    excluded = {(row["launch"], row["attempt"]) for row in study.analysis["excluded"]}
    records = {
        (record["launch"], record["attempt"]): record
        for record in study.records
        if record["kind"] == "launch" and record["launch"] in names
    }
    return [record for key, record in sorted(records.items()) if key not in excluded]


def _all_counted(study: Study) -> list[Mapping[str, Any]]:
    return [record for cell in study.plan["cells"] for record in _counted(study, cell)]


def _change(study: Study, cell: str) -> dict[str, tuple[Any, Any]]:
    """{factor: (baseline's level, the cell's)} where they differ; empty for other engines."""
    levels, start = (
        study.plan["cells"][name]["levels"] for name in (cell, study.analysis["baseline"])
    )
    return {
        factor: (start.get(factor), level)
        for factor, level in levels.items()
        if start.get(factor) != level
    }


def _with_prefix_cache(library: Library, name: str) -> Iterator[tuple[Study, str]]:
    """Executions of a study and their cell that differs from the baseline in the prefix cache
    alone.
    """
    for study in library.studies.values():
        if study.plan["study"]["name"] == name:
            for cell in study.plan["cells"]:
                if _change(study, cell) == {"prefix_cache": ("off", "on")}:
                    yield study, cell


def _turns(study: Study, workload: str) -> str:
    entry = study.plan["workloads"][workload]
    turns = entry["params"].get("turns")
    return text.count_of(turns, "turn") if turns else entry["kind"]


def _model(study: Study) -> str:
    model = study.plan["model"]
    return f"{model['preset'] or model['path']} in {model['dtype']}"
