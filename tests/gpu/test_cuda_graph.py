"""The recorded decode step, without a GPU: 'replay' runs what would have been recorded, so padding,
inputs, the advance of positions and the bookkeeping are the real ones. On a GPU the same tests
replay real graphs.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.config import EngineConfig, Optimizations
from nanovllm.engine import llm_engine
from nanovllm.engine.invariants import check_invariants
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import StepPlan
from nanovllm.gpu import cuda_graph
from nanovllm.gpu.capture import Captured
from nanovllm.gpu.cuda_graph import GraphRunner, Variant, buckets_for, halves, read_s
from nanovllm.sampling_params import SamplingParams
from nanovllm.toggles.counters import reset

ON_GPU = torch.cuda.is_available()
LEVELS = ["torch", "triton"] if ON_GPU else ["torch"]


class FakeGraphRunner(GraphRunner):
    """Replays by computing again; keeps what the device would keep."""

    def _capture_all(self) -> Any:
        return {variant: self._capture(variant, None, None) for variant in self.variants}  # type: ignore[arg-type]

    def _read_back(self, *tensors: torch.Tensor) -> Any:
        # on a GPU the copy to the host is one
        return super()._read_back(*(tensor.clone() for tensor in tensors))

    @torch.inference_mode()
    def _capture(self, variant: Variant, pool: Any, stream: Any) -> Any:
        self.inputs[: variant.bucket] = self.spare_row
        self.inputs[variant.bucket :] = 0
        reset(self.stats)
        captured = Captured(
            None,
            self._decode(variant).clone(),
            Counter(self.stats.kernel_calls),
            Counter(self.stats.attention_calls),
        )

        def replay() -> None:
            before = Counter(self.stats.kernel_calls), Counter(self.stats.attention_calls)
            captured.output.copy_(self._decode(variant))
            for calls, old in zip(
                (self.stats.kernel_calls, self.stats.attention_calls), before, strict=True
            ):
                calls.clear()
                calls.update(old)

        captured.graph = SimpleNamespace(replay=replay)
        return captured


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5, 8, 16, 17, 64, 250, 256])
def test_buckets_hold_every_batch_and_end_at_max_num_seqs(max_num_seqs: int) -> None:
    buckets = buckets_for(max_num_seqs)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == max_num_seqs
    assert all(next(b for b in buckets if b >= n) - n < 16 for n in range(1, max_num_seqs + 1))


def make_engine(
    model: Path, monkeypatch: pytest.MonkeyPatch, *, graphs: bool, **kwargs: Any
) -> LLMEngine:
    """An engine in float32; with graphs, real ones on a GPU and replayed by hand elsewhere."""
    switches = {"batching": "chunked", "prefix_cache": True, **kwargs.pop("switches", {})}
    if ON_GPU:
        switches["cuda_graphs"] = graphs
    elif graphs:
        monkeypatch.setattr(llm_engine, "ModelRunner", FakeGraphRunner)
        monkeypatch.setattr("nanovllm.cpu.runner.CpuRunner", FakeGraphRunner)
    config = EngineConfig(
        model=str(model),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=256,
        optimizations=Optimizations(**switches),
        **kwargs,
    )
    engine = LLMEngine(config)
    monkeypatch.undo()
    return engine


def serve(
    engine: LLMEngine, requests: list[tuple[list[int], SamplingParams]], *, abort: int | None = None
) -> dict[str, list[int]]:
    """Runs all to their ends, aborting one of them after six steps."""
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    tokens: dict[str, list[int]] = {}
    steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        check_invariants(engine.scheduler)
        steps += 1
        if steps == 6 and abort is not None:
            engine.abort(str(abort))
            tokens.pop(str(abort), None)
    tokens.pop(str(abort), None)
    return tokens


def requests_of(count: int, **params: Any) -> list[tuple[list[int], SamplingParams]]:
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(5, 2000, (3 + 7 * (i % 5),), generator=generator).tolist()
        for i in range(count)
    ]
    own = [
        {
            "temperature": 0.8 * (i % 3 > 0),
            "max_tokens": 5 + 4 * (i % 4),
            "seed": i,
            "ignore_eos": True,
        }
        for i in range(count)
    ]
    return [
        (prompt, SamplingParams(**values | params))
        for prompt, values in zip(prompts, own, strict=True)
    ]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("max_num_seqs", "num_blocks", "count", "params"),
    [
        (5, 64, 9, {}),  # batches between the buckets; requests end and others take their rows
        (3, 64, 3, {"temperature": 0.0}),
        (6, 9, 8, {"max_tokens": 40}),  # too few blocks: preemptions
        (4, 64, 6, {"top_k": 3, "temperature": 1.0}),  # filtered steps run eagerly
        (4, 64, 5, {"logprobs": 2}),
    ],
)
def test_tokens_are_those_of_the_eager_runner(
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    overlap: bool,
    level: str,
    max_num_seqs: int,
    num_blocks: int,
    count: int,
    params: dict[str, Any],
) -> None:
    results, replays = [], []
    for graphs, splits in ((False, False), (True, False), (True, True)):
        switches = {"overlap": overlap, "attention_backend": level, "kernels": level}
        engine = make_engine(
            tiny,
            monkeypatch,
            graphs=graphs,
            switches=switches,
            max_num_seqs=max_num_seqs,
            kv_cache_memory_bytes=num_blocks * 4 * 2 * 2 * 64 * 16 * 4,
        )
        assert engine.config.num_kv_blocks == num_blocks
        # it expects every request to end at once: memory runs out
        engine.scheduler.forecast.asked = 1 << 40
        if graphs:
            assert engine.runner.splits == (level == "triton"), "tiny is read in no time"
            engine.runner.splits = splits  # whatever its device would gain
        results.append(serve(engine, requests_of(count, **params), abort=1))
        stats = engine.stats()
        replays.append(stats["graph_replays"])
        eager_decodes = {"top_k", "logprobs"} & set(params)
        # its prefills are replayed
        assert (stats["graph_replays"] > 0) == (graphs and (not eager_decodes or level == "triton"))
        if num_blocks < 10:
            assert stats["preemptions"] > 0
        engine.close()
    assert results[0] == results[1] == results[2]
    if count > max_num_seqs:  # requests join while others decode
        assert (replays[2] > replays[1]) == (not eager_decodes)


def test_halves_of_a_mixed_step_hold_all_of_it() -> None:
    plan = StepPlan(
        7,
        num_decodes=2,
        rows=[4, 1, 3, 0],
        starts=[9, 5, 0, 16],
        query_lens=[1, 1, 3, 2],
        samples=[True, True, True, False],
        token_ids=[11, 12, 13, 21, 22],
        new_blocks=[(4, 1, 8), (3, 0, 2)],
        new_rows=[(3, 0.5, 0, 1.0, 6, None)],
        greedy_only=False,
    )
    decodes, prefills = halves(plan)
    for name in ("rows", "starts", "query_lens", "samples", "token_ids", "new_blocks", "new_rows"):
        assert getattr(decodes, name) + getattr(prefills, name) == getattr(plan, name)
    assert (decodes.num_decodes, len(decodes.rows)) == (2, 2)
    assert (prefills.num_decodes, prefills.query_lens) == (0, [3, 2])
    assert decodes.new_blocks == plan.new_blocks, "both halves run on the tables of the whole step"


@pytest.mark.parametrize(
    ("clock_khz", "bus_bits", "seconds"),
    [(2_619_000, 5120, 1.2e9 / 3.352e12), (10_501_000, 192, 1.2e9 / 0.504e12), (0, 0, math.inf)],
)
def test_the_time_to_read_the_weights_is_that_of_the_data_sheet(
    monkeypatch: pytest.MonkeyPatch, clock_khz: int, bus_bits: int, seconds: float
) -> None:
    """An H100, a desktop RTX 4070, and a driver that does not tell."""
    gpu = SimpleNamespace(memory_clock_rate=clock_khz, memory_bus_width=bus_bits)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert read_s(1_200_000_000, torch.device("cuda", 0)) == pytest.approx(seconds, rel=1e-3)


def test_a_replay_counts_what_it_executes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for graphs in (False, True):
        engine = make_engine(
            tiny, monkeypatch, graphs=graphs, max_num_seqs=4, kv_cache_memory_bytes=1 << 24
        )
        assert not any(engine.stats().values()), "starting is not work"
        serve(engine, requests_of(3, max_tokens=8))
        counts.append({k: v for k, v in engine.stats().items() if k != "graph_replays"})
        engine.close()
    assert counts[0] == counts[1]


@pytest.mark.skipif(ON_GPU, reason="of the fake runner's variants")
def test_steps_whose_rows_share_a_block_replay_the_graph_for_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(
        tiny, monkeypatch, graphs=True, max_num_seqs=4, kv_cache_memory_bytes=1 << 24
    )
    runner: Any = engine.runner
    replayed: list[tuple[int, bool]] = []
    runner.cascade, runner.fewest_sharing = True, 1
    for variant in list(runner.captured):
        runner.captured[replace(variant, shares=True)] = runner.captured[variant]
    runner.captured = Told(runner.captured, replayed)
    params = SamplingParams(temperature=0.7, max_tokens=6, ignore_eos=True)
    prefix = list(range(50, 50 + engine.config.block_size))
    prompts = [[*prefix, 7], [9, 8, 7], [*prefix, 6], [*prefix, 5]]
    serve(engine, [(prefix + [1], SamplingParams(max_tokens=1))])  # found from now on
    serve(engine, [(prompts[0], params), (prompts[1], params)])
    assert replayed
    assert not any(shares for _, shares in replayed), "one of the two has the prefix"
    replayed.clear()
    serve(engine, [(prompt, params) for prompt in prompts])
    assert all(shares for bucket, shares in replayed if bucket == 4)
    replayed.clear()
    serve(engine, [(prompts[1], params), ([4, 3, 2], params)])  # their rows were those of others
    assert not any(shares for _, shares in replayed)
    assert engine.stats()["attention_calls.cascade"] > 0
    engine.close()


@pytest.mark.skipif(ON_GPU, reason="of the fake runner's variants")
def test_shared_blocks_are_looked_for_where_too_few_could_share(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the toggle engages, and a launch with small batches is no invalid one."""
    engine = make_engine(
        tiny, monkeypatch, graphs=True, max_num_seqs=4, kv_cache_memory_bytes=1 << 24
    )
    runner: Any = engine.runner
    runner.cascade = True
    assert runner.fewest_sharing >= 4
    assert not any(variant.shares for variant in runner.variants)
    prefix = list(range(50, 50 + engine.config.block_size))
    serve(engine, [(prefix + [1], SamplingParams(max_tokens=1))])
    serve(
        engine,
        [
            ([*prefix, i], SamplingParams(temperature=0.7, max_tokens=6, ignore_eos=True))
            for i in range(4)
        ],
    )
    assert engine.stats()["attention_calls.cascade"] > 0
    assert not engine.stats().get("attention_calls.shared")
    engine.close()


class Told(dict[Variant, Any]):
    """Graphs, and which were asked for."""

    def __init__(self, graphs: dict[Variant, Any], asked: list[tuple[int, bool]]) -> None:
        super().__init__(graphs)
        self.asked = asked

    def __getitem__(self, variant: Variant) -> Any:
        self.asked.append((variant.bucket, variant.shares))
        return super().__getitem__(variant)


def test_unchanged_rows_need_no_input(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(
        tiny, monkeypatch, graphs=True, max_num_seqs=4, kv_cache_memory_bytes=1 << 24
    )
    uploads: list[int] = []
    tensor = engine.runner._tensor
    engine.runner._tensor = lambda values, *dtype: (
        uploads.append(len(values)) or tensor(values, *dtype)
    )
    serve(engine, [([7, 8, 9], SamplingParams(temperature=0.7, max_tokens=12, ignore_eos=True))])
    before = len(uploads)
    serve(engine, [([7, 8, 9], SamplingParams(temperature=0.7, max_tokens=2, ignore_eos=True))])
    assert before == len(uploads) - before, "ten more decode steps uploaded something"
    engine.close()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: cascade attention is replayed there")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_blocks", [200, 30])  # plenty; and preemptions
def test_a_shared_prefix_read_once_changes_no_token(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool, num_blocks: int
) -> None:
    monkeypatch.setattr(cuda_graph, "SHARING_KV_HEADS", 4)
    generator = torch.Generator().manual_seed(9)
    prefixes = [
        torch.randint(5, 2000, (16 * blocks,), generator=generator).tolist() for blocks in (3, 5)
    ]
    requests = [
        (
            (prefixes[i % 3] if i % 3 < 2 else []) + [7 + i, 8, 9 + i][: 1 + i % 3],
            SamplingParams(
                temperature=0.8 * (i % 2), max_tokens=20 + 7 * (i % 5), seed=i, ignore_eos=True
            ),
        )
        for i in range(30)
    ]
    results, shared = [], []
    for cascade in (False, True):
        switches = {
            "overlap": overlap,
            "attention_backend": "triton",
            "kernels": "triton",
            "cuda_graphs": True,
            "cascade_attention": cascade,
        }
        engine = make_engine(
            tiny,
            monkeypatch,
            graphs=True,
            switches=switches,
            max_num_seqs=20,
            kv_cache_memory_bytes=num_blocks * 4 * 2 * 2 * 64 * 16 * 4,
        )
        monkeypatch.setattr(cuda_graph, "SHARING_KV_HEADS", 4)  # make_engine has undone it
        engine.scheduler.forecast.asked = 1 << 40
        serve(engine, [(prefix + [1], SamplingParams(max_tokens=1)) for prefix in prefixes])
        results.append(serve(engine, requests, abort=4))
        toggle = engine.toggles()["cascade_attention"]
        shared.append((toggle["engaged"] > 0, toggle["opportunity"] > 0))
        engine.close()
    assert results[0] == results[1]
    assert shared == [(False, False), (True, True)]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("_capture_all", "capturing steps of up to 4 requests.*lower kv_cache_memory_bytes"),
        ("__init__", "the model does not fit.*tensor_parallel_size"),
    ],
)
def test_out_of_memory_says_what_to_lower(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, where: str, said: str
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. And much more."
        )

    with monkeypatch.context() as patch:
        graphs = GraphRunner if ON_GPU else FakeGraphRunner
        patch.setattr(graphs if where == "_capture_all" else ModelRunner, where, full)
        with pytest.raises(MemoryError, match=said + r".*\(CUDA out of memory\)"):
            make_engine(
                tiny, monkeypatch, graphs=True, max_num_seqs=4, kv_cache_memory_bytes=1 << 24
            )


@pytest.mark.skipif(
    not ON_GPU, reason="needs a GPU: Triton's interpreter is too slow for a whole engine"
)
def test_triton_gives_the_tokens_of_torch(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for level in LEVELS:
        switches = {"attention_backend": level, "kernels": level, "overlap": level == "triton"}
        engine = make_engine(
            tiny,
            monkeypatch,
            graphs=level == "triton",
            switches=switches,
            max_num_seqs=20,
            kv_cache_memory_bytes=1 << 25,
        )
        results.append(serve(engine, requests_of(40, max_tokens=60)))
        assert engine.stats()[f"attention_calls.{level}"] > 0
        engine.close()
    agreeing = sum(results[0][name] == results[1][name] for name in results[0])
    assert agreeing >= 39, "float32 engines part at near-ties alone, and those are rare"


def test_workspaces_go_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.gpu.workspaces import Workspaces

    cleared: list[bool] = []
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: cleared.append(True), raising=False
    )
    holder = {"model": torch.nn.Linear(1, 1)}
    Workspaces().keep_for(holder["model"])
    assert not cleared
    holder.clear()  # as ModelRunner.close does
    assert cleared == [True]
