"""Rows under plans that contradict them, and seeds that survive every way of cutting a request into steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from srt.errors import ProcessLost
from srt.messages import PageUpdate, RowStart, SamplingSpec, StepPlan
from srt.worker.rows import Rows
from tests.support.checkpoints import write_checkpoint
from tests.support.steps import GREEDY, Steps, plan_for, random_ids

SAMPLED = SamplingSpec(temperature=1.0, top_k=40, top_p=0.95, seed=1234)


def start(row: int, tokens: int, computed: int = 0, sampling: SamplingSpec = GREEDY) -> RowStart:
    return RowStart(row, np.arange(tokens, dtype="<i4").tobytes(), computed, tokens, sampling)


def rows() -> Rows:
    return Rows(2, page_size=4, context_length=64, rows=2)


def test_a_batch_names_the_slot_of_every_token_in_every_group() -> None:
    table = rows()
    pages = [PageUpdate(0, [1, 0], [0, 0], [2, 1], [5, 9, 3]), PageUpdate(1, [1, 0], [1, 0], [1, 1], [7, 2])]
    plan = StepPlan(1, [1, 0], [3, 2], [True, False], [start(1, 7, 4), start(0, 4)], pages)
    table.apply(plan)
    batch = table.begin(plan).batch
    assert batch.input_ids.tolist() == [4, 5, 6, 0, 1]
    assert batch.positions.tolist() == [4, 5, 6, 0, 1]
    assert batch.slots[0].tolist() == [36, 37, 38, 12, 13]
    assert batch.slots[1].tolist() == [28, 29, 30, 8, 9]
    assert batch.query_starts_list == [0, 3, 5]
    assert batch.kv_lens_list == [7, 2]
    assert batch.logit_tokens.tolist() == [2]
    assert batch.page_tables[0].tolist() == [[5, 9], [3, 0]]


def test_a_restarted_row_keeps_nothing_of_the_request_before() -> None:
    table = rows()
    table.apply(StepPlan(1, [], [], [], [start(0, 8)], [PageUpdate(0, [0], [0], [2], [5, 6])]))
    plan = StepPlan(2, [0], [6], [True], [start(0, 6)], [PageUpdate(0, [0], [0], [1], [3])], freed_rows=[0])
    table.apply(plan)
    assert table.begin(plan).batch.page_tables[0].tolist() == [[3, 0]]


def test_rows_beyond_the_first_capacity_are_made_room_for() -> None:
    table = rows()
    plan = StepPlan(1, [9], [3], [True], [start(9, 3)], [PageUpdate(0, [9], [0], [1], [4])])
    table.apply(plan)
    assert table.begin(plan).batch.slots[0].tolist() == [16, 17, 18]


@pytest.mark.parametrize(
    ("count", "emits", "told"),
    [
        (6, True, "cannot compute 6 more and emit"),
        (3, True, "cannot compute 3 more and emit"),
        (6, False, "cannot compute 6 more and go on"),
        (0, False, "cannot compute 0 more and go on"),
    ],
)
def test_a_plan_that_contradicts_a_row_is_refused(count: int, emits: bool, told: str) -> None:
    table = rows()
    plan = StepPlan(1, [0], [count], [emits], [start(0, 5)])
    table.apply(plan)
    with pytest.raises(ProcessLost, match=told):
        table.begin(plan)


@pytest.mark.parametrize(("tokens", "computed"), [(66, 0), (5, 5), (0, 0)])
def test_a_row_that_starts_too_long_or_without_work_is_refused(tokens: int, computed: int) -> None:
    with pytest.raises(ProcessLost, match=f"row 0 starts with {tokens} tokens, {computed} computed"):
        rows().apply(StepPlan(1, [], [], [], [start(0, tokens, computed)]))


def test_a_page_update_with_columns_that_disagree_is_refused() -> None:
    with pytest.raises(ProcessLost, match="names 1 pages for 2 entries"):
        rows().apply(StepPlan(1, [], [], [], [start(0, 5)], [PageUpdate(0, [0], [0], [2], [5])]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), vision=False)


def test_seeded_tokens_are_the_same_alone_in_a_batch_chunked_and_after_retraction(tiny: Path, tmp_path: Path) -> None:
    prompt = random_ids(30, 1, 1024)

    def fresh() -> Steps:
        return Steps(plan_for(tiny), tmp_path)

    alone = fresh()
    alone.add(0, prompt, sampling=SAMPLED)
    expected = alone.generate(0, 12)
    assert len(set(expected)) > 6
    batched = fresh()
    batched.add(1, random_ids(44, 2, 1024), sampling=SamplingSpec(temperature=0.8, seed=5))
    batched.add(0, prompt, sampling=SAMPLED)
    batched.run({1: 44, 0: 11})
    batched.run({0: 19, 1: 1})
    for _ in range(11):
        batched.run({1: 1, 0: 1})
    assert batched.tokens[0][30:] == expected
    retracted = fresh()
    retracted.add(0, prompt, sampling=SAMPLED)
    retracted.generate(0, 5)
    retracted.add(3, retracted.tokens[0], sampling=SAMPLED)
    assert retracted.generate(3, 7) == expected[5:]


def test_suppressed_ids_wait_until_min_new_tokens_exist(tiny: Path, tmp_path: Path) -> None:
    steps = Steps(plan_for(tiny), tmp_path)
    steps.add(0, random_ids(10, 1, 1024))
    free = steps.generate(0, 6)
    for kept_out in range(4):
        spec = SamplingSpec(temperature=0.0, min_new_tokens=kept_out, suppressed_ids=tuple(free))
        steps.add(1, random_ids(10, 1, 1024), sampling=spec)
        tokens = steps.generate(1, 4)
        assert not set(tokens[:kept_out]) & set(free)
        assert kept_out or tokens == free[:4]
