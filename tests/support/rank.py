"""One rank of a tensor-parallel worker in a process of its own: runs two ragged rows and saves their logits.

python -m tests.support.rank CHECKPOINT DIRECTORY RANK
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.support.steps import Steps, plan_for, random_ids

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


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
