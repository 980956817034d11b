"""The options, the report and the exit status of `server eval`."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from srt.builtin.tasks import Example, evaluation_set
from srt.errors import StartupError
from srt.evaluation.ask import Answers
from srt.evaluation.client import Reply, ServerFacts
from srt.evaluation.command import EVALUATED, parser, report, run
from srt.evaluation.score import Asked, score


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--families", "sums"], "--families: unknown family 'sums', known are sum, difference"),
        (["--count", "0"], "--count: 0 is not between 1 and 1e+06"),
        (["--count", "few"], "--count: 'few' is not an integer"),
        (["--threshold", "97"], "--threshold: 97 is not between 0 and 1"),
        (["--cuont", "3"], "--cuont"),
        (["--families"], "--families"),
    ],
)
def test_a_wrong_option_is_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(StartupError) as caught:
        run(arguments)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_evaluated_family_is_asked_by_default() -> None:
    assert parser().parse_args([]).families == list(EVALUATED)
    assert "unknown" not in EVALUATED


def right(example: Example, seconds: float) -> Asked:
    return Asked(example, Reply(seconds, example.assistant_message(), "stop", tokens=10))


def test_figures_are_those_of_the_family() -> None:
    examples = evaluation_set("sum", 100)
    asked = [right(example, (index + 1) / 100) for index, example in enumerate(examples)]
    asked[0] = dataclasses.replace(asked[0], reply=Reply(0.01, {"content": "no"}, "stop", tokens=10, steps=2))
    row = score("sum", asked)
    assert (row.right, row.errors, row.accuracy, row.answer_tokens) == (99, 0, 0.99, 10)
    assert row.step_tokens == pytest.approx(1000 / 992)
    assert row.p50_s == pytest.approx(0.505)
    assert row.p99_s == pytest.approx(0.9901)


def test_the_report_shows_wrong_answers_and_fails_below_the_threshold(capsys: pytest.CaptureFixture[str]) -> None:
    sums, sorts = evaluation_set("sum", 2), evaluation_set("sort", 2)
    wrong = Asked(sums[1], Reply(0.5, {"content": "a lot"}, "stop", tokens=3))
    answers = Answers(
        ServerFacts("tiny", sees_images=False),
        {"sum": [right(sums[0], 0.5), wrong], "sort": [right(example, 0.5) for example in sorts]},
        skipped=("image_digit",),
    )
    assert report(answers, shown=1, threshold=0.97) == 1
    printed = capsys.readouterr()
    assert f"wrong, sum: {sums[1].messages[-1]['content']}" in printed.out
    assert "a lot" in printed.out
    assert "not asked: image_digit: tiny has no image understanding" in printed.out
    assert printed.err == "sum: 50.0 % is below --threshold 0.97\n"
    assert report(answers, shown=0, threshold=0.5) == 0
    assert report(answers, shown=0, threshold=None) == 0
    assert "wrong" not in capsys.readouterr().out


def test_evaluating_needs_no_torch() -> None:
    code = "import sys, srt.evaluation.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
