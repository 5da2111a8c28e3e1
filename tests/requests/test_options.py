"""Sampling options as a user meets them: n, stop strings, bias, bad words, penalties; under toggles
that reorder the work. property_tests/test_option_properties.py has what must hold for any of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, EngineConfig, LLMEngine, SamplingParams
from nanovllm.requests.options import SamplingParamsWithOptions

SMALL: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": 8,
    "kv_cache_memory_bytes": 1 << 23,
}
TOGGLES: list[dict[str, Any]] = [
    {},
    {"batching": "chunked", "overlap": True, "prefix_cache": True},
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPT = "Beautiful is better than ugly."


def greedy(**options: Any) -> SamplingParams:
    return dataclasses.replace(GREEDY, **options)


@pytest.fixture(scope="module")
def free(tiny: Path) -> tuple[str, list[int]]:
    """Text and tokens of the greedy answer to PROMPT."""
    with LLM(str(tiny), **SMALL) as llm:
        answer = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0]
    return answer.text, answer.token_ids


@pytest.mark.parametrize("toggles", TOGGLES, ids=["baseline", "everything"])
def test_a_stop_string_across_tokens(
    tiny: Path, free: tuple[str, list[int]], toggles: dict[str, Any]
) -> None:
    text, tokens = free
    with LLM(str(tiny), **SMALL, optimizations=toggles) as llm:
        assert llm.tokenizer is not None
        # from the middle of the fifth token to the middle of the seventh
        lengths = [len(llm.tokenizer.decode(tokens[:i])) for i in range(len(tokens) + 1)]
        begin, end = (lengths[4] + lengths[5]) // 2, (lengths[6] + lengths[7] + 1) // 2
        stop = text[begin:end]
        assert text.find(stop) == begin
        for include in (False, True):
            params = greedy(stop=stop, include_stop_str_in_output=include)
            other = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
            answer, beside = (
                output.outputs[0]
                for output in llm.generate([PROMPT, "Flat"], [params, other], use_tqdm=False)
            )
            assert answer.text == text[: end if include else begin]
            assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
            assert answer.token_ids == tokens[:7]
            assert (beside.finish_reason, len(beside.token_ids)) == ("length", 3)
        later = llm.generate(PROMPT, greedy(stop=[stop], min_tokens=10), use_tqdm=False)[0].outputs[
            0
        ]
        assert len(later.token_ids) >= 10
        if stop not in text[begin + 1 :]:
            assert (later.finish_reason, later.text) == ("length", text)


def test_a_stop_token_is_no_part_of_the_text(tiny: Path, free: tuple[str, list[int]]) -> None:
    text, tokens = free
    place = next(i for i in range(3, 20) if tokens[i] not in tokens[:i])
    with LLM(str(tiny), **SMALL) as llm:
        assert llm.tokenizer is not None
        params = greedy(stop_token_ids=[tokens[place]])
        answer = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]
        assert answer.token_ids == tokens[: place + 1]
        assert answer.text == llm.tokenizer.decode(tokens[:place])
        shown = greedy(stop_token_ids=[tokens[place]], include_stop_str_in_output=True)
        answer = llm.generate(PROMPT, shown, use_tqdm=False)[0].outputs[0]
        assert answer.text == llm.tokenizer.decode(tokens[: place + 1])
    assert text.startswith(answer.text)


def test_texts_that_grow_are_never_taken_back(tiny: Path) -> None:
    config = EngineConfig.from_kwargs(str(tiny), **SMALL)
    with LLMEngine(config) as engine:
        assert engine.tokenizer is not None
        # a character of four bytes, which the bias makes of four tokens
        ids = engine.tokenizer.encode("🙂").ids
        assert len(ids) > 1
        bias = dict.fromkeys(ids, 60.0)
        for name, params in {
            "plain": greedy(logit_bias=bias),
            "held": greedy(stop=["never to be found"], logit_bias=bias),
        }.items():
            engine.add_request(name, PROMPT, params)
        texts: dict[str, list[str]] = {"plain": [], "held": []}
        while engine.has_unfinished_requests():
            for output in engine.step():
                texts[output.request_id].append(output.outputs[0].text)
                if not output.finished:
                    assert not output.outputs[0].text.endswith("\ufffd")
    for grown in texts.values():
        assert all(b.startswith(a) for a, b in itertools.pairwise(grown))
    assert texts["plain"][-1] == texts["held"][-1]


def test_several_answers_to_a_prompt(tiny: Path) -> None:
    with LLM(str(tiny), **SMALL) as llm:
        params = SamplingParams(n=3, temperature=1.2, max_tokens=6, seed=7, ignore_eos=True)
        one = SamplingParams(temperature=1.2, max_tokens=6, ignore_eos=True)
        several, single, unseeded = llm.generate(
            [PROMPT, "Flat", PROMPT],
            [params, one, dataclasses.replace(params, seed=None)],
            use_tqdm=False,
        )
        assert [len(o.outputs) for o in (several, single, unseeded)] == [3, 1, 3]
        assert [answer.index for answer in several.outputs] == [0, 1, 2]
        assert several.finished
        assert several.prompt == PROMPT
        for i, answer in enumerate(several.outputs):
            alone = llm.generate(PROMPT, dataclasses.replace(one, seed=7 + i), use_tqdm=False)
            assert answer.token_ids == alone[0].outputs[0].token_ids
        assert len({tuple(answer.token_ids) for answer in unseeded.outputs}) == 3
        metrics = several.metrics
        assert metrics.first_token_time is not None
        assert metrics.finished_time is not None
        assert metrics.arrival_time < metrics.first_token_time <= metrics.finished_time
        with pytest.raises(ValueError, match=r"n=3; LLM.generate and LLM.chat serve that"):
            llm.add_request("x", PROMPT, params)


def test_the_largest_seed_has_a_successor() -> None:
    from nanovllm.requests.several import single

    params = SamplingParams(n=2, seed=2**63 - 1)
    assert [single(params, i).seed for i in range(2)] == [2**63 - 1, -(2**63)]


def test_bias_bad_words_and_min_tokens(tiny: Path, free: tuple[str, list[int]]) -> None:
    _, tokens = free
    with LLM(str(tiny), **SMALL) as llm:
        assert llm.tokenizer is not None

        def answer(**options: Any) -> list[int]:
            return llm.generate(PROMPT, greedy(**options), use_tqdm=False)[0].outputs[0].token_ids

        assert set(answer(logit_bias={77: 100.0})) == {77}
        assert tokens[0] not in answer(logit_bias={tokens[0]: -100})
        assert answer(stop_token_ids=[tokens[0]]) == tokens[:1]
        later = answer(stop_token_ids=[tokens[0]], min_tokens=5)
        assert tokens[0] not in later[:5]
        # a word of one token is never said; of a longer one the last token after the others
        word = next(t for t in tokens if llm.tokenizer.decode([t]).isalpha())
        assert word not in answer(bad_words=[llm.tokenizer.decode([word])])
        ids = llm.tokenizer.encode("ugly 🙂", add_special_tokens=False).ids
        pushed = {token: 50.0 - i for i, token in enumerate(ids)}
        said = llm.tokenizer.decode(answer(bad_words=["ugly 🙂"], logit_bias=pushed))
        assert "ugly 🙂" not in said
        flat = answer(logit_bias={5: 100, 6: 99, 7: 98}, presence_penalty=2.0)
        assert flat[:3] == [5, 6, 5] or flat[:3] == [5, 6, 7]


def test_log_probabilities_are_those_before_options(tiny: Path) -> None:
    with LLM(str(tiny), **SMALL) as llm:
        plain = llm.generate(PROMPT, greedy(logprobs=1, max_tokens=1), use_tqdm=False)[0].outputs[0]
        biased = llm.generate(
            PROMPT, greedy(logprobs=1, max_tokens=1, logit_bias={77: 100.0}), use_tqdm=False
        )[0].outputs[0]
    assert plain.logprobs is not None
    assert biased.logprobs is not None
    assert biased.token_ids == [77]
    assert biased.logprobs[0][plain.token_ids[0]].rank == 1
    assert biased.logprobs[0][77].rank > 1


@pytest.mark.parametrize("toggles", TOGGLES, ids=["baseline", "everything"])
def test_log_probabilities_of_prompts_are_those_of_hf(tiny: Path, toggles: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()
    # longer than a step's budget, shared, of one token, and short beside another that asks for more
    prompts = [[5 + i % 90 for i in range(80)], [5 + i % 90 for i in range(75)], [9], [7, 8, 9]]
    params = [
        greedy(prompt_logprobs=k, logprobs=own, max_tokens=3)
        for k, own in ((2, None), (0, 1), (2, None), (5, None))
    ]
    with LLM(str(tiny), **SMALL, optimizations=toggles) as llm:
        llm.generate(prompts, GREEDY, use_tqdm=False)  # their prefixes can be found now
        outputs = llm.generate([*prompts, [3, 4]], [*params, GREEDY], use_tqdm=False)
    assert outputs[-1].prompt_logprobs is None
    assert outputs[0].num_cached_tokens == 0
    assert [o.outputs[0].logprobs is None for o in outputs[:4]] == [True, False, True, True]
    for prompt, asked, output in zip(prompts, params, outputs, strict=False):
        found: Any = output.prompt_logprobs
        assert found[0] is None
        assert len(found) == len(prompt)
        with torch.inference_mode():
            expected = hf(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for place in range(1, len(prompt)):
            row, token = expected[place - 1], prompt[place]
            best = row.topk(asked.prompt_logprobs).indices.tolist()
            assert set(found[place]) == {token, *best}
            for name, value in found[place].items():
                assert value.logprob == pytest.approx(float(row[name]), abs=1e-4)
                assert value.rank == int((row >= row[name]).sum())
                assert value.decoded_token is not None


def test_a_preempted_request_keeps_what_it_has_said_in_mind(tiny: Path) -> None:
    params = [
        SamplingParams(
            temperature=0.8, seed=i, max_tokens=40, ignore_eos=True, frequency_penalty=1.5,
            repetition_penalty=1.3, logit_bias=dict.fromkeys(range(20, 30), 8.0),
        )
        for i in range(6)
    ]  # fmt: skip
    prompts = [[20 + i, 21, 22, 30 + i] for i in range(6)]
    small = {**SMALL, "max_num_seqs": 8}
    with LLM(str(tiny), **small, optimizations={"batching": "chunked"}) as llm:
        roomy = llm.generate(prompts, params, use_tqdm=False)
    small["kv_cache_memory_bytes"] = 14 * 4 * 2 * 2 * 64 * 8 * 4
    for overlap in (False, True):
        with LLM(
            str(tiny), **small, optimizations={"batching": "chunked", "overlap": overlap}
        ) as llm:
            llm.scheduler.forecast.asked = 1 << 40  # expects every request to end at once
            tight = llm.generate(prompts, params, use_tqdm=False)
            assert llm.stats()["preemptions"] > 0
        assert [o.outputs[0].token_ids for o in tight] == [o.outputs[0].token_ids for o in roomy]


def test_requests_without_options_load_and_keep_nothing(tiny: Path) -> None:
    with LLM(str(tiny), **SMALL) as llm:
        llm.generate(PROMPT, GREEDY, use_tqdm=False)
        assert llm.runner.processors is None
        llm.generate(PROMPT, greedy(stop="x"), use_tqdm=False)
        assert llm.runner.processors is None  # stop strings touch no logits
        llm.generate([PROMPT] * 4, greedy(presence_penalty=1.0), use_tqdm=False)
        assert len(llm.runner.processors.states) == 4
        llm.generate([PROMPT] * 4, GREEDY, use_tqdm=False)
        assert not llm.runner.processors.states


def test_params_are_vllms(tiny: Path) -> None:
    plain = SamplingParams(temperature=0.5)
    assert type(plain) is SamplingParams
    assert plain.n == 1
    more = SamplingParams(stop="a", bad_words=["b"], logit_bias={1: 2}, seed=3)
    assert isinstance(more, SamplingParams)
    assert isinstance(more, SamplingParamsWithOptions)
    assert (more.stop, more.bad_words, more.logit_bias, more.n) == (("a",), ("b",), {1: 2.0}, 1)
    assert pickle.loads(pickle.dumps(more)) == more
    assert pickle.loads(pickle.dumps(plain)) == plain
    assert dataclasses.replace(plain, n=2).n == 2  # type: ignore[call-arg]
    assert dataclasses.replace(more, temperature=0.5).stop == ("a",)
    assert SamplingParams(stop=None, logit_bias=None, min_tokens=0).max_tokens == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"n": 2, "temperature": 0}, "n=2 with temperature=0"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1.*from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"min_p": 1.5}, "min_p=1.5.*from 0 to 1"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1"),
        ({"min_tokens": 17}, "min_tokens=17 is more than max_tokens=16"),
        ({"stop": ""}, "stop=''"),
        ({"stop": ["a", ""]}, "stop="),
        ({"stop": [3]}, "stop="),
        ({"stop": "a", "detokenize": False}, "detokenize=False"),
        ({"bad_words": [None]}, "bad_words"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
    ],
)
def test_what_is_not_allowed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_options_that_a_model_cannot_serve(tiny: Path) -> None:
    with LLM(str(tiny), **SMALL) as llm:
        with pytest.raises(ValueError, match=r"token id 5000000; allowed are integers from 0 to"):
            llm.generate(PROMPT, greedy(logit_bias={5_000_000: 1.0}), use_tqdm=False)
        assert (
            llm.generate(PROMPT, greedy(detokenize=False), use_tqdm=False)[0].outputs[0].text == ""
        )
    with (
        LLM(str(tiny), **SMALL, skip_tokenizer_init=True) as llm,
        pytest.raises(ValueError, match="need a tokenizer"),
    ):
        llm.generate([[1, 2]], greedy(stop="x"), use_tqdm=False)


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize("how", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}], ids=str)
def test_ranks_and_replicas_serve_options(tiny: Path, how: dict[str, int]) -> None:
    ids = [[5 + i % 50 for i in range(40)], [7, 8, 9]]
    params = [
        SamplingParams(
            n=2, temperature=0.7, seed=3, max_tokens=None, repetition_penalty=1.2, stop=["e", "t"]
        ),
        greedy(prompt_logprobs=1, logit_bias={70: 9.0}, frequency_penalty=2.0, bad_words=["the"]),
    ]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    message = [{"role": "user", "content": PROMPT}]
    found = []
    for more in ({}, how):
        with LLM(str(tiny), **SMALL, **more) as llm:
            several, one = llm.generate(ids, params, use_tqdm=False)
            (said,) = llm.chat(message, GREEDY, use_tqdm=False, chat_template=template)
            assert type(llm.get_tokenizer()).__name__.endswith(("Tokenizer", "TokenizerFast"))
        found.append((several, one, said))
    for ours, theirs in zip(*found, strict=True):
        for a, b in zip(ours.outputs, theirs.outputs, strict=True):
            assert (a.token_ids, a.text, a.stop_reason) == (b.token_ids, b.text, b.stop_reason)
    prompts: Any = [one.prompt_logprobs for _, one, _ in found]
    for a, b in zip(*prompts, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.keys() == b.keys()
            assert [x.logprob for x in a.values()] == pytest.approx(
                [x.logprob for x in b.values()], abs=1e-4
            )
