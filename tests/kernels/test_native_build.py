"""The library of native kernels is compiled once, and where it cannot be, the user is told what to install."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanovllm import Optimizations, cxx
from nanovllm.toggles import availability

needs_compiler = pytest.mark.skipif(cxx.why_not() is not None, reason=str(cxx.why_not()))


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    return folder


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@needs_compiler
def test_it_is_compiled_once_with_a_word_of_progress(
    sources: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = cxx.library(sources, tmp_path / "cache")
    assert cxx.load(file).one() == 1
    assert "compiling native kernels with" in capfd.readouterr().err
    assert cxx.library(sources, tmp_path / "cache") == file
    assert capfd.readouterr().err == ""
    assert [f.name for f in file.parent.iterdir() if not f.name.endswith(".lock")] == [file.name]


@needs_compiler
def test_what_changes_the_result_makes_another_library(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {cxx.library(sources, tmp_path)}
    (sources / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    files.add(cxx.library(sources, tmp_path))
    monkeypatch.setattr(cxx, "cpu_features", lambda: "another CPU")
    files.add(cxx.library(sources, tmp_path))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    files.add(cxx.library(sources, tmp_path))
    assert len(files) == (4 if cxx.platform.machine() == "x86_64" else 3)


@needs_compiler
def test_sources_that_ask_for_it_are_compiled_without_contraction(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    start = cxx._start
    monkeypatch.setattr(
        cxx, "_start", lambda arguments: commands.append(arguments) or start(arguments)
    )
    (sources / "two.cpp").write_text(f'// {cxx.EXACT}\nextern "C" int two() {{ return 2; }}\n')
    cxx.library(sources, tmp_path)
    contraction = [
        [word for word in command if word.startswith(cxx.CONTRACTION)] for command in commands
    ]
    assert contraction == [["-ffp-contract=fast"], ["-ffp-contract=off"], []]
    assert cxx.EXACT in (availability.NATIVE / "sampling.cpp").read_text()


@needs_compiler
def test_a_compiler_that_fails_is_quoted(sources: Path, tmp_path: Path) -> None:
    (sources / "one.cpp").write_text("this is no C++\n")
    with pytest.raises(
        cxx.CompilerError, match=r"(?s)could not be compiled.*one.cpp.*install g\+\+"
    ):
        cxx.library(sources, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))
    assert not list((tmp_path / "cache").glob(".building*"))


def test_no_compiler(sources: Path, tmp_path: Path, no_compiler: None) -> None:
    with pytest.raises(
        cxx.CompilerError, match=r"none was found; install g\+\+ .*apt install g\+\+"
    ):
        cxx.library(sources, tmp_path)
    with pytest.raises(
        ValueError, match=r"kernels='native' cannot run here: .*install g\+\+.*kernels='torch'"
    ):
        Optimizations(kernels="native").resolve("cpu")


def test_a_compiler_that_is_named_and_not_there(
    monkeypatch: pytest.MonkeyPatch, sources: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(cxx.CompilerError, match="CXX='no-such-compiler -O2' is not found"):
        cxx.library(sources, tmp_path)


@pytest.mark.parametrize("broken", ["missing", "failing"])
def test_auto_takes_the_next_best_level_and_says_so(
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = tmp_path / "c++"
    failing.write_text("#!/bin/sh\necho no headers here; exit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing) if broken == "failing" else "no-such-compiler")
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        resolved = Optimizations(kernels="auto", attention_backend="auto").resolve("cpu", True)
    assert (resolved.kernels, resolved.attention_backend) == ("torch", "torch")
    assert "kernels='torch'" in caplog.text
    with pytest.raises(ValueError, match=r"kernels='native' cannot run here"):
        Optimizations(kernels="native").resolve("cpu", True)


def test_a_cache_that_cannot_be_written_is_named(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    if cxx.why_not() is None:
        with pytest.raises(OSError, match="set NANOVLLM_CACHE to a folder that can be written"):
            cxx.library(sources, tmp_path / "file")


BUILD = """
import sys
from pathlib import Path
from nanovllm import cxx
print(cxx.load(cxx.library(Path(sys.argv[1]), Path(sys.argv[2]))).one())
"""


def slow_compiler(folder: Path) -> Path:
    """A compiler that says when it has begun, and takes its time."""
    script = folder / "slow-c++"
    real = " ".join(cxx.compiler())
    script.write_text(f'#!/bin/sh\necho x >> {folder}/begun\nsleep 1\nexec {real} "$@"\n')
    script.chmod(0o755)
    return script


def builder(sources: Path, cache: Path, compiler: Path) -> subprocess.Popen[str]:
    import nanovllm

    root = str(Path(nanovllm.__file__).parents[1])
    environment = {**os.environ, "CXX": str(compiler), "PYTHONPATH": root}
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(sources), str(cache)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@needs_compiler
def test_two_processes_build_it_once(sources: Path, tmp_path: Path) -> None:
    compiler = slow_compiler(tmp_path)
    processes = [builder(sources, tmp_path / "cache", compiler) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in processes]
    assert [out.strip() for out, _ in said] == ["1", "1"], said
    assert sum("once for this machine" in error for _, error in said) == 1


@needs_compiler
def test_a_killed_build_leaves_nothing_that_is_used(sources: Path, tmp_path: Path) -> None:
    compiler, cache = slow_compiler(tmp_path), tmp_path / "cache"
    process = builder(sources, cache, compiler)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(cache.glob(".building*"))
    assert not list(cache.glob("*.so"))
    again = builder(sources, cache, compiler)
    assert again.communicate(timeout=60)[0].strip() == "1"
    assert not list(cache.glob(".building*"))
