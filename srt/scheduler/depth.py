"""Whether guessing ahead pays: measured, for each size of batch, on the steps that are run anyway.

A step that checks guesses brings more tokens and takes longer. Which wins depends on how many guesses are right and on
how many rows share the step; both change while a server runs. So both ways are timed, in steps of decodes alone, by
powers of two of the rows, and the better one is used. The other one is tried now and then, less and less often.
"""

from __future__ import annotations

from typing import Final

MEMORY: Final = 1 / 16
"""Weight of one step in what is known of its kind."""
ENOUGH: Final = 4
"""Steps of a kind before it is judged."""
MARGIN: Final = 0.97
"""Guessing is given up when it brings less than this part of the tokens that doing without brings in the same time."""
LONGEST_STEP: Final = 4
"""A step counts as at most so many times the mean: whatever else held it up says nothing about guesses."""
FIRST_PAUSE: Final = 64
LONGEST_PAUSE: Final = 4096
"""Steps between two trials of the way that is not used."""
FEW_GUESSES: Final = 96
"""Guesses before a drafter is judged useless."""
MANY_GUESSES: Final = 8192
"""Of so many, the older ones weigh half as much from then on."""
USELESS: Final = 0.02
"""Share of right guesses below which a drafter has no use for prompts: those of one that is any good are far above."""


class Pace:
    """Tokens and microseconds of one kind of steps, as running means."""

    __slots__ = ("elapsed_us", "steps", "tokens")

    def __init__(self) -> None:
        self.steps = 0
        self.tokens = 0.0
        self.elapsed_us = 0.0

    def observe(self, tokens: int, elapsed_us: int) -> None:
        """One more step."""
        if self.steps >= ENOUGH:
            elapsed_us = min(elapsed_us, int(LONGEST_STEP * self.elapsed_us))
        self.steps += 1
        weight = max(MEMORY, 1 / self.steps)
        self.tokens += (tokens - self.tokens) * weight
        self.elapsed_us += (max(1, elapsed_us) - self.elapsed_us) * weight

    def forget(self) -> None:
        """Judge anew."""
        self.steps = 0

    @property
    def rate(self) -> float:
        """Tokens a microsecond."""
        return self.tokens / self.elapsed_us


class Size:
    """What is known of batches of about one size."""

    __slots__ = ("guessing", "pace", "pause", "plain", "since")

    def __init__(self) -> None:
        self.guessing = True
        self.pace = Pace()
        self.plain = Pace()
        self.pause = FIRST_PAUSE
        self.since = 0

    @property
    def tries(self) -> bool:
        """Whether the next step shall go the way that is not used: until there are enough of its steps."""
        other = self.plain if self.guessing else self.pace
        return self.pace.steps + self.plain.steps >= ENOUGH and other.steps < ENOUGH

    def observe(self, guessed: bool, tokens: int, elapsed_us: int) -> None:
        """A step has been timed."""
        (self.pace if guessed else self.plain).observe(tokens, elapsed_us)
        self.since += 1
        if self.pace.steps >= ENOUGH and self.plain.steps >= ENOUGH:
            pays = self.pace.rate >= self.plain.rate * MARGIN
            if pays != self.guessing:
                self.guessing, self.pause, self.since = pays, FIRST_PAUSE, 0
            elif self.since >= self.pause:
                self.pause, self.since = min(2 * self.pause, LONGEST_PAUSE), 0
                (self.plain if self.guessing else self.pace).forget()


class DepthControl:
    """Says of each step how many tokens a row may guess: all that the drafter has, or none."""

    def __init__(self, drafts: int) -> None:
        self.drafts = drafts
        self._sizes: dict[int, Size] = {}
        self._checked = self._right = 0.0

    def _size(self, rows: int) -> Size:
        return self._sizes.setdefault(rows.bit_length(), Size())

    def depth(self, rows: int) -> int:
        """Guesses that each of so many decoding rows may check."""
        if not self.drafts:
            return 0
        size = self._size(rows)
        return self.drafts if size.guessing != size.tries else 0

    def guesses(self, rows: int) -> bool:
        """Whether guesses that are made in a step of so many decoding rows may be wanted in the next.

        While guessing pays they are made in every step: draft modules must see all tokens to guess well.
        """
        if not self.drafts:
            return False
        size = self._size(rows)
        return size.guessing or size.tries

    @property
    def reads_prompts(self) -> bool:
        """Whether prompts shall be shown to the drafter, though it guesses nothing in that step.

        Whoever is to guess later must have seen them, and a cached prefix may be used when guessing pays. So they are
        shown to a drafter that does not pay now, but not to one that is practically never right.
        """
        return self._checked < FEW_GUESSES or self._right >= USELESS * self._checked

    def _count(self, drafted: int, right: int) -> None:
        self._checked += drafted
        self._right += right
        if self._checked > MANY_GUESSES:
            self._checked /= 2
            self._right /= 2

    def observe(self, rows: int, drafted: int, tokens: int, elapsed_us: int, guess_us: int) -> None:
        """A step of `rows` decodes and nothing else checked `drafted` guesses and brought `tokens`.

        `guess_us` of its time went into guesses for the next one: a step that does without has no use for them.
        """
        if self.drafts:
            self._count(drafted, tokens - rows)
            self._size(rows).observe(drafted > 0, tokens, elapsed_us if drafted else elapsed_us - guess_us)
