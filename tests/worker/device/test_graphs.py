"""Records of decodes: which numbers of rows have one, and that playing one back is running the step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch

from srt.configs.memory import FINE, record_sizes
from srt.configs.plan import DeviceFacts
from srt.messages import SamplingSpec, StepPlan
from srt.worker.device.graphs import Record
from srt.worker.device.runner import DeviceRunner
from srt.worker.startup import Pick, reference_backends
from tests.support.checkpoints import write_checkpoint
from tests.support.records import Recorder
from tests.support.steps import GREEDY, MTP, NO_DRAFTS, Steps, plan_for, random_ids


@pytest.mark.parametrize("most", [1, 3, 8, 9, 64, 250, 256])
def test_numbers_of_rows_with_a_record_rise_to_the_most_and_waste_little(most: int) -> None:
    found = record_sizes(most)
    assert found == sorted(set(found)) and found[-1] == most
    assert found[: min(most, FINE)] == list(range(1, min(most, FINE) + 1))
    assert all(later <= before * 9 / 8 + 1 for before, later in pairwise(found))


KINDS = {
    "greedy": [GREEDY] * 3,
    "drawn": [SamplingSpec(temperature=1.0, seed=7), GREEDY, SamplingSpec(temperature=0.6, seed=9)],
    "filtered": [SamplingSpec(top_p=0.9, seed=7), GREEDY, SamplingSpec(temperature=2.0, top_k=9, top_p=0.8, seed=1)],
}


def begin(steps: Steps, kinds: list[SamplingSpec]) -> None:
    """Three rows: a number that has no record of its own."""
    for row, kind in enumerate(kinds):
        steps.add(row, random_ids(10, row, 200), sampling=kind)
    steps.run(dict.fromkeys(range(3), 10))


def decode(steps: Steps, tokens: int, drafts: int) -> list[list[int]]:
    """The rows' first so many tokens, decoded together."""
    while min(len(steps.tokens[row]) for row in range(3)) < tokens:
        steps.run(dict.fromkeys(range(3), 1), drafts)
    return [steps.tokens[row][:tokens] for row in range(3)]


def record_of(runner: DeviceRunner, rows: int = 3) -> Record | None:
    """What so many rows would be played back from."""
    assert runner.graphs is not None
    with torch.inference_mode():
        return runner.graphs.find(StepPlan(9, list(range(rows)), [1] * rows, [True] * rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", [0, 3])
def test_the_parts_of_a_record_are_a_step(tmp_path: Path, drafts: int, kind: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", vision=False)
    plan = plan_for(checkpoint, drafting=MTP if drafts else NO_DRAFTS)
    picks = replace(reference_backends("under test"), engine=Pick("device", "under test"))
    plain, recorded = Steps(plan, tmp_path, picks=picks), Steps(plan, tmp_path, picks=picks)
    runner = recorded.runner
    assert isinstance(runner, DeviceRunner)
    runner.graphs = Recorder(runner.passes, 8, drafts, 64)
    runner.graphs.keep({4}, draws=True)
    begin(plain, KINDS[kind])
    begin(recorded, KINDS[kind])
    known = 12
    while runner.unprepared:  # between two steps, when rows are in use
        runner.prepare()
        known += 4
        assert decode(recorded, known, drafts) == decode(plain, known, drafts)
    played = record_of(runner)
    assert played is not None and played.drawn is not None
    assert decode(recorded, known + 20, drafts) == decode(plain, known + 20, drafts)


def test_the_most_rows_are_recorded_first_but_not_played_for_far_fewer(tmp_path: Path) -> None:
    """First, because the memory that the largest record works in serves all others."""
    plan = plan_for(write_checkpoint(tmp_path / "tiny", vision=False))
    picks = replace(reference_backends("under test"), engine=Pick("device", "under test"))
    runner = Steps(plan, tmp_path, picks=picks).runner
    assert isinstance(runner, DeviceRunner)
    runner.graphs = Recorder(runner.passes, 8, 0, 64)
    runner.graphs.keep(range(1, 9))
    played = []
    for _ in range(3):
        runner.prepare()
        found = [record_of(runner, rows) for rows in range(1, 9)]
        played.append([one and one.size for one in found])
    assert played == [
        [None, None, None, 8, 8, 8, 8, 8],
        [1, None, None, 8, 8, 8, 8, 8],
        [1, 2, None, 8, 8, 8, 8, 8],
    ]  # fmt: skip


class Full(Recorder):
    """Where there is no memory for records of so many rows."""

    too_many = 4

    def _record(self, size: int, drafts: int) -> Record:
        if size >= self.too_many:
            raise torch.OutOfMemoryError(f"no memory for {size} rows")
        return super()._record(size, drafts)


def test_where_the_largest_record_finds_no_memory_smaller_ones_are_made(tmp_path: Path) -> None:
    plan = plan_for(write_checkpoint(tmp_path / "tiny", vision=False), drafting=MTP)
    picks = replace(reference_backends("under test"), engine=Pick("device", "under test"))
    runner = Steps(plan, tmp_path, picks=picks).runner
    assert isinstance(runner, DeviceRunner)
    runner.graphs = Full(runner.passes, 8, MTP.drafts, 64)
    runner.graphs.keep(range(1, 9))
    pieces = 0
    while runner.unprepared:
        runner.prepare()
        pieces += 1
    assert pieces == 1 + 2 * 3 + 1, "eight rows in vain; one to three, with guesses and without; four in vain"
    found = [record_of(runner, rows) for rows in range(1, 9)]
    assert [one and one.size for one in found] == [1, 2, 3, None, None, None, None, None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records need a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", [0, 3])
def test_steps_that_are_played_back_give_what_steps_that_are_run_give(tmp_path: Path, drafts: int, kind: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", vision=False)
    plan = plan_for(checkpoint, dtype="bfloat16", drafting=MTP if drafts else NO_DRAFTS)
    device = DeviceFacts("cuda", torch.cuda.get_device_name(), 1 << 30, 2, 1)
    found = []
    for prepared in (False, True):
        steps = Steps(msgspec.structs.replace(plan, device=device), tmp_path)
        runner = steps.runner
        assert isinstance(runner, DeviceRunner) and runner.graphs is not None
        while prepared and runner.unprepared:
            runner.prepare()
        assert (record_of(runner) is not None) == prepared
        begin(steps, KINDS[kind])
        found.append(decode(steps, 30, drafts))
    assert found[0] == found[1]
