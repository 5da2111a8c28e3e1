"""The profile of this machine: its hardware and the measured speed of memory and arithmetic, which
is cached.

A machine with NVIDIA GPUs needs no profile file: a profile is made from what PyTorch detects
(`gpus_at_hand`). Profile files describe machines to plan for. If one of them matches this machine,
its name is used, with the values measured here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.host import provenance, telemetry
from experiments.host.environment import WORKPLACE, for_subprocess
from experiments.records.types import JsonObject, PlannedProfile
from experiments.study.spec import PROFILES, Profile, load_profile
from experiments.study.yaml_files import SpecError, names

MEASURE_TIMEOUT_S = 180
LEAST_CAPABILITY = (8, 0)
"""Minimum compute capability: Ampere. Older GPUs lack bfloat16 arithmetic and the asynchronous copies that the kernels use."""
_DRIVER_FILES = (Path("/dev/nvidiactl"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
"""Signs of an NVIDIA driver on Linux and on WSL, where /dev/dxg exists for GPUs of any vendor."""
KV_SHARE, KV_STEP_BYTES = 0.9, 1 << 28
"""Share of the free device memory that a study may use, and the granularity of its KV cache: 256 MiB, so that small changes in
the memory use of a desktop do not change the plan."""

# The best of one core times the number of cores: an upper bound even when other processes run
# meanwhile. The best of several sizes, because a small model fits into the caches.
_MEASURE_CPU = """
import json, sys, time
begin = time.perf_counter()
import torch
import_s = time.perf_counter() - begin
torch.set_num_threads(1)
cores = int(sys.argv[1])
def best(work, call):
    call()
    times = []
    while sum(times) < 0.5:
        begin = time.perf_counter(); call(); times.append(time.perf_counter() - begin)
    return cores * work / min(times)
copies = {}
for mib in (0.25, 1, 4, 64):
    a, b = torch.zeros(int(mib * 2**18)), torch.zeros(int(mib * 2**18))
    copies[mib] = best(2 * mib * 2**20, lambda: a.copy_(b))
flops = {}
for name in ("float32", "bfloat16"):
    dtype = getattr(torch, name)
    flops[name] = max(best(2 * n**3, lambda: a @ b) for n in (256, 512, 1024)
                      for a, b in [(torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype))])
print(json.dumps({"bandwidth_bytes_per_s": max(copies.values()), "copy_bytes_per_s_by_mib": copies, "peak_flops": flops,
                  "import_s": import_s}))
"""

# Copies larger than any cache, matmuls on random data (zeros would run faster than real data), each
# the best of several by CUDA events; small operations by the host's clock.
_MEASURE_GPU = """
import json, time
begin = time.perf_counter()
import torch
seen = {"import_s": time.perf_counter() - begin, "torch": torch.__version__, "cuda": torch.version.cuda, "devices": []}
try:
    torch.cuda.init()
except (RuntimeError, AssertionError) as error:
    seen["why_not"] = str(error).strip().splitlines()[0]
for index in range(torch.cuda.device_count() if "why_not" not in seen else 0):
    try:
        p = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # one that another process holds wholly; those before it can be used
        if index == 0:
            seen["why_not"] = str(error).strip().splitlines()[0]
        break
    seen["devices"].append({"name": p.name, "capability": [p.major, p.minor], "memory_bytes": total, "free_bytes": free,
                            "multiprocessors": p.multi_processor_count, "l2_bytes": p.L2_cache_size,
                            "uuid": str(getattr(p, "uuid", ""))})
if seen["devices"] and seen["devices"][0]["capability"] >= [8, 0]:
    free = seen["devices"][0]["free_bytes"]
    def best(work, call, seconds):
        call(); torch.cuda.synchronize()
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 3:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(); call(); stop.record(); stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        return work / min(times)
    copies = {}
    for mib in (256, 1024):
        if 4 * mib * 2**20 <= free:
            a = torch.empty(mib * 2**18, device="cuda").normal_()
            b = torch.empty_like(a)
            copies[mib] = best(2 * a.nbytes, lambda: b.copy_(a), 0.3)
            del a, b
    torch.backends.cuda.matmul.allow_tf32 = False
    flops = {}
    for name, sizes in (("bfloat16", (4096, 8192)), ("float32", (4096,))):
        for n in sizes:
            if 8 * n * n * 4 <= free:
                a, b = (torch.randn(n, n, device="cuda", dtype=getattr(torch, name)) for _ in range(2))
                flops[name] = max(flops.get(name, 0.0), best(2 * n**3, lambda: a @ b, 0.4))
                del a, b
    x = torch.zeros(32, 1024, device="cuda")
    times = []
    for _ in range(5):
        torch.cuda.synchronize(); begin = time.perf_counter()
        for _ in range(1000): x.add_(1.0)
        torch.cuda.synchronize(); times.append((time.perf_counter() - begin) / 1000)
    if copies and len(flops) == 2:
        seen |= {"bandwidth_bytes_per_s": max(copies.values()), "copy_bytes_per_s_by_mib": copies, "peak_flops": flops,
                 "host_op_s": min(times)}
print(json.dumps(seen))
"""


@dataclasses.dataclass(frozen=True)
class Gpus:
    """The GPUs that a process started here would use: the first GPU that PyTorch lists and those
    after it of the same kind.
    """

    name: str
    count: int
    memory_bytes: int
    measured: JsonObject


def detect_profile() -> Profile:
    """The profile of this machine: `cpu` without a GPU, else one made from its GPUs. Raises
    SpecError if they cannot be used.
    """
    found = gpus_at_hand()
    return load_profile("cpu") if found is None else profile_of(found)


def gpus_at_hand() -> Gpus | None:
    """The visible GPUs of this machine, with their measured speeds; None if there are none.

    Raises SpecError for GPUs that the installed PyTorch cannot use, that are too old, or that have
    too little free memory.
    """
    listed = listed_gpus()
    if not listed:
        return None
    seen = measure_gpus(listed)
    use_cpu = "To measure the CPU instead, use `--profile cpu` (make ablate PROFILE=cpu)."
    if not seen["devices"]:
        reason = seen.get("why_not") or (
            "torch was built without CUDA" if seen["cuda"] is None else "it finds no device"
        )
        if hidden := os.environ.get("CUDA_VISIBLE_DEVICES"):
            reason += f" (CUDA_VISIBLE_DEVICES={hidden})"
        raise SpecError(
            f"the driver lists {listed[0]}, but PyTorch {seen['torch']} cannot use it: {reason}. Update the NVIDIA driver, or "
            f"install a build of torch for it. {use_cpu}"
        )
    first = seen["devices"][0]
    if tuple(first["capability"]) < LEAST_CAPABILITY:
        raise SpecError(
            f"{first['name']} has compute capability {first['capability'][0]}.{first['capability'][1]}; "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} (Ampere) or higher is required. {use_cpu}"
        )
    if "bandwidth_bytes_per_s" not in seen:
        raise SpecError(
            f"{first['name']} has {first['free_bytes']:,} of {first['memory_bytes']:,} bytes free; measuring its speed takes "
            f"1.1 GB. Stop the processes that use its memory (see nvidia-smi), or hide it with CUDA_VISIBLE_DEVICES. {use_cpu}"
        )
    alike = 0
    for device in seen["devices"]:
        if (device["name"], device["memory_bytes"]) != (first["name"], first["memory_bytes"]):
            break
        alike += 1
    return Gpus(first["name"], alike, first["memory_bytes"], seen)


def profile_of(gpus: Gpus) -> Profile:
    """The profile of these GPUs, named after the profile file that matches them, else after the
    GPUs.
    """
    known = next((p for p in map(load_profile, names(PROFILES)) if matches(p, gpus)), None)
    short = re.sub(
        r"[^a-z0-9]+", "-", gpus.name.lower().removeprefix("nvidia ").removeprefix("geforce ")
    ).strip("-")
    count = f"-x{gpus.count}" if gpus.count > 1 else ""
    return Profile(
        name=known.name if known else f"{short or 'gpu'}{count}",
        title=known.title
        if known
        else f"{gpus.count} x {gpus.name}"
        if gpus.count > 1
        else gpus.name,
        device="cuda",
        num_devices=gpus.count,
        match={"gpu_name": gpus.name, "num_gpus": gpus.count},  # type: ignore[arg-type]
        memory_bytes=gpus.memory_bytes,
        bandwidth_bytes_per_s="measure",
        peak_flops="measure",
        kv_cache_memory_bytes="measure",
        preset="qwen3-0.6b",
        dtype="bfloat16",
    )


def matches(profile: Profile, gpus: Gpus) -> bool:
    """Whether a profile describes these GPUs."""
    wanted = profile.match
    return (
        wanted is not None
        and wanted.num_gpus == gpus.count
        and fnmatch.fnmatchcase(gpus.name, wanted.gpu_name)
    )


def settle(profile: Profile, dtype: str) -> PlannedProfile:
    """The profile as stored in a plan, with all values resolved except a KV cache that is sized
    later. Measured values take precedence over the file's.
    """
    settled: PlannedProfile = profile.model_dump(exclude={"match", "preset", "dtype"})  # type: ignore[assignment]
    settled["cpu_cores"] = profile.cpu_cores or provenance.cpu_cores()
    settled["memory_bytes"] = profile.memory_bytes or provenance.memory_bytes()
    measured = _measured(profile)
    settled["bandwidth_bytes_per_s"] = measured.get(
        "bandwidth_bytes_per_s", settled["bandwidth_bytes_per_s"]
    )
    settled["host_op_s"] = measured.get("host_op_s", profile.host_op_s)
    settled["import_s"] = measured.get("import_s", profile.import_s)
    peaks: dict[Any, float] = measured["peak_flops"] if measured else profile.peak_flops  # type: ignore[assignment]
    if "bfloat16" in peaks:  # the tensor cores of a GPU multiply both at the same rate
        peaks = {"float16": peaks["bfloat16"], **peaks}
    if dtype not in peaks:
        raise SpecError(
            f"profile {profile.name}: peak_flops has no {dtype}; it has {', '.join(peaks)}"
        )
    settled["peak_flops"] = peaks[dtype]
    if profile.device == "cpu":
        # Values of bfloat16 may be multiplied in float32, and are by kernels=native. PyTorch's own product of bfloat16
        # is far slower where the CPU has none.
        settled["peak_flops"] = max(peaks[dtype], peaks.get("float32", 0.0))
    settled["speeds"] = "measured on this machine" if measured else "stated in the profile"
    return settled


def _measured(profile: Profile) -> JsonObject:
    """The measured speeds, if the profile is this machine's; {} if it describes another one."""
    if profile.device == "cpu":
        return measure() if "measure" in (profile.bandwidth_bytes_per_s, profile.peak_flops) else {}
    open_values = "measure" in (profile.bandwidth_bytes_per_s, profile.peak_flops)
    try:
        gpus = gpus_at_hand()
    except SpecError:  # an unusable GPU does not matter when planning for another machine
        if open_values:
            raise
        return {}
    if gpus is not None and matches(profile, gpus):
        return gpus.measured
    if open_values:
        raise SpecError(
            f"profile {profile.name} asks for its speed to be measured, but this machine has no such GPU: set "
            "bandwidth_bytes_per_s and peak_flops in the profile to plan for another machine"
        )
    return {}


def free_gpu_bytes(num_devices: int) -> int:
    """The free memory of the fullest of the GPUs that a study will use. Raises SpecError if there
    are none.
    """
    gpus = gpus_at_hand()
    if gpus is None:
        raise SpecError(
            "kv_cache_memory_bytes: measure needs a GPU; give a number of bytes to plan for another machine"
        )
    used = gpus.measured["devices"][:num_devices]
    # torch counts them in another order
    now = telemetry.free_gpu_bytes(",".join(f"GPU-{device.get('uuid')}" for device in used))
    if len(now) == len(used) and all(
        abs(total - used[0]["memory_bytes"]) < 0.05 * total for _, total in now
    ):
        return min(free for free, _ in now)
    # for a MIG instance nvidia-smi reports the whole GPU, so use the value of the measurement
    return min(device["free_bytes"] for device in used)


def kv_budget(free_bytes: int, weight_bytes: int, step_bytes: int, most_bytes: int) -> int:
    """The size of the KV cache on a device: what weights and a step leave of its free memory, but
    no more than the workloads can fill, rounded to KV_STEP_BYTES. Raises SpecError if nothing is
    left.
    """
    room = int(KV_SHARE * free_bytes) - weight_bytes - step_bytes
    wanted = -(-most_bytes // KV_STEP_BYTES) * KV_STEP_BYTES
    if room < KV_STEP_BYTES:
        lacking = (KV_STEP_BYTES - room) / KV_SHARE
        raise SpecError(
            f"the device has {free_bytes / 1e9:.1f} GB free; weights take {weight_bytes / 1e9:.1f} GB and a step about "
            f"{step_bytes / 1e9:.1f} GB, which leaves no memory for the KV cache. Free {lacking / 1e9:.1f} GB more (see "
            "nvidia-smi), use a smaller MODEL, or lower settings.max_num_batched_tokens"
        )
    return min(wanted, room // KV_STEP_BYTES * KV_STEP_BYTES)


def listed_gpus() -> list[str]:
    """The GPUs that the driver lists (lines of `nvidia-smi -L`, including MIG instances); empty
    without a driver, and if all GPUs are hidden.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    # some containers and WSL have a driver without nvidia-smi
    if shutil.which("nvidia-smi") is None:
        return [str(path) for path in _DRIVER_FILES if path.exists()]
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
        )
        said = done.stdout + done.stderr
    except (subprocess.SubprocessError, OSError) as error:
        said = str(error)
    found = [line.strip() for line in said.splitlines() if re.match(r"\s*(GPU|MIG) ", line)]
    if not found and said and any(path.exists() for path in _DRIVER_FILES):
        # for instance after a driver update without a reboot
        return [f"a driver that does not respond ({said.strip().splitlines()[0]})"]
    return found


def measure_gpus(listed: list[str]) -> JsonObject:
    """What PyTorch reports about these GPUs and the speed of the first one, measured once (a few
    seconds) and then cached.
    """
    torch_version = metadata.version("torch")
    visible = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")}
    return _kept(
        [listed, visible, torch_version, sys.version_info[:2]], [sys.executable, "-c", _MEASURE_GPU]
    )


def measure() -> JsonObject:
    """The copy bandwidth and matmul peak of this CPU, and how long it takes to import PyTorch,
    measured once (about 5 s) and then cached.
    """
    hardware = [
        provenance.cpu_model(),
        provenance.cpu_cores(),
        provenance.memory_bytes(),
        metadata.version("torch"),
        sys.version_info[:2],
    ]
    return _kept(hardware, [sys.executable, "-c", _MEASURE_CPU, str(provenance.cpu_cores())])


def _kept(what: list[Any], command: list[str]) -> JsonObject:
    """The JSON that a command prints, cached per hardware if it holds a measurement. Raises
    SpecError if the command fails.
    """
    cache = Path(os.environ.get("NANOVLLM_CACHE") or WORKPLACE / ".cache" / "nanovllm")
    kept = cache / f"machine-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}.json"
    if kept.exists():
        return json.loads(kept.read_text())  # type: ignore[no-any-return]
    print(
        "measuring memory bandwidth and FLOP/s of this machine (once, a few seconds)",
        file=sys.stderr,
        flush=True,
    )
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=for_subprocess(),
            timeout=MEASURE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SpecError(
            f"measuring this machine did not finish within {MEASURE_TIMEOUT_S} s: is another process using its GPU? "
            "To measure the CPU instead, use `--profile cpu`"
        ) from None
    if done.returncode != 0:
        raise SpecError(f"measuring this machine failed: {done.stderr.strip()[-500:]}")
    found: JsonObject = json.loads(done.stdout.strip().splitlines()[-1])
    if "bandwidth_bytes_per_s" in found:
        # if the cache cannot be written, measure again next time
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(found))
            partial.rename(kept)
    return found
