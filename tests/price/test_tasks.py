"""The tasks, and the statistics of a paired comparison, on drawn data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import comb
from pathlib import Path

import pytest

from experiments.price import tasks
from experiments.price.tasks import DEPTHS, Question, by_task, is_right, paired, questions, right


def solved(prompts: Sequence[str]) -> list[str]:
    """The right answers, found from the prompts alone."""
    answers = []
    for prompt in prompts:
        last = prompt.rsplit("\n", 1)[-1]
        if "+" in last:
            a, b = last.removesuffix(" =").split(" + ")
            answers.append(f" {int(a) + int(b)}\n1 + 1 = 2")
        elif last == "Copy:":
            answers.append(" " + prompt.split("\n")[-2].removeprefix("Input: ") + "\n")
        else:
            line = next(line for line in prompt.split("\n") if line.startswith(last))
            answers.append(line.removeprefix(last))
    return answers


def test_every_question_can_be_answered_from_its_prompt() -> None:
    asked = questions(each=20)
    assert len(asked) == 20 * (2 + len(DEPTHS))
    assert all(right(asked, solved))
    assert not any(right(asked, lambda prompts: [" 7"] * len(prompts))[20:])


def test_questions_are_the_same_for_a_seed() -> None:
    assert questions(5, seed=1) == questions(5, seed=1) != questions(5, seed=2)


def test_the_fact_is_where_its_depth_says() -> None:
    for depth in DEPTHS:
        question = tasks.retrieval(random.Random(0), 41, depth)
        lines = question.prompt.split("\n")[:-1]
        (at,) = [i for i, line in enumerate(lines) if f"code {question.answer}." in line]
        assert at == round(40 * depth)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (" 12\n", "12", True),
        ("12.", "12", True),
        ("123", "12", False),
        (" 112", "12", False),
        ("amber  bridge\n", "amber bridge", True),
        ("amber bridges", "amber bridge", False),
        ("", "12", False),
    ],
)
def test_an_answer_is_right_as_a_whole_or_not(text: str, answer: str, expected: bool) -> None:
    assert is_right(text, answer) is expected


def test_mcnemar_is_the_exact_binomial_test_of_the_questions_that_differ() -> None:
    before = [True] * 60 + [True] * 9 + [False] * 2 + [False] * 29
    after = [True] * 60 + [False] * 9 + [True] * 2 + [False] * 29
    found = paired(before, after)
    assert (found.before, found.after, found.lost, found.gained) == (69, 62, 9, 2)
    exact = 2 * sum(comb(11, k) for k in range(3)) / 2**11
    assert found.p == pytest.approx(exact)
    # Clopper and Pearson: a share at which 9 or fewer of 100 have probability 5 %
    share = found.most_lost
    assert sum(comb(100, k) * share**k * (1 - share) ** (100 - k) for k in range(10)) == (
        pytest.approx(0.05, rel=1e-6)
    )


def test_no_difference_is_no_proof_of_equality() -> None:
    few, many = paired([True] * 20, [True] * 20), paired([True] * 200, [True] * 200)
    assert few.p == many.p == 1
    assert few.verdict() == "undecided"
    assert many.verdict() == "within margin"
    assert paired([True] * 200, [True] * 150 + [False] * 50).verdict() == "worse"
    assert paired([True] * 20, [False] * 20).most_lost == 1.0


def test_gains_do_not_pay_for_losses() -> None:
    before, after = [True] * 20 + [False] * 20, [False] * 20 + [True] * 20
    found = paired(before, after)
    assert found.p == 1
    assert found.verdict() == "undecided"


def test_false_alarms_and_false_comfort_are_at_most_the_level() -> None:
    """Drawn data: engines that are equally good but differ; and one that loses exactly the margin."""
    rng = random.Random(0)
    alarms = comfort = 0
    for _ in range(1000):
        quality = [rng.random() for _ in range(80)]
        before, after = ([rng.random() < q for q in quality] for _ in range(2))
        alarms += paired(before, after).p <= 0.05
        lost = [rng.random() < 0.05 for _ in range(200)]
        comfort += paired([True] * 200, [not x for x in lost]).verdict(0.05) == "within margin"
    assert alarms <= 65
    assert comfort <= 65


def test_tasks_are_compared_one_by_one() -> None:
    asked = [Question("a", "", ""), Question("b", "", ""), Question("a", "", "")]
    found = by_task(asked, [True, True, True], [True, False, True])
    assert {task: row.lost for task, row in found.items()} == {"a": 0, "b": 1}
    assert "undecided" in tasks.table(found)


@pytest.mark.parametrize(("before", "after"), [([True], [True, False]), ([], [])])
def test_results_that_do_not_pair_are_refused(before: list[bool], after: list[bool]) -> None:
    with pytest.raises(ValueError, match="as many of both"):
        paired(before, after)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="one question or more"):
        questions(0)
    with pytest.raises(ValueError, match="2 answers to 1 questions"):
        right([Question("a", "", "")], lambda prompts: ["", ""])


def test_the_command_compares_two_engines(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A seeded model answers nothing, with batching or without: nothing is lost."""
    assert tasks.main([str(tiny), "batching=continuous", "--each", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("task")
    assert len(lines) == 1 + 2 + len(DEPTHS)
    with pytest.raises(SystemExit):
        tasks.main([str(tiny), "batching"])
