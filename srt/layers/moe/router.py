"""The router: scores of all experts in float32, whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from srt.configs.step3p7 import MoeConfig
from srt.layers.ops import Choice, Ops
from srt.layers.parameter import Parameter, Parameters


class Router:
    """Chooses by biased score and weighs by the unbiased one. Every rank routes alike."""

    def __init__(self, config: MoeConfig, hidden_size: int, ops: Ops) -> None:
        self._config, self._ops = config, ops
        self._packed: Tensor
        self._bias: Tensor
        self._parameters = {
            "weight": Parameter((config.experts, hidden_size), torch.float32, self._take_weight),
            "bias": Parameter((config.experts,), torch.float32, self._take_bias),
        }

    def _take_weight(self, weight: Tensor) -> None:
        self._packed = self._ops.pack_router(weight)

    def _take_bias(self, bias: Tensor) -> None:
        self._bias = bias

    def __call__(self, x: Tensor) -> Choice:
        """[T, H] -> the K experts of each token."""
        return self._ops.route(x, self._packed, self._bias, top_k=self._config.chosen, factor=self._config.factor)

    def parameters(self) -> Parameters:
        """`weight` [E, H] and `bias` [E]."""
        return self._parameters
