"""What is recorded of the machine, on machines that this one is not: a GPU behind NVML or
nvidia-smi, no GPU, a dirty tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from experiments.host import provenance, telemetry
from experiments.host.telemetry import Sampler
from experiments.host.validity import THROTTLE_REASONS, objections
from experiments.study.spec import Validity


class FakeNvml(types.ModuleType):
    """Two GPUs as `pynvml` shows them; the second hides its power, as laptops do."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818 (the name that pynvml has)
        pass

    class NVMLError_NoPermission(NVMLError):  # noqa: N801, N818
        pass

    def __init__(self, processes: list[int], reasons: int = 0, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.processes, self.reasons, self.driver, self.used, self.closed = (
            processes,
            reasons,
            driver,
            10 << 20,
            False,
        )

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise self.NVMLError("no driver")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.closed = True

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        raise self.NVMLError(uuid)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        if handle == 1:
            raise self.NVMLError_NotSupported("power")
        return 350_000

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        return types.SimpleNamespace(gpu=97)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        return self.reasons if handle == 1 else 0

    def nvmlDeviceGetClockInfo(self, handle: int, which: int) -> int:  # noqa: N802
        return 1980 if which == self.NVML_CLOCK_SM else 3201

    def nvmlDeviceGetTemperature(self, handle: int, which: int) -> int:  # noqa: N802
        return 61

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        self.used += 1 << 20
        return types.SimpleNamespace(used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        return [types.SimpleNamespace(pid=pid) for pid in self.processes]


def sampled(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, own: bool = False
) -> tuple[dict[str, Any], Sampler]:
    """The telemetry of a child that works for a moment."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; end = time.time() + 5\nwhile time.time() < end: pass"]
    )
    if own:
        nvml.processes.append(child.pid)
    try:
        sampler = Sampler(child.pid, interval_s=0.05)
        sampler.start()
        time.sleep(0.5)
        return sampler.stop(), sampler
    finally:
        child.kill()
        child.wait()


def test_a_gpu_is_sampled_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml([], reasons=0x4)
    seen, sampler = sampled(monkeypatch, nvml, own=True)
    assert seen["sources"]["gpu"] == "nvml"
    assert nvml.closed
    sample = seen["samples"][-1]
    assert [gpu["watts"] for gpu in sample["gpus"]] == [350.0, None]
    assert (sample["gpu0_sm_mhz"], sample["gpu0_celsius"], sample["gpu0_busy_percent"]) == (
        1980,
        61,
        97,
    )
    assert seen["summary"]["gpu0_watts"]["mean"] == 350.0
    assert seen["throttle_reasons"] == ["power_cap"]
    assert seen["foreign_gpu_pids"] == [], "the child's own process is not foreign"
    assert sampler.peak_device_bytes is not None
    assert sampler.peak_device_bytes >= 2 << 20
    assert objections(seen, Validity(max_foreign_cpu=1).model_dump()) == [], (
        "a power cap is allowed"
    )


def test_what_happens_on_other_gpus_is_no_concern_of_a_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml = FakeNvml([], reasons=0x40)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    for visible, watts in (
        (None, [350.0, None]),
        ("1", [None]),
        ("1, 0", [None, 350.0]),
        ("", []),
        ("GPU-unknown", [350.0, None]),
    ):
        gpu = telemetry.open_gpu(visible)
        assert gpu is not None
        gpus, used, _ = gpu.sample()
        assert [found["watts"] for found in gpus] == watts, visible
        assert bool(used) == bool(watts)


def test_what_is_thinned_out_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """One hot moment of a long launch, in a sample that is dropped."""
    monkeypatch.setattr(telemetry, "_MAX_SAMPLES", 4)
    sampler = Sampler(os.getpid(), interval_s=0.001)
    samples = iter(
        [
            ([{"throttle": ["hw_thermal"] if i == 1 else []}], (9 if i == 1 else 1) << 30, set())
            for i in range(1000)
        ]
    )
    sampler._gpu = types.SimpleNamespace(
        sample=lambda: next(samples), close=lambda: None, source="test"
    )  # type: ignore[assignment]
    sampler._gpu_before = ([], 0, set())
    sampler.start()
    while len(sampler.samples) < 3 or sampler.interval_s < 0.004:
        time.sleep(0.01)
    seen = sampler.stop()
    assert not any(gpu["throttle"] for sample in seen["samples"] for gpu in sample["gpus"])
    assert seen["throttle_reasons"] == ["hw_thermal"]
    assert sampler.peak_device_bytes == 9 << 30


def test_heat_and_neighbours_are_seen_and_make_the_launch_invalid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, _ = sampled(monkeypatch, FakeNvml([os.getpid()], reasons=0x40 | 0x20 | 0x8 | 0x80))
    assert seen["foreign_gpu_pids"] == [os.getpid()]
    assert set(seen["throttle_reasons"]) == set(THROTTLE_REASONS) - {"power_cap"}
    reasons = objections(seen, Validity(max_foreign_cpu=1).model_dump())
    assert [reason.split(" (")[0] for reason in reasons] == [
        "1 other processes used its GPUs",
        "a GPU was throttled",
    ]


def with_nvidia_smi(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """A machine without `pynvml`, whose `nvidia-smi` is a shell script."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_nvidia_smi_stands_in_where_the_package_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_nvidia_smi(
        monkeypatch,
        tmp_path,
        "case $1 in\n"
        "*compute-apps*) echo 4242;;\n"
        "*driver_version*) echo 'GPU-1, NVIDIA H200, 143771, 570.1';;\n"
        "*) echo '1980, 3201, 61, [N/A], 97, 1024, Not Active, Active, Active';;\nesac",
    )
    gpu = telemetry.open_gpu()
    assert gpu is not None
    gpus, used, pids = gpu.sample()
    assert gpus == [
        {
            "sm_mhz": 1980.0,
            "memory_mhz": 3201.0,
            "celsius": 61.0,
            "watts": None,
            "busy_percent": 97.0,
            "throttle": ["sw_thermal", "power_cap"],
        }
    ]
    assert (used, pids) == (1024 << 20, {4242})
    assert telemetry.gpu_inventory() == [
        {"name": "NVIDIA H200", "memory_bytes": 143771 << 20, "driver": "570.1"}
    ]


@pytest.mark.parametrize(
    "script",
    [
        "echo No devices were found; exit 6",
        "echo No devices were found",
        "echo 'NVIDIA-SMI has failed, because it could not reach the driver, as told'; exit 9",
        "exec sleep 60",
    ],
)
def test_an_nvidia_smi_that_fails_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str
) -> None:
    """A container without its GPUs, or a driver that waits for a restart, must not stop a study on
    the CPU.
    """
    with_nvidia_smi(monkeypatch, tmp_path, script)
    real = subprocess.run
    monkeypatch.setattr(
        telemetry.subprocess,
        "run",
        lambda *a, **o: real(*a, **(o | {"timeout": 0.5} if "timeout" in o else o)),
    )
    assert telemetry.gpu_inventory() == []
    assert telemetry.open_gpu() is None
    assert provenance.of_machine()["gpus"] == []


def test_an_nvidia_smi_that_fails_for_a_moment_ends_no_telemetry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = "1980, 3201, 61, 350, 97, 1024, Not Active, Not Active, Not Active"
    script = f"if [ -e {tmp_path}/broken ]; then echo Unknown Error; exit 15; fi\ncase $1 in *clocks*) echo '{row}';; esac"
    with_nvidia_smi(monkeypatch, tmp_path, script)
    sampler = Sampler(os.getpid(), interval_s=0.05)
    sampler._gpu._last_s = float("-inf")  # type: ignore[union-attr]
    (tmp_path / "broken").touch()
    sampler.start()
    time.sleep(0.5)
    seen = sampler.stop()
    assert len(seen["samples"]) > 1
    assert not any("gpus" in sample for sample in seen["samples"])


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([], driver=False))
    assert telemetry.open_gpu() is None


def test_the_cpu_is_sampled_with_what_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, sampler = sampled(monkeypatch, FakeNvml([], driver=False))
    assert seen["sources"]["gpu"] is None
    assert {"cpu_busy", "cpu_foreign", "load_1min", "rss_bytes"} <= set(seen["summary"])
    assert 0 <= seen["summary"]["cpu_foreign"]["mean"] <= 1
    assert (sampler.peak_host_bytes or 0) > 1 << 20
    assert sampler.peak_device_bytes is None


# -------------------------------------------------------------------------------------------------
# provenance


def test_the_state_of_the_code_is_told_to_the_byte(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True
        )

    assert provenance.git_state(tmp_path) is None
    git("init", "-b", "main")
    (tmp_path / "a.py").write_text("x = 1\n")
    git("add", ".")
    git("commit", "-m", "first")
    clean = provenance.git_state(tmp_path)
    assert clean is not None
    assert (clean["branch"], clean["dirty"], clean["dirty_digest"], len(clean["commit"])) == (
        "main",
        False,
        None,
        40,
    )
    digests = set()
    for name, content in (
        ("a.py", "x = 2\n"),
        ("a.py", "x = 3\n"),
        ("new.py", "y = 1\n"),
        ("new.py", "y = 2\n"),
    ):
        (tmp_path / name).write_text(content)
        state = provenance.git_state(tmp_path)
        assert state is not None
        assert state["dirty"]
        digests.add(state["dirty_digest"])
    assert len(digests) == 4, "every change of a tracked or a new file has a digest of its own"


@pytest.mark.parametrize("inside", [False, True])
def test_another_repository_does_not_answer_for_this_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """A git hook exports GIT_DIR, and a release may be unpacked inside somebody's repository."""
    other = tmp_path / "other"
    other.mkdir()
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(other), "init"], check=True, capture_output=True)
    subprocess.run(
        ["git", "-C", str(other), *who, "commit", "--allow-empty", "-m", "other"],
        check=True,
        capture_output=True,
    )
    if inside:
        (other / "release").mkdir()
        assert provenance.git_state(other / "release") is None
        return
    before = provenance.git_state()
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert provenance.git_state() == before


def test_variables_that_matter_are_recorded_and_secrets_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = {
        "OMP_NUM_THREADS",
        "CUBLAS_WORKSPACE_CONFIG",
        "TOKENIZERS_PARALLELISM",
        "PYTHONPATH",
        "HF_HUB_OFFLINE",
        "LC_ALL",
    }
    secret = {"VLLM_API_KEY", "TORCH_TOKEN", "HF_TOKEN", "VLLM_APIKEY"}
    for name in (*recorded, *secret, "SOMETHING_ELSE"):
        monkeypatch.setenv(name, "1")
    found = provenance.of_interpreter()
    assert recorded <= set(found["environment"])
    assert not {*secret, "SOMETHING_ELSE"} & set(found["environment"])
    assert found["packages"]["torch"].startswith("2.")
    machine = provenance.of_machine()
    assert {"git", "code_digest", "hostname", "os", "cpu", "memory_bytes", "gpus"} <= set(machine)
