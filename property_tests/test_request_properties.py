"""The front door: what is allowed is taken and served, what is not is refused with a clear error,
and nothing is ignored. Many clients of one engine: each gets its tokens once and in order.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from nanovllm.config import EngineConfig
from nanovllm.engine.invariants import check_invariants
from nanovllm.models.config import load_hf_config
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.serving import AsyncLLM
from property_tests.support import model_free_llm
from property_tests.support.model_free import oracle
from property_tests.support.model_free_llm import (
    Client,
    ModelFreeLLM,
    clients,
    pace,
    read_or_leave,
)
from property_tests.support.profiles import holds
from property_tests.support.real_engine import MAX_MODEL_LEN, VOCAB, engine_of, serve, tiny
from property_tests.support.strategies import SEEDS, Request, Shape, shapes

GOOD: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.just(0.0) | st.just(0) | st.floats(1e-5, 1e30) | st.floats(1e-3, 10),
    "top_k": st.integers(-1, 10**6),
    "top_p": st.floats(1e-30, 1),
    "max_tokens": st.integers(1, 10**6),
    "seed": st.none() | SEEDS,
    "logprobs": st.none() | st.integers(0, 20),
}
BAD: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(max_value=9e-6).filter(lambda t: t != 0)
    | st.sampled_from([float("nan"), float("inf")]),
    "top_k": st.integers(max_value=-2) | st.integers(2**31),
    "top_p": st.floats(max_value=0) | st.floats(1, exclude_min=True) | st.just(float("nan")),
    "max_tokens": st.integers(max_value=0),
    "seed": st.integers(max_value=-(2**63) - 1) | st.integers(2**63),
    "logprobs": st.integers(max_value=-1),
}
NO_WHOLE_NUMBER = st.tuples(
    st.sampled_from(["top_k", "max_tokens", "seed", "logprobs"]), st.floats() | st.text()
)
SHAPE = Shape("chunked", True, 0, 8, 16, 4, 64)


@holds(fast=60, params=st.fixed_dictionaries({}, optional=GOOD))
def test_what_is_allowed_is_taken(params: dict[str, Any]) -> None:
    """Every sampling parameter in its documented range is accepted and kept; temperature 0 is one
    of them.
    """
    try:
        taken = SamplingParams(**params)
    except (ValueError, TypeError) as error:
        raise AssertionError(f"{params} are allowed and were refused: {error}") from error
    assert all(getattr(taken, name) == value for name, value in params.items()), (
        "a parameter was changed"
    )


@holds(
    fast=120,
    good=st.fixed_dictionaries({}, optional=GOOD),
    bad=st.sampled_from(sorted(BAD)).flatmap(lambda name: st.tuples(st.just(name), BAD[name]))
    | NO_WHOLE_NUMBER,
)
def test_what_is_not_allowed_is_refused(good: dict[str, Any], bad: tuple[str, Any]) -> None:
    """One sampling parameter out of its range: a ValueError that names it; max_tokens 0 is one of
    them.
    """
    name, value = bad
    try:
        SamplingParams(**{**good, name: value})
    except ValueError as error:
        assert name in str(error), f"{name}={value!r} was refused without being named: {error}"
    else:
        raise AssertionError(f"{name}={value!r} was taken")


PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)


@holds(fast=30, prompt=PROMPTS, max_tokens=st.integers(1, 5), greedy=st.booleans())
def test_a_valid_request_is_served(prompt: list[int], max_tokens: int, greedy: bool) -> None:
    """Any prompt of known tokens, greedy or not, gives exactly max_tokens tokens where end of
    sequence is ignored.
    """
    params = SamplingParams(
        temperature=0.0 if greedy else 0.9, max_tokens=max_tokens, ignore_eos=True
    )
    with engine_of(SHAPE) as engine:
        served = serve(engine, (Request(tuple(prompt), params),))
    assert len(served[0].tokens) == max_tokens, (
        f"asked for {max_tokens} tokens, got {len(served[0].tokens)}"
    )
    assert all(0 <= token < VOCAB for token in served[0].tokens)


UNKNOWN = st.lists(st.integers(), min_size=1, max_size=5).filter(
    lambda prompt: not 0 <= min(prompt) <= max(prompt) < VOCAB
)
TOO_LONG = st.integers(MAX_MODEL_LEN, MAX_MODEL_LEN + 200).map(lambda length: [1] * length)


@holds(fast=30, prompt=st.just([]) | UNKNOWN | TOO_LONG)
def test_an_impossible_request_is_refused(prompt: list[int]) -> None:
    """An empty prompt, an unknown token, a prompt that fills max_model_len: a ValueError, and the
    engine is as it was.
    """
    with engine_of(SHAPE) as engine:
        try:
            engine.add_request(
                "bad", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=4, ignore_eos=True)
            )
        except ValueError:
            assert not engine.has_unfinished_requests(), "a request was refused and queued"
        else:
            raise AssertionError(
                f"a prompt of {len(prompt)} tokens ({prompt[:3]}...) and max_tokens=4 was taken"
            )


NAMES = {
    "max_num_seqs",
    "block_size",
    "max_model_len",
    "max_num_batched_tokens",
    "dtype",
    "enforce_eager",
    "enable_prefix_caching",
    "seed",
    "device",
    "optimizations",
}


@holds(
    fast=30,
    name=st.sampled_from(sorted(NAMES)),
    edit=st.sampled_from(["x", "_", "s"]),
    at=st.integers(0, 30),
)
def test_an_unknown_argument_is_an_error(name: str, edit: str, at: int) -> None:
    """A misspelt argument of the engine is refused by name, never dropped."""
    wrong = name[:at] + edit + name[at:]
    if wrong in NAMES:
        return
    try:
        config = EngineConfig.from_kwargs(str(tiny()), **{wrong: 1})
    except TypeError as error:
        assert wrong in str(error), f"{wrong} was refused without being named: {error}"
    else:
        raise AssertionError(f"{wrong}=1 was dropped: {config}")


@holds(
    fast=30,
    theta=st.sampled_from([1e4, 1e5, 1e6, 5e6]),
    layout=st.sampled_from(["transformers 4", "transformers 5"]),
    eps=st.sampled_from([1e-6, 1e-5]),
    eos=st.lists(st.integers(0, 9), min_size=1, max_size=2),
)
def test_config_files_are_read_as_they_are_written(
    theta: float, layout: str, eps: float, eos: list[int]
) -> None:
    """rope_theta, epsilon and end-of-sequence ids, where transformers 4 and 5 write them."""
    raw = json.loads((tiny() / "config.json").read_text()) | {
        "rms_norm_eps": eps,
        "eos_token_id": eos if len(eos) > 1 else eos[0],
    }
    raw = {
        key: value
        for key, value in raw.items()
        if key not in ("rope_theta", "rope_parameters", "rope_scaling")
    }
    raw |= (
        {"rope_theta": theta}
        if layout == "transformers 4"
        else {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        try:
            config = load_hf_config(Path(folder))
        except ValueError as error:
            raise AssertionError(f"a config as {layout} writes it is refused: {error}") from error
    found = config.rope_theta, config.rms_norm_eps, config.eos_token_ids
    assert found == (theta, eps, tuple(eos)), f"read as {found}"


SCENES = shapes().flatmap(lambda shape: st.tuples(st.just(shape), clients(shape.block_size)))


@holds(fast=80, scene=SCENES, policy=st.sampled_from(["fcfs", "priority"]), paced=st.booleans())
def test_every_client_gets_its_answer(
    scene: tuple[Shape, list[Client]], policy: str, paced: bool
) -> None:
    """Clients of AsyncLLM that come, read slowly, close and cancel at any time: each that stays gets
    exactly the tokens of a request that runs alone, once, in order, and their end; nobody waits for
    ever; all KV blocks come back.
    """
    shape, group = scene
    if shape.batching == "static":
        policy = "fcfs"
    answers, left = asyncio.run(serve_clients(shape, group, policy, paced))
    for client, answer in zip(group, answers, strict=True):
        check_answer(shape, client, answer)
    assert left["unfinished"] == 0, f"{left['unfinished']} requests are left in the scheduler"
    assert left["free"] == shape.num_blocks, (
        f"{shape.num_blocks - left['free']} blocks were not given back"
    )
    assert left["held"] == 0, f"{left['held']} places in the queue were not given back"


async def serve_clients(
    shape: Shape, group: list[Client], policy: str, paced: bool
) -> tuple[list[Any], dict[str, int]]:
    llm = AsyncLLM.over(ModelFreeLLM(shape, paced), scheduling_policy=policy)
    reading = [
        asyncio.ensure_future(read_or_leave(llm, client, f"client {i}"))
        for i, client in enumerate(group)
    ]
    pacing = asyncio.ensure_future(pace(llm)) if paced else None
    _, waiting = await asyncio.wait(reading, timeout=model_free_llm.PATIENCE_S)
    for task in waiting:
        task.cancel()
    # its threads, which are daemons, are left behind: to wait for them could take for ever
    assert not waiting, f"{len(waiting)} of {len(group)} clients wait for ever"
    answers = [await task for task in reading]
    if pacing is not None:
        pacing.cancel()

    def look(engine: Any) -> dict[str, int]:
        check_invariants(engine.scheduler)
        return {
            "unfinished": engine.scheduler.num_unfinished,
            "free": engine.scheduler.blocks.num_free,
        }

    # a paced engine stands still now; the other one may still work for those that left
    while not paced and await llm.between_steps(lambda engine: engine.has_unfinished_requests()):
        await asyncio.sleep(0.001)
    looking = asyncio.ensure_future(llm.between_steps(look))
    _, waiting = await asyncio.wait([looking], timeout=model_free_llm.PATIENCE_S)
    assert not waiting, "the step thread does not answer"
    left = {**looking.result(), "held": llm.num_unfinished}
    await llm.shutdown()
    return answers, left


def check_answer(
    shape: Shape, client: Client, answer: list[RequestOutput] | ValueError | None
) -> None:
    needed = -(-(len(client.prompt) + client.max_tokens) // shape.block_size)
    if answer is None:
        return  # cancelled
    if isinstance(answer, ValueError):
        assert needed > shape.num_blocks, f"a request that fits is refused: {answer}"
        return
    assert needed <= shape.num_blocks, "a request that can never run is served"
    expected = oracle(list(client.prompt), client.max_tokens, client.stops)
    got: list[int] = []
    for output in answer:
        tokens = output.outputs[0].token_ids
        if client.kind == "delta":
            got += tokens
        else:
            assert tokens[: len(got)] == got, "an answer was taken back"
            got = list(tokens)
        assert got == expected[: len(got)], f"got {got}, alone it gets {expected}"
    ends = [output.finished for output in answer]
    left_early = client.how == "close" and client.leaves is not None and len(ends) == client.leaves
    if left_early and not (ends and ends[-1]):
        return
    assert ends == [False] * (len(ends) - 1) + [True], f"the outputs say finished={ends}"
    assert got == expected, f"the stream ends after {got}, alone it gets {expected}"
    reason = "stop" if expected[-1] in client.stops else "length"
    assert answer[-1].outputs[0].finish_reason == reason, "it ended for another reason"
    if client.kind == "final_only":
        assert len(answer) == 1, f"{len(answer)} outputs where only the last was asked for"
