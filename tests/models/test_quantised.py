"""Quantised checkpoints: every dialect of the same weights gives the logits of the numbers that the codes stand for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import write_checkpoint
from tests.support.quantised import DIALECTS, dequantise, quantise
from tests.support.steps import Steps, plan_for, random_ids

RELATIVE = 1e-5
PROMPT = random_ids(90, seed=1, vocab=512)
GEOMETRY: dict[str, Any] = {
    "vocab": 512, "hidden": 128, "kv_heads": 4, "heads": 4, "sliding_heads": 8, "expert_width": 512,
    "shared_width": 64, "limits": (0.3, 0.4), "mtp": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), **GEOMETRY)


@pytest.fixture(scope="module", params=["fp8", "nvfp4"])
def truth(request: pytest.FixtureRequest, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tensor]:
    """A format, and the logits that transformers computes from the numbers its codes stand for."""
    from transformers import Step3p7ForConditionalGeneration

    torch.set_num_threads(1)
    directory = dequantise(plain, tmp_path_factory.mktemp("float"), request.param)
    model: Any = Step3p7ForConditionalGeneration.from_pretrained(str(directory), dtype=torch.float32)
    with torch.inference_mode():
        return request.param, model.eval()(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]


def logits_of(checkpoint: Path, rundir: Path, **options: Any) -> Tensor:
    """Logits of all tokens of the prompt, prefilled in chunks."""
    steps = Steps(plan_for(checkpoint, **options), rundir)
    steps.add(0, PROMPT)
    steps.prefill(0, 40)
    return steps.all_logits(0)


def assert_equal(logits: Tensor, expected: Tensor) -> None:
    assert logits.shape == expected.shape
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    assert difference < RELATIVE, f"relative difference {difference:.2e}"


def test_every_dialect_of_a_format_equals_hugging_face_on_the_decoded_weights(
    truth: tuple[str, Tensor], plain: Path, tmp_path: Path
) -> None:
    name, expected = truth
    dialects = [dialect for dialect in DIALECTS if name in dialect]
    assert len(dialects) >= 3
    for dialect in dialects:
        checkpoint = quantise(plain, tmp_path / dialect, dialect, shards=2)
        assert_equal(logits_of(checkpoint, tmp_path), expected)


@pytest.mark.parametrize(("ranks", "ep_size"), [(2, 1), (4, 1), (2, 2)])
def test_experts_split_over_ranks_equal_hugging_face_on_the_decoded_weights(
    truth: tuple[str, Tensor], plain: Path, tmp_path: Path, ranks: int, ep_size: int
) -> None:
    name, expected = truth
    checkpoint = quantise(plain, tmp_path / name, name)
    command = [sys.executable, "-m", "tests.models.test_quantised", str(checkpoint), str(tmp_path)]
    numbers = [[str(rank), str(ranks), str(ep_size)] for rank in range(ranks)]
    started = [subprocess.Popen([*command, *number], stderr=subprocess.PIPE) for number in numbers]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    for rank in range(ranks):
        assert_equal(torch.load(tmp_path / f"logits{rank}.pt"), expected)


def test_a_format_that_does_not_split_over_the_ranks_names_the_sizes_that_do(plain: Path, tmp_path: Path) -> None:
    from srt.configs.models import read_config
    from srt.distributed import TensorGroup
    from srt.layers.moe.placement import place
    from srt.layers.quant.fp8 import Fp8Blocks
    from srt.layers.quant.nvfp4 import Nvfp4

    moe = read_config(plain).text.moe
    assert moe is not None
    group = TensorGroup()
    group.size = 8
    with pytest.raises(ValueError, match=r"width of 512 does not split over 8 ranks .* it splits over 1, 2, 4$"):
        place(group, 1, moe, Fp8Blocks())
    assert place(group, 2, moe, Fp8Blocks()).width == 128
    assert place(group, 1, moe, Nvfp4()).width == 64
    with pytest.raises(ValueError, match=r"--ep-size 3 .* legal: 1, 2, 4, 8$"):
        place(group, 3, moe, Nvfp4())


def run_rank(checkpoint: Path, rundir: Path, rank: int, ranks: int, ep_size: int) -> None:
    """One rank in a process of its own."""
    plan = plan_for(checkpoint, tp_size=ranks, ep_size=ep_size)
    steps = Steps(plan, rundir, rank)
    steps.add(0, PROMPT)
    steps.prefill(0, 40)
    torch.save(steps.all_logits(0), rundir / f"logits{rank}.pt")


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
