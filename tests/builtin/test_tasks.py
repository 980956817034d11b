"""The task families: the same from one seed, split for good, and checked strictly."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image

from srt.builtin.tasks import FAMILIES, Call, Example, draw, draw_group, evaluation_set, read_completion
from srt.builtin.tasks.drawing import canvas_size
from srt.builtin.tasks.example import belongs


def shown(example: Example) -> tuple[Any, ...]:
    """Everything of an example that can be compared."""
    pixels = tuple(picture.pixels.tobytes() for picture in example.pictures)
    return (example.key, str(example.messages), str(example.tools), example.answer, example.calls, pixels)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_seed_always_gives_the_same_prompts(family: str) -> None:
    if FAMILIES[family].evaluated:
        first, again = evaluation_set(family, 4, seed=7), evaluation_set(family, 4, seed=7)
        assert [shown(example) for example in first] == [shown(example) for example in again]
        assert shown(evaluation_set(family, 1, seed=7, start=2)[0]) == shown(first[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_answer_passes_and_a_wrong_one_does_not(family: str) -> None:
    rng = random.Random(family)
    for _ in range(10):
        example = draw_group(family, rng, split="train")[0]
        message = example.assistant_message()
        assert example.check(message)
        assert not example.check({"content": message["content"] + " 1", "tool_calls": [{}]})
        if example.calls:
            assert not example.check({"content": "", "tool_calls": message["tool_calls"][:-1]})
            wrong = {**dict(example.calls[0].arguments), "extra": 1}
            assert not example.check(
                {"tool_calls": [{"function": {"name": example.calls[0].name, "arguments": wrong}}]}
            )
        else:
            assert not example.check({"content": example.answer[:-1]})
            assert not example.check({"content": example.answer.replace(" ", "  ") + "x"})


def test_calls_are_compared_with_the_types_of_their_arguments() -> None:
    example = Example("tool_call", "", [], "", calls=(Call("add", {"a": 1, "b": 2}),))
    good = {"tool_calls": [{"function": {"name": "add", "arguments": '{"b": 2, "a": 1}'}}]}
    as_text = {"tool_calls": [{"function": {"name": "add", "arguments": '{"a": "1", "b": 2}'}}]}
    broken = {"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1'}}]}
    assert example.check(good)
    assert not example.check(as_text)
    assert not example.check(broken)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.closed])
def test_training_and_evaluation_never_share_a_problem(family: str) -> None:
    rng = random.Random(3)
    trained = {example.key for _ in range(150) for example in draw_group(family, rng, split="train", size=3)}
    asked = [draw(family, rng) for _ in range(40 if FAMILIES[family].evaluated else 0)]
    assert not trained & {example.key for example in asked}
    assert all(belongs(example, "eval") for example in asked)


def test_images_keep_to_the_stated_sizes() -> None:
    rng = random.Random(5)
    for _ in range(500):
        width, height = canvas_size(rng)
        assert 48 <= min(width, height) <= max(width, height) <= 1200
        assert max(width, height) / min(width, height) <= 3.05


def test_an_image_travels_as_a_file_that_decodes_to_its_pixels() -> None:
    example = next(item for item in evaluation_set("image_object", 20) if item.pictures[0].format == "JPEG")
    part = example.openai_messages()[0]["content"]
    assert any(piece.get("image_url", {}).get("url", "").startswith("data:image/jpeg;base64,") for piece in part)
    assert isinstance(example.pictures[0].pixels, Image.Image)


def test_a_completion_is_taken_apart() -> None:
    tools = draw("tool_joined", random.Random(1)).tools
    call = "<tool_call>\n<function=find_code>\n<parameter=word>\npear\n</parameter>\n</function>\n</tool_call>"
    text = f"plan\n</think>\n{call}"
    answer = read_completion(text, tools)
    assert answer.reasoning == "plan"
    assert answer.content == ""
    assert answer.calls == (("find_code", {"word": "pear"}),)
    assert read_completion("never closed").content == ""


def test_the_tasks_need_no_torch() -> None:
    program = "import sys, srt.builtin.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
