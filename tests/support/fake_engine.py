"""An engine made of arithmetic, loaded through the same `load_adapter` as the real ones; and plans
that use it.

Its config says how it misbehaves: crash, hang, wrong_work, dead_toggle, stuck_toggle, orphan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments import workloads
from experiments.host import provenance
from experiments.records import store

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(provenance.ROOT), str(provenance.ROOT / "src")]),
}
"""For a runner in a process of its own."""
LABORATORY = (
    "pydantic",
    "mlflow",
    "yaml",
    "typer",
    "rich",
    "jinja2",
    "matplotlib",
    "scipy",
    "statsmodels",
    "pandas",
    "sklearn",
    "ray",
)
"""What a bare GPU host has not."""


def without(hook: Path, *packages: str) -> dict[str, str]:
    """An environment for processes in which packages cannot be imported. hook: a folder to be made."""
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {packages!r}:\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    return {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(hook), ENVIRONMENT["PYTHONPATH"]])}


BEHAVIOURS = ("fine", "crash", "hang", "wrong_work", "dead_toggle", "stuck_toggle", "orphan")


class Adapter:
    name = "fake"
    allowed = ("behaviour", "seconds", "seed", "optimizations", "max_num_seqs")

    def __init__(self, model: str, config: dict[str, Any]) -> None:
        if unknown := set(config) - set(self.allowed):
            raise ValueError(f"fake: unknown config key {unknown}")
        self.config = {"behaviour": "fine", "seconds": 0.0, "optimizations": {}, **config}
        assert self.config["behaviour"] in BEHAVIOURS
        self.served = 0

    def load(self) -> dict[str, Any]:
        if self.config["behaviour"] == "crash":
            raise RuntimeError("the fake engine crashes as told")
        if self.config["behaviour"] == "orphan":
            worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(os.environ["FAKE_ENGINE_PIDS"]).write_text(f"{os.getpid()} {worker.pid}")
        if self.config["behaviour"] in ("hang", "orphan"):
            print("the fake engine hangs as told", flush=True)
            time.sleep(600)
        return dict(self.config)

    def serve(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        begin = time.perf_counter()
        time.sleep(self.config["seconds"])
        self.served += len(requests)
        short = 1 if self.config["behaviour"] == "wrong_work" else 0
        outputs = [
            [(sum(r["prompt_token_ids"]) + i) % 97 for i in range(r["max_tokens"] - short)]
            for r in requests
        ]
        duration_s = time.perf_counter() - begin
        return {
            "duration_s": duration_s,
            "outputs": outputs,
            "finish_reasons": ["length"] * len(requests),
            "request_times_s": [[0.0, duration_s / 2, duration_s]] * len(requests),
            "step_times_s": [[duration_s, 1, 1]],
        }

    def start(self, requests: list[dict[str, Any]]) -> _Serving:
        return _Serving(self, requests)

    def reset(self) -> None:
        pass

    def counters(self) -> dict[str, int]:
        return {"steps": self.served}

    def toggles(self) -> dict[str, dict[str, Any]]:
        level = self.config["optimizations"].get("prefix_cache", False)
        fires = {"dead_toggle": False, "stuck_toggle": True}.get(self.config["behaviour"], level)
        return {
            "prefix_cache": {
                "level": level,
                "baseline": False,
                "engaged": self.served * fires,
                "opportunity": 0,
            }
        }

    def close(self) -> None:
        pass


class _Serving:
    """Serves requests one at a time, a token per step of `seconds`."""

    def __init__(self, adapter: Adapter, requests: list[dict[str, Any]]) -> None:
        self._adapter, self._requests = adapter, list(requests)
        self._queue: list[int] = []
        self._tokens: list[list[int]] = [[] for _ in requests]
        self._steps: list[list[float]] = []

    def submit(self, index: int) -> None:
        self._queue.append(index)

    def advance(self) -> list[tuple[int, int, bool]]:
        begin = time.perf_counter()
        time.sleep(self._adapter.config["seconds"])
        index = self._queue[0]
        request, tokens = self._requests[index], self._tokens[index]
        tokens.append((sum(request["prompt_token_ids"]) + len(tokens)) % 97)
        done = len(tokens) == request["max_tokens"]
        if done:
            self._queue.pop(0)
            self._adapter.served += 1
        self._steps.append([time.perf_counter() - begin, int(len(tokens) == 1), 1])
        return [(index, len(tokens), done)]

    def abort(self, index: int) -> None:
        self._queue.remove(index)

    def output(self, index: int) -> list[int]:
        return self._tokens[index]

    def set_prompt(self, index: int, prompt_token_ids: list[int]) -> None:
        self._requests[index] = {**self._requests[index], "prompt_token_ids": prompt_token_ids}

    def served(self) -> dict[str, Any]:
        return {
            "outputs": self._tokens,
            "finish_reasons": ["length"] * len(self._requests),
            "step_times_s": self._steps,
        }


def make_plan(
    model: Path, blocks: int = 2, timeout_s: float = 60.0, seconds: float = 0.0, **behaviours: str
) -> dict[str, Any]:
    """A plan of baseline, aa and prefix_cache=on, plus one cell for each of `behaviours` (cell name
    -> behaviour).
    """
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps({}))
    config = {"seconds": seconds, "optimizations": {"prefix_cache": False}}
    cells: dict[str, dict[str, Any]] = {
        "baseline": {"role": "baseline", "config": config, "levels": {"prefix_cache": "off"}},
        "aa": {"role": "aa", "config": config, "levels": {"prefix_cache": "off"}},
        "prefix_cache=on": {
            "role": "treatment",
            "config": {**config, "optimizations": {"prefix_cache": True}},
            "levels": {"prefix_cache": "on"},
        },
    }
    for name, behaviour in behaviours.items():
        on = behaviour == "dead_toggle"
        cells[name] = {
            "role": "treatment",
            "levels": {},
            "config": {**config, "behaviour": behaviour, "optimizations": {"prefix_cache": on}},
        }
    work = {
        "a": workloads.build(
            "a", "random", {"num_requests": 4, "prompt_tokens": [2, 4], "output_tokens": [2, 6]}
        ),
        "b": workloads.build(
            "b",
            "conversation",
            {
                "num_conversations": 2,
                "turns": 2,
                "system_tokens": 2,
                "user_tokens": 2,
                "answer_tokens": 2,
            },
        ),
    }
    launches = [
        {
            "launch": f"b{block:02d}-o{order:02d}-{cell}",
            "block": block,
            "order": order,
            "cell": cell,
            "seed": order,
            "workload_order": ["a", "b"],
        }
        for block in range(blocks)
        for order, cell in enumerate(cells)
    ]
    plan: dict[str, Any] = {
        "plan_version": 1,
        "study": {
            "name": "fake",
            "title": "A fake study",
            "question": "Does it run?",
            "engine": "tests.support.fake_engine",
            "metric": "output_tokens_per_s",
            "smallest_effect": 0.05,
            "alpha": 0.05,
            "design": {"kind": "one_at_a_time", "blocks": blocks, "seed": 0},
            "measurement": {
                "warm_up_requests": 2,
                "warm_up_tokens": 2,
                "timeout_s": timeout_s,
                "launch_s": 0.3,
                "environment": {"OMP_WAIT_POLICY": "PASSIVE"},
            },
            "factors": {"prefix_cache": {"levels": ["on"], "baseline": "off", "workloads": []}},
            "overrides": {},
        },
        "profile": {
            "name": "cpu",
            "title": "a CPU",
            "device": "cpu",
            "num_devices": 1,
            "cpu_cores": 2,
            "memory_bytes": 2**34,
            "bandwidth_bytes_per_s": 1e10,
            "peak_flops": 1e11,
            "kv_cache_memory_bytes": 2**28,
            "note": "",
        },
        "model": {
            "preset": None,
            "path": str(model),
            "dtype": "float32",
            "digest": None,
            "shape": {
                "hidden_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 64,
                "intermediate_size": 768,
                "vocab_size": 2048,
            },
        },
        "workloads": {name: workloads.summarize(w) for name, w in work.items()},
        "cells": {
            name: {"engine": "tests.support.fake_engine", **cell} for name, cell in cells.items()
        },
        "not_applicable": [],
        "launches": launches,
        "gate": {},
        "expected_s": 0.3 * len(launches),
    }
    return {**plan, "plan_hash": store.plan_hash(plan)}
