"""Grammars of the rows: what each may draw next, also behind guesses, and when it has said all that it may.

A row's matcher stands behind its known tokens. For a step it goes ahead over the guesses, leaving a mask for each of
the wanted logits, and comes back; when the step is done it takes the tokens that were kept. All ranks do the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np

from srt.configs.plan import RuntimePlan
from srt.grammar.backends import open_backend
from srt.grammar.contract import GrammarBackend, Mask, Matcher, Vocabulary
from srt.grammar.errors import GrammarError
from srt.grammar.shelf import GrammarFiles, Shelf
from srt.messages import GrammarSpec, RowEnding, RowStart, StepPlan
from srt.worker.masks import Masks
from srt.worker.rows import Outcome, Rows, Step

FREE_SECONDS: Final = 0.002
"""What a step may take for a row's grammar, in the long run, of one core. Every row that computes waits for it."""

CREDIT_SECONDS: Final = 0.2
"""How far a row may be beyond that, now and then."""


class RowGrammars(Protocol):
    """Knows the grammars of rows. Sees every step, on every rank with the same result, but for `slow` rows."""

    def apply(self, plan: StepPlan) -> None:
        """Take over the rows that begin anew and those that are given up."""
        ...

    def masks(self, step: Step) -> Masks | None:
        """What the wanted logits of a step may become; None if no grammar is among them."""
        ...

    def advance(self, outcome: Outcome) -> list[RowEnding]:
        """A step is done: which of its rows have ended by it."""
        ...


class NoGrammars:
    """For a server that obeys no constraints."""

    def apply(self, plan: StepPlan) -> None:
        """Rows have no grammars."""

    def masks(self, step: Step) -> Masks | None:
        """Everything is allowed."""
        return None

    def advance(self, outcome: Outcome) -> list[RowEnding]:
        """None."""
        return []


class Stopwatch:
    """Time that a grammar takes of the core it runs on, so that what others do at the same time is not counted."""

    def __init__(self) -> None:
        self._debt_s = 0.0
        self._began_s = 0.0

    def __enter__(self) -> None:
        self._began_s = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self._debt_s += time.thread_time() - self._began_s

    def step_ended(self) -> bool:
        """Whether the grammar has taken more than it may, after one more step."""
        self._debt_s = max(0.0, self._debt_s - FREE_SECONDS)
        return self._debt_s > CREDIT_SECONDS


class Taken(NamedTuple):
    """What kept tokens came to: `kept` of them count, and the last of these ended the grammar, or did not fit it."""

    kept: int
    ended: bool = False
    wrong: bool = False


class RowGrammar:
    """The grammar of one row. `waiting`: for the token behind which it begins. `ended`: nothing follows."""

    def __init__(self, matcher: Matcher, spec: GrammarSpec, words: int) -> None:
        self._matcher = matcher
        self._after = spec.after_token
        self._stop_ids = frozenset(spec.stop_ids)
        self._stop_mask = np.zeros(words, np.int32)
        for token in spec.stop_ids:
            if token != self._after:
                self._stop_mask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
        self._waiting = self._after is not None
        self.ended = False
        self.watch = Stopwatch()

    def walk(self, guesses: Sequence[int], masks: Mask) -> int:
        """Fill masks [guesses + 1, W], the first for what follows the known tokens, and so on behind each guess.

        Returns how many are filled: the others are behind a guess that cannot be right, or behind the end. A guess that
        the mask before it bars is such a one; the matcher is not asked about it, for some write their no to stderr.
        """
        if self.ended:
            return 0
        waiting, accepted = self._waiting, 0
        filled, before = 0, masks[0]
        for mask, token in zip(masks, [None, *guesses], strict=True):
            if token is not None and waiting:
                waiting = token != self._after
            elif token is not None:
                if token in self._stop_ids or not _allows(before, token) or not self._matcher.accept(token):
                    break
                accepted += 1
            if waiting:
                np.invert(self._stop_mask, out=mask)
            else:
                self._matcher.fill(mask)
            filled, before = filled + 1, mask
        if accepted:
            self._matcher.rollback(accepted)
        return filled

    def take(self, tokens: Sequence[int]) -> Taken:
        """Go on over kept tokens."""
        for count, token in enumerate(tokens, start=1):
            if self._waiting:
                self._waiting = token != self._after
            elif token in self._stop_ids and self._matcher.can_end():
                self.ended = True
            elif not self._matcher.accept(token):
                self.ended = True
                return Taken(count, ended=True, wrong=True)
            elif self._matcher.can_end() and not self._can_go_on():
                self.ended = True
            if self.ended:
                return Taken(count, ended=True)
        return Taken(len(tokens))

    def _can_go_on(self) -> bool:
        mask = np.zeros_like(self._stop_mask)
        self._matcher.fill(mask)
        return bool((mask & ~self._stop_mask).any())


def _allows(mask: Mask, token: int) -> bool:
    return bool(mask[token // 32] >> token % 32 & 1)


class MatchedGrammars:
    """For a server with a grammar backend."""

    def __init__(self, shelf: Shelf, rows: Rows, vocab_size: int) -> None:
        self._shelf = shelf
        self._rows = rows
        self._words = -(-vocab_size // 32)
        self._grammars: dict[int, RowGrammar] = {}
        self._faults: dict[int, str] = {}
        self._masks: Masks | None = None

    def apply(self, plan: StepPlan) -> None:
        """Take over the rows that begin anew and those that are given up."""
        for row in plan.freed_rows:
            self._forget(row)
        for start in plan.starts:
            self._forget(start.row)
            if start.sampling.grammar is not None:
                self._start(start, start.sampling.grammar)

    def _forget(self, row: int) -> None:
        self._grammars.pop(row, None)
        self._faults.pop(row, None)

    def _start(self, start: RowStart, spec: GrammarSpec) -> None:
        """Begin a row; one that was retracted goes over what it had said."""
        try:
            matcher = self._shelf.get(spec.key).matcher(spec.stop_ids)
        except GrammarError as error:
            self._faults[start.row] = str(error)
            return
        grammar = self._grammars[start.row] = RowGrammar(matcher, spec, self._words)
        said = np.frombuffer(start.token_ids, dtype="<i4")[start.prompt_tokens :].tolist()
        if grammar.take(said).wrong:
            self._faults[start.row] = "what was said before it was retracted does not follow its grammar"

    def masks(self, step: Step) -> Masks | None:
        """What the wanted logits of a step may become; None if no grammar is among them."""
        self._masks = None
        if not self._grammars:
            return None
        rows: list[int] = []
        bits: list[Mask] = []
        first = 0
        for row, drafts in zip(step.emitting.tolist(), step.drafts.tolist(), strict=True):
            grammar = self._grammars.get(row)
            if grammar is not None:
                filled = np.zeros((drafts + 1, self._words), np.int32)
                with grammar.watch:
                    count = grammar.walk(self._rows.guesses(row, drafts).tolist(), filled)
                rows += range(first, first + count)
                bits.append(filled[:count])
            first += drafts + 1
        if rows:
            self._masks = Masks(np.array(rows, np.int64), np.concatenate(bits))
        return self._masks

    def advance(self, outcome: Outcome) -> list[RowEnding]:
        """A step is done: which of its rows have ended by it."""
        if not self._grammars and not self._faults:
            return []
        empty = set() if self._masks is None else set(self._masks.rows[self._masks.empty].tolist())
        endings = []
        first_token = first_logits = 0
        step = outcome.step
        for at, row in enumerate(step.emitting.tolist()):
            count = outcome.token_counts[at]
            tokens = outcome.token_ids[first_token : first_token + count]
            stuck = next((index for index in range(count) if first_logits + index in empty), None)
            ending = self._advance(at, row, tokens, stuck)
            if ending is not None:
                endings.append(ending)
            first_token += count
            first_logits += int(step.drafts[at]) + 1
        return endings

    def _advance(self, at: int, row: int, tokens: Sequence[int], stuck: int | None) -> RowEnding | None:
        """`stuck`: the first of the tokens in whose place no token was left."""
        if row in self._faults:
            return RowEnding(at, len(tokens), self._faults[row])
        grammar = self._grammars.get(row)
        if grammar is None or grammar.ended:
            return None
        with grammar.watch:
            taken = grammar.take(tokens)
        if taken.wrong or (stuck is not None and stuck < taken.kept):
            grammar.ended = True
            return RowEnding(at, taken.kept, "no token of the vocabulary can follow in its grammar here")
        if taken.ended:
            return RowEnding(at, taken.kept)
        if grammar.watch.step_ended():
            return RowEnding(at, taken.kept, f"its grammar takes more than {FREE_SECONDS * 1e3:g} ms a token")
        return None


def open_grammars(plan: RuntimePlan, rundir: Path, rows: Rows) -> tuple[Shelf | None, RowGrammars]:
    """Where compiled grammars are found, if constraints are obeyed, and who obeys. Imports no library yet."""
    model, name = plan.model, plan.server.grammar_backend
    if name == "none":
        return None, NoGrammars()

    def backend() -> GrammarBackend:
        return open_backend(name, Vocabulary.read(Path(model.path), model.vocab_size, model.eos_token_ids))

    shelf = Shelf(GrammarFiles(rundir), backend)
    return shelf, MatchedGrammars(shelf, rows, model.vocab_size)
