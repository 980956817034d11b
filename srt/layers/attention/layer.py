"""Self-attention of a decoder layer: project, normalise, rotate, attend, gate each head, project back."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from srt.configs.step3p7 import LayerConfig
from srt.layers.attention.contract import AttentionSpec
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.linear import column_linear, row_linear
from srt.layers.norm import Norm
from srt.layers.parameter import Parameter, Parameters, nested
from srt.layers.toolkit import Toolkit


class Attention:
    """q, k, v and the head gates come out of one product. With several ranks, heads are split over them.

    Raises: ValueError if heads do not divide by the number of ranks.
    """

    def __init__(
        self, config: LayerConfig, hidden_size: int, eps: float, rope: Tensor, kv_group: int, tools: Toolkit
    ) -> None:
        self._tools = tools
        group, dtype, head_dim = tools.group, tools.dtype, config.head_dim
        q_norm, k_norm = (Norm(tools.ops, head_dim, eps, dtype) for _ in range(2))
        self.spec = AttentionSpec(
            layer=config.index,
            group=kv_group,
            q_heads=group.share(config.q_heads),
            kv_heads=group.share(config.kv_heads),
            head_dim=head_dim,
            rotary_dim=config.rope.rotary_dim,
            window=config.window,
            scale=head_dim**-0.5,
            q_norm=q_norm.weight,
            k_norm=k_norm.weight,
            rope=rope,
            eps=eps,
        )
        outputs = {
            "q": config.q_heads * head_dim,
            "k": config.kv_heads * head_dim,
            "v": config.kv_heads * head_dim,
            "gates": config.q_heads,
        }
        self._inputs = column_linear(tools.linear, group, dtype, hidden_size, outputs)
        self._output = row_linear(tools.linear, group, dtype, config.q_heads * head_dim, hidden_size)
        self._qkv_size = (self.spec.q_heads + 2 * self.spec.kv_heads) * head_dim
        self._norms = {"q_norm": q_norm, "k_norm": k_norm}

    def __call__(self, x: Tensor, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        """[T, H], already normed -> [T, H]. Keys and values of the T tokens go into `kv`."""
        backend = self._tools.attention
        projected = self._inputs(x)
        q = backend.store(projected[:, : self._qkv_size], self.spec, kv, batch)
        heads = backend.attend(q, projected[:, self._qkv_size :], self.spec, kv, batch)
        return self._tools.group.all_reduce(self._output(heads))

    def parameters(self) -> Parameters:
        """`inputs.weight` (pieces q, k, v, gates), `output.weight`, `q_norm.weight`, `k_norm.weight`,
        `k_scale`, `v_scale`."""
        named = nested("inputs", self._inputs.parameters()) | nested("output", self._output.parameters())
        for name, norm in self._norms.items():
            named |= nested(name, norm.parameters())
        for name, scale in (("k_scale", self.spec.k_scale), ("v_scale", self.spec.v_scale)):
            named[name] = Parameter((), torch.float32, partial(_set, scale))
        return named


def _set(scale: Tensor, value: Tensor) -> None:
    scale.copy_(value)
