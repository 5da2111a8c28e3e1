"""The two fused products on a GPU: beside the kernels they replace, over a few tilings, and in the
chain of a decode step.

    PYTHONPATH=src:. python benchmarks/gpu_fused.py --out fused.json                              # ends within 100 s
    PYTHONPATH=src:. python benchmarks/gpu_fused.py --out fused-8b.json --shape 8b --rows 256 64 8 1
    PYTHONPATH=src:. python benchmarks/gpu_fused.py --out all.json --budget-s 300                 # nothing left out

For each number of rows, microseconds a layer from a CUDA graph of all layers, each with weights of
its own (together many times the L2 cache):

    gate_up    product, then SwiGLU, as two kernels ("today") and as one ("fused"), one line a tiling
    qkv        product, then q/k norm + rotary embedding + KV store, likewise
    chain      norm, qkv, o, norm, gate_up, down, each fed by the one before, without attention: today's, either fused, both. Here
               the fused kernels are at work in the chain of dependent launches, so this decides

Each fused result is compared with torch's composition first: `error` is |ours - torch's| /
|torch's| of all that is written, the worst tensor of them; past 1 % the line says WRONG and is not
considered for the chain. Chains are compared with today's, up to 10 %, as roundings add up over the
layers. A tiling that the card refuses is a line with its error. What the time did not suffice for
is listed. The rows that tell most come first.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from nanovllm.kernels import torch as twins
from nanovllm.kernels import triton as ours
from nanovllm.kernels.triton import fused
from nanovllm.kernels.triton.fused import GATE_UP_TILINGS, QKV_TILINGS, Tiling

ROWS = (256, 128, 64, 8, 192, 96, 32, 16, 1)
EPS = 1e-6
WRONG = 0.01
CHAIN_WRONG = 0.1  # against today's chain: roundings add up over the layers

# rows, columns, step, stages, warps; those of fused.py's tables are tried first, whatever stands
# here
GATE_UP_GRID = {
    16: [
        (16, 32, 256, 3, 4),
        (16, 64, 128, 5, 4),
        (16, 32, 128, 6, 4),
        (16, 32, 128, 4, 2),
        (16, 16, 256, 4, 2),
    ],
    32: [
        (32, 64, 128, 4, 4),
        (32, 32, 256, 3, 4),
        (32, 32, 128, 6, 4),
        (32, 32, 64, 6, 4),
        (16, 32, 128, 4, 4),
    ],
    64: [
        (64, 32, 128, 4, 4),
        (64, 32, 64, 6, 4),
        (64, 64, 64, 5, 4),
        (64, 64, 128, 4, 8),
        (32, 64, 128, 4, 4),
    ],
    128: [
        (64, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (128, 32, 64, 5, 4),
        (128, 64, 64, 4, 8),
        (64, 64, 128, 3, 4),
    ],
    256: [
        (64, 128, 64, 4, 4),
        (128, 64, 64, 4, 4),
        (128, 128, 128, 3, 8),
        (64, 256, 64, 3, 8),
        (256, 64, 64, 4, 8),
    ],
}
QKV_GRID = {
    16: [
        (16, 128, 128, 6, 8),
        (16, 128, 256, 3, 8),
        (16, 128, 256, 3, 4),
        (16, 128, 64, 8, 4),
        (16, 128, 128, 5, 8),
    ],
    32: [
        (16, 128, 128, 5, 4),
        (32, 128, 128, 5, 8),
        (32, 128, 64, 6, 4),
        (16, 128, 256, 3, 8),
        (32, 128, 256, 2, 8),
    ],
    64: [
        (16, 128, 128, 4, 4),
        (32, 128, 128, 4, 4),
        (32, 128, 64, 6, 4),
        (64, 128, 128, 4, 4),
        (64, 128, 64, 6, 8),
    ],
    128: [
        (32, 128, 128, 4, 4),
        (32, 128, 64, 5, 4),
        (64, 128, 128, 4, 4),
        (64, 128, 64, 4, 8),
        (16, 128, 128, 4, 4),
    ],
    256: [
        (64, 128, 128, 3, 4),
        (64, 128, 64, 4, 8),
        (128, 128, 64, 4, 8),
        (32, 128, 64, 4, 4),
        (64, 128, 128, 4, 8),
    ],
}


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    layers: int = 28
    page: int = 256
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    def draw(self, *sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, device=self.device) * scale).to(self.dtype)


SHAPES = {"0.6b": Shape(1024, 3072, 16, 8), "8b": Shape(4096, 12_288, 32, 8, layers=12)}


class Model:
    """Weights of all layers, and the ways to compute their products."""

    def __init__(self, shape: Shape, num_rows: int) -> None:
        s, self.shape = shape, shape
        q_size = s.heads * s.head_dim

        def weights(n: int, k: int) -> list[Tensor]:
            return [s.draw(n, k, scale=k**-0.5) for _ in range(s.layers)]

        self.qkv, self.o = (
            weights(q_size + 2 * s.kv_heads * s.head_dim, s.hidden),
            weights(s.hidden, q_size),
        )
        self.gate_up, self.down = (
            weights(2 * s.intermediate, s.hidden),
            weights(s.hidden, s.intermediate),
        )
        self.norm, self.q_norm, self.k_norm = (
            s.draw(n, scale=0.1) + 1 for n in (s.hidden, s.head_dim, s.head_dim)
        )
        num_blocks = num_rows + 1  # a row has a block of its own, as in the engine
        self.caches = [
            tuple(
                torch.zeros(
                    num_blocks, s.kv_heads, s.page, s.head_dim, dtype=s.dtype, device=s.device
                )
                for _ in range(2)
            )
            for _ in range(2)
        ]

    def of_rows(self, num_rows: int) -> Inputs:
        s = self.shape
        angles = torch.randn(num_rows, s.head_dim // 2, device=s.device)
        slots = torch.randperm(num_rows, device=s.device) * s.page + torch.randint(
            s.page, (num_rows,), device=s.device
        )
        return Inputs(
            s.draw(num_rows, s.hidden),
            s.draw(num_rows, s.hidden),
            torch.cat((angles.cos(), angles.sin()), dim=1),
            slots,
        )

    def rest(self, inputs: Inputs, layer: int) -> tuple[Any, ...]:
        """What linear_qk_norm_rope_store_kv is given behind x, weight and bias."""
        return self.q_norm, self.k_norm, EPS, inputs.cos_sin, *self.caches[layer % 2], inputs.slots


@dataclass
class Inputs:
    x: Tensor  # [rows, hidden]
    residual: Tensor
    cos_sin: Tensor  # [rows, head_dim] float32
    slots: Tensor  # [rows] int64


GateUp = Callable[[Tensor, Tensor], Tensor]
QKV = Callable[..., tuple[Tensor, Tensor, Tensor]]


def gate_up_today(x: Tensor, weight: Tensor) -> Tensor:
    return ours.silu_and_mul(ours.linear(x, weight))


def qkv_today(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return ours.qk_norm_rope_store_kv(ours.linear(x, weight), *rest)


def gate_up_in_tiles(tiling: Tiling) -> GateUp:
    return lambda x, weight: fused.fused_gate_up(x, weight, tiling)


def qkv_in_tiles(tiling: Tiling) -> QKV:
    return lambda x, weight, *rest: fused.fused_qkv(x, weight, None, *rest, tiling=tiling)


def graph_s(
    function: Callable[[int], object], layers: int, repeats: int = 30, warmup: int = 8
) -> float:
    """Seconds of one call of `function(layer)`, from a graph of all layers: the median replay."""
    function(0)  # compiles
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        for layer in range(layers):
            function(layer)
    for _ in range(warmup):
        graph.replay()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    return times[len(times) // 2] / 1e3 / layers


def worst_error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))
        for a, b in zip(found, expected, strict=True)
    )


def gate_up_error(model: Model, inputs: Inputs, gate_up: GateUp) -> float:
    weight = model.gate_up[0]
    return worst_error([gate_up(inputs.x, weight)], [twins.linear_silu_and_mul(inputs.x, weight)])


def qkv_error(model: Model, inputs: Inputs, qkv: QKV) -> float:
    """Over q, k, v and both caches whole: what is written where it must not be counts as well."""
    written = []
    for function in (
        qkv,
        lambda x, weight, *rest: twins.linear_qk_norm_rope_store_kv(x, weight, None, *rest),
    ):
        for cache in model.caches[0]:
            cache.zero_()
        outputs = function(inputs.x, model.qkv[0], *model.rest(inputs, 0))
        written.append([*outputs, *(cache.clone() for cache in model.caches[0])])
    return worst_error(*written)


def chain(model: Model, inputs: Inputs, gate_up: GateUp, qkv: QKV) -> Callable[[int], Tensor]:
    """layer -> the residual behind it; layer 0 begins anew."""
    state: dict[str, Any] = {}

    def layer_of(i: int) -> Tensor:
        x, residual = (inputs.x, inputs.residual) if i == 0 else state["now"]
        x, residual = ours.add_rms_norm(x, residual, model.norm, EPS)
        q, _, _ = qkv(x, model.qkv[i], *model.rest(inputs, i))
        x, residual = ours.add_rms_norm(
            ours.linear(q.flatten(1), model.o[i]), residual, model.norm, EPS
        )
        state["now"] = ours.linear(gate_up(x, model.gate_up[i]), model.down[i]), residual
        return residual

    return layer_of


class Study:
    """Lines of the table, printed as they come; and the time left for more."""

    def __init__(self, shape: Shape, rows: list[int], begin_s: float, budget_s: float) -> None:
        self.shape, self.deadline_s = shape, begin_s + budget_s
        self.begin_s = begin_s
        self.lines: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.model = Model(shape, max(rows))

    def has_time(self, what: str, reserve_s: float = 0.0) -> bool:
        if time.monotonic() < self.deadline_s - reserve_s:
            return True
        self.left_out.append(what)
        return False

    def measure(
        self,
        operation: str,
        num_rows: int,
        variant: str,
        function: Callable[[int], object],
        error_of: Callable[[], float] | None = None,
        tiling: Tiling | None = None,
    ) -> dict[str, Any]:
        line: dict[str, Any] = {
            "operation": operation,
            "rows": num_rows,
            "variant": variant,
            "tiling": tiling and list(tiling),
            "error": None,
            "us": None,
            "failed": None,
        }
        try:
            line["error"] = error_of() if error_of else None
            line["us"] = graph_s(function, self.shape.layers) * 1e6
        # a tiling that the card refuses is a line of the table
        except Exception as error:  # noqa: BLE001
            line["failed"] = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            )
        limit = CHAIN_WRONG if operation == "chain" else WRONG
        line["wrong"] = line["error"] is not None and not line["error"] <= limit  # a NaN is wrong
        line["elapsed_s"] = round(time.monotonic() - self.begin_s, 1)
        self.lines.append(line)
        self._print(line)
        return line

    def _print(self, line: dict[str, Any]) -> None:
        before = [
            other["us"]
            for other in self.lines
            if other["operation"] == line["operation"]
            and other["rows"] == line["rows"]
            and other["variant"] == "today"
            and other["us"]
        ]
        us = f"{line['us']:8.2f} us a layer" if line["us"] else "-"
        saved = (
            f"{line['us'] - before[0]:+7.2f}"
            if line["us"] and before and line["variant"] != "today"
            else " " * 7
        )
        error = "" if line["error"] is None else f"error {line['error']:.1e}"
        tiling = "" if line["tiling"] is None else str(tuple(line["tiling"]))
        print(
            f"{line['operation']:8} {line['rows']:4} rows  {line['variant']:12} {tiling:24} {us:>20} {saved}  {error}"
            f"{'  WRONG' if line['wrong'] else ''}{'  ' + line['failed'] if line['failed'] else ''}",
            flush=True,
        )

    def best(self, operation: str, num_rows: int) -> dict[str, Any] | None:
        """The fastest right one that is fused."""
        found = [
            line
            for line in self.lines
            if line["operation"] == operation
            and line["rows"] == num_rows
            and line["us"]
            and line["variant"].startswith("fused")
            and not line["wrong"]
        ]
        return min(found, key=lambda line: line["us"], default=None)

    def products(self, num_rows: int, reserve_s: float) -> dict[str, Any]:
        """Times both products; returns the best functions, where one was right."""
        model, inputs, found = self.model, self.model.of_rows(num_rows), {}
        for operation in ("gate_up", "qkv"):
            gate = operation == "gate_up"

            def layer(function: Any, gate: bool = gate) -> Callable[[int], object]:
                if gate:
                    return lambda i: function(inputs.x, model.gate_up[i])
                return lambda i: function(inputs.x, model.qkv[i], *model.rest(inputs, i))

            def error(function: Any, gate: bool = gate) -> Callable[[], float]:
                return lambda: (gate_up_error if gate else qkv_error)(model, inputs, function)

            today = gate_up_today if gate else qkv_today
            self.measure(operation, num_rows, "today", layer(today), error(today))
            candidates: dict[str, Any] = {}
            if gate and fused.suits_few(inputs.x, model.gate_up[0]):
                few = lambda x, weight: fused.linear_of_few(x, weight, gate_and_up=True)  # noqa: E731
                candidates["fused, few"] = few
                self.measure(operation, num_rows, "fused, few", layer(few), error(few))
            for tiling in tilings_to_try(operation, num_rows):
                if not self._fits(operation, tiling) or not self.has_time(
                    f"{operation}, {num_rows} rows, {tiling[:]}", reserve_s
                ):
                    continue
                function = (gate_up_in_tiles if gate else qkv_in_tiles)(tiling)
                name = f"fused {tiling[:]}"
                line = self.measure(
                    operation, num_rows, "fused", layer(function), error(function), tiling
                )
                candidates[name] = function
                line["name"] = name
            if best := self.best(operation, num_rows):
                found[operation] = candidates[best.get("name", best["variant"])]
        return found

    def _fits(self, operation: str, tiling: Tiling) -> bool:
        s = self.shape
        return s.hidden % tiling.step == 0 and (
            operation == "qkv" or 2 * s.intermediate % tiling.columns == 0
        )

    def chains(self, num_rows: int, found: dict[str, Any]) -> None:
        inputs = self.model.of_rows(num_rows)
        gate_up, qkv = found.get("gate_up", gate_up_today), found.get("qkv", qkv_today)
        variants = {
            "today": (gate_up_today, qkv_today),
            "both fused": (gate_up, qkv),
            "gate_up only": (gate_up, qkv_today),
            "qkv only": (gate_up_today, qkv),
        }
        expected: list[Tensor] = []

        def error(function: Callable[[int], Tensor]) -> float:
            with torch.inference_mode():
                residual = [function(i) for i in range(self.shape.layers)][-1].clone()
            expected[:] = expected or [residual]
            return worst_error([residual], expected[:1])

        for name, functions in variants.items():
            if name != "today" and (not found or set(functions) == {gate_up_today, qkv_today}):
                continue  # nothing fused was right
            if self.has_time(f"chain, {num_rows} rows, {name}"):
                function = chain(self.model, inputs, *functions)
                self.measure("chain", num_rows, name, function, partial(error, function))


def tilings_to_try(operation: str, num_rows: int) -> list[Tiling]:
    """That of fused.py's table first; none twice."""
    table, grid = (
        (GATE_UP_TILINGS, GATE_UP_GRID) if operation == "gate_up" else (QKV_TILINGS, QKV_GRID)
    )
    bucket = next((most for most in grid if num_rows <= most), max(grid))
    return list(
        dict.fromkeys(
            [fused.tiling_for(table, num_rows), *(Tiling(*values) for values in grid[bucket])]
        )
    )


def run(
    shape: Shape, rows: list[int], out: Path, begin_s: float, budget_s: float
) -> dict[str, Any]:
    """Writes `out` after each number of rows, so that nothing is lost with the machine."""
    study = Study(shape, rows, begin_s, budget_s)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if shape.device == "cuda" else shape.device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": {**asdict(shape), "dtype": str(shape.dtype)},
        "budget_s": budget_s,
    }
    for num_rows in rows:
        if study.has_time(f"{num_rows} rows", reserve_s=4.0):
            with torch.inference_mode():
                study.chains(num_rows, study.products(num_rows, reserve_s=2.0))
        result |= {"lines": study.lines, "left_out": study.left_out}
        out.write_text(json.dumps(result, indent=1))
    print(f"\n{time.monotonic() - begin_s:.0f} s on {result['device']}; best by rows:")
    for num_rows in rows:
        parts = []
        for operation in ("gate_up", "qkv", "chain"):
            lines = [
                line
                for line in study.lines
                if (line["operation"], line["rows"]) == (operation, num_rows)
            ]
            times = {
                line["variant"]: line["us"] for line in lines if line["us"] and not line["wrong"]
            }
            best = study.best(operation, num_rows)
            after = times.get("both fused") if operation == "chain" else best and best["us"]
            if times.get("today") and after:
                how = f" {best['tiling'] or 'few'}" if best else ""
                parts.append(f"{operation} {times['today']:.2f} -> {after:.2f}{how}")
        print(f"{num_rows:4} rows  " + ("   ".join(parts) or "-"))
    for what in study.left_out:
        print(f"no time left for {what}")
    return result


def main(arguments: list[str] | None = None) -> None:
    begin_s = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.6b")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument(
        "--budget-s",
        type=float,
        default=100.0,
        help="no measurement begins later than that; each takes about 1 s",
    )
    args = parser.parse_args(arguments)
    # a kernel that never ends ends here
    faulthandler.dump_traceback_later(1.5 * args.budget_s + 30, exit=True)
    run(SHAPES[args.shape], args.rows, args.out, begin_s, args.budget_s)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
