"""The tokenizer and the chat template of the built-in model, and what they make of an example."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Final

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from srt.builtin.tasks import Example, words

TEMPLATE_FILE: Final = Path(__file__).with_name("chat_template.jinja")
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"  # noqa: RUF001
TURN_START, TURN_END, PATCH = "<|im_start|>", "<|im_end|>", "<im_patch>"
CONTROL: Final = (
    TURN_START, TURN_END, "<im_start>", "<im_end>", PATCH, "<patch_start>", "<patch_end>", "<patch_newline>",
)  # fmt: skip
# Plain text to a client, one token to the model.
VISIBLE: Final = (
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>", "<tools>", "</tools>",
)  # fmt: skip
GENERATION_PROMPT: Final = "<|im_start|>assistant\n<think>\n"
SPECIAL: Final = (BOS, EOS, PAD, *CONTROL)
VOCABULARY: Final = 512

# A word with the space before it, one digit, a run of punctuation, or white space.
_PIECES: Final = r" ?[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]+|\s"
# Words with the space before them, and words that start a line or follow a mark.
_AFTER_SPACE: Final = (
    "These functions can be called Each line is the JSONSchema of one function call looks like this give each "
    "parameter its own lines a only with parameters and write for code word to from name age weather in add up "
    "image are you what look use tool an Again again so The What result see find city get done say hello not learned "
    "no low medium high helpful assistant I am small built model srt subtract multiply sort count reverse words "
    "remember codes tools at images did learn that have numbers these digit me JSON Return Returns sum two integers "
    "number current"
)
_BARE: Final = (
    "What Sort Reverse Count Give Use Look Which Who Hello The It You A user assistant system tool response function "
    "parameter parameters type name age code result weather description object properties string integer required "
    "city word get find add in Reasoning IMPORTANT Tools NAME KEY VALUE Get Add Find"
)
_BOTH_WAYS: Final = (*words.NAMES, *words.CITIES, *words.WEATHER)
_MARKS: Final = ('"}', '",', '":', '{"', '"},', '"}}', '"}},', '"]}}}', '."}', '.",', '["', '"}},"', "</")


def byte_alphabet() -> list[str]:
    """Return the 256 printable characters that stand for bytes, in byte order of their kind."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def build_tokenizer() -> Tokenizer:
    """Make the byte-level tokenizer: whole words of the tasks, everything else byte by byte.

    There are no merges. A piece of text that is in the vocabulary is one token, and any other
    piece falls apart into bytes, so an arbitrary word is always seen letter by letter.
    """
    vocabulary: dict[str, int] = {}
    for token in (BOS, EOS, PAD, *byte_alphabet(), *_word_tokens()):
        vocabulary.setdefault(token, len(vocabulary))
    tail = [*CONTROL, *VISIBLE]
    if len(vocabulary) + len(tail) > VOCABULARY:
        raise ValueError(f"{len(vocabulary) + len(tail)} tokens do not fit in {VOCABULARY}")
    for index in range(VOCABULARY - len(tail) - len(vocabulary)):
        vocabulary[f"<|reserved_{index}|>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (BOS, EOS, PAD)])
    for marker in tail:
        added = AddedToken(marker, special=marker in CONTROL, normalized=False)
        if marker in CONTROL:
            tokenizer.add_special_tokens([added])
        else:
            tokenizer.add_tokens([added])
    return tokenizer


def _word_tokens() -> list[str]:
    spaced = [*_AFTER_SPACE.split(), *_BOTH_WAYS, *words.COLOURS, *words.SHAPES]
    return [*("Ġ" + word for word in spaced), *_BARE.split(), *_BOTH_WAYS, *_MARKS]


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of the special and the visible marker tokens by their text."""
    ids = {}
    for text in (*SPECIAL, *VISIBLE):
        index = tokenizer.token_to_id(text)
        if index is None:
            raise ValueError(f"the tokenizer lacks {text}")
        ids[text] = index
    return ids


@functools.cache
def _template() -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE_FILE.read_text(encoding="utf-8"))


def render_prompt(example: Example) -> str:
    """Render the chat up to the point where the model starts to write."""
    return _render(example, list(example.messages), add_generation_prompt=True)


def render_whole(example: Example) -> str:
    """Render the chat with the expected answer, up to and including its end mark."""
    text = _render(example, [*example.messages, example.assistant_message()], add_generation_prompt=False)
    return text.removesuffix("\n")


def _render(example: Example, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
    text: str = _template().render(
        messages=messages,
        tools=example.tools,
        bos_token=BOS,
        reasoning_effort=example.effort,
        add_generation_prompt=add_generation_prompt,
    )
    return text
