"""One rank of a tensor-parallel worker in a process of its own: runs two ragged rows and saves their logits.

python -m tests.support.rank CHECKPOINT DIRECTORY RANK [guess]

With `guess` the draft modules guess, and each rank's part of all logits has rounding noise of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from srt.distributed.gloo import GlooGroup
from tests.support.steps import MTP, Steps, plan_for, random_ids

RANKS = 2


def main(checkpoint: Path, directory: Path, rank: int) -> None:
    """Write `logits<rank>.pt` and `tokens<rank>.pt` into `directory`."""
    steps = Steps(plan_for(checkpoint, tp_size=RANKS), directory, rank)
    for row, length in ((0, 50), (1, 9)):
        steps.add(row, random_ids(length, row, 1024))
    steps.run({0: 43, 1: 9})
    steps.run({1: 1, 0: 7})
    for _ in range(6):
        steps.run({0: 1, 1: 1})
    torch.save([steps.all_logits(row) for row in (0, 1)], directory / f"logits{rank}.pt")
    torch.save([steps.tokens[row] for row in (0, 1)], directory / f"tokens{rank}.pt")


def guess(checkpoint: Path, directory: Path, rank: int) -> None:
    """The built-in model; write the tokens kept of each row and step, and all of them, into `directory`."""
    gather, noise = GlooGroup.all_gather, torch.Generator().manual_seed(rank)

    def noisy(self: GlooGroup, x: torch.Tensor) -> torch.Tensor:
        return gather(self, x * (1 + 2e-7 * torch.randint(-1, 2, x.shape, generator=noise)))

    GlooGroup.all_gather = noisy  # type: ignore[method-assign]
    steps = Steps(plan_for(checkpoint, tp_size=RANKS, drafting=MTP), directory, rank)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    for row, question in enumerate(("Count from 1 to 30.", "Reverse the word gate.")):
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n"
        steps.add(row, tokenizer.encode(text, add_special_tokens=False).ids)
    steps.run({row: len(tokens) for row, tokens in steps.tokens.items()})
    counts = [steps.run({0: 1, 1: 1}, drafts=3).token_counts for _ in range(12)]
    torch.save(counts, directory / f"counts{rank}.pt")
    torch.save([steps.tokens[row] for row in (0, 1)], directory / f"tokens{rank}.pt")


if __name__ == "__main__":
    (guess if "guess" in sys.argv[4:] else main)(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
