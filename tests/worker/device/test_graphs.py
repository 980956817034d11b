"""Records of decodes: which numbers of rows have one, and that playing one back is running the step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch

from srt.configs.memory import FINE, record_sizes
from srt.configs.plan import DeviceFacts
from srt.messages import StepPlan
from srt.worker.device.runner import DeviceRunner
from tests.support.checkpoints import write_checkpoint
from tests.support.steps import MTP, NO_DRAFTS, Steps, plan_for, random_ids


@pytest.mark.parametrize("most", [1, 3, 8, 9, 64, 250, 256])
def test_numbers_of_rows_with_a_record_rise_to_the_most_and_waste_little(most: int) -> None:
    found = record_sizes(most)
    assert found == sorted(set(found)) and found[-1] == most
    assert found[: min(most, FINE)] == list(range(1, min(most, FINE) + 1))
    assert all(later <= before * 9 / 8 + 1 for before, later in pairwise(found))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records need a GPU")
@pytest.mark.parametrize("drafts", [0, 3])
def test_steps_that_are_played_back_give_what_steps_that_are_run_give(tmp_path: Path, drafts: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", vision=False)
    plan = plan_for(checkpoint, dtype="bfloat16", drafting=MTP if drafts else NO_DRAFTS)
    device = DeviceFacts("cuda", torch.cuda.get_device_name(), 1 << 30, 2, 1)
    answers = []
    for prepared in (False, True):
        steps = Steps(msgspec.structs.replace(plan, device=device), tmp_path)
        runner = steps.runner
        assert isinstance(runner, DeviceRunner) and runner.graphs is not None
        while prepared and runner.unprepared:
            runner.prepare()
        for row in range(3):
            steps.add(row, random_ids(10 + row, row, 200))
        steps.run({row: 10 + row for row in range(3)})
        with torch.inference_mode():
            assert (runner.graphs.find(StepPlan(9, [0, 1, 2], [1] * 3, [True] * 3)) is not None) == prepared
        for _ in range(20):
            steps.run(dict.fromkeys(range(3), 1), drafts)
        answers.append([steps.tokens[row][:30] for row in range(3)])
    assert answers[0] == answers[1]
