"""Workloads from files: what a line may say, what arrives at the engine, and a plan that needs the file no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import workload_files, workloads
from experiments.study.plan import build_plan
from experiments.study.prompts import tokenize_here
from experiments.study.spec import ModelChoice, Study, load_profile
from experiments.study.yaml_files import SpecError

SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0, 0.25, 1.0]),
    "top_k": st.integers(0, 50),
    "top_p": st.sampled_from([0.1, 1.0]),
    "ignore_eos": st.booleans(),
}
TOKENS = st.lists(st.integers(0, 2047), min_size=1, max_size=20)
PROMPT = st.fixed_dictionaries(
    {"prompt_token_ids": TOKENS},
    optional={"output_tokens": st.integers(1, 50), "kind": st.text(max_size=3)},
)


def write(folder: Path, lines: list[Any]) -> str:
    file = folder / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@settings(max_examples=50, deadline=None)
@given(
    lines=st.lists(PROMPT, min_size=1, max_size=6),
    default=st.integers(1, 99),
    sampling=st.fixed_dictionaries({}, optional=SAMPLING),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_every_line_and_parameter_arrives_at_every_request(
    folder: Path,
    lines: list[dict[str, Any]],
    default: int,
    sampling: dict[str, Any],
    seed: int,
    data: st.DataObject,
) -> None:
    first = data.draw(st.none() | st.integers(1, len(lines)))
    params = {
        "path": write(folder, lines),
        "num_requests": first,
        "default_output_tokens": default,
        "seed": seed,
        **sampling,
    }
    built = workloads.build("w", "file", params)
    (wave,) = built["waves"]
    assert [r["prompt_token_ids"] for r in wave] == [
        line["prompt_token_ids"] for line in lines[:first]
    ]
    assert [r["max_tokens"] for r in wave] == [
        line.get("output_tokens", default) for line in lines[:first]
    ]
    expected = workloads.DEFAULTS["file"] | sampling
    assert all(r[name] == expected[name] for r in wave for name in SAMPLING)  # type: ignore[literal-required]
    Path(params["path"]).unlink()
    entry = workloads.summarize(built)
    assert workloads.rebuild("w", entry) == built, "a plan needs the file no more"
    other = workloads.build("w", "file", entry["params"] | {"seed": seed ^ 1})
    assert other["requests_digest"] != built["requests_digest"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"lines.jsonl, line 2: no JSON"),
        ("[" * 100_000, "line 2: no JSON"),
        ('{"prompt": "\\ud83d"}', r"line 2: half of a character .*allowed: whole"),
        ('"text"', r"line 2: a str; allowed: a JSON object"),
        ("{}", r"line 2: no prompt; allowed: exactly one of prompt, messages"),
        (
            '{"prompt": "a", "messages": []}',
            "line 2: prompt and messages; allowed: exactly",
        ),
        ('{"prompt": ""}', 'line 2: prompt: "" is not allowed; allowed: a text'),
        ('{"promt": "a"}', "line 2: promt: unknown key; allowed: one of prompt,"),
        ('{"messages": [{"role": "user"}]}', r'line 2: messages: .*allowed: a list of {"r'),
        ('{"prompt_token_ids": [1, -1]}', r"prompt_token_ids: \[1, -1\] is not allowed"),
        (
            '{"prompt": "a", "output_tokens": 0}',
            "output_tokens: 0 .*allowed: a whole number",
        ),
    ],
)
def test_a_wrong_line_is_named_with_what_is_allowed(
    tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "lines.jsonl").write_text(f'{{"prompt_token_ids": [1]}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        workloads.build("w", "file", {"path": str(tmp_path / "lines.jsonl")})


def test_wrong_files_and_parameters(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'evryday' is no file .*did you mean everyday\?.*library"
    ):
        workloads.build("w", "file", {"path": "evryday"})
    with pytest.raises(ValueError, match="path: None is not allowed; allowed: the name of a file"):
        workloads.build("w", "file", {"path": None})
    with pytest.raises(ValueError, match=r"num_requests: 51 .*at most the 50 lines"):
        workloads.build("w", "file", {"num_requests": 51})
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no line"):
        workloads.build("w", "file", {"path": str(tmp_path / "empty.jsonl")})
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="no text in UTF-8"):
        workloads.build("w", "file", {"path": str(tmp_path / "latin.jsonl")})
    with pytest.raises(ValueError, match="content: not what a plan holds"):
        workloads.build("w", "file", {"content": "abc"})
    with pytest.raises(ValueError, match="prompts are texts; they become token ids when a plan"):
        workloads.build("w", "file", {"num_requests": 1})


def test_a_text_may_hold_any_character(tmp_path: Path) -> None:
    """Python's own splitlines would end a line at U+2028, which JSON allows in a text."""
    line = json.dumps({"prompt": "a\u2028b\x0cc"}, ensure_ascii=False)
    (tmp_path / "lines.jsonl").write_text(line + "\n", encoding="utf-8-sig")
    content = workload_files.read(str(tmp_path / "lines.jsonl"), None, 100)
    assert workload_files.unpack(content) == [{"prompt": "a\u2028b\x0cc"}]


@pytest.mark.parametrize("name", [file.stem for file in workload_files.PROMPTS.glob("*.jsonl")])
def test_the_sets_of_the_project_are_well_formed(name: str) -> None:
    lines = workload_files.unpack(workload_files.read(name, None, workloads.MOST_OF))
    texts = [json.dumps(line, sort_keys=True) for line in lines]
    assert len(set(texts)) == len(texts) >= 8
    assert all("output_tokens" in line for line in lines)


def study(**work: Any) -> Study:
    return Study.model_validate(
        {
            "name": "real-prompts",
            "factors": {"prefix_cache": {"levels": ["on"]}},
            "workloads": {"text": {"kind": "file", "temperature": 0, **work}},
            "design": {"blocks": 2},
        }
    )


def test_a_plan_holds_the_token_ids_of_its_model(tiny: Path) -> None:
    plan = build_plan(
        study(num_requests=6), load_profile("cpu"), ModelChoice(preset="tiny", dtype="float32")
    )
    entry = plan["workloads"]["text"]
    (wave,) = workloads.rebuild("text", entry)["waves"]
    from nanovllm.engine.llm_engine import load_tokenizer

    tokenizer = load_tokenizer(str(tiny))
    lines = workload_files.unpack(workload_files.read("everyday", 6, 1000))
    assert [r["prompt_token_ids"] for r in wave] == [
        tokenizer.encode(line["prompt"]).ids for line in lines
    ]
    assert entry["num_requests"] == 6
    starts = {tuple(r["prompt_token_ids"][:100]) for r in wave}
    assert len(starts) == 1, "six questions about one text share its beginning"


def test_a_conversation_needs_a_chat_template(tiny: Path) -> None:
    with pytest.raises(SpecError, match=r"workload text: its prompts .*has no chat template"):
        build_plan(
            study(path="library-desk"),
            load_profile("cpu"),
            ModelChoice(preset="tiny", dtype="float32"),
        )


def test_token_ids_of_another_model_are_refused(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"prompt_token_ids": [1, 49151], "output_tokens": 4}\n')
    with pytest.raises(SpecError, match=r"token id 49151, but the model's vocabulary has 2048"):
        build_plan(
            study(path=str(tmp_path / "ids.jsonl")),
            load_profile("cpu"),
            ModelChoice(preset="tiny", dtype="float32"),
        )


def test_a_prompt_can_be_what_a_user_says(tmp_path: Path, tiny: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    lines = [
        {"prompt": "Why?", "output_tokens": 3},
        {"messages": [{"role": "user", "content": "Why?"}]},
        {"prompt_token_ids": [5]},
    ]
    packed = workload_files.pack(lines)
    first, second, third = workload_files.unpack(tokenize_here(str(tmp_path), packed, as_chat=True))
    assert first["prompt_token_ids"] == second["prompt_token_ids"]
    assert first["output_tokens"] == 3
    assert third == {"prompt_token_ids": [5]}
    plain, *_ = workload_files.unpack(tokenize_here(str(tmp_path), packed, as_chat=False))
    assert len(plain["prompt_token_ids"]) < len(first["prompt_token_ids"])
