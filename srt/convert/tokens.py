"""Token ids to measure activations with: from a file, or seeded random ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from srt.errors import StartupError

SEQUENCE_TOKENS = 512
"""Longer texts are cut into sequences of this length."""
DEFAULT_TOKENS = 2048
SEED = 0


def seeded_sequences(vocab_size: int, tokens: int = DEFAULT_TOKENS) -> list[list[int]]:
    """Uniform random ids, the same on every machine."""
    generator = torch.Generator().manual_seed(SEED)
    return _cut([torch.randint(0, vocab_size, (tokens,), generator=generator).tolist()], tokens)


def read_sequences(file: Path, checkpoint: Path, vocab_size: int, tokens: int) -> list[list[int]]:
    """At most `tokens` ids of a file: plain text, or JSON lines of id lists, texts or objects that hold one.

    Objects have `input_ids`, `text` or `prompt`. Texts become ids by the checkpoint's tokenizer.json.
    Raises: StartupError with file and line.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--calibration {file} cannot be read: {error}") from error
    items: list[object] = [text]
    if file.suffix in (".jsonl", ".json"):
        items = [_line(file, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    tokenizer: Tokenizer | None = None
    sequences: list[list[int]] = []
    for item in items:
        if isinstance(item, str):
            if tokenizer is None:
                tokenizer = _tokenizer(checkpoint)
            sequences.append(tokenizer.encode(item).ids)
        elif isinstance(item, list):
            sequences.append([_id(file, value, vocab_size) for value in item])
    cut = _cut(sequences, tokens)
    if not cut:
        raise StartupError(f"--calibration {file} holds no tokens")
    return cut


def _line(file: Path, number: int, line: str) -> object:
    """Text or id list of one JSON line."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise StartupError(f"--calibration {file}, line {number} is not JSON: {error}") from error
    if isinstance(value, dict):
        value = next((value[key] for key in ("input_ids", "text", "prompt") if key in value), None)
    if not isinstance(value, (str, list)):
        raise StartupError(f"--calibration {file}, line {number} holds neither a text nor a list of token ids")
    return value


def _id(file: Path, value: object, vocab_size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        raise StartupError(f"--calibration {file} holds {value!r}, token ids are 0 to {vocab_size - 1}")
    return value


def _tokenizer(checkpoint: Path) -> Tokenizer:
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        raise StartupError(f"{checkpoint} has no tokenizer.json to read a calibration text with; give token ids")
    return Tokenizer.from_file(str(path))


def _cut(sequences: list[list[int]], tokens: int) -> list[list[int]]:
    """Sequences of at most `SEQUENCE_TOKENS`, `tokens` ids in all."""
    cut, left = [], tokens
    for sequence in sequences:
        for start in range(0, len(sequence), SEQUENCE_TOKENS):
            part = sequence[start : start + min(SEQUENCE_TOKENS, left)]
            if part:
                cut.append(part)
                left -= len(part)
    return cut
