"""The built-in model whole, on a GPU beside plain torch on the CPU: logits, greedy answers, images.

Arithmetic of other shapes rounds in another way, so no two ways of computing a token agree to the bit. What holds: no
way is much further from float32 than plain bfloat16 is, and a greedy answer changes only where two tokens were nearly
as good. A fault that bfloat16 hides, say a window of one key less, shows in float32, which the same kernels compute.
On a CPU the same tests hold the device's engine with plain torch in it to the host's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest
import torch
from torch import Tensor

from srt.messages import ImageSpan
from srt.tiles import TileFiles
from srt.worker.image_features import ImageFeatures
from srt.worker.startup import DTYPES, worker_device
from tests.models.test_vision_tower import load_tower
from tests.support.gpu import ON_A_GPU
from tests.support.steps import NO_DRAFTS
from tests.support.whole_model import TINY, Asker, Deviation, Engine, Place, Question, Reference, Way, regret

log = logging.getLogger(__name__)
CPU: Final = Place("cpu", "bfloat16")
HALF: Final = Place("cuda", "bfloat16")
SINGLE: Final = Place("cuda", "float32")
PLACES = [
    pytest.param(CPU, id="cpu"),
    pytest.param(HALF, id="gpu", marks=ON_A_GPU),
    pytest.param(SINGLE, id="gpu-float32", marks=ON_A_GPU),
]
FEW = {"recall": 1, "sort": 1, "tool_call": 1, "image_digit": 1}
MANY = {
    "greeting": 1, "sum": 1, "difference": 1, "sort": 1, "reverse": 1, "count": 1, "json": 1, "recall": 2,
    "recall_turns": 1, "tool_call": 1, "tool_joined": 1, "tool_answer": 1, "image_object": 2, "image_digit": 1,
    "image_many": 1,
}  # fmt: skip
"""Prompts of 15 to 1,452 tokens, with a window of 64."""
ROOM: Final = {"cpu": 24, "cuda": 60}
"""Tokens of an answer."""
TIMES: Final = Deviation(1.2, 1.5, 1.5)
"""How many times as far off as those of plain torch in bfloat16 logits in bfloat16 may be."""
IMAGE_TIMES: Final = Deviation(1.5, 1.5, 1.5)
"""The same of images' features, which torch's own kernels compute in either place."""
MORE: Final = Deviation(1e-4, 5e-3, 2e-3)
"""And how much further; what few positions decide varies more than the median of thousands."""
EXACT: Final = Deviation(2e-5, 2e-4, 3e-3)
"""Float32: sums in another order, other roots and exponentials; once in a while another expert."""
MARGIN: Final = {"bfloat16": 0.5, "float32": 1e-3}
"""Of two tokens between whose logits rounding may decide."""
CHANGED: Final = {"bfloat16": 0.1, "float32": 0.0}
"""Share of answers that may change with the way of computing."""
NOT_BEST: Final = {"bfloat16": 0.01, "float32": 0.0}
"""Share of tokens that may not be those of float32."""
WRONG: Final = 0.1
"""Share of answers that may be wrong; of thousands, 0.1 % are."""
WAYS = {
    "guessing": Way(drafts=3),
    "eight at a time": Way(rows=8, chunk=60),
    "eight at a time, guessing, in small chunks": Way(rows=8, chunk=23, drafts=3),
    "pages of 64": Way(rows=8, chunk=60, drafts=3, page_size=64),
    "recorded": Way(rows=8, chunk=60, recorded=True),
    "recorded, guessing": Way(rows=3, chunk=60, drafts=3, recorded=True),
}
EACH = [
    pytest.param(*place.values, way, id=f"{place.id}-{way}", marks=place.marks)
    for place in PLACES
    for way in WAYS
    if place.id != "gpu-float32" or "guessing, in small chunks" in way or way == "recorded, guessing"
]


class Bench:
    """Questions, and what answers them; each is made once."""

    def __init__(self, rundir: Path) -> None:
        torch.set_num_threads(1)
        self._rundir, self.asker = rundir, Asker(rundir)
        self.questions = cache(self._questions)
        self.engine = cache(self._engine)
        self.reference = cache(lambda dtype: Reference(dtype, rundir))
        self.alone = cache(self._alone)

    def _questions(self, device: str) -> list[Question]:
        families, noise = (FEW, 1) if device == "cpu" else (MANY, 3)
        plan = CPU.plan(drafting=NO_DRAFTS)
        return self.asker.ask(families, plan, seed=11) + self.asker.noise(noise, plan)

    def _engine(self, place: Place, page_size: int = 16) -> Engine:
        return Engine(place, self._rundir, self.asker.end, page_size)

    def answers(self, place: Place, way: Way) -> list[list[int]]:
        """Greedy answers to all questions."""
        return self.engine(place, way.page_size).answer(self.questions(place.device), way, ROOM[place.device])

    def _alone(self, place: Place) -> list[tuple[list[int], Tensor]]:
        """Answers to questions asked one by one, and the truth's logits [N, V] at each of their tokens."""
        questions = self.questions(place.device)
        found = self.answers(place, Way())
        reference = self.reference("float32")
        return [
            (answer, reference.logits(question, answer)[question.size - 1 : -1])
            for question, answer in zip(questions, found, strict=True)
        ]

    def features(self, place: Place, batches: list[list[ImageSpan]]) -> list[Tensor]:
        """Features of the images [F, H] of each batch, computed anew."""
        images = CPU.plan(drafting=NO_DRAFTS).model.images
        assert images is not None
        device, threads = worker_device(place.plan(), 0), torch.get_num_threads()
        with torch.inference_mode():
            with device:
                tower = load_tower(TINY, DTYPES[place.dtype])
            kept = ImageFeatures(
                tower, TileFiles(self._rundir, images), images, device, budget_bytes=0, threads=threads
            )
            found = [kept.get(batch, []) for batch in batches]
        return [part[span.key].float().cpu() for batch, part in zip(batches, found, strict=True) for span in batch]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    yield Bench(tmp_path_factory.mktemp("run"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("place", [*PLACES, pytest.param(Place("cpu", "float32"), id="cpu-float32")])
def test_logits_are_as_near_to_float32_as_those_of_plain_torch(bench: Bench, place: Place) -> None:
    """Of prompts whole and in chunks, of decodes together, with and without guesses."""
    steps, found, plain, truth = bench.engine(place).steps, list[Tensor](), list[Tensor](), list[Tensor]()
    questions = bench.questions(place.device)
    questions = questions[1::3] if len(questions) > 8 else questions
    for row, question in enumerate(questions):
        steps.add(row, question.prompt.tokens, images=question.prompt.spans)
        steps.prefill(row, chunk=100 if row % 2 else 512)
    for drafts in (0, 0, 3, 3, 0, 3):
        steps.run(dict.fromkeys(range(len(questions)), 1), drafts)
    for row, question in enumerate(questions):
        more = steps.tokens[row][question.size : steps.computed[row]]
        found.append(steps.all_logits(row).float().cpu())
        plain.append(bench.reference("bfloat16").logits(question, more))
        truth.append(bench.reference("float32").logits(question, more))
    deviation, bound = Deviation.of(found, truth), bound_of(plain, truth, place.dtype, TIMES)
    log.info("%s, at most %s", deviation, bound)
    assert deviation <= bound
    for at in range(len(questions)):
        assert Deviation.of(found[at : at + 1], truth[at : at + 1]).median < 0.02


def bound_of(plain: list[Tensor], truth: list[Tensor], dtype: str, times: Deviation) -> Deviation:
    """How far off something may be, beside what is found in plain bfloat16."""
    return EXACT if dtype == "float32" else Deviation.of(plain, truth).widened(times, MORE)


@pytest.mark.parametrize("place", PLACES)
def test_greedy_answers_are_right_and_each_token_the_best_or_nearly(bench: Bench, place: Place) -> None:
    questions, alone = bench.questions(place.device), bench.alone(place)
    behind = [regret(row, token) for answer, rows in alone for token, row in zip(answer, rows, strict=True)]
    wrong = sum(not bench.asker.right(question, answer) for question, (answer, _) in zip(questions, alone, strict=True))
    lost = sum(by > 0 for by in behind)
    log.info("%d of %d tokens not the best, by %.3g; %d answers wrong", lost, len(behind), max(behind), wrong)
    assert max(behind) < MARGIN[place.dtype]
    assert lost <= NOT_BEST[place.dtype] * len(behind)
    assert wrong <= WRONG * len(questions)


@pytest.mark.parametrize(("place", "way"), EACH)
def test_an_answer_changes_only_where_two_tokens_are_nearly_as_good(bench: Bench, place: Place, way: str) -> None:
    alone = bench.alone(place)
    changed = list[float]()
    for (answer, truth), other in zip(alone, bench.answers(place, WAYS[way]), strict=True):
        if other != answer:
            at = next(at for at, pair in enumerate(zip(answer, other, strict=False)) if pair[0] != pair[1])
            changed.append(regret(truth[at], answer[at], other[at]))
    log.info("%d of %d answers changed, where tokens were behind by %s", len(changed), len(alone), changed)
    assert max(changed, default=0.0) < MARGIN[place.dtype]
    assert len(changed) <= CHANGED[place.dtype] * len(alone)


@pytest.mark.parametrize("place", PLACES)
def test_images_of_all_sizes_have_the_features_of_plain_torch_alone_and_together(bench: Bench, place: Place) -> None:
    spans = [span for question in bench.questions(place.device) for span in question.prompt.spans]
    together = bench.features(place, [spans])
    alone = bench.features(place, [[span] for span in spans])
    plain, truth = (bench.features(Place("cpu", dtype), [spans]) for dtype in ("bfloat16", "float32"))
    bound = bound_of(plain, truth, place.dtype, IMAGE_TIMES)
    for found in (together, alone):
        deviation = Deviation.of(found, truth)
        log.info("%s, at most %s", deviation, bound)
        assert deviation <= bound
