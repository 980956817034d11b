"""Sampling: what the filters keep, and that a draw depends on nothing but the row's own logits, seed and position."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srt.errors import ProcessLost
from srt.layers.ops import TorchOps
from srt.worker.edits import LogitEdits
from srt.worker.sampler import SamplingColumns, sample, uniform

DRAWS = 4000


def columns(rows: int, **given_columns: Any) -> SamplingColumns:
    """Neutral settings for `rows` rows, seed 0, positions 0, 1, 2, ..., with some of them replaced."""
    values: dict[str, Any] = {
        "temperature": np.ones(rows), "top_k": np.zeros(rows, np.int64), "top_p": np.ones(rows),
        "min_p": np.zeros(rows), "seed": np.zeros(rows, np.uint64), "position": np.arange(rows),
    }  # fmt: skip
    for name, value in given_columns.items():
        values[name] = value if name == "edits" else np.broadcast_to(value, rows).astype(values[name].dtype)
    return SamplingColumns(**values)


def draw(logits: Tensor, **given_columns: Any) -> list[int]:
    """One token a row."""
    tokens: list[int] = sample(logits.clone(), columns(len(logits), **given_columns), TorchOps()).tolist()
    return tokens


def shares(probabilities: list[float], **given_columns: Any) -> dict[int, float]:
    """How often each token is drawn from one distribution."""
    logits = torch.tensor(probabilities).log().repeat(DRAWS, 1)
    return {token: count / DRAWS for token, count in sorted(Counter(draw(logits, **given_columns)).items())}


def test_temperature_zero_takes_the_largest_logit_and_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert draw(logits, temperature=0.0) == [1, 0]


def test_draws_follow_the_softmax() -> None:
    assert shares([0.5, 0.3, 0.15, 0.05]) == pytest.approx({0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}, abs=0.03)


def test_a_higher_temperature_flattens() -> None:
    root = np.sqrt([0.5, 0.3, 0.15, 0.05])
    expected = dict(enumerate(root / root.sum()))
    assert shares([0.5, 0.3, 0.15, 0.05], temperature=2.0) == pytest.approx(expected, abs=0.03)


def test_top_k_keeps_the_largest_and_the_lowest_ids_among_equals() -> None:
    assert set(shares([0.2, 0.4, 0.2, 0.2], top_k=2)) == {0, 1}


def test_top_p_keeps_the_fewest_that_reach_its_share() -> None:
    assert shares([0.5, 0.3, 0.15, 0.05], top_p=0.7) == pytest.approx({0: 0.625, 1: 0.375}, abs=0.03)


def test_top_p_counts_the_share_of_what_top_k_kept() -> None:
    assert set(shares([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.56)) == {0}
    assert set(shares([0.4, 0.3, 0.2, 0.1], top_p=0.56)) == {0, 1}


def test_min_p_is_a_share_of_the_largest_probability() -> None:
    assert set(shares([0.5, 0.3, 0.15, 0.05], min_p=0.29)) == {0, 1, 2}


def test_the_most_probable_token_survives_every_filter() -> None:
    assert shares([0.3, 0.4, 0.3], top_p=1e-9, min_p=1.0, top_k=1) == {1: 1.0}


def test_barred_ids_are_never_drawn() -> None:
    def barred(rows: int) -> LogitEdits:
        edits = LogitEdits()
        for row in range(rows):
            edits.barred.add(row, np.array([0]), np.zeros(1, np.float32))
        return edits

    assert draw(torch.tensor([[9.0, 1.0, 2.0]]), temperature=0.0, edits=barred(1)) == [2]
    logits = torch.tensor([[9.0, 1.0, 2.0]]).repeat(200, 1)
    assert 0 not in draw(logits, edits=barred(200))


def test_huge_logits_over_tiny_temperatures_do_not_overflow() -> None:
    assert draw(torch.tensor([[3e38, -3e38, 0.0]]), temperature=2e-6) == [0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_a_logit_that_is_not_finite_is_a_fault(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    with pytest.raises(ProcessLost, match=r"1 of 3 sampled rows are not finite: rows \[1\]"):
        draw(logits, temperature=temperature)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_draw_does_not_depend_on_the_rows_beside_it(data: st.DataObject) -> None:
    rows = data.draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(rows, 50, generator=generator)

    def each(values: st.SearchStrategy[Any]) -> np.ndarray[Any, Any]:
        return np.array(data.draw(st.lists(values, min_size=rows, max_size=rows)))

    settings_of_rows = {
        "temperature": each(st.sampled_from([0.0, 0.7, 1.0])),
        "top_k": each(st.sampled_from([0, 1, 5, 49, 50, 1000])),
        "top_p": each(st.sampled_from([0.1, 0.9, 1.0])),
        "min_p": each(st.sampled_from([0.0, 0.2])),
        "seed": each(st.integers(0, 2**63 - 1)).astype(np.uint64),
        "position": each(st.integers(0, 10_000)),
    }
    together = draw(logits, **settings_of_rows)
    alone = [
        draw(logits[row : row + 1], **{name: values[row : row + 1] for name, values in settings_of_rows.items()})[0]
        for row in range(rows)
    ]
    assert together == alone


def plain_draw(logits: Tensor, at: SamplingColumns, row: int) -> tuple[int, float]:
    """The definition, one row in float64: the token, and how near the number was to the border of another one."""
    wide = (logits[row].double() - logits[row].double().max()) / at.temperature[row]
    order = torch.sort(wide, descending=True, stable=True).indices
    weights = wide.exp()
    if 0 < at.top_k[row] < len(wide):
        weights[order[at.top_k[row] :]] = 0
    ranked = weights[order]
    before = (ranked.cumsum(0) - ranked) / weights.sum()
    near = (before - at.top_p[row]).abs().min().item() if at.top_p[row] < 1 else 1.0
    weights[order[1:][before[1:] >= at.top_p[row]]] = 0
    weights[weights < at.min_p[row]] = 0
    cumulative = weights.cumsum(0) / weights.sum()
    number = uniform(at.seed[row : row + 1], at.position[row : row + 1])[0]
    near = min(near, (cumulative - number).abs().min().item())
    return int((cumulative <= number).sum()), near


@pytest.mark.parametrize("vocabulary", [3, 64, 100, 4096, 8192])
@pytest.mark.parametrize("coarse", [False, True])
def test_draws_equal_the_plain_definition(vocabulary: int, coarse: bool) -> None:
    rng = np.random.default_rng(vocabulary)
    rows = 60
    logits = torch.from_numpy(rng.normal(0, 3, (rows, vocabulary)).astype(np.float32))
    if coarse:  # many ties
        logits = logits.round()
    at = columns(
        rows,
        temperature=rng.choice([0.3, 1.0, 5.0], rows),
        top_k=rng.choice([0, 1, 2, 50, 5000], rows),
        top_p=rng.choice([1.0, 0.95, 0.5, 1e-6], rows),
        min_p=rng.choice([0.0, 0.0, 0.05], rows),
        seed=rng.integers(0, 2**62, rows),
    )
    drawn = sample(logits.clone(), at, TorchOps()).tolist()
    for row in range(rows):
        token, near = plain_draw(logits, at, row)
        assert drawn[row] == token or near < 1e-6, f"row {row}"


def test_noise_differs_by_seed_and_by_position_and_is_spread_evenly() -> None:
    positions = np.arange(2000)
    numbers = np.stack([uniform(np.full(2000, seed, np.uint64), positions) for seed in range(20)])
    assert len(np.unique(numbers)) == numbers.size
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.histogram(numbers, bins=10, range=(0, 1))[0] == pytest.approx([4000] * 10, rel=0.06)
    assert abs(np.corrcoef(numbers[0], numbers[1])[0, 1]) < 0.1
    assert abs(np.corrcoef(numbers[0, :-1], numbers[0, 1:])[0, 1]) < 0.1
