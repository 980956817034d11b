"""What the worker asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.embedding import Embedding
from srt.layers.parameter import Parameters


class LanguageModel(Protocol):
    """Tokens of a step to logits. T tokens, L of them with wanted logits, H hidden size, V vocabulary."""

    embedding: Embedding
    """Token ids to vectors; draft modules share it."""

    def forward(self, batch: ForwardBatch, kv: Sequence[KVLayer]) -> Tensor:
        """The residual stream after the last layer, before the final norm: [T, H].

        Keys and values of the step's tokens are written to `kv`, which has one entry a layer.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of rows of the residual stream: [L, H] -> [L, V], on every rank."""
        ...

    def parameters(self) -> Parameters:
        """Everything that a checkpoint must fill, by name."""
        ...


class ImageEncoder(Protocol):
    """Square views of images to features that stand where their placeholder tokens are."""

    def encode(self, views: Tensor) -> Tensor:
        """N views of one size: [N, S, S, 3] uint8, on any device -> [N, F, H] in the model's dtype, on its device.

        A view's features depend on its pixels only, not on what else is in the batch.
        """
        ...

    def parameters(self) -> Parameters:
        """Everything that a checkpoint must fill, by name."""
        ...


class DraftModel(Protocol):
    """Modules that guess tokens beyond the next one, each on what the one before put out.

    Module i at position p knows token p + 1 + i and guesses token p + 2 + i.
    """

    @property
    def modules(self) -> int:
        """How many tokens beyond the next one can be guessed."""
        ...

    def begin(self, batch: ForwardBatch) -> None:
        """Prepare for the positions that all modules are run on; called once, before any of them."""
        ...

    def forward(self, module: int, token_ids: Tensor, hidden: Tensor, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        """Run one module on T positions and write its keys and values: [T] and [T, H] -> [T, H].

        `token_ids` are those of p + 1 + module. `hidden` is the main model's residual stream, then what the module
        before returned. `kv` is the memory of this module.
        """
        ...

    def logits(self, module: int, hidden: Tensor) -> Tensor:
        """Logits of token p + 2 + module: [L, H] -> [L, V], on every rank."""
        ...

    def parameters(self) -> Parameters:
        """Everything that a checkpoint must fill, by name."""
        ...
