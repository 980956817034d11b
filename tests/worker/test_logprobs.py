"""Log probabilities against transformers in float32: of prompts and answers, however they are cut, hit and guessed."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from srt.configs.plan import DraftTraits
from srt.messages import Logprobs, LogprobSpec, SamplingSpec, StepResult, joined
from srt.worker.logprobs import logprobs_of
from tests.support.checkpoints import write_checkpoint
from tests.support.steps import MTP, NO_DRAFTS, Steps, plan_for, random_ids

TOLERANCE = 1e-4
PROMPT = random_ids(300, 5, 1024)
SPEC = LogprobSpec(top=4, ids=(7, 1000, 7), prompt_from=1)
SAMPLED = SamplingSpec(
    temperature=0.7, top_k=9, seed=3, frequency_penalty=1.0, logit_bias=((5, 3.0),), min_new_tokens=40,
    suppressed_ids=(1, 2), logprobs=SPEC,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def truth(tiny: Path) -> Any:
    from transformers import Step3p7ForConditionalGeneration

    torch.set_num_threads(1)
    return Step3p7ForConditionalGeneration.from_pretrained(str(tiny), dtype=torch.float32)


def expected(truth: Any, tokens: list[int]) -> Tensor:
    """Log probabilities [N - 1, V] of what may follow each token but the last."""
    with torch.inference_mode():
        logits: Tensor = truth(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)[:-1]


def assert_equal(found: Logprobs, tokens: list[int], after: Tensor) -> None:
    """`found` tells of `tokens` what `after` [N, V] says."""
    values, rows = torch.tensor(array("f", found.values)), torch.arange(len(tokens))
    assert array("i", found.token_ids).tolist() == tokens
    assert (values - after[rows, torch.tensor(tokens)]).abs().max() < TOLERANCE
    top_ids = torch.tensor(array("i", found.top_ids)).view(-1, SPEC.top)
    top_values = torch.tensor(array("f", found.top_values)).view(-1, SPEC.top)
    best = after.topk(SPEC.top)
    assert (top_values - best.values).abs().max() < TOLERANCE
    assert (after.gather(1, top_ids) - best.values).abs().max() < TOLERANCE, "the ids, but for ties"
    listed = torch.tensor(array("f", found.listed)).view(-1, len(SPEC.ids))
    assert (listed - after[:, list(SPEC.ids)]).abs().max() < TOLERANCE


def gathered(results: Iterable[StepResult], side: str) -> Logprobs:
    """All that steps told of a single row's prompt, or of its answer."""
    told = [row.prompt if side == "prompt" else row.output for result in results for row in result.logprobs]
    return joined([part for part in told if part is not None])


@pytest.mark.parametrize(("drafting", "drafts"), [(NO_DRAFTS, 0), (MTP, 3)], ids=["plain", "mtp"])
@pytest.mark.parametrize("chunk", [300, 64, 7])
def test_prompt_and_answer_equal_hugging_face_whatever_sampling_does_to_the_logits(
    tiny: Path, truth: Any, tmp_path: Path, drafting: DraftTraits, drafts: int, chunk: int
) -> None:
    steps = Steps(plan_for(tiny, drafting=drafting), tmp_path)
    steps.add(0, PROMPT, sampling=SAMPLED, logprobs_from=1)
    results = []
    while steps.computed[0] < len(PROMPT):
        results.append(steps.run({0: min(chunk, len(PROMPT) - steps.computed[0])}))
    while len(steps.tokens[0]) < len(PROMPT) + 20:
        results.append(steps.run({0: 1}, drafts))
    after = expected(truth, steps.tokens[0])
    assert_equal(gathered(results, "prompt"), PROMPT[1:], after[: len(PROMPT) - 1])
    assert_equal(gathered(results, "output"), steps.tokens[0][len(PROMPT) :], after[len(PROMPT) - 1 :])


def test_a_hit_may_cover_all_but_the_token_before_the_first_that_is_wanted(
    tiny: Path, truth: Any, tmp_path: Path
) -> None:
    steps = Steps(plan_for(tiny, page_size=4, pages=256), tmp_path)
    steps.add(0, PROMPT)
    steps.prefill(0)
    for first in (101, 103, 299):
        steps.add(1, PROMPT, sampling=SAMPLED, shares=(0, (first - 1) // 4 * 4), logprobs_from=first)
        results = []
        while steps.computed[1] < len(PROMPT):
            results.append(steps.run({1: min(50, len(PROMPT) - steps.computed[1])}))
        after = expected(truth, PROMPT)
        assert_equal(gathered(results, "prompt"), PROMPT[first:], after[first - 1 :])


def test_rows_that_want_none_share_the_steps_of_those_that_do(tiny: Path, truth: Any, tmp_path: Path) -> None:
    steps = Steps(plan_for(tiny), tmp_path)
    steps.add(0, PROMPT[:40])
    steps.add(1, PROMPT[:90], sampling=SAMPLED, logprobs_from=50)
    steps.add(2, PROMPT[40:60], sampling=SamplingSpec(seed=1, logprobs=LogprobSpec()))
    results = [steps.run({0: 40, 1: 60, 2: 20}), steps.run({2: 1, 1: 30, 0: 1}), steps.run({0: 1, 2: 1, 1: 1})]
    assert [[row.at for row in result.logprobs] for result in results] == [[1, 2], [0, 1], [1, 2]]
    mine = [row for result, at in zip(results, (1, 1, 2), strict=True) for row in result.logprobs if row.at == at]
    after = expected(truth, steps.tokens[1])
    assert_equal(joined([row.prompt for row in mine if row.prompt]), PROMPT[50:90], after[49:89])
    assert_equal(joined([row.output for row in mine if row.output]), steps.tokens[1][90:], after[89:])
    assert results[0].logprobs[1].prompt is None
    output = results[0].logprobs[1].output
    assert output is not None
    assert (len(output), output.top_ids, output.listed) == (1, b"", b"")


def test_half_precision_logits_make_full_precision_numbers() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    found = logprobs_of(logits, torch.tensor([2]), LogprobSpec())
    assert array("f", found.values)[0] == pytest.approx(-0.4076059644)
