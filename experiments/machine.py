"""This machine: which profile is its own, and how fast its memory and arithmetic are. Its measurements are kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments import provenance, telemetry
from experiments.spec import PROFILES, Profile, load_profile
from experiments.yaml_files import SpecError, names

# One core at its best, times the cores: never below the truth, even when others are at work while it is measured. The best of
# several sizes: a small model lives in the CPU's caches, and a bound must hold for it as well.
_MEASURE = """
import json, sys, time, torch
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
print(json.dumps({"bandwidth_bytes_per_s": max(copies.values()), "copy_bytes_per_s_by_mib": copies, "peak_flops": flops}))
"""


def detect_profile() -> Profile:
    """The profile of this machine: `cpu` without a GPU. Raises SpecError for a GPU that no profile knows."""
    gpus = telemetry.gpu_inventory()
    if not gpus:
        return load_profile("cpu")
    profiles = [load_profile(name) for name in names(PROFILES)]
    fitting = [p for p in profiles if p.match and p.match.gpu_name in gpus[0]["name"] and p.match.num_gpus <= len(gpus)]
    if not fitting:
        raise SpecError(
            f"no profile knows this machine's {len(gpus)} x {gpus[0]['name']}: give --profile with one of "
            f"{', '.join(p.name for p in profiles)}, or the path of a YAML file of your own (copy experiments/profiles/h200.yaml)"
        )
    return max(fitting, key=lambda p: p.match.num_gpus if p.match else 0)


def settle(profile: Profile, dtype: str) -> dict[str, Any]:
    """The profile as a plan stores it: nothing open. What it leaves to the machine is taken, or measured, here."""
    settled = profile.model_dump(exclude={"match", "preset", "dtype"})
    settled["cpu_cores"] = profile.cpu_cores or provenance.cpu_cores()
    settled["memory_bytes"] = profile.memory_bytes or provenance.memory_bytes()
    measured = measure() if "measure" in (profile.bandwidth_bytes_per_s, profile.peak_flops) else {}
    if profile.bandwidth_bytes_per_s == "measure":
        settled["bandwidth_bytes_per_s"] = measured["bandwidth_bytes_per_s"]
    peaks: dict[Any, float] = measured["peak_flops"] if profile.peak_flops == "measure" else profile.peak_flops
    if dtype not in peaks:
        raise SpecError(f"profile {profile.name}: peak_flops has no {dtype}; it has {', '.join(peaks)}")
    settled["peak_flops"] = peaks[dtype]
    return settled


def measure() -> dict[str, Any]:
    """Copy bandwidth and matrix-multiplication peak of this CPU, measured once (about 5 s) and then kept."""
    hardware = json.dumps([provenance.cpu_model(), provenance.cpu_cores(), provenance.memory_bytes()])
    cache = Path(os.environ.get("NANOVLLM_CACHE", provenance.ROOT / ".cache" / "nanovllm"))
    kept = cache / f"machine-{hashlib.sha256(hardware.encode()).hexdigest()[:12]}.json"
    if not kept.exists():
        command = [sys.executable, "-c", _MEASURE, str(provenance.cpu_cores())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SpecError(f"measuring this machine failed: {done.stderr.strip()[-500:]}")
        cache.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        partial.write_text(done.stdout)
        partial.rename(kept)
    return json.loads(kept.read_text())  # type: ignore[no-any-return]
