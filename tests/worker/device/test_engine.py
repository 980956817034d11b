"""The engine whose rows live on the device, driven on a CPU: it answers as the engine of the host does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from srt.configs.plan import DraftTraits
from srt.errors import ProcessLost
from srt.layers.moe.backends import RunnerChoice
from srt.layers.moe.reference import ReferenceExperts
from srt.layers.quant.plain import Plain
from srt.messages import LogprobSpec, PageUpdate, RowStart, SamplingSpec, StepPlan
from srt.worker.device.mtp import DeviceWindows
from srt.worker.device.runner import DeviceRunner
from srt.worker.startup import Pick, Picks, _recordable, reference_backends
from tests.support.checkpoints import write_checkpoint
from tests.support.dictation import Dictated, draft_kv
from tests.support.steps import GREEDY, MTP, NO_DRAFTS, Steps, plan_for, random_ids

CPU = torch.device("cpu")
KINDS = [
    GREEDY,
    SamplingSpec(temperature=1.0, top_p=0.9, seed=77),
    SamplingSpec(temperature=0.0, min_new_tokens=9, suppressed_ids=tuple(range(100))),
    SamplingSpec(temperature=2.0, top_k=5, min_p=0.01, seed=(1 << 63) + 3),
]
LENGTHS = (3, 40, 17, 64)
CAREFUL = [
    SamplingSpec(temperature=0.0, frequency_penalty=0.4, logit_bias=((5, 3.0), (9, -2.0))),
    KINDS[1],
    SamplingSpec(temperature=0.7, repetition_penalty=1.3, seed=9, logprobs=LogprobSpec(top=3)),
    KINDS[3],
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


def on_host() -> Picks:
    return reference_backends("under test")


def on_device() -> Picks:
    return replace(on_host(), engine=Pick("device", "under test"))


def answers(steps: Steps, drafts: int = 0, kinds: list[SamplingSpec] = KINDS) -> list[list[int]]:
    """Rows of all kinds: prefilled together and in chunks, one on the prefix of another, then decoded together."""
    prompts = [random_ids(length, length, 200) for length in LENGTHS]
    prompts[3][:32] = prompts[1][:32]
    for row in range(3):
        steps.add(row, prompts[row], sampling=kinds[row])
    steps.run({0: 3, 1: 32})
    steps.add(3, prompts[3], sampling=kinds[3], shares=(1, 32))
    steps.run({0: 1, 1: 8, 2: 11, 3: 9}, drafts)
    steps.run({2: 6, 3: 23, 0: 1}, drafts)
    while min(len(steps.tokens[row]) - LENGTHS[row] for row in range(4)) < 20:
        steps.run(dict.fromkeys(range(4), 1), drafts)
    return [steps.tokens[row][LENGTHS[row] :][:20] for row in range(4)]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("drafts", [0, 3])
def test_both_engines_give_the_same_answers(checkpoint: Path, tmp_path: Path, page_size: int, drafts: int) -> None:
    pages = 512 // page_size
    plain = plan_for(checkpoint, page_size=page_size, pages=pages)
    guessing = plan_for(checkpoint, page_size=page_size, pages=pages, drafting=MTP if drafts else NO_DRAFTS)
    expected = answers(Steps(plain, tmp_path, picks=on_host()))
    assert answers(Steps(guessing, tmp_path, picks=on_device()), drafts) == expected


@pytest.mark.parametrize("drafts", [0, 3])
def test_what_the_device_cannot_sample_the_host_does(checkpoint: Path, tmp_path: Path, drafts: int) -> None:
    expected = answers(Steps(plan_for(checkpoint), tmp_path, picks=on_host()), kinds=CAREFUL)
    guessing = plan_for(checkpoint, drafting=MTP if drafts else NO_DRAFTS)
    assert answers(Steps(guessing, tmp_path, picks=on_device()), drafts, CAREFUL) == expected


def test_log_probabilities_are_those_of_the_host(checkpoint: Path, tmp_path: Path) -> None:
    told = []
    for picks in (on_host(), on_device()):
        steps = Steps(plan_for(checkpoint), tmp_path, picks=picks)
        steps.add(1, random_ids(9, 2, 200))
        steps.add(0, random_ids(12, 1, 200), sampling=CAREFUL[2])
        results = [steps.run({1: 9, 0: 12}), steps.run({1: 1, 0: 1})]
        told.append([np.frombuffer(one.logprobs[0].output.values, "<f4") for one in results])  # type: ignore[union-attr]
    np.testing.assert_allclose(told[1], told[0], atol=1e-5)


@pytest.mark.parametrize("rights", [[0], [3], [0, 3, 1, 2, 0, 0, 2]])
@pytest.mark.parametrize(("page_size", "chunk"), [(16, None), (4, 7)])
def test_draft_memory_on_the_device_equals_that_of_one_pass_whatever_was_accepted(
    checkpoint: Path, tmp_path: Path, rights: list[int], page_size: int, chunk: int | None
) -> None:
    prompt, count = random_ids(21, 5, 200), 30
    alone = Steps(plan_for(checkpoint), tmp_path, picks=on_host())
    alone.add(0, prompt)
    truth = prompt + alone.generate(0, count + 8)
    plan = plan_for(checkpoint, page_size=page_size, pages=512 // page_size, drafting=MTP)
    steps = Steps(plan, tmp_path, picks=on_device())
    runner = steps.runner
    assert isinstance(runner, DeviceRunner) and isinstance(runner.proposer, DeviceWindows)
    rows, kv = runner.rows, runner.proposer._kv
    dictated = Dictated(lambda: int(rows.known[0]), truth, plan.model.vocab_size, rights)
    runner.proposer._ops = dictated  # type: ignore[assignment]
    steps.add(0, prompt)
    steps.prefill(0, chunk)
    steps.generate(0, count, drafts=3)
    known = steps.tokens[0]
    assert known == truth[: len(known)], "guesses changed the answer"
    decodes = steps.step - (1 if chunk is None else -(-len(prompt) // chunk))
    assert len(known) - len(prompt) - 1 == pytest.approx(decodes * (1 + sum(rights) / len(rights)), abs=4)
    steps.add(1, known)
    steps.prefill(1)
    final = len(known) - MTP.modules
    for told, whole in zip(draft_kv(steps, kv, 0, final), draft_kv(steps, kv, 1, final), strict=True):
        torch.testing.assert_close(told, whole, atol=2e-5, rtol=2e-5)


def bare(checkpoint: Path, tmp_path: Path) -> DeviceRunner:
    runner = Steps(plan_for(checkpoint), tmp_path, picks=on_device()).runner
    assert isinstance(runner, DeviceRunner)
    return runner


def first(count: int, emits: bool, tokens: int = 5) -> StepPlan:
    begin = RowStart(0, np.arange(8, 8 + tokens, dtype="<i4").tobytes(), 0, tokens, GREEDY)
    pages = [PageUpdate(group, [0], [0], [1], [1]) for group in range(2)]
    return StepPlan(1, [0], [count], [emits], [begin], pages)


@pytest.mark.parametrize("drafting", [NO_DRAFTS, MTP])
def test_a_rehearsal_leaves_no_trace(checkpoint: Path, tmp_path: Path, drafting: DraftTraits) -> None:
    expected = answers(Steps(plan_for(checkpoint), tmp_path, picks=on_host()))
    steps = Steps(plan_for(checkpoint, drafting=drafting), tmp_path, picks=on_device())
    assert isinstance(steps.runner, DeviceRunner)
    with torch.inference_mode():
        for tokens in (1, 40, 5000):
            steps.runner.passes.rehearse(tokens)
    assert answers(steps, drafting.drafts) == expected


def test_results_come_in_the_order_of_plans_and_only_once(checkpoint: Path, tmp_path: Path) -> None:
    runner = bare(checkpoint, tmp_path)
    runner.submit(first(5, True))
    runner.submit(StepPlan(2, [0], [1], [True]))
    runner.submit(StepPlan(3, [], [], [], freed_rows=[0]))
    assert runner.busy
    results = list(runner.finished())
    assert [result.step for result in results] == [1, 2, 3]
    assert [len(result.token_ids) for result in results] == [1, 1, 0]
    assert not list(runner.finished())


@pytest.mark.parametrize(("count", "emits"), [(6, True), (3, True), (6, False)])
def test_a_plan_that_contradicts_a_row_fails_when_its_result_is_due(
    checkpoint: Path, tmp_path: Path, count: int, emits: bool
) -> None:
    runner = bare(checkpoint, tmp_path)
    runner.submit(first(count, emits))
    with pytest.raises(ProcessLost, match="a row cannot compute what it is asked to"):
        list(runner.finished())


def test_plans_that_can_be_refused_at_once_are(checkpoint: Path, tmp_path: Path) -> None:
    runner = bare(checkpoint, tmp_path)
    with pytest.raises(ProcessLost, match="names 2 pages for 1 entries"):
        runner.submit(StepPlan(1, [], [], [], pages=[PageUpdate(0, [0], [0], [1], [1, 2])]))
    with pytest.raises(ProcessLost, match="row 8 starts; there are 8"):
        runner.submit(StepPlan(2, [], [], [], [RowStart(8, b"\0\0\0\0", 0, 1, GREEDY)]))
    with pytest.raises(ProcessLost, match="row 0 starts with 1 tokens, 1 computed"):
        runner.submit(StepPlan(3, [], [], [], [RowStart(0, b"\0\0\0\0", 1, 1, GREEDY)]))
    with pytest.raises(ProcessLost, match="names a row twice"):
        runner.submit(StepPlan(4, [1, 1], [1, 1], [True, True]))
    with pytest.raises(ProcessLost, match="plan 6 came after plan 3, expected 4"):
        runner.submit(StepPlan(6, [], [], []))


def test_logits_that_are_not_finite_fail_the_step(checkpoint: Path, tmp_path: Path) -> None:
    runner = bare(checkpoint, tmp_path)
    embedding = runner.model.embedding
    runner.model.embedding._table = torch.full_like(embedding._table, torch.nan)
    runner.submit(first(5, True))
    with pytest.raises(ProcessLost, match="logits are not finite"):
        list(runner.finished())


def test_steps_are_recorded_only_where_nothing_in_them_waits() -> None:
    recorded = Pick("graphs", "under test")
    fast = replace(on_host(), engine=recorded, attention=Pick("triton", "under test"))
    experts = ReferenceExperts(Plain(torch.float32))
    choices = {name: {3: RunnerChoice(experts, name, "")} for name in ("triton", "reference")}
    assert _recordable(fast, choices["triton"]).engine is recorded
    assert _recordable(fast, choices["reference"]).engine.key == "device"
    assert _recordable(replace(on_host(), engine=recorded), choices["triton"]).engine.key == "device"
