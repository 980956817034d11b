"""What is drawn under all filters together, by chi-square against a plain numpy reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from srt.layers.ops import TorchOps
from srt.messages import SamplingSpec
from srt.worker.edits import LogitEdits, RowEdits
from srt.worker.sampler import SamplingColumns, sample

VOCABULARY = 50
DRAWS = 40_000
CHANCE = 4.75
"""Standard deviations; a right sampler exceeds it once in a million times."""


def probabilities(logits: NDArray[np.float64], spec: SamplingSpec) -> NDArray[np.float64]:
    """The reference: softmax, then top_k, top_p and min_p one after the other."""
    scaled = np.exp((logits - logits.max()) / spec.temperature)
    kept = np.ones(len(scaled), bool)
    order = np.argsort(-scaled, kind="stable")
    if spec.top_k:
        kept[order[spec.top_k :]] = False
    share = np.where(kept, scaled, 0) / scaled[kept].sum()
    before = np.cumsum(share[order]) - share[order]
    kept[order[before >= spec.top_p]] = False
    kept &= scaled >= spec.min_p * scaled.max()
    kept[order[0]] = True
    weights = np.where(kept, scaled, 0)
    result: NDArray[np.float64] = weights / weights.sum()
    return result


def drawn(logits: NDArray[np.float64], spec: SamplingSpec, edits: LogitEdits | None = None) -> NDArray[np.int64]:
    """How often each token comes in `DRAWS` draws at different positions."""

    def column(value: Any, kind: type) -> NDArray[Any]:
        return np.full(DRAWS, value, kind)

    columns = SamplingColumns(
        temperature=column(spec.temperature, np.float64), top_k=column(spec.top_k, np.int64),
        top_p=column(spec.top_p, np.float64), min_p=column(spec.min_p, np.float64), seed=column(spec.seed, np.uint64),
        position=np.arange(DRAWS), edits=edits,
    )  # fmt: skip
    tokens = sample(torch.from_numpy(logits.astype(np.float32)).repeat(DRAWS, 1), columns, TorchOps())
    counts: NDArray[np.int64] = np.bincount(tokens.numpy(), minlength=VOCABULARY)
    return counts


def assert_follows(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    """Chi-square; rare tokens are counted together, and what cannot be drawn must not have been."""
    assert counts[expected == 0].sum() == 0
    rare = expected * DRAWS < 10
    observed = np.append(counts[~rare], counts[rare].sum()).astype(np.float64)
    wanted = np.append(expected[~rare], expected[rare].sum()) * DRAWS
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    if freedom:
        square = ((observed - wanted) ** 2 / wanted).sum()
        # Wilson and Hilferty: the cube root is nearly normal.
        deviation = ((square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
        assert deviation < CHANCE, f"chi-square {square:.1f} with {freedom} degrees of freedom"


SPECS = [
    SamplingSpec(),
    SamplingSpec(temperature=0.6),
    SamplingSpec(temperature=1.7),
    SamplingSpec(top_k=7),
    SamplingSpec(top_p=0.8),
    SamplingSpec(min_p=0.2),
    SamplingSpec(temperature=1.4, top_k=20, top_p=0.9, min_p=0.05),
    SamplingSpec(temperature=0.5, top_k=3, top_p=0.95),
    SamplingSpec(temperature=2.0, top_p=0.5, min_p=0.4),
]


@pytest.mark.parametrize("seed", range(len(SPECS)))
def test_draws_follow_the_filtered_distribution(seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, VOCABULARY).astype(np.float32).astype(np.float64)
    spec = SPECS[seed]
    assert_follows(drawn(logits, spec), probabilities(logits, spec))


def test_draws_follow_penalised_and_biased_logits() -> None:
    logits = np.random.default_rng(99).normal(0, 2, VOCABULARY).astype(np.float32).astype(np.float64)
    prompt, answer = [1, 2, 3, 3], [3, 4, 4, 4, 5]
    spec = SamplingSpec(
        temperature=0.9, top_p=0.95, frequency_penalty=0.4, presence_penalty=-0.3, repetition_penalty=1.3,
        logit_bias=((4, 3.0), (40, -2.5)), min_new_tokens=9, suppressed_ids=(int(logits.argmax()),),
    )  # fmt: skip
    changed = logits.copy()
    for token in {*prompt, *answer}:
        changed[token] *= 1 / 1.3 if changed[token] > 0 else 1.3
    for token in set(answer):
        changed[token] -= 0.4 * answer.count(token) - 0.3
    changed[4] += 3.0
    changed[40] -= 2.5
    changed[logits.argmax()] = -np.inf
    edits = LogitEdits()
    for row in range(DRAWS):
        RowEdits(spec, np.array(prompt + answer), len(prompt)).collect(edits, row, np.array(prompt + answer), 0)
    assert_follows(drawn(logits, spec, edits), probabilities(changed, spec))


def test_the_test_notices_a_sampler_that_is_a_little_wrong() -> None:
    logits = np.random.default_rng(1).normal(0, 2, VOCABULARY)
    spec = SamplingSpec(temperature=1.0)
    with pytest.raises(AssertionError, match="chi-square"):
        assert_follows(drawn(logits, SamplingSpec(temperature=1.03)), probabilities(logits, spec))
