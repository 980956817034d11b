"""A worker that keeps its promises and has a model small enough to check: wrong pages become wrong tokens.

The value of a token is a checksum over the values of all tokens before it that the full group shows, of those in the
window that the sliding group shows, and of the token itself. It is stored in the slots that the page tables name, as KV
would be, and the next token is a function of it. So a token depends on the content of every page that it may see, at
the moment when it is computed; a page that was lost, freed too early or mistaken for another changes the answer.

With a drafter it guesses right or wrong by chance, and goes on behind wrong guesses too, so that garbage lies behind
what it keeps. Draft modules store the value of each token once more in their own group, again for the last few of the
tokens that were known before each step, and check what they find in their window.

Steps whose results nobody has yet are remembered with the pages that they read and write. A step in flight may still
be rolled back (drafts are), so nobody else may write what it reads, or read what it writes.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

from srt.messages import ImageSpan, Logprobs, RowLogprobs, RowStart, StepPlan, StepResult

VOCABULARY = 48
SLIDING_SALT = 0x5BD1E995
DRAFT_SALT = 0x27D4EB2F


class Values:
    """The values of one sequence, continued token by token. `seen` are those that a group shows so far."""

    def __init__(self, window: int, full: bytes = b"", sliding: bytes = b"") -> None:
        self._reach = 4 * (window - 1)
        self._full = crc32(full)
        self._sliding = sliding[max(0, len(sliding) - self._reach) :]
        self.value = 0

    def append(self, token: int) -> tuple[bytes, bytes]:
        """Compute a token; returns what each group has to store for it."""
        self.value = crc32(self._sliding + token.to_bytes(4, "little"), self._full)
        full = self.value.to_bytes(4, "little")
        sliding = (self.value ^ SLIDING_SALT).to_bytes(4, "little")
        self._full = crc32(full, self._full)
        joined = self._sliding + sliding
        self._sliding = joined[max(0, len(joined) - self._reach) :]
        return full, sliding

    @property
    def next_token(self) -> int:
        """What follows the last token."""
        return self.value % VOCABULARY


def answer(prompt: Sequence[int], count: int, window: int) -> list[int]:
    """What the model says to a prompt when it is alone, without pages."""
    values = Values(window)
    for token in prompt:
        values.append(token)
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.append(values.next_token)
        values.append(tokens[-1])
    return tokens


def as_seen(tokens: Sequence[int], images: Sequence[ImageSpan]) -> list[int]:
    """The tokens as the model sees them: where an image is, its content."""
    seen = list(tokens)
    for span in images:
        for at in range(span.tokens):
            seen[span.start + at] = crc32(span.key + at.to_bytes(4, "little"))
    return seen


class WorkerRow:
    """What the worker knows of a row: its tokens, how many are computed, and a page table per group."""

    def __init__(self, start: RowStart, groups: int) -> None:
        ids = start.token_ids
        tokens = [int.from_bytes(ids[at : at + 4], "little") for at in range(0, len(ids), 4)]
        self.tokens = as_seen(tokens, start.images)
        self.computed = self.begin = start.computed
        self.told = start.sampling.logprobs is not None
        self.prompt_tokens, self.logprobs_from = start.prompt_tokens, start.logprobs_from
        assert self.logprobs_from is None or self.computed < self.logprobs_from < self.prompt_tokens
        self.tables: list[dict[int, int]] = [{} for _ in range(groups)]


def tell(row: WorkerRow, first: int, end: int) -> Logprobs:
    """Tokens of these positions, and as their log probability the position itself."""
    ids = row.tokens[first:end]
    return Logprobs(array("i", ids).tobytes(), array("f", range(first, end)).tobytes())


class Touched(NamedTuple):
    """Pages (group, page) that an unanswered step reads and writes, and for which row."""

    reads: dict[tuple[int, int], WorkerRow]
    writes: dict[tuple[int, int], WorkerRow]


class FakeWorker:
    """Obeys plans in order, as `StepPlan` describes them, over two pools: full and sliding."""

    def __init__(
        self, page_size: int, window: int, pages: Sequence[int], rows: int, modules: int = 0, luck: float = 0.5
    ) -> None:
        self.modules = modules
        self.luck = luck
        self.context = 1 << 30
        self.dice = random.Random(rows)
        self.guesses = self.right_guesses = 0
        self.page_size = page_size
        self.window = window
        self.pools = [bytearray(4 * page_size * (count + 1)) for count in pages]
        self.rows: dict[int, WorkerRow] = {}
        self.row_count = rows
        self.step = 0
        self.computed_tokens = 0
        self.unanswered: deque[Touched] = deque()

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step."""
        assert plan.step == self.step + 1, f"step {plan.step} follows step {self.step}"
        self.step = plan.step
        for index in plan.freed_rows:
            del self.rows[index]
        for start in plan.starts:
            assert 0 <= start.row < self.row_count
            self.rows[start.row] = WorkerRow(start, len(self.pools))
        for update in plan.pages:
            at = 0
            for index, first, count in zip(update.rows, update.firsts, update.counts, strict=True):
                for logical, page in enumerate(update.pages[at : at + count], first):
                    self.rows[index].tables[update.group][logical] = page
                at += count
            assert at == len(update.pages)
        assert len(set(plan.rows)) == len(plan.rows), "a row is named twice"
        self.unanswered.append(Touched({}, {}))
        sampled: list[int] = []
        counts: list[int] = []
        logprobs: list[RowLogprobs] = []
        drafts = plan.drafts or [0] * len(plan.rows)
        for at, (index, count, emits, guesses) in enumerate(
            zip(plan.rows, plan.counts, plan.emits, drafts, strict=True)
        ):
            row = self.rows[index]
            assert row.computed + count <= len(row.tokens), "a row computes tokens that it does not know"
            before, known = row.computed, len(row.tokens)
            assert not guesses or before + count + guesses < self.context, "a guess lies behind the last position"
            values = self._compute(row, count, guesses)
            if emits:
                assert row.computed == len(row.tokens), "a row emits before it has computed all it knows"
                kept = [values.next_token, *self._check(row, values, guesses)]
                row.tokens += kept
                row.computed += len(kept) - 1
                sampled += kept
                counts.append(len(kept))
            if row.told:
                output = tell(row, known, len(row.tokens)) if emits else None
                logprobs.append(RowLogprobs(at, self._prompt(row, before + 1, min(known, before + count + 1)), output))
            if self.modules:
                self._draft(row, min(before, known - self.modules))
        drafted = [guesses for guesses, emits in zip(drafts, plan.emits, strict=True) if emits] if plan.drafts else []
        return StepResult(plan.step, sampled, counts, elapsed_us=1, drafted=drafted, logprobs=logprobs)

    def _prompt(self, row: WorkerRow, first: int, end: int) -> Logprobs | None:
        """Of the prompt's positions [first, end) those that are wanted."""
        if row.logprobs_from is None:
            return None
        first, end = max(first, row.logprobs_from), min(end, row.prompt_tokens)
        return tell(row, first, end) if first < end else None

    def _check(self, row: WorkerRow, values: Values, guesses: int) -> list[int]:
        """Go on for so many guesses; returns what is sampled after the right ones."""
        kept: list[int] = []
        right = True
        for offset in range(guesses):
            guess = values.next_token if self.dice.random() < self.luck else self.dice.randrange(VOCABULARY)
            right = right and guess == values.next_token
            for group, stored in enumerate(values.append(guess)):
                slot = self._slot(row, group, row.computed + offset)
                self.pools[group][slot : slot + 4] = stored
            if right:
                kept.append(values.next_token)
        self.guesses += guesses
        self.right_guesses += len(kept)
        return kept

    def _draft(self, row: WorkerRow, start: int) -> None:
        """Store the draft values from `start` on, and look at their windows."""
        first = max(row.begin, start)
        low = max(0, first - self.window + 1)
        for position in range(low, row.computed):
            if position < row.begin and not row.tables[2].get(position // self.page_size):
                continue  # draft KV may be missing behind a hit
            whole = self._slot(row, 0, position)
            value = int.from_bytes(self.pools[0][whole : whole + 4], "little") ^ DRAFT_SALT
            slot = self._slot(row, 2, position)
            self._touch_draft(row, position, position >= first)
            if position >= first:
                self.pools[2][slot : slot + 4] = value.to_bytes(4, "little")
            else:
                assert int.from_bytes(self.pools[2][slot : slot + 4], "little") == value, f"draft KV at {position}"

    def _touch_draft(self, row: WorkerRow, position: int, writes: bool) -> None:
        page = (2, row.tables[2][position // self.page_size])
        (self.unanswered[-1].writes if writes else self.unanswered[-1].reads)[page] = row
        for step in self.unanswered:
            assert step.writes.get(page, row) is row, f"page {page} is used while another step writes it"
            assert not writes or step.reads.get(page, row) is row, f"page {page} is written while another step reads it"

    def _compute(self, row: WorkerRow, count: int, guesses: int) -> Values:
        start, end = row.computed, row.computed + count
        self._touch(row, start, end + guesses)
        assert count > 0 and end <= len(row.tokens), f"{count} tokens at {start} of {len(row.tokens)}"
        values = Values(
            self.window, self._read(row, 0, 0, start), self._read(row, 1, max(0, start - self.window + 1), start)
        )
        for position in range(start, end):
            for group, stored in enumerate(values.append(row.tokens[position])):
                slot = self._slot(row, group, position)
                self.pools[group][slot : slot + 4] = stored
        row.computed = end
        self.computed_tokens += count
        return values

    def answered(self) -> None:
        """The scheduler has heard of the oldest unanswered step."""
        self.unanswered.popleft()

    def _touch(self, row: WorkerRow, start: int, end: int) -> None:
        """Note what a row's tokens [start, end) read and write; nobody else may be in between in a step in flight."""
        now = self.unanswered[-1]
        for group, first in enumerate((0, max(0, start - self.window + 1))):
            table = row.tables[group]
            for index in range(first // self.page_size, (end - 1) // self.page_size + 1):
                page = (group, table[index])
                if index >= start // self.page_size:
                    now.writes[page] = row
                    for step in self.unanswered:
                        assert step.reads.get(page, row) is row, f"page {page} is written while another step reads it"
                if index * self.page_size < start:
                    now.reads[page] = row
                    for step in self.unanswered:
                        assert step.writes.get(page, row) is row, f"page {page} is read while another step writes it"

    def _slot(self, row: WorkerRow, group: int, position: int) -> int:
        page = row.tables[group][position // self.page_size]
        assert page > 0, "the null page was named"
        return 4 * (page * self.page_size + position % self.page_size)

    def _read(self, row: WorkerRow, group: int, start: int, end: int) -> bytes:
        """Values of the positions [start, end) as the row's page table of a group shows them."""
        if start >= end:
            return b""
        width, table, pool = 4 * self.page_size, row.tables[group], self.pools[group]
        first, last = start // self.page_size, (end - 1) // self.page_size
        pages = (table[index] for index in range(first, last + 1))
        shown = b"".join(bytes(pool[page * width : (page + 1) * width]) for page in pages)
        return shown[4 * start - first * width : 4 * end - first * width]
