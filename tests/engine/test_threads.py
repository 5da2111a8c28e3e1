"""An engine that is used in ways nobody planned: by several threads, from a folder that holds
anything.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.project.test_architecture import ROOT

SMALL: dict[str, Any] = {"max_num_seqs": 2, "max_model_len": 128, "kv_cache_memory_bytes": 1 << 22}


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize("replicas", [1, 2])
def test_threads_that_share_an_engine_take_turns(tiny: Path, replicas: int) -> None:
    """As a web handler or a thread pool does: every call gets its own answer, the same as alone."""
    params = SamplingParams(temperature=0, max_tokens=12)
    prompts = [[i + 1, 2, 3] for i in range(6)]
    with LLM(str(tiny), **SMALL, data_parallel_size=replicas) as llm:
        alone = [
            llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
            for prompt in prompts
        ]
        with ThreadPoolExecutor(4) as pool:
            together = pool.map(
                lambda prompt: (
                    llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
                ),
                prompts,
            )
        assert list(together) == alone


def test_requests_may_be_added_while_another_thread_steps(tiny: Path) -> None:
    with LLM(str(tiny), **SMALL) as llm:
        done: list[str] = []
        adding = threading.Event()

        def step() -> None:
            while not adding.is_set() or llm.has_unfinished_requests():
                done.extend(output.request_id for output in llm.step() if output.finished)

        stepper = threading.Thread(target=step)
        stepper.start()
        for i in range(20):
            llm.add_request(
                str(i), [i + 1, 2], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
            )
        adding.set()
        stepper.join(60)
        assert sorted(done, key=int) == [str(i) for i in range(20)]


SCRIPT = """
from nanovllm import LLM, SamplingParams
import sys
for switch in sys.argv[2:]:
    with LLM(sys.argv[1], **{switch: 2}, max_num_seqs=2, max_model_len=64, kv_cache_memory_bytes=1 << 22) as llm:
        print(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, temperature=0), use_tqdm=False)[0].outputs[0].token_ids)
"""


def test_the_working_directory_shadows_no_module_of_ranks_and_replicas(
    tiny: Path, tmp_path: Path
) -> None:
    """A script that lies elsewhere does not see a statistics.py of the working directory, and
    neither do its ranks and replicas. Their tokens are those of one engine in this process.
    """
    work, script = tmp_path / "work", tmp_path / "script.py"
    work.mkdir()
    script.write_text(SCRIPT)
    for name in ("statistics", "socket", "torch", "psutil", "nanovllm"):
        (work / f"{name}.py").write_text("raise SystemExit('a module of the working directory')")
    with LLM(str(tiny), **SMALL) as llm:
        params = SamplingParams(max_tokens=3, temperature=0)
        expected = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids
    switches = ("tensor_parallel_size", "data_parallel_size")
    done = subprocess.run(
        [sys.executable, str(script), str(tiny), *switches],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{expected}\n" * len(switches)


def test_an_engine_that_is_found_in_the_working_directory_has_its_ranks_there_too(
    tiny: Path,
) -> None:
    """`python -c` in src/: the empty entry of sys.path is the working directory."""
    command = [sys.executable, "-c", SCRIPT, str(tiny), "tensor_parallel_size"]
    done = subprocess.run(
        command,
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
