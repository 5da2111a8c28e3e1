"""Several GPUs: do more ranks compute the same, what does a step cost, and what does an all-reduce?

    PYTHONPATH=src:. python benchmarks/gpu_tp.py --out DIR          # all-reduce, tokens, times: under five minutes on two H200s
    PYTHONPATH=src:. python benchmarks/gpu_tp.py --out DIR --parts split large    # time by kind of kernel; Qwen3-8B's shape

Each part runs in processes of its own and may fail alone: its traceback is printed and the next
part begins. DIR gets one JSON file a part. A tool for finding out what to do next: what is
published comes from ablations/studies/scaling.yaml.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import psutil

ENGINE = {
    "max_model_len": 4096,
    "block_size": 256,
    "max_num_seqs": 256,
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 48 << 30,
}
WORKLOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "latency-1": ("random", {"num_requests": 1, "prompt_tokens": 128, "output_tokens": 256}),
    "latency-8": ("random", {"num_requests": 8, "prompt_tokens": 128, "output_tokens": 256}),
    "latency-64": ("random", {"num_requests": 64, "prompt_tokens": 128, "output_tokens": 256}),
    "canonical": ("canonical", {}),
}
MEBIBYTE = 1 << 20
ENDS_AT = "GPU_TP_ENDS_AT"


def engines_for(degree: int) -> dict[str, dict[str, Any]]:
    """The configurations that are compared, by name."""
    return {
        "tp1": {},
        f"tp{degree}-library": {"tensor_parallel_size": degree},
        f"tp{degree}-symmetric": {"tensor_parallel_size": degree, "all_reduce": "symmetric_memory"},
        f"dp{degree}": {"data_parallel_size": degree},
    }


# -- one engine in a process of its own ------------------------------------------------------------


def serve_main(job: dict[str, Any], out: Path) -> None:
    """Loads an engine and serves every workload `repeats` times; writes tokens and times."""
    import dataclasses

    from experiments.workloads import build
    from nanovllm import ALL, LLM, SamplingParams
    from nanovllm.models.checkpoint import ensure_checkpoint

    if "profile" in job:
        from nanovllm.distributed import processes, workers

        os.environ["GPU_TP_PROFILE"] = job["profile"]
        workers.RANK_MAIN, processes.CLOSE_TIMEOUT_S = "benchmarks.gpu_tp.profiled_rank", 90.0
    folder = ensure_checkpoint(job["preset"], **job["changes"])
    begin = time.perf_counter()
    switches = {f.name: getattr(ALL, f.name) for f in dataclasses.fields(ALL)} | job[
        "optimizations"
    ]
    llm: Any = LLM(str(folder), optimizations=switches, **job["engine"])
    result: dict[str, Any] = {
        "start_s": time.perf_counter() - begin,
        "config": llm.resolved_config(),
        "runs": {},
    }
    try:
        for name, (kind, params) in {
            "warm-up": ("random", {"num_requests": 24, "output_tokens": 8}),
            **job["workloads"],
        }.items():
            requests = build(name, kind, params)["waves"][0]
            prompts = [{"prompt_token_ids": r["prompt_token_ids"]} for r in requests]
            sampling = [
                SamplingParams(
                    temperature=r["temperature"],
                    max_tokens=r["max_tokens"],
                    ignore_eos=r["ignore_eos"],
                    seed=r["seed"],
                    top_k=r["top_k"],
                    top_p=r["top_p"],
                )
                for r in requests
            ]
            for _ in range(1 if name == "warm-up" else job["repeats"]):
                llm.reset_stats()
                llm.reset_prefix_cache()
                begin = time.perf_counter()
                outputs = llm.generate(prompts, sampling, use_tqdm=False)
                seconds = time.perf_counter() - begin
                tokens = [list(o.outputs[0].token_ids) for o in outputs]
                decode_ms = [s * 1e3 for s, prefill, _ in llm.step_times() if not prefill]
                num_tokens = sum(map(len, tokens))
                result["runs"].setdefault(name, []).append(
                    {
                        "seconds": seconds,
                        "output_tokens": num_tokens,
                        "tokens_per_s": num_tokens / seconds,
                        "tokens": tokens,
                        "decode_ms_median": statistics.median(decode_ms) if decode_ms else None,
                        "steps": len(llm.step_times()),
                        "stats": llm.stats(),
                        "toggles": llm.toggles(),
                    }
                )
    finally:
        llm.close()
    out.write_text(json.dumps(result))


# -- all-reduce by size ----------------------------------------------------------------------------


def all_reduce_main(rank: int, size: int, rendezvous: str, out: Path) -> None:
    """One rank: microseconds of an all-reduce, called eagerly and replayed from a graph, by size
    and kind.
    """
    from nanovllm.distributed.collectives import GPU_ENVIRONMENT

    os.environ.update(GPU_ENVIRONMENT)
    import torch
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symm_mem

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", store=dist.FileStore(rendezvous, size), rank=rank, world_size=size, device_id=device
    )
    memory = symm_mem.empty(8 * MEBIBYTE, dtype=torch.uint8, device=device)
    symm_mem.rendezvous(memory, dist.group.WORLD)
    name = dist.group.WORLD.group_name
    rows: list[dict[str, Any]] = []
    for nbytes in [2048 << i for i in range(13)]:
        x = torch.full((nbytes // 2,), float(rank + 1), dtype=torch.bfloat16, device=device)
        buffer = memory[:nbytes].view(torch.bfloat16)

        def library(x: torch.Tensor = x) -> torch.Tensor:
            dist.all_reduce(x)
            return x

        def one_shot(x: torch.Tensor = x, buffer: torch.Tensor = buffer) -> torch.Tensor:
            buffer.copy_(x)
            return torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", name)

        def one_shot_copy(x: torch.Tensor = x, buffer: torch.Tensor = buffer) -> torch.Tensor:
            return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, x, "sum", name)

        def two_shot(x: torch.Tensor = x, buffer: torch.Tensor = buffer) -> torch.Tensor:
            buffer.copy_(x)
            torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", name)
            return x.copy_(buffer)

        for kind in (library, one_shot, one_shot_copy, two_shot):
            row: dict[str, Any] = {"bytes": nbytes, "kind": kind.__name__}
            try:
                x.fill_(rank + 1)
                row["right"] = bool((kind() == size * (size + 1) / 2).all())
                for _ in range(3):
                    kind()
                x.zero_()
                row["eager_us"] = _timed_us(lambda kind=kind: [kind() for _ in range(20)]) / 20  # type: ignore[misc]
                graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
                torch.cuda.synchronize()
                dist.barrier()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    for _ in range(20):
                        kind()
                row["graph_us"] = _timed_us(graph.replay) / 20
                del graph
            except Exception:  # noqa: BLE001  the next kind may work
                row["error"] = traceback.format_exc()
                print(row["error"], flush=True)
            rows.append(row)
    out.write_text(json.dumps(rows))
    torch.cuda.synchronize()
    dist.destroy_process_group()


def _timed_us(work: Any, repeats: int = 20) -> float:
    import torch

    for _ in range(3):
        work()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) * 1e3


# -- parts -----------------------------------------------------------------------------------------


def run(commands: list[list[str]], timeout_s: float) -> None:
    """Runs processes side by side. Raises RuntimeError where one fails or takes too long; ends all
    of them, and their children.
    """
    left_s = float(os.environ[ENDS_AT]) - time.monotonic()
    if left_s < 15:
        raise RuntimeError(f"{commands[0][0]} was not started: --budget-s is used up")
    timeout_s = min(timeout_s, left_s)
    children = [
        subprocess.Popen([sys.executable, __file__, *command], start_new_session=True)
        for command in commands
    ]
    deadline = time.monotonic() + timeout_s
    try:
        while any(child.poll() is None for child in children):
            if failed := [child.returncode for child in children if child.poll() not in (None, 0)]:
                raise RuntimeError(f"{commands[0][0]} ended with status {failed[0]}")
            if time.monotonic() > deadline:
                _show_where(children)
                raise RuntimeError(f"{commands[0][0]} took longer than {timeout_s:.0f} s")
            time.sleep(0.1)
        if failed := [child.returncode for child in children if child.returncode]:
            raise RuntimeError(f"{commands[0][0]} ended with status {failed[0]}")
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _show_where(children: list[subprocess.Popen[bytes]]) -> None:
    """Has every process print its stacks."""
    for child in children:
        with contextlib.suppress(psutil.Error):
            for process in [
                psutil.Process(child.pid),
                *psutil.Process(child.pid).children(recursive=True),
            ]:
                process.send_signal(signal.SIGUSR1)
    time.sleep(1)


def served(name: str, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        description, out = Path(folder, "job.json"), Path(folder, "result.json")
        description.write_text(json.dumps(job))
        print(f"-- {name}", flush=True)
        run([["--serve", str(description), "--result", str(out)]], timeout_s)
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def agreement(expected: list[list[int]], found: list[list[int]]) -> dict[str, Any]:
    """How many requests agree to their ends, and how many tokens before the first difference of
    each.
    """
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(expected, found, strict=True)
    ]
    total = sum(map(len, expected))
    return {
        "requests": len(expected),
        "requests_equal": sum(n == len(x) for n, x in zip(same, expected, strict=True)),
        "tokens": total,
        "tokens_before_the_first_difference": sum(same),
    }


def part_all_reduce(degree: int, out: Path, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder, "rendezvous"))
        run(
            [
                [
                    "--all-reduce-rank",
                    str(rank),
                    "--degree",
                    str(degree),
                    "--rendezvous",
                    rendezvous,
                    "--result",
                    str(Path(folder, f"{rank}.json")),
                ]
                for rank in range(degree)
            ],
            90,
        )
        rows = json.loads(Path(folder, "0.json").read_text())
    (out / "all-reduce.json").write_text(json.dumps({"degree": degree, "rows": rows}))
    for row in rows:
        eager, graph = row.get("eager_us", float("nan")), row.get("graph_us", float("nan"))
        print(
            f"  {row['bytes']:>9} B {row['kind']:13} eager {eager:8.1f} us, in a graph {graph:8.1f}, right: {row.get('right')}"
        )


def part_tokens(degree: int, out: Path, device: str) -> None:
    """float32 on `tiny`: every token of every configuration is the same, but for the rare near-tie."""
    heads = {"num_key_value_heads": 4} if degree > 2 else {}
    workloads = {
        f"t={t}": (
            "random",
            {
                "num_requests": 40,
                "prompt_tokens": [3, 60],
                "output_tokens": [5, 60],
                "vocab_size": 2048,
                "temperature": t,
                **more,
            },
        )
        for t, more in ((0.0, {}), (0.8, {}), (1.0, {"top_k": 20}))
    }
    job = {
        "preset": "tiny",
        "changes": heads,
        "workloads": workloads,
        "repeats": 1,
        "engine": {
            "max_model_len": 256,
            "block_size": 16,
            "max_num_seqs": 20,
            "kv_cache_memory_bytes": 64 * MEBIBYTE,
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "device": device,
        },
    }
    results: dict[str, Any] = {}
    for name, switches in engines_for(degree).items():
        try:
            results[name] = served(f"tokens of {name}", {**job, "optimizations": switches}, 75)
        except RuntimeError:
            traceback.print_exc()
            continue
        if name != "tp1" and "tp1" in results:
            for workload in workloads:
                pair = (results[key]["runs"][workload][0]["tokens"] for key in ("tp1", name))
                results[name]["runs"][workload][0]["agreement"] = found = agreement(*pair)
                print(f"  {workload}: {found}")
    (out / "tokens.json").write_text(json.dumps(_without_tokens(results)))


def part_times(degree: int, out: Path, device: str) -> None:
    """Qwen3-0.6B's shape in bfloat16: the canonical workload, and steps of small batches."""
    job = {
        "preset": "qwen3-0.6b",
        "changes": {},
        "workloads": WORKLOADS,
        "repeats": 1,
        "engine": ENGINE,
    }
    _times(degree, out / "times.json", job)


def part_large(degree: int, out: Path, device: str) -> None:
    """Qwen3-8B's shape, its weights made on the GPUs."""
    work = {
        f"decode-{n}": ("random", {"num_requests": n, "prompt_tokens": 128, "output_tokens": 128})
        for n in (8, 64, 256)
    }
    _times(
        degree,
        out / "large.json",
        {"preset": "qwen3-8b", "changes": {}, "workloads": work, "repeats": 1, "engine": ENGINE},
    )


def part_split(degree: int, out: Path, device: str) -> None:
    """Where a decode step's time goes on rank 0: kernels that compute, kernels that sum over ranks
    (and wait for them), neither.
    """
    work = {
        f"decode-{n}": ("random", {"num_requests": n, "prompt_tokens": 128, "output_tokens": 128})
        for n in (8, 256)
    }
    results: dict[str, Any] = {}
    for name, switches in engines_for(degree).items():
        if "tensor_parallel_size" not in switches:
            continue
        for workload, described in work.items():
            with tempfile.TemporaryDirectory() as folder:
                profile = Path(folder, "profile.json")
                job = {
                    "preset": "qwen3-0.6b",
                    "changes": {},
                    "workloads": {workload: described},
                    "repeats": 1,
                    "engine": ENGINE,
                    "optimizations": switches,
                    "profile": str(profile),
                }
                try:
                    served(f"split of {name}, {workload}", job, 120)
                    results[f"{name}, {workload}"] = found = json.loads(profile.read_text())
                except (RuntimeError, OSError):
                    traceback.print_exc()
                    continue
            shares = {kind: f"{us / found['span_us']:.1%}" for kind, us in found["us"].items()}
            print(f"  {found['span_us'] / 1e3:.0f} ms in the middle of the run: {shares}")
            for kernel, us in found["kernels"][:12]:
                print(f"    {us / found['span_us']:6.1%} {kernel[:100]}")
    (out / "split.json").write_text(json.dumps(results))


def profiled_rank(channel: Any) -> None:
    """The main of a rank's process: as nanovllm.distributed.rank.main; rank 0 records its kernels and writes a
    summary when it ends.
    """
    import torch

    from nanovllm.distributed.rank import Rank

    rank = Rank(channel)
    if rank.rank > 0:
        return rank.run()
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler,
        contextlib.suppress(EOFError),
    ):
        rank.run()
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profiler.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    spans = spans[len(spans) // 2 : -len(spans) // 8]  # of steady decode
    us, kernels, reached = {"compute": 0.0, "communication": 0.0}, dict[str, float](), spans[0][0]
    for begin, end, kernel in spans:
        sums = any(word in kernel.lower() for word in ("nccl", "one_shot", "two_shot", "symm"))
        fresh = max(0.0, end - max(begin, reached))  # kernels overlap a little: count a moment once
        reached = max(reached, end)
        us["communication" if sums else "compute"] += fresh
        kernels[kernel] = kernels.get(kernel, 0.0) + fresh
    span_us = reached - spans[0][0]
    us["host, or gaps between kernels"] = span_us - sum(us.values())
    top = sorted(kernels.items(), key=lambda item: -item[1])
    Path(os.environ["GPU_TP_PROFILE"]).write_text(
        json.dumps({"span_us": span_us, "us": us, "kernels": top[:40]})
    )
    return None


def _times(degree: int, out: Path, job: dict[str, Any]) -> None:
    results: dict[str, Any] = {}
    for name, switches in engines_for(degree).items():
        try:
            results[name] = served(f"times of {name}", {**job, "optimizations": switches}, 90)
        except RuntimeError:
            traceback.print_exc()
            continue
        print(f"  start {results[name]['start_s']:.1f} s")
        for workload in job["workloads"]:
            runs = results[name]["runs"][workload]
            best = min(runs, key=lambda r: r["seconds"])
            step = (
                ""
                if best["decode_ms_median"] is None
                else f", decode step {best['decode_ms_median']:.3f} ms"
            )
            line = f"  {workload}: {best['tokens_per_s']:.0f} tok/s, {best['seconds']:.3f} s{step}"
            if name != "tp1" and "tp1" in results:
                pair = (results[key]["runs"][workload][0]["tokens"] for key in ("tp1", name))
                runs[0]["agreement"] = found = agreement(*pair)
                line += f"; {found['requests_equal']} of {found['requests']} requests as tp1"
            print(line, flush=True)
    out.write_text(json.dumps(_without_tokens(results)))


def _without_tokens(results: dict[str, Any]) -> dict[str, Any]:
    for result in results.values():
        for runs in result["runs"].values():
            for entry in runs:
                entry.pop("tokens", None)
    return results


PARTS = {
    "all-reduce": part_all_reduce,
    "tokens": part_tokens,
    "times": part_times,
    "split": part_split,
    "large": part_large,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, help="folder for the JSON files")
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=["all-reduce", "tokens", "times"]
    )
    parser.add_argument(
        "--budget-s", type=float, default=285, help="what has not ended by then is ended"
    )
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: the part `tokens` over gloo"
    )
    hidden = {"help": argparse.SUPPRESS}
    parser.add_argument("--serve", type=Path, **hidden)  # type: ignore[arg-type]
    parser.add_argument("--result", type=Path, **hidden)  # type: ignore[arg-type]
    parser.add_argument("--all-reduce-rank", type=int, **hidden)  # type: ignore[arg-type]
    parser.add_argument("--rendezvous", **hidden)  # type: ignore[arg-type]
    given = parser.parse_args()
    faulthandler.register(signal.SIGUSR1)  # run() asks for it before it ends what takes too long
    if given.serve:
        return serve_main(json.loads(given.serve.read_text()), given.result)
    if given.all_reduce_rank is not None:
        return all_reduce_main(given.all_reduce_rank, given.degree, given.rendezvous, given.result)
    if given.out is None:
        parser.error("--out is required")
    os.environ[ENDS_AT] = str(time.monotonic() + given.budget_s)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.parts:
        begin = time.monotonic()
        print(f"== {name}", flush=True)
        try:
            PARTS[name](given.degree, given.out, given.device)
        except Exception:  # noqa: BLE001  the other parts still tell something
            traceback.print_exc()
        print(f"== {name}: {time.monotonic() - begin:.0f} s", flush=True)
    return None


if __name__ == "__main__":
    main()
