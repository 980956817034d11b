"""The router: scores of all experts in float32, whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from srt.configs.step3p7 import MoeConfig
from srt.layers.ops import Choice, Ops
from srt.layers.parameter import Parameter, Parameters


class Router:
    """Chooses by biased score and weighs by the unbiased one. Every rank routes alike."""

    def __init__(self, config: MoeConfig, hidden_size: int, ops: Ops) -> None:
        self._config, self._ops = config, ops
        self._weight = torch.empty(config.experts, hidden_size, dtype=torch.float32)
        self._bias = torch.empty(config.experts, dtype=torch.float32)

    def __call__(self, x: Tensor) -> Choice:
        """[T, H] -> the K experts of each token."""
        logits = functional.linear(x.float(), self._weight)
        return self._ops.choose_experts(logits, self._bias, top_k=self._config.chosen, factor=self._config.factor)

    def parameters(self) -> Parameters:
        """`weight` [E, H] and `bias` [E]."""
        return {
            "weight": Parameter(tuple(self._weight.shape), torch.float32, self._take_weight),
            "bias": Parameter(tuple(self._bias.shape), torch.float32, self._take_bias),
        }

    def _take_weight(self, weight: Tensor) -> None:
        self._weight.copy_(weight)

    def _take_bias(self, bias: Tensor) -> None:
        self._bias.copy_(bias)
