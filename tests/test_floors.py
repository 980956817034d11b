"""The floor that benchmarks compare with, and the picture of it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.plot import draw, lines_of, weights_of

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "h200-steps.jsonl"
NAMESPACE = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("preset", "form", "rows", "expected"),
    [
        ("slice8", "bf16", 1, 1.15),
        ("slice8", "bf16", 256, 11.38),
        ("slice8", "fp8", 8, 1.92),
        ("slice8", "nvfp4", 64, 3.33),
        ("full45", "nvfp4", 8, 7.92),
    ],
)
def test_the_floor_is_the_time_that_the_weights_of_a_step_need(
    preset: str, form: str, rows: int, expected: float
) -> None:
    assert weights_of(preset, form).floor_ms(rows, 4.3e12) == pytest.approx(expected, rel=0.01)


def test_every_stored_result_is_drawn_as_a_line_and_none_is_faster_than_memory_is_read() -> None:
    results = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    lines = lines_of(results, 4.3e12)
    assert len(lines) == sum(not result["options"]["mtp"] for result in results)
    # The floor is at the rate of a copy; nothing that only reads came to more than 103 % of that.
    assert all(ratio > 1 / 1.03 for line in lines for _, ratio in line.points)
    picture = ElementTree.fromstring(draw(lines))
    assert len(picture.findall(f"{NAMESPACE}polyline")) == len(lines)
    assert len(picture.findall(f"{NAMESPACE}circle")) == sum(len(line.points) for line in lines)


def test_the_picture_in_the_documentation_is_that_of_the_stored_results() -> None:
    results = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    stored = (RESULTS.parents[1] / "pictures" / "steps.svg").read_text(encoding="utf-8")
    assert stored == draw(lines_of(results, 4.3e12))
