"""The whole model: text layers, MTP modules with their own heads, vision tower. Names are the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.builtin.layers import Block, Linear, Masks, Norm, Rope, rope_tables
from tools.builtin.shape import Shape
from tools.builtin.vision import Tower


class SharedHead(nn.Module):
    """A module's own norm and output matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = Norm(shape.hidden, shape.epsilon)
        self.output = Linear(shape.hidden, shape.vocabulary, scale=0.1)


class HeadHolder(nn.Module):
    """Keeps the head under `transformer.`, as the checkpoint names it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shared_head = SharedHead(shape)


class Module(Block):
    """One MTP module: a sliding dense layer on the joined embedding and hidden state."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        self.enorm = Norm(shape.hidden, shape.epsilon)
        self.hnorm = Norm(shape.hidden, shape.epsilon)
        self.eh_proj = Linear(2 * shape.hidden, shape.hidden)
        self.transformer = HeadHolder(shape)

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Return the layer's input: embedding first, then the hidden state, both normed."""
        out: Tensor = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        return out

    def logits(self, x: Tensor) -> Tensor:
        """Return the module's own logits."""
        head = self.transformer.shared_head
        out: Tensor = head.output(head.norm(x))
        return out


class Body(nn.Module):
    """Embedding, layers (main and MTP) and the final norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        main = [Block(shape, layer) for layer in range(shape.layers)]
        modules = [Module(shape, layer) for layer in range(shape.layers, shape.layers + shape.modules)]
        self.layers = nn.ModuleList([*main, *modules])
        self.norm = Norm(shape.hidden, shape.epsilon)


@dataclass(frozen=True)
class Output:
    """Logits of the main head and of each module [B, L, V], and the experts' shares by layer."""

    logits: Tensor
    drafts: tuple[Tensor, ...]
    shares: dict[int, Tensor]


class Model(nn.Module):
    """The trainable model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        self.lm_head = Linear(shape.hidden, shape.vocabulary, scale=0.1)
        self.vision_model = Tower(shape.vision)
        self.vit_large_projector = Linear(4 * shape.vision.width, shape.hidden, scale=0.5)

    def main_layers(self) -> Iterator[Block]:
        """Yield the main layers in order."""
        for layer in self.model.layers[: self.shape.layers]:
            assert isinstance(layer, Block)
            yield layer

    def modules_in_chain(self) -> Iterator[Module]:
        """Yield the MTP modules in order."""
        for layer in self.model.layers[self.shape.layers :]:
            assert isinstance(layer, Module)
            yield layer

    def see(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return projected features [N, tokens, H] of pictures [N, S, S, 3] of one size."""
        out: Tensor = self.vit_large_projector(self.vision_model(pixels, dtype))
        return out

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return token embeddings."""
        return functional.embedding(ids, self.model.embed_tokens.weight).to(dtype)

    def forward(self, ids: Tensor, x: Tensor, rope: Rope, masks: Masks) -> Output:
        """Run every layer and module over whole rows; `x` holds the embeddings with images in place.

        Row p of module i reads the token at p + 1 + i. The last rows read past the end, where
        nothing is asked of them.
        """
        shares = {}
        for layer in self.main_layers():
            x, share = layer(x, rope, masks)
            if share is not None:
                shares[layer.layer] = share
        logits = self.lm_head(self.model.norm(x))
        drafts = []
        embedded = self.embed(ids, x.dtype)
        for module in self.modules_in_chain():
            embedded = torch.roll(embedded, -1, dims=1)
            x, _ = module(module.join(embedded, x), rope, masks)
            drafts.append(module.logits(x))
        return Output(logits, tuple(drafts), shares)


def dense_masks(shape: Shape, positions: Tensor, documents: Tensor, branches: Tensor) -> Masks:
    """Return boolean masks [B, 1, L, L] per layer type for packed rows.

    A token sees itself and what came before it in its document: the shared prefix (branch 0)
    and its own branch.
    """
    length = positions.shape[1]
    index = torch.arange(length, device=positions.device)
    seen = (documents[:, :, None] == documents[:, None, :]) & (index[:, None] >= index)
    seen &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    near = positions[:, :, None] - positions[:, None, :] < shape.window
    return {shape.kind(0): seen[:, None], shape.kind(1): (seen & near)[:, None]}


def rope_for(shape: Shape, positions: Tensor) -> Rope:
    """Return the rope tables of a batch."""
    return rope_tables(shape, positions)
