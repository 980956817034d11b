"""fp32 logits of every token against transformers, however the tokens are cut into steps."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from srt.worker.startup import Picks, reference_backends
from tests.support.checkpoints import write_checkpoint
from tests.support.rank import RANKS
from tests.support.steps import Steps, plan_for, random_ids

RELATIVE = 1e-5
PROMPT = random_ids(150, seed=1, vocab=1024)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), limits=(0.3, 0.4))


@pytest.fixture(scope="module")
def truth(tiny: Path) -> Any:
    from transformers import Step3p7ForConditionalGeneration

    torch.set_num_threads(1)
    model: Any = Step3p7ForConditionalGeneration.from_pretrained(str(tiny), dtype=torch.float32)
    return model.eval()


@pytest.fixture(params=["fastest", "reference"])
def picks(request: pytest.FixtureRequest) -> Picks | None:
    """The backends that start-up would pick on this machine, and plain torch."""
    return None if request.param == "fastest" else reference_backends("for comparison")


def reference(truth: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = truth(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def assert_equal(logits: Tensor, expected: Tensor) -> None:
    assert logits.shape == expected.shape
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    assert difference < RELATIVE, f"relative difference {difference:.2e}"


def assert_row_equal(steps: Steps, row: int, truth: Any) -> None:
    """A row's logits, at all positions it computed, are those of its tokens."""
    computed = steps.computed[row]
    logits = steps.all_logits(row)
    assert_equal(logits, reference(truth, steps.tokens[row][:computed])[computed - len(logits) :])


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_a_whole_prefill_equals_hugging_face(
    tiny: Path, truth: Any, tmp_path: Path, picks: Picks | None, page_size: int
) -> None:
    steps = Steps(plan_for(tiny, page_size=page_size, pages=512 // page_size), tmp_path, picks=picks)
    steps.add(0, PROMPT)
    steps.prefill(0)
    assert_row_equal(steps, 0, truth)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("page_size", [1, 16])
def test_chunked_prefill_equals_hugging_face(
    tiny: Path, truth: Any, tmp_path: Path, picks: Picks | None, chunk: int, page_size: int
) -> None:
    steps = Steps(plan_for(tiny, page_size=page_size, pages=512 // page_size), tmp_path, picks=picks)
    steps.add(0, PROMPT)
    steps.prefill(0, chunk)
    assert_row_equal(steps, 0, truth)


def test_step_by_step_decoding_equals_hugging_face(tiny: Path, truth: Any, tmp_path: Path, picks: Picks | None) -> None:
    steps = Steps(plan_for(tiny), tmp_path, picks=picks)
    steps.add(0, PROMPT[:40])
    generated = steps.generate(0, 40)
    assert_row_equal(steps, 0, truth)
    assert generated == reference(truth, PROMPT[:40] + generated)[39:-1].argmax(-1).tolist()


def test_prefill_chunks_and_decodes_of_ragged_rows_share_a_step(
    tiny: Path, truth: Any, tmp_path: Path, picks: Picks | None
) -> None:
    steps = Steps(plan_for(tiny, pages=128), tmp_path, picks=picks)
    for row, (length, seed) in enumerate([(1, 2), (33, 3), (120, 4), (16, 5), (71, 6)]):
        steps.add(row, random_ids(length, seed, 1024))
    steps.run({0: 1, 1: 33, 2: 50})
    steps.run({2: 7, 0: 1, 3: 16, 1: 1})
    steps.run({1: 1, 4: 70, 3: 1, 2: 1, 0: 1})
    steps.run({0: 1, 4: 1, 2: 62, 1: 1})
    for _ in range(5):
        steps.run({4: 1, 0: 1, 2: 1, 3: 1, 1: 1})
    for row in range(5):
        assert_row_equal(steps, row, truth)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_a_row_that_shares_the_pages_of_a_prefix_equals_hugging_face(
    tiny: Path, truth: Any, tmp_path: Path, picks: Picks | None, page_size: int
) -> None:
    steps = Steps(plan_for(tiny, page_size=page_size, pages=1024 // page_size), tmp_path, picks=picks)
    steps.add(0, PROMPT)
    steps.prefill(0, 32)
    steps.add(1, PROMPT[:128] + random_ids(30, 9, 1024), shares=(0, 128))
    steps.run({0: 1, 1: 13})
    steps.run({1: 17, 0: 1})
    steps.run({0: 1, 1: 1})
    assert_row_equal(steps, 0, truth)
    assert_row_equal(steps, 1, truth)


def test_two_ranks_equal_hugging_face_and_each_other(tiny: Path, truth: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.rank", str(tiny), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE) for rank in range(RANKS)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()
    first, second = (torch.load(tmp_path / f"logits{rank}.pt") for rank in range(RANKS))
    tokens = torch.load(tmp_path / "tokens0.pt")
    assert tokens == torch.load(tmp_path / "tokens1.pt")
    for row in range(2):
        assert torch.equal(first[row], second[row])
        assert_equal(first[row], reference(truth, tokens[row][:-1]))


def test_bfloat16_stays_close_to_float32(tiny: Path, truth: Any, tmp_path: Path, picks: Picks | None) -> None:
    steps = Steps(plan_for(tiny, dtype="bfloat16"), tmp_path, picks=picks)
    steps.add(0, PROMPT[:100])
    steps.prefill(0, 30)
    logits, expected = steps.all_logits(0).float(), reference(truth, PROMPT[:100])
    assert steps.all_logits(0).dtype == torch.bfloat16
    assert (logits - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_published_names_and_those_of_transformers_load_to_the_same_model(
    tiny: Path, truth: Any, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    saved = tmp_path / "saved"
    saved.mkdir()
    shutil.copy(tiny / "preprocessor_config.json", saved)
    truth.config.to_json_file(str(saved / "config.json"), use_diff=False)
    save_file({name: tensor.contiguous() for name, tensor in truth.state_dict().items()}, str(saved / "a.safetensors"))
    logits = []
    for checkpoint in (tiny, saved):
        steps = Steps(plan_for(checkpoint), tmp_path)
        steps.add(0, PROMPT[:50])
        steps.prefill(0)
        logits.append(steps.all_logits(0))
    assert torch.equal(*logits)
