"""What the native kernels add up to: a request's logits are the same bits whatever shares its steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srt.worker.startup import Picks
from tests.support.steps import Steps, plan_for, random_ids

LENGTHS = (90, 1, 33, 64, 7)


def _alone(checkpoint: Path, rundir: Path, native: Picks, dtype: str, tokens: list[int], page_size: int) -> Steps:
    steps = Steps(plan_for(checkpoint, dtype=dtype, page_size=page_size, pages=128), rundir, picks=native)
    steps.add(0, tokens)
    steps.generate(0, 12)
    return steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_gets_the_same_bits_alone_and_among_others_in_any_chunks_and_pages(
    checkpoint: Path, tmp_path: Path, native: Picks, dtype: str
) -> None:
    prompts = [random_ids(length, seed, 1024) for seed, length in enumerate(LENGTHS)]
    together = Steps(plan_for(checkpoint, dtype=dtype, page_size=16), tmp_path, picks=native)

    def run(rows: int, most: int) -> None:
        """A step of up to `most` tokens of each of the first rows."""
        together.run({row: min(most, len(together.tokens[row]) - together.computed[row]) for row in range(rows)})

    for row, prompt in enumerate(prompts):
        together.add(row, prompt)
        run(row + 1, 13)
    while any(len(together.tokens[row]) < len(prompt) + 12 for row, prompt in enumerate(prompts)):
        run(len(prompts), 9)
    for row, prompt in enumerate(prompts):
        alone = _alone(checkpoint, tmp_path, native, dtype, prompt, 4 if row % 2 else 16)
        count = len(prompt) + 11
        assert torch.equal(together.all_logits(row)[:count], alone.all_logits(0)[:count])
        assert together.tokens[row][: count + 1] == alone.tokens[0][: count + 1]
