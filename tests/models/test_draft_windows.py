"""Draft modules after any mix of right and wrong guesses: their memory is that of one pass over the finished tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srt.messages import SamplingSpec
from srt.worker.startup import Picks
from tests.support.dictation import dictate, window_kv
from tests.support.steps import GREEDY, MTP, Steps, plan_for, random_ids

SAMPLED = SamplingSpec(temperature=1.0, top_p=0.9, seed=77)
NEW_TOKENS = 40


@pytest.mark.parametrize("rights", [[0], [1], [2], [3], [0, 3, 1, 2, 0, 0, 2]])
@pytest.mark.parametrize(("page_size", "chunk"), [(16, None), (1, 2), (4, 7)])
def test_12_24_draft_memory_equals_that_of_one_pass_whatever_was_accepted(
    checkpoint: Path, tmp_path: Path, native: Picks, rights: list[int], page_size: int, chunk: int | None
) -> None:
    plan = plan_for(checkpoint, page_size=page_size, pages=512 // page_size, drafting=MTP)
    prompt = random_ids(21, 5, 200)
    alone = Steps(plan_for(checkpoint), tmp_path, picks=native)
    alone.add(0, prompt)
    truth = prompt + alone.generate(0, NEW_TOKENS + 8)
    steps = Steps(plan, tmp_path, picks=native)
    dictate(steps, truth, rights)
    steps.add(0, prompt)
    steps.prefill(0, chunk)
    steps.generate(0, NEW_TOKENS, drafts=3)
    known = steps.tokens[0]
    assert known == truth[: len(known)], "guesses changed the answer"
    decodes = steps.step - (1 if chunk is None else -(-len(prompt) // chunk))
    assert len(known) - len(prompt) - 1 == pytest.approx(decodes * (1 + sum(rights) / len(rights)), abs=4)
    steps.add(1, known)
    steps.prefill(1)
    final = len(known) - MTP.modules
    for told, whole in zip(window_kv(steps, 0, final), window_kv(steps, 1, final), strict=True):
        assert torch.equal(told, whole)


def test_rows_of_all_kinds_in_one_step_get_what_they_get_without_guesses(
    checkpoint: Path, tmp_path: Path, native: Picks
) -> None:
    least = SamplingSpec(temperature=0.0, min_new_tokens=9, suppressed_ids=tuple(range(100)))
    kinds = [GREEDY, SAMPLED, least, SamplingSpec(temperature=2.0, top_k=5, min_p=0.01, seed=3)]
    prompts = [random_ids(length, length, 200) for length in (3, 40, 17, 64)]
    alone = []
    for prompt, kind in zip(prompts, kinds, strict=True):
        steps = Steps(plan_for(checkpoint), tmp_path, picks=native)
        steps.add(0, prompt, sampling=kind)
        alone.append(steps.generate(0, 24))
    together = Steps(plan_for(checkpoint, drafting=MTP), tmp_path, picks=native)
    for row, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
        together.add(row, prompt, sampling=kind)
    together.run({row: len(prompt) for row, prompt in enumerate(prompts)})
    for _ in range(23):
        together.run(dict.fromkeys(range(4), 1), drafts=3)
    answers = [together.tokens[row][len(prompt) :][:24] for row, prompt in enumerate(prompts)]
    assert answers == alone


@pytest.mark.parametrize("modules", [1, 2])
def test_fewer_modules_than_there_are_guess_less_far(
    checkpoint: Path, tmp_path: Path, native: Picks, modules: int
) -> None:
    drafting = MTP.__class__("mtp", modules, modules, modules)
    steps = Steps(plan_for(checkpoint, drafting=drafting), tmp_path, picks=native)
    alone = Steps(plan_for(checkpoint), tmp_path, picks=native)
    prompt = random_ids(30, 1, 200)
    for each in (steps, alone):
        each.add(0, prompt)
    assert steps.generate(0, 20, drafts=3)[:20] == alone.generate(0, 20)
