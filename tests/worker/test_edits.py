"""Penalties and biases: against logits computed by hand, along guesses, and when a request starts again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srt.configs.plan import DraftTraits
from srt.messages import SamplingSpec, ThinkingBudget
from srt.worker.edits import LogitEdits, RowEdits
from tests.support.checkpoints import write_checkpoint
from tests.support.steps import GREEDY, MTP, NO_DRAFTS, Steps, plan_for, random_ids

NGRAM = DraftTraits("ngram", drafts=3)
PENALISED = SamplingSpec(
    temperature=0.0, frequency_penalty=0.2, presence_penalty=-1.0, repetition_penalty=0.6, logit_bias=((3, 0.5),)
)


def edited(logits: Tensor, sampling: SamplingSpec, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The definition, token by token: logits [V] after prompt and answer."""
    numbers = logits.double().tolist()
    counts, everything = Counter(answer), {*prompt, *answer}
    for token, number in enumerate(numbers):
        if token in everything:
            factor = sampling.repetition_penalty
            numbers[token] = number / factor if number > 0 else number * factor
        if counts[token]:
            numbers[token] -= sampling.frequency_penalty * counts[token] + sampling.presence_penalty
        numbers[token] += dict(sampling.logit_bias).get(token, 0.0)
        if len(answer) < sampling.min_new_tokens and token in sampling.suppressed_ids:
            numbers[token] = -torch.inf
    return torch.tensor(numbers)


def apply(row: RowEdits, logits: Tensor, tokens: Sequence[int], guesses: int = 0) -> Tensor:
    """Logits [guesses + 1, V] as a row that knows `tokens`, the last of them guesses, wants them."""
    edits = LogitEdits()
    row.collect(edits, 0, np.array(tokens), guesses)
    return edits.apply(logits.clone()) if edits else logits


def test_penalties_and_biases_are_those_computed_by_hand() -> None:
    sampling = SamplingSpec(
        frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0, logit_bias=((2, 1.5), (3, -1.0))
    )
    row = RowEdits(sampling, np.array([0, 4]), 2)
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0, -0.5, 7.0]])
    after = apply(row, logits, [0, 4, 1, 1, 3])
    # 0: 2 / 2.  1: -1 x 2 - 2 x 0.5 - 0.25.  2: 0.5 + 1.5.  3: 3 / 2 - 0.5 - 0.25 - 1.  4: -0.5 x 2.  5: untouched.
    assert after.tolist() == [[1.0, -3.25, 2.0, -0.25, -1.0, 7.0]]


def test_only_the_answer_counts_for_frequency_and_presence() -> None:
    row = RowEdits(SamplingSpec(frequency_penalty=1.0, presence_penalty=1.0), np.array([0, 0, 1]), 3)
    assert apply(row, torch.zeros(1, 3), [0, 0, 1]).tolist() == [[0.0, 0.0, 0.0]]
    assert apply(row, torch.zeros(1, 3), [0, 0, 1, 0]).tolist() == [[-2.0, 0.0, 0.0]]


def test_a_bias_of_100_forces_a_token_and_of_minus_100_forbids_it() -> None:
    logits = torch.tensor([[20.0, 30.0, -20.0]])
    assert apply(RowEdits(SamplingSpec(logit_bias=((2, 100.0),)), np.array([0]), 1), logits, [0]).argmax() == 2
    assert apply(RowEdits(SamplingSpec(logit_bias=((1, -100.0),)), np.array([0]), 1), logits, [0]).argmax() == 0


def test_neutral_settings_want_nothing() -> None:
    assert not RowEdits.wanted(SamplingSpec(temperature=0.5, top_k=4, min_new_tokens=3))
    assert RowEdits.wanted(SamplingSpec(min_new_tokens=3, suppressed_ids=(1,)))
    assert RowEdits.wanted(SamplingSpec(logit_bias=((0, 1.0),)))


TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    prompt=TOKENS,
    answer=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5),
    guesses=st.lists(st.integers(0, 9), max_size=4),
    repetition=st.sampled_from([1.0, 0.7, 1.5]),
    frequency=st.sampled_from([0.0, 0.5, -1.0]),
    presence=st.sampled_from([0.0, 2.0]),
    least=st.integers(0, 8),
)
def test_a_row_that_grows_step_by_step_along_wrong_guesses_equals_the_definition(
    prompt: list[int],
    answer: list[list[int]],
    guesses: list[int],
    repetition: float,
    frequency: float,
    presence: float,
    least: int,
) -> None:
    sampling = SamplingSpec(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence,
        logit_bias=((0, 3.0), (9, -1.0)), min_new_tokens=least, suppressed_ids=(1, 2),
    )  # fmt: skip
    row = RowEdits(sampling, np.array(prompt), len(prompt))
    logits = torch.linspace(-2, 3, 10).repeat(len(guesses) + 1, 1)
    known: list[int] = []
    for more in ([], *answer):
        known += more
        found = apply(row, logits, prompt + known + guesses, len(guesses))
        for offset in range(len(guesses) + 1):
            expected = edited(logits[offset], sampling, prompt, known + guesses[:offset])
            assert torch.allclose(found[offset].double(), expected.double(), atol=1e-6)


def test_half_precision_logits_are_edited_in_full_precision() -> None:
    row = RowEdits(SamplingSpec(logit_bias=((0, 0.001),)), np.array([0]), 1)
    assert apply(row, torch.tensor([[16.0, 16.0]], dtype=torch.bfloat16), [0])[0, 0].item() == pytest.approx(16.001)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), vision=False)


def generated(steps: Steps, sampling: SamplingSpec, drafts: int) -> list[int]:
    steps.add(0, random_ids(20, 3, 1024), sampling=sampling)
    return steps.generate(0, 24, drafts)[:24]


@pytest.mark.parametrize(("drafting", "drafts"), [(NO_DRAFTS, 0), (NGRAM, 3), (MTP, 3)], ids=["plain", "ngram", "mtp"])
def test_a_worker_draws_by_the_edited_logits_of_every_row_also_of_guesses(
    tiny: Path, tmp_path: Path, drafting: DraftTraits, drafts: int
) -> None:
    steps = Steps(plan_for(tiny, drafting=drafting), tmp_path)
    prompt = random_ids(20, 3, 1024)
    found = generated(steps, PENALISED, drafts)
    assert found != generated(Steps(plan_for(tiny), tmp_path), GREEDY, 0)
    plain = steps.all_logits(0)
    for at, token in enumerate(found):
        expected = edited(plain[len(prompt) - 1 + at], PENALISED, prompt, found[:at])
        best = expected.topk(2)
        assert best.indices[0] == token or best.values[0] - best.values[1] < 1e-4, f"token {at}"


def test_a_row_that_starts_again_goes_on_as_if_it_never_had_stopped(tiny: Path, tmp_path: Path) -> None:
    steps = Steps(plan_for(tiny), tmp_path)
    whole = generated(steps, PENALISED, 0)
    prompt = random_ids(20, 3, 1024)
    steps.add(1, prompt + whole[:9], sampling=PENALISED, prompt_tokens=len(prompt))
    assert whole[:9] + steps.generate(1, 15)[:15] == whole


def test_reasoning_ends_when_its_budget_is_spent_and_only_then() -> None:
    sampling = SamplingSpec(thinking=ThinkingBudget(2, 5, (5, 4)))
    assert RowEdits.wanted(sampling)
    logits = torch.randn(3, 6)
    forced = [-torch.inf] * 5 + [0.0]
    row = RowEdits(sampling, np.array([0, 1]), 2)
    assert torch.equal(apply(row, logits[:1], [0, 1]), logits[:1])
    after = apply(row, logits, [0, 1, 2, 2, 3], guesses=2)
    assert torch.equal(after[0], logits[0])
    assert after[1:].tolist() == [forced, forced], "behind one token, and behind two and three"
    after = apply(row, logits[:2], [0, 1, 2, 4], guesses=1)
    assert torch.equal(after, logits[:2]), "the guess ends it"
    assert apply(row, logits[:1], [0, 1, 2, 2]).tolist() == [forced]
    assert torch.equal(apply(row, logits[:1], [0, 1, 2, 2, 5]), logits[:1])
    assert torch.equal(apply(row, logits[:1], [0, 1, 2, 2, 5, 3]), logits[:1])
    assert apply(RowEdits(sampling, np.array([0, 1, 2, 2]), 2), logits[:1], [0, 1, 2, 2]).tolist() == [forced]
    resumed = RowEdits(sampling, np.array([0, 1, 5, 2]), 2)
    assert torch.equal(apply(resumed, logits[:1], [0, 1, 5, 2]), logits[:1])
