"""A worker without processes: makes plans by hand and keeps the logits of every token it computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from srt.configs.drafting import kv_groups
from srt.configs.models import read_facts
from srt.configs.plan import DeviceFacts, DraftTraits, GroupPlan, RuntimePlan
from srt.configs.server import ServerConfig
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.parameter import Parameters
from srt.messages import ImageSpan, PageUpdate, RowStart, SamplingSpec, StepPlan, StepResult
from srt.models.contract import LanguageModel
from srt.worker.device.runner import DeviceRunner
from srt.worker.startup import Picks, start

GREEDY = SamplingSpec(temperature=0.0)
NO_DRAFTS = DraftTraits()
MTP = DraftTraits("mtp", drafts=3, modules=3, look_ahead=3)


def plan_for(
    checkpoint: Path,
    *,
    dtype: str = "float32",
    page_size: int = 16,
    pages: int = 64,
    tp_size: int = 1,
    context_length: int = 1024,
    load_format: str = "auto",
    kv_dtype: str = "",
    ep_size: int = 1,
    drafting: DraftTraits = NO_DRAFTS,
) -> RuntimePlan:
    """A runtime plan with `pages` pages in each KV group."""
    facts = read_facts(checkpoint)
    width = 4 if dtype == "float32" else 2
    groups = []
    if drafting.modules:
        drafting = msgspec.structs.replace(drafting, weights_path=str(checkpoint))
    for group in kv_groups(facts, drafting):
        page_bytes = 2 * width * len(group.layers) * page_size * group.kv_heads * group.head_dim // tp_size
        geometry = (group.name, group.layers, group.window, group.kv_heads, group.head_dim)
        groups.append(GroupPlan(*geometry, pages, page_bytes))
    return RuntimePlan(
        server=ServerConfig(model_path=str(checkpoint), tp_size=tp_size, ep_size=ep_size, load_format=load_format),
        model=facts,
        device=DeviceFacts("cpu", "cpu", 0, 2),
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
        page_size=page_size,
        context_length=context_length,
        max_total_tokens=pages * page_size,
        groups=tuple(groups),
        max_running_requests=8,
        max_queued_requests=8,
        chunked_prefill_size=512,
        max_step_tokens=512,
        steps_in_flight=1,
        worker_threads=1,
        random_seed=0,
        drafting=drafting,
    )


class Recorder:
    """A language model that remembers the logits of all tokens of its last step."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.embedding = model.embedding
        self.last = torch.empty(0)

    def forward(self, batch: ForwardBatch, kv: Sequence[KVLayer]) -> Tensor:
        hidden = self._model.forward(batch, kv)
        self.last = self._model.logits(hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)

    def parameters(self) -> Parameters:
        return self._model.parameters()


class Steps:
    """Requests on rows of one worker, driven step by step. Pages are handed out in a scattered order and kept."""

    def __init__(self, plan: RuntimePlan, rundir: Path, rank: int = 0, picks: Picks | None = None) -> None:
        self.runner = start(plan, rundir, rank, lambda done, total: None, picks).runner
        self.plan, self.recorder = plan, Recorder(self.runner.model)
        self.runner.model = self.recorder
        self._wide = isinstance(self.runner, DeviceRunner)
        """Steps have room for all guesses that a row may have."""
        self.step = 0
        self.logits: dict[int, list[Tensor]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.pages: dict[int, list[list[int]]] = {}
        orders = [np.random.default_rng(7 + at).permutation(group.pages) + 1 for at, group in enumerate(plan.groups)]
        self._free = [order.tolist() for order in orders]
        self._starts: list[RowStart] = []
        self._updates: list[PageUpdate] = []

    def add(
        self,
        row: int,
        tokens: Sequence[int],
        *,
        sampling: SamplingSpec = GREEDY,
        shares: tuple[int, int] = (0, 0),
        images: Sequence[ImageSpan] = (),
        prompt_tokens: int | None = None,
        logprobs_from: int | None = None,
    ) -> None:
        """Put a request on a row; `shares` = (other row, tokens): a prefix hit on whole pages of that row.

        `prompt_tokens`: how many of the tokens are the prompt, if it has an answer already.
        """
        other, computed = shares
        assert computed % self.plan.page_size == 0
        hit = computed // self.plan.page_size
        self.tokens[row], self.computed[row], self.logits[row] = list(tokens), computed, []
        self.pages[row] = [self.pages[other][at][:hit] if hit else [] for at in range(len(self._free))]
        ids = np.array(tokens, dtype="<i4").tobytes()
        left = tuple(span for span in images if span.start + span.tokens > computed)
        prompt = len(tokens) if prompt_tokens is None else prompt_tokens
        self._starts.append(RowStart(row, ids, computed, prompt, sampling, left, logprobs_from))
        for group, pages in enumerate(self.pages[row]):
            if pages:
                self._updates.append(PageUpdate(group, [row], [0], [hit], list(pages)))

    def misplace(self, row: int, group: int, index: int, page: int) -> None:
        """Put a wrong page in place of a row's `index`-th one, as a fault of the page table would."""
        self.pages[row][group][index] = page
        self._updates.append(PageUpdate(group, [row], [index], [1], [page]))

    def run(self, counts: dict[int, int], drafts: int = 0) -> StepResult:
        """One step: row -> tokens to compute. A row that reaches its last token emits, and checks up to `drafts`
        guesses."""
        self.step += 1
        for row, count in counts.items():
            self._extend(row, self.computed[row] + count + drafts)
        emits = [self.computed[row] + count == len(self.tokens[row]) for row, count in counts.items()]
        plan = StepPlan(
            step=self.step, rows=list(counts), counts=list(counts.values()), emits=emits,
            starts=self._starts, pages=self._updates, drafts=[drafts] * len(counts),
        )  # fmt: skip
        self._starts, self._updates = [], []
        result = self.runner.step(plan)
        sampled, kept, drafted = iter(result.token_ids), iter(result.token_counts), iter(result.drafted)
        at = 0
        for (row, count), emitted in zip(counts.items(), emits, strict=True):
            new = next(kept) if emitted else 1
            self.logits[row].append(self.recorder.last[at : at + count + new - 1].clone())
            self.computed[row] += count + new - 1
            guesses = next(drafted) if emitted else 0
            at += count + (drafts * emitted if self._wide else guesses)
            if emitted:
                self.tokens[row] += [next(sampled) for _ in range(new)]
        return result

    def prefill(self, row: int, chunk: int | None = None) -> None:
        """Compute all known tokens of a row, `chunk` at a time."""
        wanted = len(self.tokens[row])
        while self.computed[row] < wanted:
            left = wanted - self.computed[row]
            self.run({row: left if chunk is None else min(chunk, left)})

    def generate(self, row: int, count: int, drafts: int = 0) -> list[int]:
        """Prefill if need be and decode until at least `count` new tokens are there."""
        prompt = len(self.tokens[row])
        self.prefill(row)
        while len(self.tokens[row]) < prompt + count:
            self.run({row: 1}, drafts)
        return self.tokens[row][prompt:]

    def all_logits(self, row: int) -> Tensor:
        """Logits of every token that this row computed, [N, V]."""
        return torch.cat(self.logits[row])

    def _extend(self, row: int, tokens: int) -> None:
        for group, pages in enumerate(self.pages[row]):
            missing = -(-tokens // self.plan.page_size) - len(pages)
            if missing > 0:
                new = [self._free[group].pop() for _ in range(missing)]
                self._updates.append(PageUpdate(group, [row], [len(pages)], [missing], new))
                pages += new


def random_ids(count: int, seed: int, vocab: int) -> list[int]:
    """Ordinary token ids, no specials."""
    ids: list[int] = np.random.default_rng(seed).integers(8, vocab - 16, count).tolist()
    return ids
