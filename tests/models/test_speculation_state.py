"""What guesses leave behind on a worker: tokens, lengths, keys and values, on every page border and in every mix."""

from __future__ import annotations

import subprocess
import sys
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.ops import TorchOps
from srt.layers.parameter import Parameters
from srt.messages import RowStart, SamplingSpec, StepPlan
from srt.worker.mtp import WindowProposer
from srt.worker.rows import Outcome, Rows
from srt.worker.runner import Runner
from srt.worker.startup import Picks
from tests.support.dictation import dictate, window_kv, windows_of
from tests.support.rank import RANKS
from tests.support.steps import GREEDY, MTP, Steps, plan_for, random_ids

CANARY = 123.0
TINY = Path(__file__).parents[2] / "srt" / "builtin" / "tiny"


class Bench:
    """Workers with and without modules, and what the one without says."""

    def __init__(self, checkpoint: Path, directory: Path, picks: Picks) -> None:
        self.checkpoint, self.directory, self.picks = checkpoint, directory, picks

    def steps(self, page_size: int = 16, context_length: int = 1024) -> Steps:
        pages = 1024 // page_size
        plan = plan_for(self.checkpoint, page_size=page_size, pages=pages, context_length=context_length, drafting=MTP)
        return Steps(plan, self.directory, picks=self.picks)

    def truth(self, prompt: list[int], count: int, sampling: SamplingSpec = GREEDY) -> list[int]:
        """The prompt and what follows without guesses."""
        alone = Steps(plan_for(self.checkpoint), self.directory, picks=self.picks)
        alone.add(0, prompt, sampling=sampling)
        return prompt + alone.generate(0, count)


@pytest.fixture
def bench(checkpoint: Path, tmp_path: Path, native: Picks) -> Bench:
    return Bench(checkpoint, tmp_path, native)


def main_kv(steps: Steps, row: int, positions: int) -> list[Tensor]:
    """Keys and values of a row's first positions in all layers of the main model; NaN behind a window."""
    size, shown = steps.plan.page_size, []
    for at, group in enumerate(steps.plan.groups[:2]):
        slots = [steps.pages[row][at][p // size] * size + p % size for p in range(positions)]
        for layer in group.layers:
            memory = steps.runner.kv[layer]
            shown += [part.flatten(0, 1)[slots] for part in (memory.k, memory.v)]
    return shown


@pytest.mark.parametrize("rights", [[0], [1], [2], [3], [3, 0, 2, 1, 1]])
def test_03_07_10_11_after_every_count_of_right_guesses_the_state_is_that_without(
    bench: Bench, rights: list[int]
) -> None:
    prompt = random_ids(19, 8, 200)
    truth = bench.truth(prompt, 40)
    steps = bench.steps()
    dictate(steps, truth, rights)
    steps.add(0, prompt)
    steps.prefill(0)
    lengths = []
    for right in (right for right, _ in zip(cycle(rights), range(8), strict=False)):
        result = steps.run({0: 1}, drafts=3)
        lengths += result.token_counts
        assert result.token_counts == [right + 1]
        known = steps.tokens[0]
        runner = steps.runner
        assert isinstance(runner, Runner)
        assert runner.rows.history(0).tolist() == known == truth[: len(known)]
        assert steps.computed[0] == len(known) - 1
        assert runner.rows._host["computed"][0] == len(known) - 1
    assert lengths == [right + 1 for right, _ in zip(cycle(rights), range(8), strict=False)]
    steps.add(1, steps.tokens[0])
    steps.prefill(1)
    predicted = steps.all_logits(1).argmax(dim=-1).tolist()
    assert predicted[len(prompt) - 1 : -1] == steps.tokens[0][len(prompt) :]
    computed = steps.computed[0]
    for told, whole in zip(main_kv(steps, 0, computed), main_kv(steps, 1, computed), strict=True):
        assert torch.equal(told, whole)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_17_every_place_in_a_page_meets_every_count_of_right_guesses(bench: Bench, page_size: int) -> None:
    text = bench.truth(random_ids(40, 3, 200), 60)
    steps = bench.steps(page_size)
    for right in range(4):
        for shift in range(right + 1):
            prompt = text[: 54 + shift]
            dictate(steps, text, [right])
            steps.add(0, prompt)
            steps.generate(0, 20, drafts=3)
            known = steps.tokens[0]
            assert known == text[: len(known)]
            steps.add(1, known)
            steps.prefill(1)
            final = len(known) - MTP.modules
            for told, whole in zip(window_kv(steps, 0, final), window_kv(steps, 1, final), strict=True):
                assert torch.equal(told, whole)
            for row in (0, 1):
                for free, pages in zip(steps._free, steps.pages[row], strict=True):
                    free += pages


def test_15_16_only_pages_of_the_row_are_written_and_the_null_page_never(bench: Bench) -> None:
    """Row 1 begins behind a hit on row 0's pages, which are row 0's to write, then guesses right and wrong."""
    prompt = random_ids(40, 9, 200)
    steps = bench.steps(page_size=4)
    steps.add(0, prompt)
    steps.prefill(0)
    steps.add(1, [*prompt[:36], *random_ids(5, 4, 200)], shares=(0, 36))
    proposer = windows_of(steps)
    pools = [(layer, group) for group in (0, 1) for layer in _layers(steps, group)]
    pools += [(layer, 2) for layer in proposer._kv]
    shared = [set(steps.pages[0][group][:9]) for group in range(3)]
    kept = {}
    for number, (layer, group) in enumerate(pools):
        others = sorted({0, *steps._free[group]})
        with torch.inference_mode():
            layer.k[others] = layer.v[others] = CANARY
        kept[number] = layer.k[sorted(shared[group])].clone(), layer.v[sorted(shared[group])].clone()
    for _ in range(12):
        steps.run({1: len(steps.tokens[1]) - steps.computed[1]}, drafts=3)
    for number, (layer, group) in enumerate(pools):
        others = sorted({0, *steps._free[group]})
        assert (layer.k[others] == CANARY).all()
        assert (layer.v[others] == CANARY).all()
        for before, after in zip(kept[number], (layer.k, layer.v), strict=True):
            assert torch.equal(before, after[sorted(shared[group])])


def _layers(steps: Steps, group: int) -> list[KVLayer]:
    return [steps.runner.kv[layer] for layer in steps.plan.groups[group].layers]


def test_18_guesses_reach_the_last_position_and_not_beyond(bench: Bench) -> None:
    prompt = random_ids(30, 2, 200)
    truth = bench.truth(prompt, 18)
    for right in range(4):
        steps = bench.steps(context_length=48)
        dictate(steps, truth, [right])
        steps.add(0, prompt)
        steps.prefill(0)
        while len(steps.tokens[0]) < 48:
            steps.run({0: 1}, drafts=min(3, 48 - 1 - len(steps.tokens[0])))
        assert steps.tokens[0] == truth


def test_20_21_pages_lie_wherever_they_like_in_each_group(bench: Bench) -> None:
    """The same answer and the same draft memory with pages in order, and in another order in each group."""
    prompt = random_ids(33, 6, 200)
    scattered, ordered = bench.steps(page_size=4), bench.steps(page_size=4)
    ordered._free = [sorted(free, reverse=True) for free in ordered._free]
    counts = []
    for steps in (scattered, ordered):
        steps.add(0, prompt)
        steps.prefill(0)
        counts.append([steps.run({0: 1}, drafts=3).token_counts for _ in range(12)])
    assert counts[0] == counts[1]
    assert scattered.pages[0] != ordered.pages[0]
    assert scattered.pages[0][1] != scattered.pages[0][2]
    length = scattered.computed[0]
    for one, other in zip(window_kv(scattered, 0, length), window_kv(ordered, 0, length), strict=True):
        assert torch.equal(one, other)


def test_33_no_pass_sees_further_than_its_longest_row(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = bench.steps(page_size=4)
    model, seen = windows_of(steps)._model, list[ForwardBatch]()
    for owner, name in ((steps.recorder, "forward"), (model, "begin")):
        passed = getattr(owner, name)

        def spy(batch: ForwardBatch, *more: object, passed: object = passed) -> object:
            seen.append(batch)
            assert callable(passed)
            return passed(batch, *more)

        monkeypatch.setattr(owner, name, spy)
    for row, length in enumerate((5, 30)):
        steps.add(row, random_ids(length, row, 200))
    steps.run({0: 5, 1: 30})
    for _ in range(4):
        steps.run({0: 1, 1: 1}, drafts=3)
    assert len(seen) == 10
    for batch in seen:
        longest = int(batch.kv_lens.max())
        assert longest <= max(steps.computed.values()) + 3
        assert {table.shape[1] for table in batch.page_tables} == {-(-longest // 4)}


def test_34_a_batch_after_another_one_is_what_it_was_before(bench: Bench) -> None:
    """Large, small, large again: nothing of a step is left in the memory that the next one works with."""
    steps, fresh = bench.steps(), bench.steps()
    prompts = [random_ids(length, length, 200) for length in (50, 3, 21, 8)]
    answers = []
    for each, rounds in ((fresh, 1), (steps, 3)):
        for round_ in range(rounds):
            rows = range(4) if round_ != 1 else range(1, 2)
            for row in rows:
                each.add(row, prompts[row])
            each.run({row: len(prompts[row]) for row in rows})
            results = [each.run(dict.fromkeys(rows, 1), drafts=3) for _ in range(6)]
            if round_ != 1:
                answers.append([each.all_logits(row) for row in rows])
                answers[-1].append(torch.tensor([result.token_ids[-1] for result in results]))
            for row in rows:
                for free, pages in zip(each._free, each.pages[row], strict=True):
                    free += pages
    for later in answers[1:]:
        assert all(torch.equal(one, other) for one, other in zip(answers[0], later, strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_08_a_drafter_gone_mad_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, poison: float) -> None:
    prompt = random_ids(20, 5, 200)
    truth = bench.truth(prompt, 12)
    steps = bench.steps()
    model = windows_of(steps)._model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *pass_: forward(*pass_) * poison)
    steps.add(0, prompt)
    assert steps.generate(0, 12, drafts=3)[:12] == truth[20:32]


def test_36_ranks_keep_the_same_guesses_whatever_their_rounding(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.rank", str(TINY), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank), "guess"], stderr=subprocess.PIPE) for rank in range(RANKS)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()
    for name in ("counts", "tokens"):
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(RANKS))
        assert first == second
        assert name != "counts" or any(count == 4 for step in first for count in step)


class Recording:
    """Draft modules that only look: at the positions that they are run on, and at the hidden states for them."""

    def __init__(self, modules: int) -> None:
        self.modules = modules
        self.positions: list[int] = []

    def begin(self, batch: ForwardBatch) -> None:
        self.positions = batch.positions.tolist()

    def forward(self, module: int, token_ids: Tensor, hidden: Tensor, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        assert hidden[:, 0].tolist() == self.positions, "a position with the hidden state of another one"
        return hidden

    def logits(self, module: int, hidden: Tensor) -> Tensor:
        return torch.eye(3)[:1]

    def parameters(self) -> Parameters:
        return {}


@pytest.mark.parametrize("modules", range(1, 9))
def test_13_14_what_wrong_guesses_spoiled_is_run_again_and_no_more(modules: int) -> None:
    """With a of k guesses right the window has max(k, a + 1) positions: max(0, k - 1 - a) of them once more."""
    for right in range(modules + 1):
        rows, model = Rows(1, 64, 256, 1, modules), Recording(modules)
        memory = KVLayer(torch.empty(0), torch.empty(0))
        proposer = WindowProposer(model, [memory] * modules, rows, TorchOps(), 1)
        plan = StepPlan(1, [0], [20], [True], [RowStart(0, np.zeros(20, "<i4").tobytes(), 0, 20, GREEDY)])
        for step in range(1, 7):
            rows.apply(plan)
            proposer.start(plan.starts)
            begun = rows.begin(plan)
            # Guesses are 0; what is sampled is 0 as long as it is to agree.
            sampled = np.array([int(at >= right) for at in range(len(begun.batch.logit_tokens))])
            outcome: Outcome = rows.end(begun, sampled)
            proposer.propose(outcome, begun.batch.positions[:, None].float())
            if step > 1:
                assert outcome.accepted.tolist() == [right]
                frontier = int(outcome.computed[0])
                assert model.positions == list(range(frontier - max(modules, right + 1), frontier))
            plan = StepPlan(step + 1, [0], [1], [True], drafts=[modules])
