"""From nothing to the first token on a GPU, in fresh processes: with kernels compiled side by side,
one after the other, and found.

    PYTHONPATH=src:. python benchmarks/gpu_first_start.py --out first-start.json            # Qwen3-0.6B's shape
    PYTHONPATH=src:. python benchmarks/gpu_first_start.py --model qwen3-8b --repeats 1 --out first-start-8b.json

`side by side` and `one by one` begin with an empty cache of Triton's; `warm` follows `side by side`
with what it left, and `warm, one by one` follows `one by one`. The operating system's caches are
warm in all but the first process, so one goes first and is not counted. Single runs on one machine:
no intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARMS = {"side by side": True, "one by one": False}


def child(model: str, rehearsed: bool, began: float) -> None:
    """Prints seconds of each phase, and what was compiled, as JSON. began: time.time() when the
    process was started.
    """
    phases: dict[str, float] = {"interpreter": time.time() - began}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                phases[name] = phases.get(name, 0.0) + time.perf_counter() - begin

        return call

    begin = time.perf_counter()
    import torch

    from nanovllm import LLM, SamplingParams
    from nanovllm.engine import model_runner
    from nanovllm.gpu import cuda_graph, machine, memory_plan, rehearsal, step_memory
    from nanovllm.models.checkpoint import ensure_checkpoint

    phases["import"] = time.perf_counter() - begin
    import triton

    compiled: list[tuple[str, bool, float]] = []

    def listen(
        *, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool
    ) -> None:
        if not cache_hit:
            main = threading.current_thread() is threading.main_thread()
            compiled.append(
                (
                    src.name,
                    main,
                    (times.ir_initialization + sum(us for _, us in times.lowering_stages)) / 1e6,
                )
            )

    triton.knobs.compilation.listener = listen
    if not rehearsed:
        rehearsal.Rehearsal = type(
            "None_",
            (),
            {
                "num_kernels": 0,
                "duration_s": 0.0,
                "__init__": lambda self, *_: None,
                "wait": lambda self: None,
            },
        )
    machine.prepare = timed("look at the machine", machine.prepare)
    memory_plan.weights_bytes = timed("weights' size", memory_plan.weights_bytes)
    model_runner.load_weights = timed("weights", model_runner.load_weights)
    rehearsal.Rehearsal.wait = timed("wait for kernels", rehearsal.Rehearsal.wait)
    step_memory._peak_bytes = timed("largest steps", step_memory._peak_bytes)
    cuda_graph.GraphRunner._capture_all = timed("capturing", cuda_graph.GraphRunner._capture_all)
    folder = str(ensure_checkpoint(model))
    begin = time.perf_counter()
    llm = LLM(folder, max_model_len=4096, skip_tokenizer_init=True)
    phases["LLM(...)"] = time.perf_counter() - begin
    begin = time.perf_counter()
    llm.generate(
        [{"prompt_token_ids": list(range(5, 69))}],
        SamplingParams(max_tokens=1, ignore_eos=True),
        use_tqdm=False,
    )
    phases["first token"] = time.perf_counter() - begin
    phases["all, from the process's start"] = time.time() - began
    late = [name for name, main, _ in compiled if main]
    print(
        "RESULT"
        + json.dumps(
            {
                "phases_s": {name: round(s, 3) for name, s in phases.items()},
                "device": torch.cuda.get_device_name(),
                "cpus": len(os.sched_getaffinity(0)),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "compiled": len(compiled),
                "compiled_by_main_thread": late,
                "compile_s_in_sum": round(sum(s for _, _, s in compiled), 2),
                "rehearsal": {
                    "kernels": llm.runner.rehearsal.num_kernels,
                    "duration_s": round(llm.runner.rehearsal.duration_s, 2),
                },
            }
        )
    )
    llm.close()


def run(model: str, rehearsed: bool, cache: str) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--child",
        "--model",
        model,
        "--began",
        repr(time.time()),
        *(["--rehearsed"] * rehearsed),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        raise SystemExit(f"a start failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(line.removeprefix("RESULT"))  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--model", default="qwen3-0.6b", help="a preset of nanovllm.models.checkpoint"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rehearsed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.model, args.rehearsed, args.began)
        return
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        run(args.model, True, cache)  # reads every library and the checkpoint from disk
    for _ in range(args.repeats):
        for name, rehearsed in ARMS.items():
            with tempfile.TemporaryDirectory() as cache:
                results.setdefault(name, []).append(run(args.model, rehearsed, cache))
                warm = "warm" if rehearsed else "warm, one by one"
                results.setdefault(warm, []).append(run(args.model, rehearsed, cache))
    for name, runs in results.items():
        for result in runs:
            print(
                f"{name}: {result['phases_s']['all, from the process' + chr(39) + 's start']:.1f} s",
                json.dumps(result),
            )
    if args.out:
        args.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
