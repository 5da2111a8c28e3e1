"""Telemetry of a launch: CPU load (own and others'), clock and power, memory of the process tree, and
clocks, temperature and processes of the GPUs.

Sampled by a thread of the *runner*, so that the measured engine process is not disturbed. Reads
/proc (or psutil, if there is no /proc) and NVML through pynvml (or `nvidia-smi`, if that is not
installed).
"""

# Own code instead of a package that monitors: a host that runs launches needs an engine and the standard library, nothing else.
# The share of the CPU that other processes use, by which launches are judged, is the difference of two readings (/proc/stat and
# the process tree) that must be taken together.

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from experiments.host.cpu_power import CpuPower
from experiments.records.types import Gpu, JsonObject, Telemetry

_PROC = Path("/proc")
_MAX_SAMPLES = 120
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

Sample = JsonObject


class Sampler:
    """Samples every `interval_s` from `start()` to `stop()`. A long launch is thinned out to at most
    120 samples.
    """

    def __init__(self, pid: int, interval_s: float = 0.5, visible: str | None = None) -> None:
        """Create it before the process starts, to know which GPU memory and processes belong to
        others, and set `pid` afterwards. visible: CUDA_VISIBLE_DEVICES of the process (numbers or
        UUIDs; None for all GPUs); other GPUs are not sampled.
        """
        self.pid, self.interval_s = pid, interval_s
        self.samples: list[Sample] = []
        self._peak_rss: dict[int, int] = {}
        self._gpu = open_gpu(visible)
        self._gpu_before = self._gpu.sample() if self._gpu else None
        self._gpu_pids: set[int] = set()
        self._throttle: set[str] = set()  # in any sample, kept or thinned out; as is the next
        self._peak_device: int | None = None
        self._own_pids: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> Telemetry:
        """Stops sampling and returns the telemetry for the record."""
        self._stop.set()
        self._thread.join()
        if self._gpu:
            self._gpu.close()
        numbers = {
            name
            for sample in self.samples
            for name, value in sample.items()
            if isinstance(value, (int, float))
        }
        return {
            "sources": {
                "cpu": "proc" if _PROC.is_dir() else "psutil",
                "gpu": self._gpu.source if self._gpu else None,
            },
            "interval_s": self.interval_s,
            "summary": {
                name: _summary([s[name] for s in self.samples if s.get(name) is not None])
                for name in sorted(numbers - {"time_s"})
            },
            "throttle_reasons": sorted(self._throttle),
            "foreign_gpu_pids": sorted(self._foreign_gpu_pids()),
            "samples": self.samples,
        }

    @property
    def peak_host_bytes(self) -> int | None:
        """The sum over the process tree of each process's peak resident memory (shared pages are
        counted in each process).
        """
        return sum(self._peak_rss.values()) or None

    @property
    def peak_device_bytes(self) -> int | None:
        """The largest sampled increase of memory in use on all GPUs since the process started; None
        without a GPU.
        """
        return self._peak_device

    def _foreign_gpu_pids(self) -> set[int]:
        """The processes of others that used the GPUs. In a container, NVML reports process ids of
        the host, so ours cannot be recognized; then only those that ran before ours started count.
        """
        if self._gpu_before is None:
            return set()
        visible = bool(self._gpu_pids & self._own_pids)
        return self._gpu_pids - self._own_pids if visible else self._gpu_before[2]

    def _run(self) -> None:
        begin, cpu_before, own_before = time.monotonic(), cpu_times(), 0.0
        power = CpuPower()
        while not self._stop.wait(self.interval_s):
            cpu_now = cpu_times()
            sample: Sample = {
                "time_s": round(time.monotonic() - begin, 3),
                "load_1min": round(os.getloadavg()[0], 2),
            }
            if cpu_now and cpu_before and cpu_now[1] > cpu_before[1]:
                sample["cpu_busy"] = round(
                    (cpu_now[0] - cpu_before[0]) / (cpu_now[1] - cpu_before[1]), 4
                )
            pids = process_tree(self.pid)
            own_now = _cpu_ticks(pids)
            if cpu_now and cpu_before and cpu_now[1] > cpu_before[1] and own_now >= own_before:
                others = (cpu_now[0] - cpu_before[0] - (own_now - own_before)) / (
                    cpu_now[1] - cpu_before[1]
                )
                sample["cpu_foreign"] = round(min(1.0, max(0.0, others)), 4)
            cpu_before, own_before = cpu_now, own_now
            sample["cpu_mhz"] = cpu_mhz()
            if (watts := power.watts()) is not None:
                sample["cpu_watts"] = round(watts, 2)
            self._own_pids |= set(pids)
            if resident := self._note_memory(pids):
                sample["rss_bytes"] = resident
            if self._gpu and self._gpu_before:
                gpus, used, computing = self._gpu.sample()
                self._gpu_pids |= computing
                if gpus:  # `nvidia-smi` may fail for a moment
                    grown = max(0, used - self._gpu_before[1])
                    self._throttle |= {reason for gpu in gpus for reason in gpu["throttle"]}
                    self._peak_device = max(grown, self._peak_device or 0)
                    sample |= {"gpus": gpus, "gpu_memory_bytes": grown}
                    sample |= {
                        f"gpu0_{name}": value
                        for name, value in gpus[0].items()
                        if name != "throttle"
                    }
            self.samples.append(sample)
            if len(self.samples) > _MAX_SAMPLES:
                self.samples, self.interval_s = self.samples[::2], 2 * self.interval_s

    def _note_memory(self, pids: list[int]) -> int:
        now = 0
        for pid in pids:
            resident, peak = _rss(pid)
            now += resident
            self._peak_rss[pid] = max(peak, self._peak_rss.get(pid, 0))
        return now


def process_tree(pid: int) -> list[int]:
    """`pid` and its living descendants."""
    if not _PROC.is_dir():
        psutil = _optional("psutil")
        return (
            [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
            if psutil
            else [pid]
        )
    parents = {
        int(path.name): _stat(int(path.name)) for path in _PROC.iterdir() if path.name.isdigit()
    }
    tree = [pid]
    for member in tree:
        tree += [child for child, fields in parents.items() if fields and int(fields[1]) == member]
    return tree


def tree_cpu_s(pid: int) -> float | None:
    """CPU seconds (user and system) used so far by the living processes of a tree. None without
    /proc.
    """
    if not _PROC.is_dir():
        return None
    return _cpu_ticks(process_tree(pid)) / _TICKS_PER_S


def _cpu_ticks(pids: list[int]) -> float:
    """User and system time of the living processes; 0 without /proc."""
    fields = [_stat(pid) for pid in pids]
    return float(sum(int(f[11]) + int(f[12]) for f in fields if f))


def cpu_times() -> tuple[float, float] | None:
    """(busy, total) CPU time of the whole machine since it started, in ticks; None without /proc."""
    fields = [int(field) for field in _text(_PROC / "stat").partition("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4], sum(fields)) if len(fields) == 8 else None


def cpu_mhz() -> float | None:
    """The mean clock over all cores; None if the system does not report it."""
    clocks = [
        float(line.split(":")[1])
        for line in _text(_PROC / "cpuinfo").splitlines()
        if line.startswith("cpu MHz")
    ]
    return round(sum(clocks) / len(clocks), 1) if clocks else None


def _rss(pid: int) -> tuple[int, int]:
    """(resident, peak resident) bytes of one process; zeros once it has ended."""
    if not _PROC.is_dir():
        psutil = _optional("psutil")
        resident = psutil.Process(pid).memory_info().rss if psutil and psutil.pid_exists(pid) else 0
        return resident, resident
    lines = dict(
        line.split(":", 1)
        for line in _text(_PROC / str(pid) / "status").splitlines()
        if ":" in line
    )
    return tuple(
        int(lines[name].split()[0]) * 1024 if name in lines else 0 for name in ("VmRSS", "VmHWM")
    )  # type: ignore[return-value]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (state, parent, ...); empty once the process
    has ended.
    """
    return _text(_PROC / str(pid) / "stat").rpartition(")")[2].split()


def _text(path: Path) -> str:
    """The content of a /proc file; empty if its process has ended or there is no /proc."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return ""


def _summary(values: list[float]) -> dict[str, float]:
    return (
        {"min": min(values), "mean": round(sum(values) / len(values), 4), "max": max(values)}
        if values
        else {}
    )


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# ----------------------------------------------------------------------------------------------------------------
# GPUs


class _Nvml:
    """Samples the GPUs that a process sees through NVML, which takes about a millisecond."""

    source = "nvml"
    _REASONS: ClassVar = {
        0x4: "power_cap",
        0x8: "hw_slowdown",
        0x20: "sw_thermal",
        0x40: "hw_thermal",
        0x80: "hw_power_brake",
    }

    def __init__(self, nvml: Any, visible: str | None) -> None:
        self._nvml = nvml
        every = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        names = (
            None
            if visible is None
            else [name.strip() for name in visible.split(",") if name.strip()]
        )
        try:
            self._handles = every if names is None else [self._handle(name) for name in names]
        except nvml.NVMLError:
            # names that NVML does not know, a part of a UUID: rather too many than none
            self._handles = every

    def _handle(self, name: str) -> Any:
        nvml = self._nvml
        return (
            nvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdecimal()
            else nvml.nvmlDeviceGetHandleByUUID(name)
        )

    def sample(self) -> tuple[list[JsonObject], int, set[int]]:
        """(state of each GPU, memory in use on all of them in bytes, the processes that compute on
        them).
        """
        nvml, gpus, used, pids = self._nvml, [], 0, set()
        for handle in self._handles:
            watts = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
            busy = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
            reasons = self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
            gpus.append(
                {
                    "sm_mhz": self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
                    "memory_mhz": self._ask(
                        nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM
                    ),
                    "celsius": self._ask(
                        nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU
                    ),
                    "watts": None if watts is None else watts / 1000,
                    "busy_percent": None if busy is None else busy.gpu,
                    "throttle": [name for bit, name in self._REASONS.items() if reasons & bit],
                }
            )
            used += nvml.nvmlDeviceGetMemoryInfo(handle).used
            pids |= {
                process.pid
                for process in self._ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
            }
        return gpus, used, pids

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or None if the GPU does not report it (as power on laptops, and nearly
        everything on virtual GPUs).
        """
        try:
            return question(*arguments)
        except (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_NoPermission):
            return None


class _NvidiaSmi:
    """The same through `nvidia-smi`, at most every 2 s, because each call costs some 50 ms of CPU."""

    source = "nvidia-smi"
    _FIELDS = (
        "clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu,memory.used,"
        "clocks_throttle_reasons.hw_slowdown,clocks_throttle_reasons.sw_thermal_slowdown,clocks_throttle_reasons.sw_power_cap"
    )

    def __init__(self, visible: str | None) -> None:
        self._visible = visible
        self._last: tuple[list[JsonObject], int, set[int]] = ([], 0, set())
        self._last_s = float("-inf")

    def sample(self) -> tuple[list[JsonObject], int, set[int]]:
        if time.monotonic() - self._last_s < 2:
            return self._last
        gpus, used = [], 0
        for row in nvidia_smi("--query-gpu=" + self._FIELDS, self._visible):
            # "[N/A]" is None
            values = [float(v) if v.replace(".", "", 1).isdigit() else None for v in row[:6]]
            throttle = [
                name
                for name, state in zip(
                    ("hw_slowdown", "sw_thermal", "power_cap"), row[6:], strict=True
                )
                if state == "Active"
            ]
            names = ("sm_mhz", "memory_mhz", "celsius", "watts", "busy_percent")
            gpus.append(dict(zip(names, values[:5], strict=True)) | {"throttle": throttle})
            used += int(values[5] or 0) << 20
        pids = {
            int(pid)
            for (pid,) in nvidia_smi("--query-compute-apps=pid", self._visible)
            if pid.isdigit()
        }
        self._last, self._last_s = (gpus, used, pids), time.monotonic()
        return self._last

    def close(self) -> None:
        """Does nothing."""


def nvidia_smi(query: str, visible: str | None = None) -> list[list[str]]:
    """The rows that `nvidia-smi` prints for a query, for all GPUs or those that `visible` names.
    Empty if there is no driver or the query fails.
    """
    if shutil.which("nvidia-smi") is None or visible == "":
        return []
    command = [
        "nvidia-smi",
        query,
        "--format=csv,noheader,nounits",
        *([] if visible is None else ["-i", visible]),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=30, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    # "No devices were found" may come with status 0
    return [row for row in rows if len(row) == len(query.split(","))]


def visible_gpus(uuids: Sequence[str]) -> list[str]:
    """The GPUs that CUDA shows this process, named as in CUDA_VISIBLE_DEVICES. uuids: all GPUs of the
    machine.

    Follows CUDA's rule that the list ends at the first name that is not a GPU. A MIG instance counts
    as one GPU.
    """
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return [str(index) for index in range(len(uuids))]
    found: list[str] = []
    for name in map(str.strip, named.split(",")):
        is_index = name.isdecimal() and int(name) < len(uuids)
        is_uuid = name.startswith("MIG-") or (
            name.startswith("GPU-") and any(uuid.startswith(name) for uuid in uuids)
        )
        if not (is_index or is_uuid) or name in found:
            break
        found.append(name)
    return found


def gpu_inventory() -> list[Gpu]:
    """Name, memory and driver of each GPU that this process may use; empty without an NVIDIA driver.

    A MIG instance is listed with the name and memory of the first GPU, because nvidia-smi does not
    report which GPU it belongs to.
    """
    rows = nvidia_smi("--query-gpu=uuid,name,memory.total,driver_version")
    found: list[Gpu] = []
    for shown in visible_gpus([row[0] for row in rows]) if rows else []:
        named = (
            row for index, row in enumerate(rows) if shown == str(index) or row[0].startswith(shown)
        )
        _, name, mib, driver = next(named, rows[0])
        if mib.isdigit():
            found.append({"name": name, "memory_bytes": int(mib) << 20, "driver": driver})
    return found


def free_gpu_bytes(visible: str | None = None) -> list[tuple[int, int]]:
    """(free, total) memory of all GPUs or those that `visible` names, in the driver's order; empty
    if unknown.
    """
    rows = nvidia_smi("--query-gpu=memory.total,memory.used", visible)
    known = [(int(total), int(used)) for total, used in rows if total.isdigit() and used.isdigit()]
    return [((total - used) << 20, total << 20) for total, used in known]


def open_gpu(visible: str | None = None) -> _Nvml | _NvidiaSmi | None:
    """A source of GPU samples; None without a working NVIDIA driver."""
    nvml = _optional("pynvml")
    if nvml is not None:
        try:
            nvml.nvmlInit()
            return _Nvml(nvml, visible)
        except nvml.NVMLError:
            return None  # pynvml is installed, but there is no driver
    tool = _NvidiaSmi(visible)
    return tool if tool.sample()[0] else None
