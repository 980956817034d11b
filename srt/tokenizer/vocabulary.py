"""The checkpoint's tokenizer: text to ids, and ids to the bytes they stand for.

Only byte-level BPE is supported: there every token is a fixed string of bytes and a text is their concatenation,
so that decoding token by token is exact for any sequence, also for bytes that are no valid UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer

from srt.bytelevel import token_bytes
from srt.errors import StartupError

SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint; empty if there is no such file.

    Raises: StartupError if the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} is not a JSON object: {error}") from error


def _is_byte_level(decoder: Any) -> bool:
    """Whether the `decoder` entry of tokenizer.json is the byte-level one and nothing else."""
    match decoder:
        case {"type": "ByteLevel"}:
            return True
        case {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}:
            return True
        case _:
            return False


class Vocabulary:
    """Token ids of one checkpoint. Texts in `marks` mean something in an answer: they are never left out of it.

    Raises: StartupError if the directory has no usable tokenizer.json.
    """

    def __init__(self, directory: Path, marks: Iterable[str] = ()) -> None:
        path = directory / "tokenizer.json"
        decoder = read_json_object(path).get("decoder")
        if not _is_byte_level(decoder):
            found = "is missing" if not path.is_file() else f"has the decoder {msgspec.json.encode(decoder).decode()}"
            raise StartupError(f"{path} {found}; only byte-level BPE tokenizers are supported")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise StartupError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.config = read_json_object(directory / "tokenizer_config.json")
        self.specials = _special_texts(self.config, read_json_object(directory / "special_tokens_map.json"))
        added = self._tokenizer.get_added_tokens_decoder()
        kept = frozenset(marks)
        self.special_ids = frozenset(
            index for index, token in added.items() if token.special and token.content not in kept
        )
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text; `add_special_tokens` lets tokenizer.json put its opening and closing tokens around it.

        `add_bos_token` in tokenizer_config.json is not looked at: transformers' generic fast class does not either.
        """
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def id_of(self, token: str) -> int | None:
        """Id of a token by its exact text."""
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def text_of(self, token_id: int) -> str | None:
        """The token of an id as the vocabulary spells it."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def bytes_of(self, token_id: int) -> bytes:
        """What a token stands for; ids without an entry in the vocabulary stand for nothing."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else token_bytes(token)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool) -> str:
        """Text of a whole sequence; bytes that are no valid UTF-8 become U+FFFD."""
        if skip_special_tokens:
            token_ids = (index for index in token_ids if index not in self.special_ids)
        return b"".join(map(self.bytes_of, token_ids)).decode("utf-8", "replace")


def _special_texts(config: dict[str, Any], special_tokens_map: dict[str, Any]) -> dict[str, str]:
    """Text of bos_token, eos_token and so on, as far as the checkpoint names them."""
    found: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        match config.get(name) or special_tokens_map.get(name):
            case str(text) | {"content": str(text)}:
                found[name] = text
            case _:
                continue
    return found
