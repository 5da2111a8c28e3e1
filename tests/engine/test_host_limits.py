"""What a process may use of a machine: control groups of both versions, affinity,
CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from experiments.host import environment, provenance, telemetry
from nanovllm import host_limits
from nanovllm.config import ResolvedConfig
from nanovllm.engine import kv_cache

GIB = 1 << 30
UUIDS = ["GPU-aaaa-1", "GPU-bbbb-2", "GPU-cccc-3", "GPU-dddd-4"]


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups of our own; `join` puts this process into one."""
    monkeypatch.setattr(host_limits, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(host_limits, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    return tmp_path


def join(groups: Path, membership: str, files: dict[str, str]) -> None:
    (groups / "membership").write_text(membership)
    for name, content in files.items():
        file = groups / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),
        ("0::/\n", {"cpu.max": "1600000 100000"}, 8),
        # the limit of the one above
        ("0::/pod/app\n", {"pod/app/cpu.max": "max 100000", "pod/cpu.max": "200000 100000"}, 2),
        # a container sees its own group as the topmost
        ("0::/host/path/of/it\n", {"cpu.max": "150000 100000"}, 2),
        (
            "3:cpu,cpuacct:/a\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "150000",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            "3:cpu,cpuacct:/a\n",
            {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        # another controller
        ("3:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("0::/\n", {"cpu.max": "nonsense"}, 8),
        ("0::/with:colon\n", {"with:colon/cpu.max": "100000 100000"}, 1),
    ],
)
def test_a_quota_is_cores_rounded_up(
    groups: Path, membership: str, files: dict[str, str], cores: int
) -> None:
    join(groups, membership, files)
    assert host_limits.cpu_cores() == provenance.cpu_cores() == cores


def test_affinity_is_a_limit_as_well(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join(groups, "0::/\n", {"cpu.max": "400000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert host_limits.cpu_cores() == 1


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("", {}, (6 * GIB, 8 * GIB)),
        ("0::/\n", {"memory.max": "max", "memory.current": str(GIB)}, (6 * GIB, 8 * GIB)),
        ("0::/\n", {"memory.max": str(2 * GIB), "memory.current": str(GIB)}, (GIB, 2 * GIB)),
        # Files in the cache are in use, and yet to be had.
        (
            "0::/\n",
            {
                "memory.max": str(2 * GIB),
                "memory.current": str(2 * GIB),
                "memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            (GIB, 2 * GIB),
        ),
        ("0::/\n", {"memory.max": str(2 * GIB), "memory.current": str(3 * GIB)}, (0, 2 * GIB)),
        ("0::/\n", {"memory.max": str(64 * GIB), "memory.current": str(GIB)}, (6 * GIB, 8 * GIB)),
        (
            "0::/a\n",
            {
                "a/memory.max": "max",
                "a/memory.current": "1",
                "memory.max": str(GIB),
                "memory.current": "0",
            },
            (GIB, GIB),
        ),
        (
            "4:memory:/a\n",
            {
                "memory/a/memory.limit_in_bytes": str(GIB),
                "memory/a/memory.usage_in_bytes": str(GIB // 2),
                "memory/a/memory.stat": f"total_inactive_file {GIB // 4}\n",
            },
            (3 * GIB // 4, GIB),
        ),
        (
            "4:memory:/\n",
            {
                "memory/memory.limit_in_bytes": str(2**63 - 4096),
                "memory/memory.usage_in_bytes": "5",
            },
            (6 * GIB, 8 * GIB),
        ),
    ],
)
def test_memory_is_what_a_container_may_use(
    groups: Path, membership: str, files: dict[str, str], expected: tuple[int, int]
) -> None:
    join(groups, membership, files)
    assert host_limits.memory_within(6 * GIB, 8 * GIB) == expected


def test_everything_that_asks_gets_the_limit(groups: Path) -> None:
    join(
        groups,
        "0::/\n",
        {"memory.max": str(GIB), "memory.current": str(GIB // 2), "cpu.max": "100000 100000"},
    )
    config = ResolvedConfig(
        model="any",
        max_model_len=2**20,
        max_num_seqs=2**20,
        max_num_batched_tokens=2**20,
        gpu_memory_utilization=0.75,
    )
    spec = kv_cache.KVCacheSpec(1, 1, 64, 16, torch.float32)
    assert kv_cache.num_blocks_for(config, spec) == (GIB // 2 - GIB // 4) // spec.block_bytes
    machine = provenance.of_machine()
    assert (machine["memory_bytes"], machine["cpu"]["cores"]) == (GIB, 1)
    # libraries count the cores that there are
    assert environment.for_subprocess()["OMP_NUM_THREADS"] == "1"
    assert environment.for_subprocess({"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def test_without_a_quota_libraries_choose_their_threads(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join(groups, "0::/\n", {"cpu.max": "max 100000"})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in environment.for_subprocess()


@pytest.mark.parametrize(
    ("variable", "seen"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("-1", []),
        ("2", ["2"]),
        ("3, 1", ["3", "1"]),
        ("0,9,1", ["0"]),  # CUDA stops reading there
        ("0,0", ["0"]),
        ("GPU-cccc", ["GPU-cccc"]),
        ("GPU-eeee", []),
        ("MIG-1234,MIG-5678", ["MIG-1234", "MIG-5678"]),
        ("none", []),
    ],
)
def test_gpus_are_those_that_cuda_shows(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, seen: list[str]
) -> None:
    if variable is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert telemetry.visible_gpus(UUIDS) == seen
    monkeypatch.setattr(
        telemetry,
        "nvidia_smi",
        lambda _: [[u, f"GPU {i}", "1024", "570"] for i, u in enumerate(UUIDS)],
    )
    expected = [
        "GPU 0" if "MIG" in name else f"GPU {'2' if name == 'GPU-cccc' else name}" for name in seen
    ]
    assert [gpu["name"] for gpu in telemetry.gpu_inventory()] == expected
