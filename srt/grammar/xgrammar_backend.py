"""Grammars by xgrammar: compiled with masks for most states ahead of time, matched by an Earley parser."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, assert_never

import msgspec
import xgrammar
from xgrammar import CompiledGrammar, GrammarCompiler, GrammarMatcher, StructuralTag, StructuralTagItem

from srt.grammar.contract import Compiled, Mask, Matcher, Vocabulary
from srt.grammar.errors import GrammarError
from srt.grammar.schemas import check_schema
from srt.grammar.texts import MOST_WHITESPACE, choice_grammar
from srt.payloads import Constraint

ANY_OBJECT: Final = '{"type":"object","additionalProperties":true}'

_WHERE = re.compile(r"^(\[[\d:]+\] \S+:\d+: )?(Check failed: \(.*?\) is false: )?", re.DOTALL)


class XGrammar:
    """The backend. One thread, no cache of its own: both are the caller's affair."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._info = xgrammar.TokenizerInfo(
            list(vocabulary.tokens),
            xgrammar.VocabType.RAW,
            vocab_size=len(vocabulary.tokens),
            stop_token_ids=list(vocabulary.eos_ids),
        )
        self._compiler = GrammarCompiler(self._info, max_threads=1, cache_enabled=False)

    def compile(self, constraint: Constraint) -> bytes:
        """The compiled form of a constraint. Raises: GrammarError."""
        try:
            with _warnings() as said:
                compiled = self._compile(constraint)
        except (RuntimeError, ValueError, TypeError) as error:
            raise GrammarError(_reason(str(error))) from error
        if constraint.strict and constraint.kind != "structural_tag" and said:
            raise GrammarError(said[0])
        if constraint.kind == "json_schema" and constraint.strict:
            check_schema(constraint.text)
        return compiled.serialize_json().encode()

    def _compile(self, constraint: Constraint) -> CompiledGrammar:
        compiler, text = self._compiler, constraint.text
        match constraint.kind:
            case "json_schema":
                return compiler.compile_json_schema(
                    text, strict_mode=constraint.strict, max_whitespace_cnt=MOST_WHITESPACE
                )
            case "json_object":
                return compiler.compile_json_schema(ANY_OBJECT, max_whitespace_cnt=MOST_WHITESPACE)
            case "regex":
                return compiler.compile_regex(text)
            case "ebnf":
                return compiler.compile_grammar(text)
            case "choice":
                return compiler.compile_grammar(choice_grammar(text))
            case "structural_tag":
                return compiler.compile_structural_tag(_structural_tag(text))
            case _:
                assert_never(constraint.kind)

    def load(self, data: bytes) -> Compiled:
        """What `compile` gave, ready to be matched. Raises: GrammarError if it is something else."""
        try:
            return _Compiled(CompiledGrammar.deserialize_json(data.decode(), self._info), self._vocabulary)
        except RuntimeError as error:
            raise GrammarError(_reason(str(error))) from error


class _Compiled:
    def __init__(self, grammar: CompiledGrammar, vocabulary: Vocabulary) -> None:
        self._grammar = grammar
        self._vocabulary = vocabulary
        self.size = int(grammar.memory_size_bytes)

    def matcher(self, stop_ids: Sequence[int]) -> Matcher:
        """A matcher at the beginning."""
        return _Matcher(self._grammar, stop_ids, self._vocabulary.eos_ids)


class _Matcher:
    """The library knows no matcher without stop ids: the end of one is left to the vocabulary's and then barred."""

    def __init__(self, grammar: CompiledGrammar, stop_ids: Sequence[int], eos_ids: Sequence[int]) -> None:
        self._matcher = GrammarMatcher(grammar, override_stop_tokens=list(stop_ids) or None)
        self._barred = frozenset(() if stop_ids else eos_ids)

    def accept(self, token: int) -> bool:
        """Go on with a token, if it is allowed; else stay."""
        return token not in self._barred and bool(self._matcher.accept_token(token))

    def rollback(self, count: int) -> None:
        """Take the last accepted tokens back."""
        self._matcher.rollback(count)

    def fill(self, mask: Mask) -> None:
        """Write which tokens are allowed next. Not after a stop id."""
        self._matcher.fill_next_token_bitmask(mask[None])
        for token in self._barred:
            mask[token // 32] &= ~(1 << token % 32)

    def can_end(self) -> bool:
        """Whether what was accepted is complete."""
        return bool(self._matcher.is_completed())


def _structural_tag(text: str) -> str | StructuralTag:
    """A structural tag as the library knows it; the older form, with `structures` and `triggers`, is translated."""
    document: Any = msgspec.json.decode(text)
    match document:
        case {"structures": list(structures), "triggers": list(triggers)}:
            items = [StructuralTagItem.model_validate(entry) for entry in structures]
            return StructuralTag.from_legacy_structural_tag(items, triggers)
        case _:
            return text


def _reason(said: str) -> str:
    """What the library says, without where in its own sources it says it."""
    return _WHERE.sub("", said).strip()


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the library warns of meanwhile: it tells only standard error what of a constraint it leaves out.

    Nothing else may write there at the same time: compiling has a process of its own.
    """
    said: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
            said += [_reason(line).removeprefix("Warning: ") for line in lines if "Warning: " in line]
