"""What requests change in logits before anything is drawn: penalties, biases, tokens that must not come yet, or must.

A row's edits are a function of its sampling settings and of the tokens before the one to draw, guesses included. They
are collected on the host as single places of the logits [L, V] and applied on whatever device these are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srt.messages import SamplingSpec

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

FEWEST_SLOTS = 64


@dataclass
class Places:
    """Places of logits, and a number for each. No place comes twice."""

    rows: list[int] = field(default_factory=list)
    ids: list[Ints] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)

    def add(self, row: int, ids: Ints, values: Floats) -> None:
        """Places of one more row of the logits."""
        self.rows.append(row)
        self.ids.append(ids)
        self.values.append(values)

    def on(self, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Index of N places, and their numbers: [N] int64 twice, [N] float32."""
        rows = np.repeat(np.array(self.rows, np.int64), [len(ids) for ids in self.ids])
        index = torch.from_numpy(rows).to(device), torch.from_numpy(np.concatenate(self.ids)).to(device)
        return index, torch.from_numpy(np.concatenate(self.values)).to(device)


@dataclass
class LogitEdits:
    """All changes of one step's logits, kind by kind in the order in which they are made."""

    repeated: Places = field(default_factory=Places)
    """Positive logits are divided by the number, negative ones multiplied with it."""
    used: Places = field(default_factory=Places)
    """The number is subtracted."""
    biased: Places = field(default_factory=Places)
    """The number is added."""
    barred: Places = field(default_factory=Places)
    """Becomes minus infinity."""
    forced: Places = field(default_factory=Places)
    """All others of the row become minus infinity."""

    def __bool__(self) -> bool:
        return any(places.rows for places in (self.repeated, self.used, self.biased, self.barred, self.forced))

    def apply(self, logits: Tensor) -> Tensor:
        """The edited logits [L, V] in float32; those given may be overwritten."""
        logits = logits.float()
        if self.repeated.rows:
            index, factors = self.repeated.on(logits.device)
            there = logits[index]
            logits[index] = torch.where(there > 0, there / factors, there * factors)
        if self.used.rows:
            index, penalties = self.used.on(logits.device)
            logits[index] -= penalties
        if self.biased.rows:
            index, biases = self.biased.on(logits.device)
            logits[index] += biases
        if self.barred.rows:
            index, _ = self.barred.on(logits.device)
            logits[index] = -torch.inf
        if self.forced.rows:
            index, _ = self.forced.on(logits.device)
            logits[index[0]] = -torch.inf
            logits[index] = 0.0
        return logits


class Seen:
    """The distinct tokens of a sequence that grows at its end, and how often each came."""

    def __init__(self, tokens: Ints) -> None:
        ids, counts = np.unique(tokens, return_counts=True)
        self._size = len(ids)
        self._ids = np.zeros(max(FEWEST_SLOTS, 2 * self._size), np.int64)
        self._counts = np.zeros(len(self._ids), np.int64)
        self._ids[: self._size], self._counts[: self._size] = ids, counts
        self._slots = {token: slot for slot, token in enumerate(ids.tolist())}

    def add(self, tokens: Sequence[int]) -> None:
        """More tokens at the end."""
        for token in tokens:
            slot = self._slots.get(token)
            if slot is None:
                slot = self._slots[token] = self._new_slot(token)
            self._counts[slot] += 1

    def _new_slot(self, token: int) -> int:
        if self._size == len(self._ids):
            self._ids, self._counts = (np.pad(column, (0, self._size)) for column in (self._ids, self._counts))
        self._ids[self._size] = token
        self._size += 1
        return self._size - 1

    def followed_by(self, guesses: Sequence[int]) -> tuple[Ints, Ints]:
        """Ids and their counts if these tokens came next; the ids in no particular order."""
        ids, counts = self._ids[: self._size].copy(), self._counts[: self._size].copy()
        more = Counter(guesses)
        new = [token for token in more if token not in self._slots]
        for token in more.keys() - new:
            counts[self._slots[token]] += more[token]
        if not new:
            return ids, counts
        new_counts = np.array([more[token] for token in new], np.int64)
        return np.concatenate([ids, np.array(new, np.int64)]), np.concatenate([counts, new_counts])


class RowEdits:
    """What one request wants changed. Must be asked for positions in rising order, but for guesses."""

    def __init__(self, sampling: SamplingSpec, tokens: Ints, prompt_tokens: int) -> None:
        """`tokens` are all that is known, the first `prompt_tokens` of them the prompt."""
        self._sampling = sampling
        self._free_from = prompt_tokens + sampling.min_new_tokens
        self._counted = len(tokens)
        self._everything = Seen(tokens) if sampling.repetition_penalty != 1 else None
        penalised = sampling.frequency_penalty or sampling.presence_penalty
        self._answer = Seen(tokens[prompt_tokens:]) if penalised else None
        self._barred = np.array(sampling.suppressed_ids if sampling.min_new_tokens else (), np.int64)
        self._biased = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        self._budget = sampling.thinking if self._goes_on(tokens[prompt_tokens:].tolist()) else None
        """While the row thinks: how long it may."""
        self._prompt_tokens = prompt_tokens

    def _goes_on(self, tokens: Iterable[int]) -> bool:
        """Whether reasoning that came to these tokens goes on behind them."""
        budget = self._sampling.thinking
        return budget is not None and not any(token in budget.end_ids for token in tokens)

    @staticmethod
    def wanted(sampling: SamplingSpec) -> bool:
        """Whether a request has any edits at all."""
        return bool(
            sampling.repetition_penalty != 1
            or sampling.frequency_penalty
            or sampling.presence_penalty
            or sampling.logit_bias
            or (sampling.min_new_tokens and sampling.suppressed_ids)
            or sampling.thinking is not None
        )

    def collect(self, edits: LogitEdits, first: int, tokens: Ints, guesses: int) -> None:
        """Add the edits of `guesses + 1` rows of logits from row `first` on: those behind `tokens`, which end with as
        many guesses; the first of these rows follows the last token that is no guess."""
        known = len(tokens) - guesses
        if self._everything is not None or self._answer is not None or self._budget is not None:
            news = tokens[self._counted : known].tolist()
            for seen in (self._everything, self._answer):
                if seen is not None:
                    seen.add(news)
            self._budget = self._budget if self._goes_on(news) else None
            self._counted = known
        ahead: list[int] = tokens[known:].tolist()
        for offset in range(guesses + 1):
            self._collect_one(edits, first + offset, ahead[:offset], known + offset)

    def _collect_one(self, edits: LogitEdits, row: int, guesses: list[int], position: int) -> None:
        sampling = self._sampling
        if self._everything is not None:
            ids, _ = self._everything.followed_by(guesses)
            edits.repeated.add(row, ids, np.full(len(ids), sampling.repetition_penalty, np.float32))
        if self._answer is not None:
            ids, counts = self._answer.followed_by(guesses)
            penalties = sampling.frequency_penalty * counts + sampling.presence_penalty
            edits.used.add(row, ids, penalties.astype(np.float32))
        if len(self._biased):
            edits.biased.add(row, self._biased, self._bias)
        if position < self._free_from and len(self._barred):
            edits.barred.add(row, self._barred, np.zeros(len(self._barred), np.float32))
        budget = self._budget
        if budget is not None and position >= self._prompt_tokens + budget.tokens and self._goes_on(guesses):
            edits.forced.add(row, np.array([budget.close_id], np.int64), np.zeros(1, np.float32))
