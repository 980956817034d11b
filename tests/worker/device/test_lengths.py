"""What the host says of rows' lengths is what the device knows, and it says nothing that it cannot know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from srt.layers.batch import ForwardBatch, KVLayer
from srt.messages import RowStart, SamplingSpec, StepPlan
from srt.worker.device.lengths import HostLengths
from tests.support.checkpoints import write_checkpoint
from tests.support.steps import MTP, NO_DRAFTS, Recorder, Steps, plan_for, random_ids
from tests.worker.device.test_engine import on_device


class Listening(Recorder):
    """Keeps what batches say of their rows' lengths, on the host and on the device."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder._model)
        self.told: list[tuple[list[int] | None, list[int]]] = []

    def forward(self, batch: ForwardBatch, kv: Sequence[KVLayer]) -> Tensor:
        self.told.append((batch.kv_lens_list, batch.kv_lens.tolist()))
        return super().forward(batch, kv)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), guessing=st.booleans())
def test_lengths_that_are_told_are_right_and_those_of_rows_with_checked_guesses_are_not_told(
    checkpoint: Path, data: st.DataObject, guessing: bool
) -> None:
    with TemporaryDirectory() as rundir:
        steps = Steps(plan_for(checkpoint, drafting=MTP if guessing else NO_DRAFTS), Path(rundir), picks=on_device())
        steps.recorder = steps.runner.model = listening = Listening(steps.recorder)
        guessed: set[int] = set()
        for number in range(data.draw(st.integers(2, 10))):
            for row in data.draw(st.sets(st.integers(0, 3))) if number else {0, 1}:
                if row not in steps.tokens or data.draw(st.booleans()):
                    steps.add(row, random_ids(data.draw(st.integers(1, 30)), number, 200))
                    guessed.discard(row)
            rows = data.draw(st.lists(st.sampled_from(sorted(steps.tokens)), min_size=1, unique=True))
            left = {row: len(steps.tokens[row]) - steps.computed[row] for row in rows}
            drafts = data.draw(st.sampled_from([0, 3])) if guessing else 0
            counts = {row: data.draw(st.integers(1, most)) for row, most in left.items()}
            steps.run(counts, drafts)
            told, true = listening.told[-1]
            assert told == (None if guessed & set(rows) else true)
            guessed |= {row for row in rows if drafts and counts[row] == left[row]}


def test_a_row_that_starts_again_is_known_again() -> None:
    lengths = HostLengths(2)
    start = RowStart(1, b"", 7, 9, SamplingSpec())
    lengths.start([start])
    starts, ends = lengths.advance(StepPlan(1, [1], [2], [True], drafts=[3]))
    assert (starts.tolist(), ends) == ([7], [12])
    starts, ends = lengths.advance(StepPlan(2, [1], [1], [True], drafts=[0]))
    assert (starts.tolist(), ends) == ([9], None)
    lengths.start([start])
    starts, ends = lengths.advance(StepPlan(3, [1], [1], [False], drafts=[3]))
    assert (starts.tolist(), ends) == ([7], [8])
    assert np.array_equal(lengths.advance(StepPlan(4, [], [], []))[0], [])
