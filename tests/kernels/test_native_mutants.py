"""The tests of the native kernels are tested: sources with a fault are caught by a twin test, and sources for other
instruction sets pass them. Each compiles the kernels again, which takes some ten seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm import cxx
from nanovllm.toggles.availability import NATIVE

if problem := cxx.why_not():
    pytest.skip(problem, allow_module_level=True)

ROOT = Path(__file__).parents[2]
TESTS = "tests/kernels/test_native_kernels.py"

FAULTS = [
    # what, file, text, its replacement, the tests that must fail
    ("epsilon is forgotten", "norm.h", "float(n) + eps", "float(n)", "norms"),
    (
        "q has the norm of k",
        "linear.cpp",
        "of.q_heads ? q_norm : k_norm",
        "of.q_heads ? k_norm : k_norm",
        "qkv",
    ),
    (
        "gate and up are exchanged",
        "linear.cpp",
        "silu_and_mul<T>(load(gate + i), load(up + i))",
        "silu_and_mul<T>(load(up + i), load(gate + i))",
        "silu_and_mul",
    ),
    (
        "the last panel is not padded",
        "linear.cpp",
        "first + j < n ? weight",
        "first + j < n - 1 ? weight",
        "linear",
    ),
    (
        "a bias is not added",
        "linear.cpp",
        "if (bias) add_bias(sums, bias + first, count);",
        "",
        "linear",
    ),
    (
        "V is rotated as well",
        "linear.cpp",
        "if (number < of.q_heads + of.kv_heads) {",
        "if (true) {",
        "qkv",
    ),
    (
        "the rotation turns the other way",
        "linear.cpp",
        "first * cos[i] - second * sin[i]",
        "first * cos[i] + second * sin[i]",
        "qkv",
    ),
    (
        "K goes one slot too far",
        "linear.cpp",
        "(h * of.block_size + slot % of.block_size)",
        "(h * of.block_size + (slot + 1) % of.block_size)",
        "qkv",
    ),
    (
        "a token sees the one after it",
        "attention.cpp",
        "first_length + r / group - first",
        "first_length + 1 + r / group - first",
        "attention",
    ),
    (
        "a new maximum does not scale the sums so far",
        "attention.cpp",
        "sums[r * d + i] *= before",
        "sums[r * d + i] *= 1.0f",
        "attention",
    ),
    (
        "pages are read one after the other",
        "attention.cpp",
        "k_cache + pages.table[(first + t) / pages.block_size]",
        "k_cache + ((first + t) / pages.block_size)",
        "attention",
    ),
    ("one round of Philox is missing", "sampling.cpp", "round < 10", "round < 9", "bits"),
    ("products and sums are fused", "sampling.cpp", "-ffp-contract=off", "contraction", "bits"),
    (
        "noise is bounded too tightly",
        "sampling.cpp",
        "0.6931472f + 1e-3f",
        "0.6931472f - 1.5f",
        "sampled_tokens",
    ),
    ("the last of equals wins", "sampling.cpp", "v > value ||", "v >= value ||", "sampled_tokens"),
    (
        "half of the seed is lost",
        "sampling.cpp",
        "uint32_t(uint64_t(seed) >> 32)",
        "0u",
        "sampled_tokens",
    ),
]


def outcome(
    sources: Path, cache: Path, chosen: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The chosen twin tests, with the library of other sources."""
    run = (
        "import sys, pytest; from pathlib import Path; from nanovllm import cxx; from nanovllm.kernels.native import library as l; "
        f"real = cxx.library; cxx.library = lambda folder, cache=None: real(Path({str(sources)!r}), Path({str(cache)!r})); "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    arguments = [TESTS, "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    return subprocess.run(
        [sys.executable, "-c", run, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}", **environment},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0])
def test_a_fault_is_caught(fault: tuple[str, ...], tmp_path: Path) -> None:
    _, name, text, replacement, chosen = fault
    sources = tmp_path / "native"
    shutil.copytree(NATIVE, sources)
    source = (sources / name).read_text()
    assert text in source, "the fault has no place in today's sources"
    (sources / name).write_text(source.replace(text, replacement))
    done = outcome(sources, tmp_path / "cache", chosen)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Error" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_what_aten_allows_is_enough(capability: str, tmp_path: Path) -> None:
    """Without AVX2, and without AVX-512: the same tests pass."""
    chosen = "not engine and not rank and not weights and not tokens_in"
    done = outcome(NATIVE, tmp_path, chosen, ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_every_fault_has_its_place() -> None:
    for what, name, text, _, _ in FAULTS:
        assert text in (NATIVE / name).read_text(), what
