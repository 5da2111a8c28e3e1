"""A wrong study is refused before anything runs, in words that name the file, the key and what is
allowed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.study import spec
from experiments.study.yaml_files import SpecError, names

STUDY = """
name: five-lines
title: A study
question: Does it help?
settings: {max_num_seqs: 8, max_num_batched_tokens: 512, max_model_len: 512, block_size: 16}
factors: {prefix_cache: {levels: on}, batching: {levels: [continuous, chunked]}}
workloads: {scaled: {kind: random, num_requests: 8}}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "five-lines.yaml"
    path.write_text(STUDY)
    return path


def test_every_study_and_profile_of_the_repository_is_valid() -> None:
    for name in names(spec.STUDIES):
        assert spec.load_study(name)[0].name == name
    for name in names(spec.PROFILES):
        assert spec.load_profile(name).name == name


def test_on_and_off_are_levels(study: Path) -> None:
    """YAML reads `on` as true."""
    loaded, _ = spec.load_study(study)
    assert loaded.factors["prefix_cache"].levels == ["on"]
    assert loaded.factors["prefix_cache"].baseline == "off"
    reversed_, _ = spec.load_study(study, ["factors.prefix_cache={levels: [off], baseline: on}"])
    assert (
        reversed_.factors["prefix_cache"].levels,
        reversed_.factors["prefix_cache"].baseline,
    ) == (["off"], "on")


def test_factors_are_those_of_the_engine() -> None:
    assert spec.FACTORS["prefix_cache"] == ("off", "on")
    assert spec.FACTORS["tensor_parallel_size"][0] == 1


def test_overrides_are_applied_and_returned(study: Path) -> None:
    loaded, applied = spec.load_study(
        study, ["design.blocks=3", "workloads.scaled.num_requests=16"]
    )
    assert loaded.design.blocks == 3
    assert loaded.workloads["scaled"].params["num_requests"] == 16
    assert applied == {"design.blocks": 3, "workloads.scaled.num_requests": 16}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("metrik=x", "metrik: unknown key .did you mean metric..; allowed: name, title"),
        (
            "factors.prefix_cach={levels: on}",
            "prefix_cach: unknown factor .did you mean prefix_cache..; allowed: attention",
        ),
        (
            "factors.prefix_cache.level=on",
            "factors.prefix_cache.level: unknown key .did you mean levels.",
        ),
        (
            "factors.batching.levels=[chunky]",
            "batching: 'chunky' is not a level .did you mean chunked..; allowed: static, continuous, chunked",
        ),
        ("factors.batching.levels=[static]", "batching: levels static must differ"),
        (
            "factors.batching.workloads=[mixed]",
            "'mixed' is not a workload of this study; allowed: scaled",
        ),
        ("design.blocks=1", "design.blocks: Input should be greater than or equal to 2 .given: 1."),
        ("metric=speed", "metric: Input should be 'output_tokens_per_s'.*given: 'speed'"),
        (
            "workloads.scaled.num_requests=many",
            "workloads.scaled: num_requests: 'many' is not allowed; allowed: a whole number",
        ),
        (
            "workloads.scaled={num_requests: 2}",
            "workloads.scaled: a workload is a mapping with `kind`",
        ),
        (
            "cells.hf={role: reference, engine: hv}",
            "cells.hf.engine: unknown engine 'hv'; allowed: nanovllm, hf",
        ),
        (
            "cells.hf={role: treatment, engine: hf}",
            "cells.hf: role 'treatment' does not fit engine 'hf'",
        ),
        (
            "cells.aa={role: all, levels: {batching: chunked}}",
            "cells.aa: the design makes a cell of this name",
        ),
        (
            "cells.all={role: all, levels: {overlap: on}}",
            "cells.all.levels: 'overlap' is not a factor of this study",
        ),
        ("cells.all={role: all}", "cells.all: a cell of role all needs `levels`"),
        ("settings.max_num_seqs=0", "settings.max_num_seqs: .*greater than or equal to 1"),
        ("name=Not A Name", "name: String should match pattern"),
        (
            "design.kind=leave_one_in",
            "design.kind: Input should be 'one_at_a_time', 'add_one_in'.*given: 'leave_one_in'",
        ),
        ("design.blocks=41", "design.blocks: Input should be less than or equal to 40 .given: 41."),
        (
            "design={blocks: 3, bootstrap: true}",
            "design: blocks: 3 is too few for bootstrap intervals; use 6 to 40",
        ),
        (
            "design.resolution=4",
            "design: resolution and generators are only allowed with kind: fractional_factorial, not one_at_a_time",
        ),
        (
            "design.kind=listed",
            "design.kind: listed runs only the study's `cells`, and it has none",
        ),
        (
            "design.kind=fractional_factorial",
            "factors.batching.levels: a fractional factorial has one level besides the baseline, not 2",
        ),
        ("factors.prefix_cache.baseline=", "factors.prefix_cache.baseline: must not be empty"),
        (
            "factors.prefix_cache.levels=[off, on]",
            "levels off, on must differ from each other and from the baseline, off, which runs",
        ),
        (
            "fixed={batching: chunked}",
            "fixed.batching: not an optimization, or already a factor of this study; allowed: attention_backend, kern",
        ),
        (
            "fixed={kernels: cuda}",
            "fixed.kernels: 'cuda' is not a level; allowed: torch, compile, triton",
        ),
        (
            "validity.throttle=[heat]",
            "validity.throttle.0: Input should be 'hw_slowdown'.*given: 'heat'",
        ),
    ],
)
def test_errors_name_the_file_the_key_and_what_is_allowed(
    study: Path, override: str, message: str
) -> None:
    with pytest.raises(SpecError, match=rf"five-lines.yaml(:\d+)? .with overrides.*{message}"):
        spec.load_study(study, [override])


def test_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.yaml"
    path.write_text(
        "name: lines\n"
        "factors:\n"
        "  batching:\n"
        "    levels:\n"
        "      - continuous\n"
        "      - chunky\n"
        "workloads:\n"
        "  short:\n"
        "    kind: random\n"
        "    num_requests: many\n"
        "metrik: x\n"
        "design:\n"
        "  blocks: 1\n"
    )
    with pytest.raises(SpecError) as raised:
        spec.load_study(path)
    found = str(raised.value)
    assert (
        "lines.yaml:6: factors: batching: 'chunky' is not a level (did you mean chunked?)" in found
    )
    assert "lines.yaml:10: workloads.short: num_requests: 'many' is not allowed" in found
    assert "lines.yaml:11: metrik: unknown key (did you mean metric?)" in found
    assert "lines.yaml:13: design.blocks: Input should be greater" in found
    overrides = [
        "metrik=x",
        "factors.batching.levels=[chunked, static]",
        "workloads.short.num_requests=4",
    ]
    with pytest.raises(SpecError) as raised:
        spec.load_study(path, overrides)
    found = str(raised.value)
    assert "lines.yaml (with overrides metrik, " in found, "a value of the command line has no line"
    assert "lines.yaml:13 (with overrides metrik, " in found


THREE = (
    "factors={prefix_cache: {levels: on}, batching: {levels: chunked}, kernels: {levels: compile}}"
)
FOUR = THREE[:-1] + ", overlap: {levels: on}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [THREE, "design={kind: fractional_factorial}"],
            "3 factors have no fraction of resolution 4; use kind: full_factorial .8",
        ),
        (
            [
                FOUR,
                "design={kind: fractional_factorial, generators: {cuda_graphs: [kernels, overlap]}}",
            ],
            "design.generators.cuda_graphs: not a factor of this study; allowed: prefix_cache, batching",
        ),
        (
            [
                FOUR,
                "design={kind: fractional_factorial, generators: {overlap: [kernels, kernels]}}",
            ],
            "design.generators.overlap: kernels, kernels; allowed: two or more different "
            "factors that have no generator themselves: prefix",
        ),
        (
            [
                FOUR,
                "design={kind: fractional_factorial, generators: {overlap: [kernels, batching]}}",
            ],
            "design.generators: their resolution is 3, but design.resolution is 4",
        ),
    ],
)
def test_a_fraction_that_is_none_is_refused(
    study: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        spec.load_study(study, overrides)


def test_stated_generators_are_taken(study: Path) -> None:
    design = "design={kind: fractional_factorial, resolution: 3, generators: {overlap: [kernels, batching]}}"
    loaded, _ = spec.load_study(study, [FOUR, design])
    assert loaded.generators({name: factor.levels for name, factor in loaded.factors.items()}) == {
        "overlap": ["kernels", "batching"]
    }


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SpecError,
        match=r"embeded: no such study .did you mean embedded..; give the path of a YAML file, or a name from .*embedded",
    ):
        spec.load_study("embeded")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(SpecError, match=r"broken.yaml: not valid YAML"):
        spec.load_study(broken)
    broken.write_text("name: x")
    with pytest.raises(SpecError, match=r"broken.yaml: factors: missing"):
        spec.load_study(broken)
    with pytest.raises(SpecError, match="write KEY=VALUE"):
        spec.load_study("embedded", ["blocks"])
    with pytest.raises(SpecError, match="'name' is not a mapping"):
        spec.load_study("embedded", ["name.x=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            STUDY + "design: {blocks: 6}\nseed: 1\ndesign: {blocks: 2}\n",
            r"'design' in lines 8 and 10: keep one",
        ),
        (
            STUDY.replace("prefix_cache: {levels: on}", "batching: {levels: [static]}"),
            r"'batching' in lines 6 and 6",
        ),
        ("name: a\n1: x\n1: y\n", r"key 1 in lines 2 and 3"),
        ("name: a\nyes: 1\ntrue: 2\n", r"key True in"),
        ("? [a]\n: b\n", r"not valid YAML"),
        ("name: 2026-99-99\n", r"not valid YAML: month must be in"),
        ("name: &x [*x]\n", r"five-lines\.yaml: "),
        ("name: " + "[" * 3000 + "]" * 3000, r"not valid YAML: .*nested"),
        ("name: \t- a\n\tb", r"not valid YAML"),
        ("", r"must be a mapping"),
    ],
)
def test_yaml_that_says_two_things_or_none(study: Path, text: str, message: str) -> None:
    study.write_text(text)
    with pytest.raises(SpecError, match=message):
        spec.load_study(study)


def test_a_merge_key_may_be_overridden(study: Path) -> None:
    """`<<` brings defaults, which are there to be written again."""
    common = "{kind: random, num_requests: 8, prompt_tokens: 4, output_tokens: 4}"
    text = (
        STUDY.split("workloads:")[0]
        + f"workloads:\n  a: &a {common}\n  b:\n    <<: *a\n    num_requests: 2\n"
    )
    study.write_text(text)
    assert spec.load_study(study)[0].workloads["b"].params["num_requests"] == 2


def test_a_file_in_another_encoding_is_a_message(study: Path) -> None:
    study.write_bytes(STUDY.replace("A study", "Größe").encode("latin-1"))
    with pytest.raises(SpecError, match=r"not valid YAML: .*utf-8"):
        spec.load_study(study)


def test_an_override_says_a_key_once(study: Path) -> None:
    with pytest.raises(SpecError, match=r"'blocks' in lines 1 and 1"):
        spec.load_study(study, ["design={blocks: 2, blocks: 3}"])
