"""Batched greedy decoding with a cache, and how often the MTP modules guess what it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.builtin.layers import Block, attend
from tools.builtin.model import Model, dense_masks, rope_for


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and the features [P, H] of its `<im_patch>` tokens in order."""

    ids: list[int]
    features: Tensor | None = None


def place(model: Model, ids: Tensor, prompts: Sequence[Prompt], patch_id: int, dtype: torch.dtype) -> Tensor:
    """Return the embeddings of padded rows, image features in their places."""
    x = model.embed(ids, dtype)
    for index, prompt in enumerate(prompts):
        if prompt.features is not None:
            at = torch.nonzero(ids[index] == patch_id)[:, 0]
            x[index, at] = prompt.features.to(x)
    return x


def _padded(rows: Sequence[list[int]], device: torch.device) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [2] * (length - len(row)) for row in rows], device=device)


class Decoder:
    """A model with keys and values of a batch."""

    def __init__(self, model: Model, prompts: Sequence[Prompt], room: int, patch_id: int, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.device = model.lm_head.weight.device
        self.lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=self.device)
        ids = _padded([prompt.ids for prompt in prompts], self.device)
        batch, length = ids.shape
        shape = model.shape
        size = (batch, length + room, shape.kv_heads, shape.head_dim)
        self.keys = [torch.zeros(size, device=self.device, dtype=dtype) for _ in range(shape.layers)]
        self.values = [torch.zeros(size, device=self.device, dtype=dtype) for _ in range(shape.layers)]
        positions = torch.arange(length, device=self.device)[None]
        rope, nothing = rope_for(shape, positions), torch.zeros_like(positions)
        masks = dense_masks(shape, positions, nothing, nothing)
        x = place(model, ids, prompts, patch_id, dtype)
        for index, layer in enumerate(model.main_layers()):
            h = layer.input_layernorm(x)
            q, k, v = layer.self_attn.project(h, rope)
            self.keys[index][:, :length], self.values[index][:, :length] = k, v
            x = self._rest(layer, x, h, attend(q, k, v, masks[layer.self_attn.kind]))
        last = x[torch.arange(batch, device=self.device), self.lengths - 1]
        self.next = self._choose(last)

    @staticmethod
    def _rest(layer: Block, x: Tensor, h: Tensor, mixed: Tensor) -> Tensor:
        x = x + layer.self_attn.finish(h, mixed)
        return x + layer.feed_forward(x)[0]

    def _choose(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self.model.model.norm(x))
        return logits.float().argmax(-1)

    def step(self) -> None:
        """Feed the chosen tokens and choose the next ones."""
        shape = self.model.shape
        rows = torch.arange(len(self.lengths), device=self.device)
        position = self.lengths[:, None]
        rope = rope_for(shape, position)
        x = self.model.embed(self.next[:, None], self.dtype)
        ages = position - torch.arange(self.keys[0].shape[1], device=self.device)
        masks = {
            shape.kind(0): (ages >= 0)[:, None, None],
            shape.kind(1): ((ages >= 0) & (ages < shape.window))[:, None, None],
        }
        for index, layer in enumerate(self.model.main_layers()):
            h = layer.input_layernorm(x)
            q, k, v = layer.self_attn.project(h, rope)
            self.keys[index][rows, self.lengths], self.values[index][rows, self.lengths] = k[:, 0], v[:, 0]
            mixed = attend(q, self.keys[index], self.values[index], masks[layer.self_attn.kind])
            x = self._rest(layer, x, h, mixed)
        self.lengths = self.lengths + 1
        self.next = self._choose(x[:, 0])


@torch.no_grad()
def generate(
    model: Model, prompts: Sequence[Prompt], *, room: int, stops: Sequence[int], patch_id: int, dtype: torch.dtype
) -> list[list[int]]:
    """Continue every prompt greedily until a stop token (kept) or until `room` tokens are written."""
    decoder = Decoder(model, prompts, room, patch_id, dtype)
    stop_ids = torch.tensor(list(stops), device=decoder.device)
    written = [decoder.next]
    done = torch.isin(decoder.next, stop_ids)
    for count in range(1, room):
        if count % 8 == 0 and bool(done.all()):
            break
        decoder.step()
        written.append(decoder.next)
        done |= torch.isin(decoder.next, stop_ids)
    rows: list[list[int]] = torch.stack(written, 1).tolist()
    return [_until(row, set(stops)) for row in rows]


def _until(row: list[int], stops: set[int]) -> list[int]:
    for index, token in enumerate(row):
        if token in stops:
            return row[: index + 1]
    return row


@dataclass
class Acceptance:
    """Counts of right guesses. `right[i]`: module i alone; `chained[i]`: modules 0 to i all right."""

    rows: int
    right: list[int]
    chained: list[int]
    steps: int
    tokens: int

    def add(self, other: Acceptance) -> None:
        """Sum two counts."""
        self.rows += other.rows
        self.steps += other.steps
        self.tokens += other.tokens
        self.right = [a + b for a, b in zip(self.right, other.right, strict=True)]
        self.chained = [a + b for a, b in zip(self.chained, other.chained, strict=True)]


@torch.no_grad()
def acceptance(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[list[int]], *, patch_id: int, dtype: torch.dtype
) -> Acceptance:
    """Compare each module's guesses with greedy answers.

    A module that is fed accepted drafts is fed the true tokens, so a chain of drafts is right as
    far as every module up to there is right when fed the truth. `steps` walks each answer as
    speculative decoding does: accept, then go on behind the last accepted token.
    """
    shape = model.shape
    device = model.lm_head.weight.device
    ids = _padded([prompt.ids + answer for prompt, answer in zip(prompts, answers, strict=True)], device)
    positions = torch.arange(ids.shape[1], device=device)[None]
    nothing = torch.zeros_like(positions)
    masks = dense_masks(shape, positions, nothing, nothing)
    x = place(model, ids, prompts, patch_id, dtype)
    output = model(ids, x, rope_for(shape, positions), masks)
    guesses = [draft.float().argmax(-1).cpu() for draft in output.drafts]
    total = Acceptance(0, [0] * shape.modules, [0] * shape.modules, 0, 0)
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, end = len(prompt.ids), len(prompt.ids) + len(answer)
        row = ids[index].cpu()
        hits = [
            [bool(guess[index, p] == row[p + 2 + i]) for p in range(start - 1, end - 2 - i)]
            for i, guess in enumerate(guesses)
        ]
        total.add(_walk(hits, len(answer)))
    return total


def _walk(hits: list[list[bool]], tokens: int) -> Acceptance:
    whole = len(hits[-1])
    right = [sum(row[:whole]) for row in hits]
    chained = [sum(all(row[p] for row in hits[: i + 1]) for p in range(whole)) for i in range(len(hits))]
    at = steps = 0
    while at < tokens:
        steps += 1
        taken = 0
        while taken < len(hits) and at < len(hits[taken]) and hits[taken][at]:
            taken += 1
        at += taken + 1
    return Acceptance(whole, right, chained, steps, tokens)
