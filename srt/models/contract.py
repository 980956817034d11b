"""What the worker asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.parameter import Parameters


class LanguageModel(Protocol):
    """Tokens of a step to logits. T tokens, L of them with wanted logits, H hidden size, V vocabulary."""

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
