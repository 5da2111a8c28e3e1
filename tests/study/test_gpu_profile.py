"""A machine's own profile: made from the GPUs that PyTorch sees, measured once, or refused with a
remedy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.host import telemetry
from experiments.study import machine
from experiments.study.spec import load_profile
from experiments.study.yaml_files import SpecError

GB = 10**9


def seen(*devices: dict[str, Any], **more: Any) -> dict[str, Any]:
    speeds = {
        "bandwidth_bytes_per_s": 4.4e11,
        "peak_flops": {"bfloat16": 5.5e13, "float32": 2.5e13},
        "host_op_s": 4e-6,
    }
    return {
        "torch": "2.15.0",
        "cuda": "13.2",
        "import_s": 1.5,
        "devices": list(devices),
        **speeds,
        **more,
    }


def device(
    name: str = "NVIDIA GeForce RTX 4070",
    capability: tuple[int, int] = (8, 9),
    memory: int = 12 * GB,
) -> dict[str, Any]:
    return {
        "name": name,
        "capability": list(capability),
        "memory_bytes": memory,
        "free_bytes": memory - GB,
    }


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Gives this machine GPUs: a function of what PyTorch sees of them."""
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def give(found: dict[str, Any], listed: int | None = None) -> None:
        lines = [
            f"GPU {n}: NVIDIA something (UUID: GPU-{n})"
            for n in range(len(found["devices"]) if listed is None else listed)
        ]
        monkeypatch.setattr(machine, "listed_gpus", lambda: lines)
        monkeypatch.setattr(machine, "measure_gpus", lambda listed: found)
        free = [(d["free_bytes"], d["memory_bytes"]) for d in found["devices"]]
        monkeypatch.setattr(telemetry, "free_gpu_bytes", lambda visible: free)

    return give


def test_any_gpu_of_capability_8_has_a_profile_of_its_own(gpus: Any) -> None:
    gpus(seen(device("NVIDIA L4", (8, 9), 24 * GB)))
    profile = machine.detect_profile()
    assert (profile.name, profile.device, profile.num_devices, profile.memory_bytes) == (
        "l4",
        "cuda",
        1,
        24 * GB,
    )
    settled = machine.settle(profile, "bfloat16")
    assert settled["bandwidth_bytes_per_s"] == 4.4e11
    assert settled["peak_flops"] == 5.5e13
    assert settled["speeds"] == "measured on this machine"
    assert (settled["host_op_s"], settled["import_s"]) == (4e-6, 1.5)
    json.dumps(settled)


def test_a_file_that_describes_the_machine_lends_its_name_and_not_its_speeds(gpus: Any) -> None:
    gpus(seen(device()))
    profile = machine.detect_profile()
    assert profile.name == "rtx4070"
    for asked in (profile, load_profile("rtx4070")):
        assert machine.settle(asked, "bfloat16")["bandwidth_bytes_per_s"] == 4.4e11, (
            "what is measured wins over a data sheet"
        )
    absent = machine.settle(load_profile("h100"), "bfloat16")
    assert (absent["bandwidth_bytes_per_s"], absent["speeds"]) == (2.95e12, "stated in the profile")


@pytest.mark.parametrize("suffix", ["Ti", "SUPER", "Laptop GPU"])
def test_a_similar_name_is_another_card(gpus: Any, suffix: str) -> None:
    gpus(seen(device(f"NVIDIA GeForce RTX 4070 {suffix}")))
    assert machine.detect_profile().name != "rtx4070"


def test_several_gpus_of_one_kind_count_and_others_do_not(gpus: Any) -> None:
    h100 = device("NVIDIA H100 80GB HBM3", (9, 0), 85 * GB)
    gpus(seen(h100, h100))
    assert (machine.detect_profile().name, machine.detect_profile().num_devices) == ("h100-x2", 2)
    gpus(seen(h100, h100, device()))
    assert machine.detect_profile().num_devices == 2, "the third is of another kind"
    gpus(seen(device(), h100))
    assert machine.detect_profile().num_devices == 1
    gpus(seen(*[device("NVIDIA A100-SXM4-40GB", (8, 0), 40 * GB)] * 3))
    assert machine.detect_profile().name == "a100-sxm4-40gb-x3"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            seen(device("Tesla T4", (7, 5))),
            r"Tesla T4 has compute capability 7\.5; 8\.0 .* is required.* PROFILE=cpu",
        ),
        (
            seen(why_not="The NVIDIA driver on your system is too old (found version 11040)."),
            r"too old .* Update the NVIDIA",
        ),
        (seen(cuda=None), r"built without CUDA\. .* install a build of torch for it"),
        (
            {k: v for k, v in seen(device()).items() if k != "bandwidth_bytes_per_s"},
            r"bytes free; measuring its speed takes .*see nvidia-smi",
        ),
    ],
)
def test_gpus_that_cannot_be_used_are_refused_with_a_remedy(
    gpus: Any, found: dict[str, Any], message: str
) -> None:
    gpus(found, listed=1)
    with pytest.raises(SpecError, match=message):
        machine.detect_profile()


def test_a_gpu_that_cannot_be_used_is_no_obstacle_to_planning_for_another(gpus: Any) -> None:
    gpus(seen(why_not="The NVIDIA driver on your system is too old"), listed=1)
    assert machine.settle(load_profile("rtx4070"), "bfloat16")["bandwidth_bytes_per_s"] == 504e9


def test_a_driver_that_does_not_answer_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After an update without a restart nvidia-smi fails: to measure the CPU without a word would
    be no answer.
    """
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_DRIVER_FILES", (tmp_path / "nvidiactl",))
    assert machine.listed_gpus() == []
    (tmp_path / "nvidiactl").touch()
    assert machine.listed_gpus() == [
        "a driver that does not respond (Failed to initialize NVML: Driver/library version mismatch)"
    ]


def test_free_memory_is_that_of_the_gpus_that_pytorch_sees(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(seen({**device(), "uuid": "abc"}))
    asked = []
    monkeypatch.setattr(
        telemetry, "free_gpu_bytes", lambda visible: asked.append(visible) or [(5 * GB, 12 * GB)]
    )
    assert (machine.free_gpu_bytes(1), asked) == (5 * GB, ["GPU-abc"])
    monkeypatch.setattr(telemetry, "free_gpu_bytes", lambda visible: [(39 * GB, 40 * GB)])
    assert machine.free_gpu_bytes(1) == 11 * GB, (
        "the driver tells the whole GPU's, PyTorch has a slice of it"
    )


def test_hidden_gpus_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert machine.detect_profile().name == "cpu"


def test_a_profile_that_leaves_its_speeds_open_needs_its_machine(
    monkeypatch: pytest.MonkeyPatch, gpus: Any
) -> None:
    gpus(seen(device("NVIDIA L4")))
    profile = machine.detect_profile()
    monkeypatch.setattr(machine, "listed_gpus", list)
    with pytest.raises(
        SpecError,
        match="set bandwidth_bytes_per_s and peak_flops in the profile to plan for another machine",
    ):
        machine.settle(profile, "bfloat16")


def test_the_kv_cache_is_what_weights_and_a_step_leave_and_no_more_than_the_work_fills() -> None:
    unit = machine.KV_STEP_BYTES
    assert machine.kv_budget(80 * GB, GB, GB, most_bytes=3 * GB) == -(-3 * GB // unit) * unit
    free = 7_100_000_000
    tight = machine.kv_budget(free, GB, GB, most_bytes=60 * GB)
    assert tight % unit == 0
    assert 0.9 * free - 2 * GB - unit < tight <= 0.9 * free - 2 * GB
    assert machine.kv_budget(free - 50_000_000, GB, GB, most_bytes=60 * GB) == tight, (
        "a desktop may take a little more"
    )
    with pytest.raises(
        SpecError, match=r"weights take 16\.0 GB .* Free 1[0-9]\.[0-9] GB more .* smaller MODEL"
    ):
        machine.kv_budget(7 * GB, 16 * GB, GB, most_bytes=GB)


def test_a_measurement_is_kept_and_a_failed_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    count = tmp_path / "count"
    count.write_text("")

    def measured(answer: dict[str, Any]) -> dict[str, Any]:
        code = f"open({str(count)!r}, 'a').write('x'); print({json.dumps(json.dumps(answer))})"
        return machine._kept(["some hardware"], [machine.sys.executable, "-c", code])

    assert measured({"devices": []}) == {"devices": []}
    assert measured(seen()) == seen()
    assert measured({"devices": [1]}) == seen(), "it was kept"
    assert count.read_text() == "xx"
