"""The draft heads of Step-3.5-Flash and Step-3.7-Flash: modules that guess tokens beyond the next one.

Module i at position p takes the embedding of token p + 1 + i and a hidden state of position p: the main model's before
its final norm for module 0, else what module i - 1 put out, before that one's norm. It guesses token p + 2 + i, and has
keys and values, a norm and an output matrix of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srt.configs.step3p7 import LayerConfig, RopeConfig, TextConfig
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.embedding import Embedding, Head
from srt.layers.linear import Linear
from srt.layers.norm import Norm
from srt.layers.parameter import Parameters, Piece, nested
from srt.layers.rope import rope_table
from srt.layers.toolkit import Toolkit
from srt.models.step3p7_text import Block


class MtpModule:
    """One module. The product that joins embedding and hidden state is whole on every rank, the rest is split."""

    def __init__(self, layer: LayerConfig, config: TextConfig, rope: Tensor, kv_group: int, tools: Toolkit) -> None:
        hidden, eps = config.hidden_size, config.norm_eps
        self._norms = {
            name: Norm(tools.ops, hidden, eps, tools.dtype) for name in ("token_norm", "hidden_norm", "norm")
        }
        shape = (hidden, 2 * hidden)
        self._join = Linear(tools.linear, shape, tools.dtype, {"": Piece(shape)})
        self._block = Block(layer, config, rope, kv_group, tools)
        self._head = Head(tools.linear, tools.group, tools.dtype, config.vocab_size, hidden)

    def __call__(self, tokens: Tensor, hidden: Tensor, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        """Embeddings and hidden states [T, H] -> [T, H], before the module's norm."""
        joined = torch.cat((self._norms["token_norm"](tokens), self._norms["hidden_norm"](hidden)), dim=-1)
        x, residual = self._block(self._join(joined), None, kv, batch)
        return x + residual

    def logits(self, hidden: Tensor) -> Tensor:
        """[L, H] as the module put it out -> [L, V], on every rank."""
        return self._head(self._norms["norm"](hidden))

    def parameters(self) -> Parameters:
        """`token_norm.*`, `hidden_norm.*`, `norm.*`, `join.*`, `head.*`, and those of a block."""
        named = nested("join", self._join.parameters()) | nested("head", self._head.parameters())
        for name, norm in self._norms.items():
            named |= nested(name, norm.parameters())
        return named | self._block.parameters()


class Step3p7Mtp:
    """The first `modules` draft heads beside a main model whose embedding they share.

    Raises: ValueError if heads or widths do not divide by the number of ranks.
    """

    def __init__(self, config: TextConfig, modules: int, embedding: Embedding, tools: Toolkit) -> None:
        self._attention, self._embedding = tools.attention, embedding
        layers = config.mtp_layers[:modules]
        self._first = config.main_layers
        ropes: dict[RopeConfig, Tensor] = {layer.rope: rope_table(layer.rope, tools.positions) for layer in layers}
        group = len(config.kv_groups())
        self._modules = [MtpModule(layer, config, ropes[layer.rope], group, tools) for layer in layers]

    @property
    def modules(self) -> int:
        """How many tokens beyond the next one can be guessed."""
        return len(self._modules)

    def begin(self, batch: ForwardBatch) -> None:
        """Prepare for the positions that all modules are run on."""
        self._attention.begin(batch)

    def forward(self, module: int, token_ids: Tensor, hidden: Tensor, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        """Run one module on T positions; `token_ids` [T] are those of p + 1 + module. Returns [T, H]."""
        return self._modules[module](self._embedding(token_ids), hidden, kv, batch)

    def logits(self, module: int, hidden: Tensor) -> Tensor:
        """Logits of token p + 2 + module: [L, H] -> [L, V], on every rank."""
        return self._modules[module].logits(hidden)

    def parameters(self) -> Parameters:
        """`draft.{layer}.*`, with the layer numbers of the checkpoint."""
        named: Parameters = {}
        for index, module in enumerate(self._modules, self._first):
            named |= nested(f"draft.{index}", module.parameters())
        return named
