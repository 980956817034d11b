"""What log lines look like and what a request's line may contain."""

from __future__ import annotations

import json
import logging

import pytest

from srt.log import SHORT_CHARACTERS, JsonLines, TextLines, request_line

FACTS = {"rid": "r1", "prompt_tokens": 5000}
SAMPLING = {"temperature": 0.5}
TEXTS = {"prompt": "the secret " * 1000}


def record(message: str) -> logging.LogRecord:
    """A record as a module would make it."""
    return logging.LogRecord("srt.x", logging.INFO, __file__, 1, message, None, None)


def test_a_text_line_names_level_and_process() -> None:
    assert TextLines("srt:api").format(record("hello")).endswith(" INFO srt:api hello")


def test_further_lines_of_a_message_are_indented() -> None:
    assert TextLines("srt:api").format(record("a\nb")).endswith("a\n    b")


def test_a_json_line_is_one_object() -> None:
    line = JsonLines("srt:worker[0]").format(record('say "hi"\nthere'))
    assert "\n" not in line
    assert json.loads(line)["message"] == 'say "hi"\nthere'
    assert json.loads(line)["process"] == "srt:worker[0]"


@pytest.mark.parametrize("form", ["text", "json"])
def test_level_0_has_no_prompt_text_and_no_parameters(form: str) -> None:
    line = request_line("received", 0, form, FACTS, SAMPLING, TEXTS)
    assert "r1" in line and "5000" in line
    assert "secret" not in line and "temperature" not in line


def test_each_level_adds_to_the_one_below() -> None:
    lines = [json.loads(request_line("received", level, "json", FACTS, SAMPLING, TEXTS)) for level in range(4)]
    assert [sorted(line) for line in lines[:2]] == [
        ["event", "prompt_tokens", "rid"],
        ["event", "prompt_tokens", "rid", "temperature"],
    ]
    assert lines[2]["prompt"].startswith(TEXTS["prompt"][:SHORT_CHARACTERS] + "... (")
    assert lines[3]["prompt"] == TEXTS["prompt"]
