"""Ranges of activations, keys and values, measured by running token ids through the model, one layer at a time.

Memory holds one layer's weights and the residual stream of all tokens. What is measured: for each routed expert the
largest magnitude that enters its gate and up products, and its down product; for each layer that of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srt.configs.step3p7 import LayerConfig
from srt.convert.source import Checkpoint
from srt.distributed import TensorGroup
from srt.layers.attention.contract import AttentionSpec
from srt.layers.attention.reference import ReferenceAttention
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.embedding import Embedding
from srt.layers.linear import PlainLinear
from srt.layers.moe.contract import PackedExperts
from srt.layers.moe.reference import ReferenceExperts
from srt.layers.ops import TorchOps
from srt.layers.parameter import nested
from srt.layers.quant.registry import format_of
from srt.layers.rope import rope_table
from srt.layers.toolkit import Toolkit
from srt.models.step3p7_text import Block
from srt.weights.load import load

PAGE = 64


@dataclass(frozen=True)
class Ranges:
    """Largest magnitudes of one layer; experts that no token chose have the largest of those that were chosen."""

    gate_up: Tensor
    """[E]: what enters the gate and up products of each expert."""
    down: Tensor
    """[E]: what enters its down product."""
    keys: float
    values: float
    unchosen: int
    """Experts that no token chose."""


class _Experts(ReferenceExperts):
    """The reference, remembering what enters its products."""

    gate_up: Tensor
    down: Tensor

    def watch(self, experts: int) -> None:
        """Forget what was measured before."""
        self.gate_up, self.down = torch.zeros(experts), torch.zeros(experts)

    def expert(self, hidden: Tensor, experts: PackedExperts, number: int) -> Tensor:
        self.gate_up[number] = hidden.abs().amax().float()
        return super().expert(hidden, experts, number)

    def inner(self, hidden: Tensor, experts: PackedExperts, number: int) -> Tensor:
        inner = super().inner(hidden, experts, number)
        self.down[number] = inner.abs().amax().float()
        return inner


class _Attention(ReferenceAttention):
    """The reference, remembering the largest key and value."""

    keys = 0.0
    values = 0.0

    def store(self, qkv: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        q = super().store(qkv, spec, kv, batch)
        self.keys, self.values = float(kv.k.abs().max()), float(kv.v.abs().max())
        return q


def calibrate(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], device: torch.device, done: Callable[[int], None]
) -> dict[int, Ranges]:
    """Layer -> ranges over these sequences; `done` is called with each layer's number.

    Raises: StartupError if the checkpoint does not fit the model.
    """
    config = checkpoint.config
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    with torch.inference_mode(), device:
        batch = _batch(sequences)
        embedding = Embedding(config.text.vocab_size, config.text.hidden_size, dtype)
        source = checkpoint.layer("embedding.")
        load(nested("embedding", embedding.parameters()), checkpoint.book, source, lambda done, total: None)
        x, residual = embedding(batch.input_ids), None
        del embedding
        ranges = {}
        for layer in config.text.layers:
            x, residual, ranges[layer.index] = _run_layer(checkpoint, layer, x, residual, batch, dtype)
            done(layer.index)
    return ranges


def _run_layer(
    checkpoint: Checkpoint,
    layer: LayerConfig,
    x: Tensor,
    residual: Tensor | None,
    batch: ForwardBatch,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Ranges]:
    """One layer over all tokens; its weights are gone afterwards."""
    text = checkpoint.config.text
    attention = _Attention()
    experts = _Experts(format_of(checkpoint.formats.get(layer.index, "plain"), dtype))
    count = text.moe.experts if text.moe is not None else 0
    experts.watch(count)
    longest = int(batch.kv_lens.max())
    tools = Toolkit(
        ops=TorchOps(), linear=PlainLinear(), attention=attention, experts={layer.index: experts},
        group=TensorGroup(), dtype=dtype, positions=longest,
    )  # fmt: skip
    block = Block(layer, text, rope_table(layer.rope, longest), 0, tools)
    prefix = f"layers.{layer.index}"
    source = checkpoint.layer(prefix + ".")
    load(nested(prefix, block.parameters()), checkpoint.book, source, lambda done, total: None)
    checkpoint.close()
    pages = int(batch.page_tables[0].max()) + 1
    shape = (pages, PAGE, layer.kv_heads, layer.head_dim)
    kv = KVLayer(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
    x, residual = block(x, residual, kv, batch)
    unchosen = int((experts.gate_up == 0).sum()) if layer.routed else 0
    return x, residual, Ranges(
        gate_up=_filled(experts.gate_up), down=_filled(experts.down), keys=attention.keys, values=attention.values,
        unchosen=unchosen,
    )  # fmt: skip


def _filled(largest: Tensor) -> Tensor:
    """Measured magnitudes, on the host; the largest of all where nothing was measured."""
    return torch.where(largest > 0, largest, largest.max() if len(largest) else 0.0).cpu()


def _batch(sequences: Sequence[Sequence[int]]) -> ForwardBatch:
    """All sequences whole in one step of one KV group, each on pages of its own."""
    counts = [len(sequence) for sequence in sequences]
    starts = [sum(counts[:row]) for row in range(len(counts) + 1)]
    pages = [-(-count // PAGE) for count in counts]
    table = torch.zeros(len(counts), max(pages), dtype=torch.int32)
    first = 1
    for row, many in enumerate(pages):
        table[row, :many] = torch.arange(first, first + many, dtype=torch.int32)
        first += many
    positions = torch.cat([torch.arange(count) for count in counts])
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    slots = table[rows, positions // PAGE].long() * PAGE + positions % PAGE
    return ForwardBatch(
        input_ids=torch.tensor([token for sequence in sequences for token in sequence]),
        positions=positions,
        query_starts=torch.tensor(starts, dtype=torch.int32),
        query_starts_list=starts,
        kv_lens=torch.tensor(counts, dtype=torch.int32),
        kv_lens_list=counts,
        page_tables=(table,),
        slots=(slots,),
        logit_tokens=torch.tensor([start - 1 for start in starts[1:]]),
        page_size=PAGE,
    )
