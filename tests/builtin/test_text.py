"""The tokenizer and the chat template of the built-in model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from srt.builtin.tasks import EFFORTS, FAMILIES, draw_group, read_completion
from srt.builtin.tasks.words import word
from tools.builtin import text

TINY = Path(__file__).parents[2] / "srt" / "builtin" / "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The tokenizer as the package ships it."""
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


def test_the_shipped_text_files_are_what_the_code_makes(tokenizer: Tokenizer) -> None:
    assert tokenizer.to_str() == text.build_tokenizer().to_str()
    assert (TINY / "chat_template.jinja").read_text() == text.TEMPLATE_FILE.read_text()


@pytest.mark.parametrize(
    "sample", ["", "plain words", "  two  spaces\n\n\ttab", "naïve 漢字 🙂 Ωμέγα", '{"a": [1, 2.5]}', "\x00\x7f"]
)
def test_any_text_survives_a_round_trip(tokenizer: Tokenizer, sample: str) -> None:
    ids = tokenizer.encode(sample, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == sample


def test_digits_and_made_up_words_are_seen_one_by_one(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("4821", add_special_tokens=False).ids) == 4
    assert len(tokenizer.encode(" qwzrtu", add_special_tokens=False).ids) == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rendered_chat_reads_back(tokenizer: Tokenizer, family: str) -> None:
    rng = random.Random(11)
    for _ in range(5):
        example = draw_group(family, rng, split="train")[0]
        prompt, whole = text.render_prompt(example), text.render_whole(example)
        assert prompt.endswith(text.GENERATION_PROMPT)
        assert whole.startswith(prompt)
        assert whole.endswith("<|im_end|>")
        completion = whole[len(prompt) :].removesuffix("<|im_end|>")
        assert example.check(read_completion(completion, example.tools).message())
        ids = tokenizer.encode(whole, add_special_tokens=False).ids
        assert (
            ids[: len(tokenizer.encode(prompt, add_special_tokens=False).ids)]
            == tokenizer.encode(prompt, add_special_tokens=False).ids
        )


def test_effort_stands_in_the_system_block_and_changes_the_reasoning() -> None:
    rng = random.Random(2)
    lengths: dict[str, list[int]] = {effort: [] for effort in EFFORTS}
    while min(map(len, lengths.values())) < 5:
        example = draw_group("sort", rng, split="train")[0]
        if example.effort:
            assert f"<|im_start|>system\nReasoning: {example.effort}\n\n" in text.render_prompt(example)
            lengths[example.effort].append(len(example.thinking))
    low, medium, high = (sum(lengths[effort]) / len(lengths[effort]) for effort in EFFORTS)
    assert low < medium < high


def test_words_come_in_all_the_stated_lengths() -> None:
    rng = random.Random(0)
    assert {len(word(rng)) for _ in range(2000)} == set(range(3, 9))
