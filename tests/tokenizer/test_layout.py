"""How images are cut, against the worked examples and against the published rule written out again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srt.tokenizer.layout import ImageTokenIds, Layout, Rule, image_token_count, image_token_ids, plan_layout
from tests.support.pictures import STEP

IDS = ImageTokenIds(patch=128001, view_start=1, view_end=2, crop_start=3, crop_end=4, row_end=5)

EXAMPLES = [
    (300, 200, 0, 0, 171), (728, 728, 0, 0, 171), (500, 300, 2, 0, 337), (300, 700, 3, 2, 422), (729, 729, 4, 1, 504),
    (1024, 768, 4, 1, 504), (1920, 1080, 8, 1, 836), (800, 300, 2, 0, 337), (2000, 400, 5, 0, 586),
    (3000, 200, 15, 0, 1416), (4000, 3000, 30, 4, 2665), (610, 1210, 6, 2, 671), (504, 2100, 4, 3, 506),
    (1600, 1000, 6, 1, 670), (100, 20, 0, 0, 171), (20, 10, 2, 0, 337),
]  # fmt: skip
"""Width, height, crops, row ends, tokens."""


def tokens(layout: Layout) -> int:
    return image_token_count(layout.columns, layout.rows, STEP)


@pytest.mark.parametrize("rule", ["vendor", "hf"])
@pytest.mark.parametrize(("width", "height", "crops", "row_ends", "count"), EXAMPLES)
def test_worked_examples(width: int, height: int, crops: int, row_ends: int, count: int, rule: Rule) -> None:
    layout = plan_layout(width, height, STEP, rule)
    assert layout.crops == crops
    assert max(0, layout.rows - 1) == row_ends
    assert tokens(layout) == count
    ids = image_token_ids(layout.columns, layout.rows, STEP, IDS)
    assert len(ids) == count
    assert ids.count(IDS.patch) == 81 * crops + 169
    assert ids.count(IDS.row_end) == row_ends


def test_crops_stand_row_by_row_before_the_global_view() -> None:
    crop = [IDS.crop_start, *[IDS.patch] * 81, IDS.crop_end]
    view = [IDS.view_start, *[IDS.patch] * 169, IDS.view_end]
    assert image_token_ids(2, 2, STEP, IDS) == [*crop, *crop, IDS.row_end, *crop, *crop, *view]
    assert image_token_ids(1, 3, STEP, IDS) == [*crop, IDS.row_end, *crop, IDS.row_end, *crop, *view]
    assert image_token_ids(0, 0, STEP, IDS) == view


def test_a_long_side_of_exactly_the_view_still_fits_it() -> None:
    assert plan_layout(728, 728, STEP, "vendor").crops == 0
    assert plan_layout(728, 400, STEP, "vendor").window == 400
    assert plan_layout(729, 729, STEP, "vendor").window == 504


def test_the_published_rule_rounds_a_quotient_of_a_fifth_up_and_that_of_transformers_does_not() -> None:
    vendor, hf = plan_layout(660, 300, STEP, "vendor"), plan_layout(660, 300, STEP, "hf")
    assert (vendor.columns, hf.columns) == (3, 2)
    assert (tokens(vendor), tokens(hf)) == (420, 337)


def test_larger_images_shrink_with_their_sides_cut_off_not_rounded() -> None:
    assert plan_layout(4000, 3001, STEP, "vendor").shrunk == (3024, 2268)
    assert plan_layout(5000, 3332, STEP, "vendor").shrunk == (3024, 2015)


def test_a_sliver_is_padded_to_a_square_before_all_else() -> None:
    layout = plan_layout(5000, 31, STEP, "vendor")
    assert layout.padded == (5000, 5000)
    assert layout.shrunk == (3024, 3024)
    assert (layout.columns, layout.rows) == (6, 6)
    assert plan_layout(5000, 32, STEP, "vendor").padded == (5000, 32)
    assert plan_layout(120, 30, STEP, "vendor").padded == (120, 30), "a ratio of exactly 4 is no sliver"


def test_low_detail_is_the_global_view_alone() -> None:
    assert tokens(plan_layout(4000, 3000, STEP, "vendor", crops=False)) == 171


def published(width: int, height: int) -> tuple[int, int]:
    """Columns and rows, by the published steps, with windows listed one by one."""
    if min(width, height) < 32 and (width / height > 4 or width / height < 1 / 4):
        width = height = max(width, height)
    if max(width, height) > 3024:
        scale = 3024 / max(width, height)
        width, height = int(width * scale), int(height * scale)
    long, short = max(width, height), min(width, height)
    window = min(short, 504) if long / short > 4 else 504
    if long <= 728:
        window = short if long / short > 1.5 else 0
    if window == 0:
        return 0, 0
    counts = []
    for side in (width, height):
        whole = side // window
        size = side if side < window else window * (whole + (side / window - whole > 0.2))
        starts = [0]
        while starts[-1] + window < size:
            starts.append(starts[-1] + window)
        counts.append(len(starts))
    return counts[0], counts[1]


@given(st.integers(1, 6000), st.integers(32, 6000), st.booleans())
def test_any_size_is_cut_as_published(width: int, height: int, turned: bool) -> None:
    if turned:
        width, height = height, width
    layout = plan_layout(width, height, STEP, "vendor")
    assert (layout.columns, layout.rows) == published(width, height)
    if layout.window:
        assert layout.window <= STEP.crop_size or max(width, height) <= STEP.view_size
        assert layout.canvas[0] <= layout.columns * layout.window
