"""The memory plan: what it says of a checkpoint's weights is what lies in its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srt.configs.memory import Spread, rank_bytes, weight_parts
from srt.configs.models import read_facts
from srt.configs.plan import WeightKind
from srt.configs.shards import all_entries
from tests.support.checkpoints import write_checkpoint
from tests.support.quantised import quantise

GEOMETRY: dict[str, Any] = {"vocab": 512, "hidden": 128, "heads": 4, "sliding_heads": 8, "expert_width": 256, "mtp": 3}
WHOLE = Spread(ranks=1, expert_groups=1, item_bytes=2, panels=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), **GEOMETRY)


@pytest.mark.parametrize("dialect", ["bf16", "fp8", "nvfp4"])
def test_parts_add_up_to_the_bytes_in_the_files(plain: Path, tmp_path: Path, dialect: str) -> None:
    checkpoint = plain if dialect == "bf16" else quantise(plain, tmp_path, dialect)
    facts = read_facts(checkpoint)
    parts = weight_parts(facts, WHOLE, facts.mtp_modules, tower=True)
    on_disk = sum(entry.bytes for _, entry in all_entries(checkpoint))
    # What is left out: scales of a whole matrix, single numbers.
    assert abs(sum(parts.values()) - on_disk) < 2048
    assert parts["mtp"] == facts.weight_bytes["mtp"]
    assert parts["vision"] == facts.weight_bytes["vision"]


def test_half_the_draft_modules_take_their_share(plain: Path) -> None:
    facts = read_facts(plain)
    sizes = [weight_parts(facts, WHOLE, modules, tower=True).get("mtp", 0) for modules in range(4)]
    assert sizes == [0, sizes[3] // 3, 2 * sizes[3] // 3, sizes[3]]


@pytest.mark.parametrize(
    ("kind", "spread", "expected"),
    [
        # Rows are shared out, columns are, the whole is on each.
        (WeightKind("a", 100, 8), Spread(2, 1, 2, panels=False), 50 * 8 * 2),
        (WeightKind("a", 100, 8), Spread(2, 1, 2, panels=True), 64 * 8 * 2),
        (WeightKind("a", 100, 8, split="columns"), Spread(2, 1, 4, panels=False), 100 * 4 * 4),
        (WeightKind("a", 100, 8, split="whole"), Spread(4, 1, 2, panels=False), 100 * 8 * 2),
        (WeightKind("a", 100, 8, format="float32", split="whole"), Spread(4, 1, 2, panels=False), 100 * 8 * 4),
        # 8 experts over 2 groups of 2 ranks: 4 experts of half the width; codes are padded to whole blocks.
        (WeightKind("a", 512, 64, stack=8, halves=2), Spread(4, 2, 2, panels=False), 4 * 256 * 64 * 2),
        (WeightKind("a", 128, 64, stack=8, halves=2, format="fp8"), Spread(1, 1, 2, panels=False), 8 * (256 * 64 + 8)),
        (WeightKind("a", 64, 160, format="nvfp4", split="columns", stack=2), Spread(8, 1, 2, panels=True),
         2 * (64 * 32 // 2 + 64 * 2)),
        (WeightKind("a", 64, 160, format="nvfp4", split="columns", stack=2), Spread(8, 1, 2, panels=False),
         2 * (64 * 64 // 2 + 64 * 4)),
    ],
)  # fmt: skip
def test_a_rank_holds_its_share_padded_as_its_format_wants(kind: WeightKind, spread: Spread, expected: int) -> None:
    assert rank_bytes(kind, spread) == expected
