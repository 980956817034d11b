"""The language model of Step-3.5-Flash and Step-3.7-Flash.

45 decoder layers, three sliding ones after each full one. They differ in query heads, rotation, window and clamps;
the first few have a dense network, the others routed experts. What a layer is like stands in its `LayerConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from srt.configs.step3p7 import LayerConfig, RopeConfig, TextConfig
from srt.layers.attention.layer import Attention
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.embedding import Embedding, Head
from srt.layers.mlp import Mlp
from srt.layers.moe.block import MoeBlock
from srt.layers.norm import Norm
from srt.layers.parameter import Parameters, nested
from srt.layers.rope import rope_table
from srt.layers.toolkit import Toolkit


class Block:
    """One decoder layer: x + attention(norm(x)), then x + network(norm(x))."""

    def __init__(self, layer: LayerConfig, config: TextConfig, rope: Tensor, kv_group: int, tools: Toolkit) -> None:
        hidden, eps = config.hidden_size, config.norm_eps
        self._group = tools.group
        self._attention_norm = Norm(tools.ops, hidden, eps, tools.dtype)
        self._attention = Attention(layer, hidden, eps, rope, kv_group, tools)
        self._network_norm = Norm(tools.ops, hidden, eps, tools.dtype)
        self._network: MoeBlock | Mlp
        if layer.routed and config.moe is not None:
            self._network = MoeBlock(config.moe, layer, hidden, tools)
        else:
            self._network = Mlp(hidden, config.intermediate_size, layer.shared_limit, tools)

    def __call__(self, x: Tensor, residual: Tensor | None, kv: KVLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """(x, residual) -> (x, residual), all [T, H]; the residual stream is their sum, `None` counts as zero."""
        if residual is None:
            residual, x = x, self._attention_norm(x)
        else:
            x, residual = self._attention_norm.add(x, residual)
        x = self._attention(x, kv, batch)
        x, residual = self._network_norm.add(x, residual)
        return self._group.all_reduce(self._network(x)), residual

    def parameters(self) -> Parameters:
        """`attention_norm.*`, `attention.*`, `network_norm.*`, `network.*`."""
        return (
            nested("attention_norm", self._attention_norm.parameters())
            | nested("attention", self._attention.parameters())
            | nested("network_norm", self._network_norm.parameters())
            | nested("network", self._network.parameters())
        )


class Step3p7Text:
    """Token ids to logits over paged KV memory.

    Raises: ValueError if heads or widths do not divide by the number of ranks.
    """

    def __init__(self, config: TextConfig, tools: Toolkit) -> None:
        self._attention = tools.attention
        self.embedding = Embedding(config.vocab_size, config.hidden_size, tools.dtype)
        ropes: dict[RopeConfig, Tensor] = {}
        for layer in config.layers:
            if layer.rope not in ropes:
                ropes[layer.rope] = rope_table(layer.rope, tools.positions)
        groups = {index: number for number, group in enumerate(config.kv_groups()) for index in group.layers}
        self.blocks = [Block(layer, config, ropes[layer.rope], groups[layer.index], tools) for layer in config.layers]
        self._norm = Norm(tools.ops, config.hidden_size, config.norm_eps, tools.dtype)
        self._head = Head(tools.linear, tools.group, tools.dtype, config.vocab_size, config.hidden_size)

    def forward(self, batch: ForwardBatch, kv: Sequence[KVLayer]) -> Tensor:
        """The residual stream after the last layer, before the final norm: [T, H]."""
        self._attention.begin(batch)
        x, residual = self._embedded(batch), None
        for block, memory in zip(self.blocks, kv, strict=True):
            x, residual = block(x, residual, memory, batch)
        return x if residual is None else x + residual

    def _embedded(self, batch: ForwardBatch) -> Tensor:
        """Embeddings of the tokens, and features of images in the places of theirs: [T, H]."""
        x = self.embedding(batch.input_ids)
        return x if batch.images is None else x.index_copy_(0, batch.images.tokens, batch.images.features)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of rows of the residual stream: [L, H] -> [L, V], on every rank."""
        return self._head(self._norm(hidden))

    def parameters(self) -> Parameters:
        """`embedding.*`, `layers.{i}.*`, `norm.*`, `head.*`."""
        named = nested("embedding", self.embedding.parameters())
        for index, block in enumerate(self.blocks):
            named |= nested(f"layers.{index}", block.parameters())
        return named | nested("norm", self._norm.parameters()) | nested("head", self._head.parameters())
