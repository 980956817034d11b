"""What weights a model has, as a list of kinds: from its configuration, before any tensor is looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from srt.configs.plan import Activations, Moment, WeightKind
from srt.configs.step3p7 import LayerConfig, TextConfig, VisionConfig

EMBEDDING, ATTENTION, NETWORKS, EXPERTS, ROUTERS, NORMS, HEAD, MTP, VISION = (
    "embedding", "attention", "dense networks", "routed experts", "routers", "norms", "output head", "mtp", "vision",
)  # fmt: skip
"""Parts of a model, as the memory table names them."""


def weight_kinds(text: TextConfig, vision: VisionConfig | None, formats: Mapping[int, str]) -> tuple[WeightKind, ...]:
    """Every weight of a checkpoint; `formats` says how the routed experts of each layer are stored.

    The MTP modules are one part, of which a server may run a share.
    """
    kinds: Counter[WeightKind] = Counter()
    kinds[WeightKind(EMBEDDING, text.vocab_size, text.hidden_size, split="whole", packed=False)] += 1
    kinds[WeightKind(HEAD, text.vocab_size, text.hidden_size)] += 1
    kinds[_vector(NORMS, text.hidden_size)] += 1
    for layer in text.layers:
        kinds.update(_block(text, layer, formats.get(layer.index)))
    for layer in text.mtp_layers:
        kinds.update(_part(kind, MTP) for kind in _mtp_module(text, layer))
    if vision is not None:
        size = tower_values(vision, text.hidden_size)
        kinds[WeightKind(VISION, size, 1, split="whole", packed=False)] += 1
    return tuple(_times(kind, count) for kind, count in kinds.items())


def activations(text: TextConfig, vision: VisionConfig | None, formats: Mapping[int, str]) -> Activations:
    """What a step needs beside weights and KV, per token and per wanted row of logits; and the rotary tables."""
    moments = [_attending(layer, 5 * text.hidden_size) for layer in text.layers]
    moments += [_attending(layer, 8 * text.hidden_size, drafting=True) for layer in text.mtp_layers]
    moments.append(Moment(5 * text.hidden_size, 3 * text.intermediate_size))
    if text.moe is not None and formats:
        moe, coded = text.moe, "fp8" in formats.values()
        codes = 1 + 4 / 128 if coded else 0.0  # what enters the second product, and its scales
        moments.append(
            Moment(5 * text.hidden_size + moe.chosen * text.hidden_size, width=moe.chosen * moe.width, codes=codes)
        )
    return Activations(
        moments=tuple(dict.fromkeys(moments)),
        hidden_values=text.hidden_size,
        # The tower's network: its wider state, the activation, both multiplied; the residual and its norm; pixels.
        patch_values=0 if vision is None else 3 * vision.mlp_width + 2 * vision.width + 3 * vision.patch_size**2,
        patch_pixels=0 if vision is None else vision.patch_size**2,
        logit_values=text.vocab_size,
        layers=len(text.layers),
        rotary_values=sum({layer.rope: layer.rope.rotary_dim for layer in text.layers}.values()),
        draft_rotary_values=sum({layer.rope: layer.rope.rotary_dim for layer in text.mtp_layers}.values()),
    )


def _attending(layer: LayerConfig, whole: int, *, drafting: bool = False) -> Moment:
    """A layer attends: what was projected, the queries, and what comes out."""
    projected = (layer.q_heads + 2 * layer.kv_heads) * layer.head_dim + layer.q_heads
    return Moment(whole, projected + 2 * layer.q_heads * layer.head_dim, drafting=drafting)


def tower_values(vision: VisionConfig, hidden_size: int) -> int:
    """Numbers in the image tower with its projector."""
    width, mlp = vision.width, vision.mlp_width
    block = 4 * width * width + 2 * width * mlp  # attention, network
    block += 4 * width + (mlp + width) + 6 * width  # their biases; two norms and two scales
    around = 3 * vision.patch_size**2 * width + (vision.image_size // vision.patch_size) ** 2 * width + 2 * width
    convolutions = (2 * width * width + 8 * width * width) * 9 + 6 * width
    return vision.layers * block + around + convolutions + hidden_size * 4 * width


def _block(text: TextConfig, layer: LayerConfig, experts: str | None) -> Iterator[WeightKind]:
    """One decoder layer; `experts` is the format of its routed experts, None without any."""
    hidden, heads = text.hidden_size, layer.q_heads * layer.head_dim
    inputs = heads + 2 * layer.kv_heads * layer.head_dim + layer.q_heads
    yield WeightKind(ATTENTION, inputs, hidden)
    yield WeightKind(ATTENTION, hidden, heads, split="columns")
    for size in (hidden, hidden, layer.head_dim, layer.head_dim):
        yield _vector(NORMS, size)
    width = text.intermediate_size
    if experts is not None and text.moe is not None:
        moe, width = text.moe, text.moe.shared_width
        yield WeightKind(EXPERTS, 2 * moe.width, hidden, format=experts, stack=moe.experts, halves=2)
        yield WeightKind(EXPERTS, hidden, moe.width, format=experts, stack=moe.experts, split="columns")
        yield WeightKind(ROUTERS, moe.experts, hidden, format="float32", split="whole")
        yield WeightKind(ROUTERS, moe.experts, 1, format="float32", split="whole", packed=False)
    yield WeightKind(NETWORKS, 2 * width, hidden)
    yield WeightKind(NETWORKS, hidden, width, split="columns")


def _mtp_module(text: TextConfig, layer: LayerConfig) -> Iterator[WeightKind]:
    """A draft module: a dense decoder layer, what joins its inputs, and an output head of its own."""
    hidden = text.hidden_size
    yield from _block(text, layer, None)
    yield from (_vector(NORMS, hidden) for _ in range(3))
    yield WeightKind(NETWORKS, hidden, 2 * hidden, split="whole")
    yield WeightKind(HEAD, text.vocab_size, hidden)


def _vector(part: str, size: int) -> WeightKind:
    return WeightKind(part, size, 1, split="whole", packed=False)


def _part(kind: WeightKind, part: str) -> WeightKind:
    return WeightKind(part, kind.rows, kind.columns, split=kind.split, packed=kind.packed)


def _times(kind: WeightKind, count: int) -> WeightKind:
    return WeightKind(
        kind.part, kind.rows, kind.columns, count, kind.format, kind.stack, kind.halves, kind.split, kind.packed
    )
