"""Grammars by llguidance: nothing is computed ahead of time, and each mask has a budget of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, assert_never

import msgspec
import numpy as np
from llguidance import LLMatcher, LLTokenizer, StructTag, TokenizerWrapper, grammar_from

from srt.grammar.contract import Compiled, Mask, Matcher, Vocabulary
from srt.grammar.errors import GrammarError
from srt.grammar.texts import MOST_WHITESPACE, choice_grammar, closed
from srt.payloads import Constraint

_WHITESPACE: Final = rf"[\x20\x0A\x0D\x09]{{1,{MOST_WHITESPACE}}}"


class _Words:
    """The vocabulary as the library wants to see it. It tokenizes only to know what is usual, so bytes are enough."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = list(vocabulary.tokens)
        self.eos_token_id = vocabulary.eos_ids[0] if vocabulary.eos_ids else None
        self.bos_token_id = None
        self.special_token_ids = [index for index, token in enumerate(self.tokens) if not token]
        self._of_byte = {token[0]: index for index, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        return [self._of_byte[byte] for byte in data if byte in self._of_byte]


class LLGuidance:
    """The backend. What it compiles is the constraint in the library's own language, once it has been found good."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Words(vocabulary)),
            n_vocab=len(vocabulary.tokens),
            eos_token=list(vocabulary.eos_ids) or None,
        )

    def compile(self, constraint: Constraint) -> bytes:
        """The compiled form of a constraint. Raises: GrammarError."""
        try:
            grammar = _translated(constraint)
        except (ValueError, AssertionError) as error:
            raise GrammarError(str(error).strip()) from error
        wrong, said = LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if wrong:
            raise GrammarError(said[0].strip().splitlines()[0])
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise GrammarError(matcher.get_error().strip().splitlines()[0])
        return grammar.encode()

    def load(self, data: bytes) -> Compiled:
        """What `compile` gave, ready to be matched. Raises: GrammarError if it is something else."""
        prototype = LLMatcher(self._tokenizer, data.decode(), log_level=0)
        if prototype.is_error():
            raise GrammarError(prototype.get_error().strip().splitlines()[0])
        return _Compiled(prototype, self._vocabulary.eos_ids, len(data))


class _Compiled:
    def __init__(self, prototype: LLMatcher, eos_ids: Sequence[int], size: int) -> None:
        self._prototype = prototype
        self._eos_ids = eos_ids
        self.size = size

    def matcher(self, stop_ids: Sequence[int]) -> Matcher:
        """A matcher at the beginning."""
        return _Matcher(self._prototype.deep_copy(), stop_ids, self._eos_ids)


class _Matcher:
    """The library ends with the vocabulary's own ids; those of the request are put in their place."""

    def __init__(self, matcher: LLMatcher, stop_ids: Sequence[int], eos_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._stop_ids = np.array(sorted(stop_ids), np.int64)
        self._own = np.array(sorted({*stop_ids, *eos_ids}), np.int64)
        self._own_set = frozenset(self._own.tolist())

    def accept(self, token: int) -> bool:
        """Go on with a token, if it is allowed; else stay."""
        return token not in self._own_set and self._matcher.try_consume_tokens([token]) == 1

    def rollback(self, count: int) -> None:
        """Take the last accepted tokens back."""
        self._matcher.rollback(count)

    def fill(self, mask: Mask) -> None:
        """Write which tokens are allowed next."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():  # beyond the library's own limits
            mask[:] = 0
            return
        words = mask.view(np.uint32)
        np.bitwise_and.at(words, self._own // 32, ~(np.uint32(1) << (self._own % 32).astype(np.uint32)))
        if self.can_end():
            np.bitwise_or.at(words, self._stop_ids // 32, np.uint32(1) << (self._stop_ids % 32).astype(np.uint32))

    def can_end(self) -> bool:
        """Whether what was accepted is complete."""
        return not self._matcher.is_error() and self._matcher.is_accepting()


def _translated(constraint: Constraint) -> str:
    """A constraint in the library's language. Raises: ValueError, AssertionError, GrammarError."""
    text = constraint.text
    match constraint.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(
                closed(text) if constraint.strict else text,
                overrides={"whitespace_pattern": _WHITESPACE, "lenient": not constraint.strict},
            )
        case "json_object":
            return LLMatcher.grammar_from_json_schema(
                '{"type":"object"}', overrides={"whitespace_pattern": _WHITESPACE}
            )
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "ebnf":
            return grammar_from("gbnf", text)
        case "choice":
            return grammar_from("gbnf", choice_grammar(text))
        case "structural_tag":
            return _structural_tag(text)
        case _:
            assert_never(constraint.kind)


def _structural_tag(text: str) -> str:
    document: Any = msgspec.json.decode(text)
    match document:
        case {"structures": [*structures], "triggers": [*triggers]}:
            pass
        case _:
            raise GrammarError("llguidance knows structural tags with 'structures' and 'triggers' only")
    tags = []
    for tag in structures:
        trigger = next((trigger for trigger in triggers if tag["begin"].startswith(trigger)), None)
        if trigger is None:
            raise GrammarError(f"no trigger is the beginning of {tag['begin']!r}")
        tags.append(StructTag(trigger=trigger, begin=tag["begin"], grammar=tag["schema"], end=tag["end"]))
    return StructTag.to_grammar(tags, assume_special=False)
