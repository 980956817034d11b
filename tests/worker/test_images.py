"""Images in steps: float32 logits of every token against transformers, however prompts are cut and mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from torch import Tensor

from srt.configs.models import read_facts
from srt.configs.plan import ImageConfig, RuntimePlan
from srt.messages import ImageWork
from tests.support.checkpoints import write_checkpoint, write_golden
from tests.support.pictures import picture
from tests.support.prompts import ImagePrompt
from tests.support.steps import Steps, plan_for, random_ids

RELATIVE = 1e-5
WIDE, TALL, SMALL = picture(200, 90), picture(90, 300, shift=3), picture(60, 50, shift=9)
"""In the tiny checkpoint, whose views have 112 pixels and crops 84: two crops in a row, three in a column, none."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), limits=(0.3, 0.4))


@pytest.fixture(scope="module")
def images(tiny: Path) -> ImageConfig:
    config = read_facts(tiny).images
    assert config is not None
    return config


@pytest.fixture(scope="module")
def truth(tiny: Path) -> Any:
    from transformers import Step3p7ForConditionalGeneration

    torch.set_num_threads(1)
    return Step3p7ForConditionalGeneration.from_pretrained(str(tiny), dtype=torch.float32)


class Bench:
    """A worker and prompts with images for it."""

    def __init__(self, plan: RuntimePlan, config: ImageConfig, rundir: Path) -> None:
        self.steps = Steps(plan, rundir)
        self._config, self._rundir = config, rundir

    def prompt(self, *parts: list[int] | Image.Image) -> ImagePrompt:
        return ImagePrompt(parts, self._config, self._rundir)

    def add(self, row: int, prompt: ImagePrompt, shares: tuple[int, int] = (0, 0)) -> None:
        self.steps.add(row, prompt.tokens, images=prompt.spans, shares=shares)

    def run(self, counts: dict[int, int]) -> ImageWork | None:
        return self.steps.run(counts).images

    def assert_equal(self, row: int, prompt: ImagePrompt, truth: Any) -> None:
        """Logits of a row, at all positions it computed, are those of its tokens and images."""
        logits = self.steps.all_logits(row)
        more = self.steps.tokens[row][len(prompt.tokens) : self.steps.computed[row]]
        assert_close(logits, prompt.logits(truth, more)[self.steps.computed[row] - len(logits) :])


def assert_close(logits: Tensor, expected: Tensor) -> None:
    assert logits.shape == expected.shape
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    assert difference < RELATIVE, f"relative difference {difference:.2e}"


@pytest.fixture
def bench(tiny: Path, images: ImageConfig, tmp_path: Path) -> Bench:
    return Bench(plan_for(tiny, page_size=4, pages=256), images, tmp_path)


def words(count: int, seed: int) -> list[int]:
    return random_ids(count, seed, 1000)


def test_the_published_prompt_with_images_gives_the_published_logits(tmp_path: Path) -> None:
    """The golden vectors: two crops and a global view of given pixels between text tokens."""
    from srt.layers.batch import PlacedFeatures
    from tests.models.test_vision_tower import golden_pixels, load_tower

    checkpoint = write_golden(tmp_path)
    ids = [5, 6, 102, *[101] * 4, 103, 102, *[101] * 4, 103, 104, *[101] * 4, 105, 9]
    tower = load_tower(checkpoint)
    with torch.inference_mode():
        features = torch.cat(
            [tower.features(golden_pixels(2, 84, 2)).flatten(0, 1), tower.features(golden_pixels(1, 112, 1))[0]]
        )
    steps = Steps(plan_for(checkpoint, page_size=4), tmp_path)

    class Given:
        def apply(self, plan: object) -> None:
            pass

        def place(self, parts: object) -> PlacedFeatures:
            return PlacedFeatures(torch.tensor([at for at, token in enumerate(ids) if token == 101]), features)

        def report(self) -> None:
            return None

        def rehearse(self) -> None:
            pass

    steps.runner.images = Given()
    steps.add(0, ids)
    steps.prefill(0)
    logits = steps.all_logits(0)[-1]
    expected = torch.tensor([-0.03566, 0.65106, 1.92395, 0.00167, -0.06188, 0.35846])
    assert torch.allclose(logits[:6], expected, atol=6e-6)
    assert logits.argmax() == 53


@pytest.mark.parametrize("chunk", [None, 1, 5, 13])
def test_several_images_in_a_prompt_equal_hugging_face_however_it_is_cut(
    bench: Bench, truth: Any, chunk: int | None
) -> None:
    prompt = bench.prompt(words(9, 1), WIDE, words(2, 2), TALL, SMALL, words(5, 3))
    bench.add(0, prompt)
    bench.steps.prefill(0, chunk)
    bench.assert_equal(0, prompt, truth)


def test_a_prompt_may_begin_and_end_with_an_image(bench: Bench, truth: Any) -> None:
    prompt = bench.prompt(SMALL, words(1, 1), WIDE)
    bench.add(0, prompt)
    bench.steps.generate(0, 6)
    bench.assert_equal(0, prompt, truth)


def test_rows_with_and_without_images_share_steps(bench: Bench, truth: Any) -> None:
    prompts = [
        bench.prompt(words(3, 1), WIDE, words(4, 2)),
        bench.prompt(words(20, 3), SMALL),
        bench.prompt(words(2, 4), TALL, SMALL, WIDE, words(2, 5)),
    ]
    for row, prompt in enumerate(prompts):
        bench.add(row, prompt)
    bench.steps.add(3, words(40, 6))
    sizes = [len(prompt.tokens) for prompt in prompts]
    bench.run({0: 7, 3: 10, 1: 21, 2: 1})
    bench.run({2: sizes[2] - 1, 0: sizes[0] - 7, 3: 30, 1: sizes[1] - 21})
    for _ in range(4):
        bench.run({1: 1, 0: 1, 3: 1, 2: 1})
    for row, prompt in enumerate(prompts):
        bench.assert_equal(row, prompt, truth)
    tokens = torch.tensor([bench.steps.tokens[3][: bench.steps.computed[3]]])
    with torch.inference_mode():
        assert_close(bench.steps.all_logits(3), truth(input_ids=tokens, use_cache=False).logits[0])


def test_a_prefix_hit_may_end_inside_an_image(bench: Bench, truth: Any) -> None:
    first = bench.prompt(words(6, 1), WIDE, words(8, 2))
    bench.add(0, first)
    bench.steps.prefill(0)
    for row, shared in enumerate((4, 8, 12, 16, 20), start=1):
        again = bench.prompt(words(6, 1), WIDE, words(8, 2 if shared > 16 else 3))
        bench.add(row, again, shares=(0, shared))
        bench.steps.prefill(row)
        bench.assert_equal(row, again, truth)


def test_each_distinct_image_is_computed_once_while_it_is_kept(bench: Bench) -> None:
    for row in range(4):
        bench.add(row, bench.prompt(words(2, row), WIDE, SMALL))
    size = len(bench.steps.tokens[0])
    work = bench.run({0: size, 1: size})
    assert work is not None
    assert (work.images, work.hits, work.batches) == (2, 2, 2), "crops in one batch, global views in another"
    work = bench.run({2: size, 0: 1, 3: 2})
    assert work is not None
    assert (work.images, work.hits, work.batches) == (0, 2, 0)
    assert bench.run({0: 1, 1: 1}) is None


def test_images_that_come_later_in_a_prompt_ride_along(bench: Bench) -> None:
    shots = [picture(50 + at, 50, shift=at) for at in range(5)]
    parts: list[list[int] | Image.Image] = [part for shot in shots for part in (words(3, 1), shot)]
    bench.add(0, bench.prompt(*parts))
    size = len(bench.steps.tokens[0])
    work = bench.run({0: 5})
    assert work is not None
    assert (work.images, work.batches) == (5, 1)
    assert bench.run({0: size - 5}) is None, "they are held until they are placed"


@pytest.mark.parametrize("chunk", [4, 100])
def test_without_a_cache_rows_hold_what_they_have_begun(
    tiny: Path, images: ImageConfig, truth: Any, tmp_path: Path, chunk: int
) -> None:
    plan = plan_for(tiny, page_size=4, pages=256)
    server = msgspec.structs.replace(plan.server, encoder_cache_bytes=0)
    bench = Bench(msgspec.structs.replace(plan, server=server), images, tmp_path)
    prompt = bench.prompt(words(3, 1), WIDE, words(1, 1), TALL, words(3, 1), WIDE)
    bench.add(0, prompt)
    bench.steps.prefill(0, chunk)
    bench.assert_equal(0, prompt, truth)


def test_a_row_that_starts_again_computes_its_images_again(bench: Bench, truth: Any) -> None:
    """As after a retraction in the middle of an image."""
    prompt = bench.prompt(words(3, 1), WIDE, words(2, 2), TALL)
    bench.add(0, prompt)
    bench.run({0: 9})
    bench.add(0, prompt)
    bench.steps.generate(0, 3)
    bench.assert_equal(0, prompt, truth)
    other = bench.prompt(words(5, 9), SMALL, words(2, 2))
    bench.add(0, other)
    bench.steps.prefill(0)
    bench.assert_equal(0, other, truth)


def test_features_are_kept_up_to_their_budget_and_the_oldest_go_first(
    tiny: Path, images: ImageConfig, tmp_path: Path
) -> None:
    plan = plan_for(tiny, page_size=4, pages=512)
    feature_bytes = 4 * 64 * images.view_tokens
    server = msgspec.structs.replace(plan.server, encoder_cache_bytes=2 * feature_bytes)
    bench = Bench(msgspec.structs.replace(plan, server=server), images, tmp_path)

    def encoded(row: int, shot: Image.Image) -> int:
        prompt = bench.prompt(shot, words(1, 1))
        bench.add(row, prompt)
        work = bench.run({row: len(prompt.tokens)})
        assert work is not None
        return work.images

    shots = [picture(40 + at, 40, shift=at) for at in range(3)]
    assert [encoded(row, shots[at]) for row, at in enumerate((0, 1, 0, 2, 0, 1))] == [1, 1, 0, 1, 0, 1]
