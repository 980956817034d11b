"""The built-in model whole: questions to it, an engine that answers them, and plain torch on a CPU as the truth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import torch
from PIL import Image
from torch import Tensor

from srt.builtin.tasks import Example, evaluation_set, read_completion
from srt.configs.models import checkpoint_directory
from srt.configs.plan import DeviceFacts, DraftTraits, RuntimePlan
from srt.messages import StepPlan
from srt.tokenizer.layout import ImageTokenIds
from srt.worker.device.runner import DeviceRunner
from srt.worker.image_features import torch_threads
from srt.worker.startup import Pick, reference_backends
from tests.support.prompts import ImagePrompt
from tests.support.records import Recorder
from tests.support.steps import MTP, NO_DRAFTS, Steps, plan_for, random_ids
from tools.builtin import text

TINY: Final = checkpoint_directory("builtin:tiny")
CONTEXT: Final = 2048
TOKENS: Final = {"cpu": 32_768, "cuda": 131_072}
CORES: Final = {"cpu": 4, "cuda": 16}
"""At most: small products gain nothing from more, compilers do."""


@dataclass(frozen=True)
class Place:
    """Where a model computes, and in which numbers."""

    device: str
    dtype: str

    def plan(self, *, page_size: int = 16, drafting: DraftTraits = MTP) -> RuntimePlan:
        """With KV memory for all that a module of tests computes."""
        plan = plan_for(
            TINY,
            dtype=self.dtype,
            page_size=page_size,
            pages=TOKENS[self.device] // page_size,
            context_length=CONTEXT,
            drafting=drafting,
        )
        cores = min(CORES[self.device], len(os.sched_getaffinity(0)))
        device = plan.device
        if self.device == "cuda":
            free, _ = torch.cuda.mem_get_info()
            device = DeviceFacts("cuda", torch.cuda.get_device_name(), free, cores, 1)
        return msgspec.structs.replace(plan, device=device, worker_threads=cores)


@dataclass(frozen=True)
class Question:
    """A problem with its prompt as a worker gets it; without a problem the prompt is noise, and the model unsure."""

    example: Example | None
    prompt: ImagePrompt

    @property
    def size(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.tokens)


class Asker:
    """Draws problems that training did not show. Pixels of their images go into the files of `rundir`."""

    def __init__(self, rundir: Path) -> None:
        self._rundir = rundir
        self._tokenizer = text.build_tokenizer()
        ids = text.token_ids(self._tokenizer)
        self.end = ids[text.TURN_END]
        names = (text.PATCH, "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>")
        self._marks = ImageTokenIds(*(ids[name] for name in names))

    def ask(self, families: dict[str, int], plan: RuntimePlan, seed: int) -> list[Question]:
        """So many problems of each family."""
        drawn = [example for family, count in families.items() for example in evaluation_set(family, count, seed)]
        return [self._question(example, plan) for example in drawn]

    def noise(self, count: int, plan: RuntimePlan) -> list[Question]:
        """So many prompts of ordinary tokens drawn evenly, of 20 to 500 tokens."""
        assert plan.model.images is not None
        sizes = torch.linspace(20, 500, count).int().tolist()
        drawn = [random_ids(size, 1000 + at, plan.model.vocab_size) for at, size in enumerate(sizes)]
        return [Question(None, ImagePrompt([ids], plan.model.images, self._rundir, self._marks)) for ids in drawn]

    def _question(self, example: Example, plan: RuntimePlan) -> Question:
        assert plan.model.images is not None
        first, *others = text.render_prompt(example).split(text.PATCH)
        parts: list[list[int] | Image.Image] = [self._ids(first)]
        for picture, part in zip(example.pictures, others, strict=True):
            parts += [picture.pixels, self._ids(part)]
        return Question(example, ImagePrompt(parts, plan.model.images, self._rundir, self._marks))

    def _ids(self, part: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(part, add_special_tokens=False).ids
        return ids

    def right(self, question: Question, answer: list[int]) -> bool:
        """Whether an answer is the expected one, as far as it came to its end."""
        if answer[-1] != self.end or question.example is None:
            return True
        completion = self._tokenizer.decode(answer[:-1], skip_special_tokens=False)
        return question.example.check(read_completion(completion, question.example.tools).message())


@dataclass(frozen=True)
class Way:
    """How questions are computed: so many at a time, prompts in chunks, with guesses, with steps played back."""

    rows: int = 1
    chunk: int = 512
    drafts: int = 0
    recorded: bool = False
    page_size: int = 16


class Engine:
    """The engine whose rows live on the device: with the kernels of a GPU there, with plain torch on a CPU."""

    def __init__(self, place: Place, rundir: Path, end: int, page_size: int = 16) -> None:
        picks = None
        if place.device == "cpu":
            picks = replace(reference_backends("under test"), engine=Pick("device", "under test"))
        self.steps, self._end = Steps(place.plan(page_size=page_size), rundir, picks=picks), end
        runner = self.steps.runner
        assert isinstance(runner, DeviceRunner)
        self._runner, self._records = runner, runner.graphs
        self._sizes = set(range(1, 9))
        if place.device == "cpu":
            self._records, self._sizes = Recorder(runner.passes, 8, MTP.drafts, 512), {4, 8}
        runner.graphs = None

    def prepare(self, way: Way) -> None:
        """Record decodes of up to eight rows; those of this way have a record then."""
        assert self._records is not None, "every kernel can be recorded"
        self._records.keep(self._sizes)
        self._runner.graphs = self._records
        while self._runner.unprepared:
            self._runner.prepare()
        ones, emits, drafts = [1] * way.rows, [True] * way.rows, [way.drafts] * way.rows
        with torch.inference_mode():
            record = self._records.find(StepPlan(0, list(range(way.rows)), ones, emits, drafts=drafts))
        assert record is not None, "what is not recorded is run, and nothing is shown about records"

    def answer(self, questions: Sequence[Question], way: Way, room: int) -> list[list[int]]:
        """Greedy answers of up to `room` tokens, ends included."""
        if way.recorded:
            self.prepare(way)
        parts = [questions[at : at + way.rows] for at in range(0, len(questions), way.rows)]
        answers = [answer for some in parts for answer in self._together(some, way, room)]
        self._runner.graphs = None
        return answers

    def _together(self, questions: Sequence[Question], way: Way, room: int) -> list[list[int]]:
        steps, answers = self.steps, dict[int, list[int]]()
        for row, question in enumerate(questions):
            steps.add(row, question.prompt.tokens, images=question.prompt.spans)
        while len(answers) < len(questions):
            left = {row: len(steps.tokens[row]) - steps.computed[row] for row in range(len(questions))}
            steps.run({row: min(way.chunk, left[row]) for row in left if row not in answers}, way.drafts)
            for row, question in enumerate(questions):
                known = steps.tokens[row][question.size :]
                if row not in answers and (self._end in known or len(known) >= room):
                    answers[row] = known[: known.index(self._end) + 1 if self._end in known else room]
        return [answers[row] for row in range(len(questions))]


class Reference:
    """Plain torch on the CPU: logits of tokens that are known, in one pass."""

    def __init__(self, dtype: str, rundir: Path) -> None:
        self._plan = Place("cpu", dtype).plan(drafting=NO_DRAFTS)
        self._steps = Steps(self._plan, rundir, picks=reference_backends("the truth"))

    def logits(self, question: Question, more: Sequence[int] = ()) -> Tensor:
        """[N, V] float32, of the prompt and of `more` tokens behind it."""
        self._steps.add(0, [*question.prompt.tokens, *more], images=question.prompt.spans)
        with torch_threads(self._plan.worker_threads):
            self._steps.prefill(0)
        return self._steps.all_logits(0).float()


def regret(logits: Tensor, *tokens: int) -> float:
    """By how much the worst of some tokens is behind the best token there is: logits [V]."""
    return float(logits.max() - logits[list(tokens)].min())


@dataclass(frozen=True)
class Deviation:
    """How far logits are from the truth: differences of positions by norm, relative to the truth's.

    Most positions show rounding alone; at some a rounding chooses another expert, which is a hundred times as much.
    """

    median: float
    most: float
    """All but one position in a hundred are no further off."""
    typical: float
    """Root of the mean square: one position of nonsense among thousands shows."""

    @classmethod
    def of(cls, found: Sequence[Tensor], truth: Sequence[Tensor]) -> Deviation:
        """Of logits [N, V] of some prompts."""
        one, other = torch.cat(list(found)).float().cpu(), torch.cat(list(truth))
        assert one.shape == other.shape
        relative = (one - other).norm(dim=-1) / other.norm(dim=-1)
        median, most = relative.quantile(torch.tensor([0.5, 0.99])).tolist()
        return cls(median, most, float(relative.square().mean().sqrt()))

    def widened(self, times: Deviation, more: Deviation) -> Deviation:
        """So many times as far off, and so much more."""
        parts = zip(*((one.median, one.most, one.typical) for one in (self, times, more)), strict=True)
        return Deviation(*(own * factor + added for own, factor, added in parts))

    def __le__(self, bound: Deviation) -> bool:
        return self.median <= bound.median and self.most <= bound.most and self.typical <= bound.typical
