"""Whatever is guessed, tokens are those that are drawn without guesses, and follow the model's distribution.

Production noise, sampler and checking, over a toy model whose next token depends on the last one, thousands of rows at
a time. Drafters of every kind: greedy, sampling with noise of their own or with the model's, never right, always right.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from srt.layers.ops import TorchOps
from srt.messages import RowStart, SamplingSpec, StepPlan
from srt.worker.rows import Rows
from srt.worker.sampler import sample, uniform

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Drafter = Callable[[Ints, Ints], Ints]
"""Last tokens and the positions of the guesses to tokens, [N] each."""

ROWS = 20_000
TOKENS = 8
DRAFTS = 3
MODEL = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.3, 0.45, 0.25]])
"""Probability of the next token given the last one."""
DRAFT = np.array([[0.2, 0.3, 0.5], [0.1, 0.7, 0.2], [0.3, 0.4, 0.3]])
SEEDS = np.arange(ROWS, dtype=np.uint64) * np.uint64(7919)


def draws(probabilities: Floats, numbers: Floats) -> Ints:
    """Inverse of the cumulative distributions [N, V] at numbers [N]."""
    sums = probabilities.cumsum(axis=1)[:, :-1]
    drawn: Ints = (sums <= numbers[:, None]).sum(axis=1)
    return drawn


def own_noise() -> Drafter:
    """Samples with numbers that nobody else has."""
    rng = np.random.default_rng(5)
    return lambda last, position: draws(DRAFT[last], rng.random(len(last)))


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "greedy": lambda: lambda last, position: DRAFT[last].argmax(axis=1),
    "sampling": own_noise,
    "sampling with the model's noise": lambda: lambda last, position: draws(DRAFT[last], uniform(SEEDS, position)),
    "as the model": lambda: lambda last, position: draws(MODEL[last], uniform(SEEDS, position)),
    "never right": lambda: lambda last, position: (draws(MODEL[last], uniform(SEEDS, position)) + 1) % 3,
    "beyond the vocabulary": lambda: lambda last, position: last * 0 + 3,
}


class Toy:
    """All rows, run until each has enough tokens. `checked`: last tokens, first guesses, and what was sampled."""

    def __init__(self, drafter: Drafter | None, sampling: SamplingSpec, model: Floats = MODEL) -> None:
        self.tokens = np.zeros((ROWS, TOKENS + DRAFTS + 1), np.int64)
        self.known = np.zeros(ROWS, np.int64)
        self.checked: list[tuple[Ints, Ints, Ints]] = []
        self.accepted: list[Ints] = []
        rows, ops = Rows(1, 16, 32, ROWS, DRAFTS), TorchOps()
        logits = torch.from_numpy(np.log(np.vstack([model, [[1 / 3] * 3]]))).float()
        prompt = np.zeros(1, "<i4").tobytes()
        kept = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        starts = [RowStart(row, prompt, 0, 1, SamplingSpec(seed=int(SEEDS[row]), **kept)) for row in range(ROWS)]
        everyone, at = list(range(ROWS)), np.arange(ROWS)
        previous, guesses = at, list[Ints]()
        step = 0
        while (self.known < TOKENS).any():
            step += 1
            drafts = [DRAFTS] * ROWS if drafter else []
            plan = StepPlan(step, everyone, [1] * ROWS, [True] * ROWS, starts, drafts=drafts)
            rows.apply(plan)
            starts = []
            begun = rows.begin(plan)
            last = begun.batch.input_ids[begun.batch.logit_tokens]
            outcome = rows.end(begun, sample(logits[last], rows.sampling(begun), ops).numpy())
            ids, counts = np.array(outcome.token_ids), np.array(outcome.token_counts)
            ends = np.cumsum(counts)
            if guesses:
                self.checked.append((previous, guesses[0], ids[ends - counts]))
                self.accepted.append(counts - 1)
            for offset in range(DRAFTS + 1):
                more = (offset < counts) & (self.known + offset < TOKENS)
                self.tokens[at[more], self.known[more] + offset] = ids[(ends - counts)[more] + offset]
            self.known += counts
            if drafter:
                previous, guesses = ids[ends - 1], []
                for offset in range(DRAFTS):
                    before = guesses[-1] if guesses else previous
                    guesses.append(drafter(np.minimum(before, 2), 1 + self.known + offset))
                    rows.guess(at, offset, guesses[-1])

    @property
    def answer(self) -> Ints:
        """[N, TOKENS]."""
        return self.tokens[:, :TOKENS]


def chi_square(observed: Floats, expected: Floats) -> float:
    """How far counts are from what they should be, in standard deviations of the statistic; below 4 by all odds."""
    assert expected.min() >= 5
    freedom = observed.size - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def joint(model: Floats, tokens: int) -> Floats:
    """Probabilities of all sequences of so many tokens behind the prompt, flat."""
    chances, last = np.ones(1), np.zeros(1, np.int64)
    for _ in range(tokens):
        chances = (chances[:, None] * model[last]).ravel()
        last = np.tile(np.arange(3), len(last))
    return chances


def counted(answer: Ints, tokens: int) -> Floats:
    """How often each sequence of the first tokens came, in the order of `joint`."""
    codes = answer[:, :tokens] @ (3 ** np.arange(tokens - 1, -1, -1))
    return np.bincount(codes, minlength=3**tokens).astype(np.float64)


@pytest.fixture(scope="module")
def plain() -> Ints:
    return Toy(None, SamplingSpec()).answer


@pytest.mark.parametrize("name", DRAFTERS)
def test_01_04_06_07_every_drafter_leaves_every_token_as_it_is_without(name: str, plain: Ints) -> None:
    toy = Toy(DRAFTERS[name](), SamplingSpec())
    assert (toy.answer == plain).all()
    kept = np.concatenate(toy.accepted).mean()
    if name in ("never right", "beyond the vocabulary"):
        assert kept == 0
    elif name == "as the model":
        assert kept == DRAFTS
    else:
        assert 0.3 < kept < 2


def test_04_four_tokens_over_several_steps_follow_the_model_s_joint_distribution() -> None:
    toy = Toy(own_noise(), SamplingSpec())
    assert chi_square(counted(toy.answer, 4), joint(MODEL, 4) * ROWS) < 4
    pairs = np.zeros((3, 3))
    np.add.at(pairs, (toy.answer[:, :-1].ravel(), toy.answer[:, 1:].ravel()), 1)
    for last in range(3):
        assert chi_square(pairs[last], MODEL[last] * pairs[last].sum()) < 4


def test_04_filters_and_temperature_shape_the_model_and_not_the_guesses() -> None:
    sampling = SamplingSpec(temperature=0.5, top_k=2)
    sharper = np.where(np.sort(MODEL, axis=1)[:, 1:2] > MODEL, 0, MODEL) ** 2
    sharper[1, 1] = 0  # of equal ones the lowest id is kept
    sharper /= sharper.sum(axis=1, keepdims=True)
    toy = Toy(own_noise(), sampling)
    expected = joint(sharper, 4) * ROWS
    there = expected > 0
    observed = counted(toy.answer, 4)
    assert observed[~there].sum() == 0
    assert chi_square(observed[there], expected[there]) < 4


def test_04_a_guess_is_right_as_often_as_the_model_gives_it() -> None:
    """No check is more generous to a drafter that guesses one token: it is accepted with that token's probability."""
    toy = Toy(DRAFTERS["greedy"](), SamplingSpec())
    for last in range(3):
        guess = int(DRAFT[last].argmax())
        checked = np.concatenate([sampled[previous == last] for previous, _, sampled in toy.checked])
        deviation = np.sqrt(MODEL[last, guess] * (1 - MODEL[last, guess]) / len(checked))
        assert abs((checked == guess).mean() - MODEL[last, guess]) < 4 * deviation


def test_05_what_is_sampled_knows_nothing_of_the_guess_before_it() -> None:
    toy = Toy(own_noise(), SamplingSpec())
    for last in range(3):
        table = np.zeros((3, 3))
        for previous, guess, sampled in toy.checked:
            np.add.at(table, (guess[previous == last], sampled[previous == last]), 1)
        for sampled_behind in table:
            assert chi_square(sampled_behind, MODEL[last] * sampled_behind.sum()) < 4
