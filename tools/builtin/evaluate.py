"""Measures the model on problems it was not trained on: accuracy per family, acceptance of the drafts."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.pool
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer

from srt.builtin.tasks import FAMILIES, Example, evaluation_set, read_completion
from tools.builtin import text
from tools.builtin.decode import Acceptance, Prompt, acceptance, generate
from tools.builtin.export import load_model
from tools.builtin.model import Model
from tools.builtin.packing import Sight, encode, look

EVALUATED: Final = tuple(name for name, family in FAMILIES.items() if family.evaluated)
_ROOM: Final = {"count": 900, "greeting": 128, "tool_joined": 260}


@dataclass(frozen=True)
class Result:
    """What one family gave."""

    family: str
    count: int
    right: int
    drafts: Acceptance
    wrong: list[tuple[str, str]]

    def table(self) -> dict[str, Any]:
        """Return the figures."""
        rows = max(1, self.drafts.rows)
        return {
            "accuracy": self.right / max(1, self.count),
            "count": self.count,
            "draft_right": [value / rows for value in self.drafts.right],
            "draft_chained": [value / rows for value in self.drafts.chained],
            "tokens_per_step": self.drafts.tokens / max(1, self.drafts.steps),
            "answer_tokens": self.drafts.tokens / max(1, self.count),
        }


def _prepare(task: tuple[str, int, int, int]) -> list[tuple[Example, Sight]]:
    family, start, end, seed = task
    prepared = []
    for example in evaluation_set(family, end - start, seed, start):
        sight = look(example, []) if example.pictures else Sight()
        prepared.append((replace(example, pictures=()), sight))
    return prepared


def prepared_examples(
    family: str, count: int, seed: int, pool: multiprocessing.pool.Pool | None
) -> Iterator[tuple[Example, Sight]]:
    """Draw a family's evaluation set and cut its images, in other processes if there is a pool."""
    tasks = [(family, start, min(count, start + 10), seed) for start in range(0, count, 10)]
    for part in pool.imap(_prepare, tasks) if pool else map(_prepare, tasks):
        yield from part


class Evaluator:
    """A model with what is needed to question it."""

    def __init__(self, model: Model, tokenizer: Tokenizer, dtype: torch.dtype, batch_tokens: int = 0) -> None:
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.ids = text.token_ids(tokenizer)
        self.stops = [self.ids[text.EOS], self.ids[text.PAD], self.ids[text.TURN_END]]
        self.batch_tokens = batch_tokens or (400_000 if dtype == torch.bfloat16 else 20_000)

    @torch.no_grad()
    def prompt(self, example: Example, sight: Sight) -> Prompt:
        """Tokenise a prompt and compute the features of its images."""
        tokens = encode(self.tokenizer, self.ids, text.render_prompt(example), sight.layouts)
        if not sight.wholes:
            return Prompt(tokens)
        device = self.model.lm_head.weight.device
        whole = self.model.see(torch.from_numpy(np.stack(sight.wholes)).to(device), self.dtype)
        crops = None
        if sight.crops:
            crops = self.model.see(torch.from_numpy(np.stack(sight.crops)).to(device), self.dtype)
        pieces, at = [], 0
        for index, layout in enumerate(sight.layouts):
            if layout.crops and crops is not None:
                pieces.append(crops[at : at + layout.crops].flatten(0, 1))
                at += layout.crops
            pieces.append(whole[index])
        return Prompt(tokens, torch.cat(pieces))

    def family(self, name: str, items: Iterable[tuple[Example, Sight]]) -> Result:
        """Question the model about every example of a family."""
        asked = [(example, self.prompt(example, sight)) for example, sight in items]
        asked.sort(key=lambda pair: len(pair[1].ids))
        room = _ROOM.get(name, 160)
        right, wrong = 0, list[tuple[str, str]]()
        drafts = Acceptance(0, [0] * self.model.shape.modules, [0] * self.model.shape.modules, 0, 0)
        for batch in self._batches(asked, room):
            prompts = [prompt for _, prompt in batch]
            patch_id = self.ids[text.PATCH]
            answers = generate(self.model, prompts, room=room, stops=self.stops, patch_id=patch_id, dtype=self.dtype)
            drafts.add(acceptance(self.model, prompts, answers, patch_id=patch_id, dtype=self.dtype))
            for (example, _), answer in zip(batch, answers, strict=True):
                body = answer[:-1] if answer[-1] in self.stops else answer
                completion = self.tokenizer.decode(body, skip_special_tokens=False)
                ended = answer[-1] == self.stops[-1]
                if ended and example.check(read_completion(completion, example.tools).message()):
                    right += 1
                else:
                    wrong.append((str(example.messages[-1]["content"])[-160:], completion[-240:]))
        return Result(name, len(asked), right, drafts, wrong)

    def _batches(self, asked: Sequence[tuple[Example, Prompt]], room: int) -> Iterator[list[tuple[Example, Prompt]]]:
        batch: list[tuple[Example, Prompt]] = []
        for pair in asked:
            if batch and (len(pair[1].ids) + room) * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(pair)
        if batch:
            yield batch


def evaluate(
    model: Model, *, count: int, dtype: torch.dtype, families: Sequence[str] = EVALUATED, seed: int = 0,
    processes: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of every family and of all drafts together; prints them on the way."""
    model.eval()
    evaluator = Evaluator(model, text.build_tokenizer(), dtype)
    whole: dict[str, Any] = {}
    every = Acceptance(0, [0] * model.shape.modules, [0] * model.shape.modules, 0, 0)
    pool = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else None
    for name in families:
        result = evaluator.family(name, prepared_examples(name, count, seed, pool))
        whole[name] = {**result.table(), "wrong": result.wrong[:6]}
        every.add(result.drafts)
        figures = result.table()
        print(
            f"eval {name:13s} {figures['accuracy']:.4f} of {result.count}, drafts "
            f"{' '.join(f'{v:.3f}' for v in figures['draft_chained'])}, {figures['tokens_per_step']:.2f} a step",
            flush=True,
        )
    if pool:
        pool.terminate()
    rows = max(1, every.rows)
    whole["drafts"] = {
        "right": [value / rows for value in every.right],
        "chained": [value / rows for value in every.chained],
        "tokens_per_step": every.tokens / max(1, every.steps),
        "mean_of_families": sum(whole[name]["tokens_per_step"] for name in families) / len(families),
    }
    print("eval drafts", json.dumps(whole["drafts"]), flush=True)
    return whole


def main() -> None:
    """Evaluate an exported checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("srt/builtin/tiny"))
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="*", default=list(EVALUATED))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1, help="processes that draw and cut images")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load_model(arguments.model).to(arguments.device)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    found = evaluate(
        model,
        count=arguments.count,
        dtype=dtype,
        families=arguments.families,
        seed=arguments.seed,
        processes=arguments.processes,
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
