"""config.json of Step-3.5-Flash (`step3p5`, text) and Step-3.7-Flash (`step3p7`, text and images) as typed values.

Two spellings are read: the one of the published releases, where per-layer lists go on for the MTP layers, and the
one that transformers writes when it saves the model. Keys are read by default-or-fail; keys that would change the
arithmetic in a way that is not implemented must have their usual value.
"""

from __future__ import annotations

import re
from typing import Literal, TypeVar

import msgspec

from srt.configs.plan import KVGroupSpec
from srt.configs.quant import QuantConfig, read_quant
from srt.configs.section import Section
from srt.errors import StartupError

FULL, SLIDING = "full_attention", "sliding_attention"
V = TypeVar("V")
GROUPS: dict[str, str] = {FULL: "full", SLIDING: "sliding"}
"""Attention kind of a layer -> name of its KV group."""
DTYPES = ("bfloat16", "float16", "float32")


class Llama3Scaling(msgspec.Struct, frozen=True):
    """Stretch of low rotary frequencies; `original_positions` is the context length before stretching."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int


class RopeConfig(msgspec.Struct, frozen=True):
    """Rotation of the first `rotary_dim` dimensions of a head."""

    theta: float
    rotary_dim: int
    scaling: Llama3Scaling | None


class LayerConfig(msgspec.Struct, frozen=True):
    """One decoder layer. Limits are SwiGLU clamps, None is no clamp; `window` counts keys, the query's included."""

    index: int
    kind: str
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    rope: RopeConfig
    routed: bool
    limit: float | None
    """Clamp of the routed experts."""
    shared_limit: float | None
    """Clamp of the shared expert, and of a dense MLP."""


class MoeConfig(msgspec.Struct, frozen=True):
    """Routed experts of a layer and the shared expert beside them; widths in values."""

    experts: int
    chosen: int
    width: int
    shared_width: int
    factor: float
    """Multiplies the normalised weights of the chosen experts."""


class TextConfig(msgspec.Struct, frozen=True):
    """The language model. `mtp_layers` are the draft heads' blocks, numbered after the main layers."""

    hidden_size: int
    vocab_size: int
    intermediate_size: int
    norm_eps: float
    max_positions: int
    layers: tuple[LayerConfig, ...]
    mtp_layers: tuple[LayerConfig, ...]
    moe: MoeConfig | None

    @property
    def main_layers(self) -> int:
        """Number of layers without the MTP layers."""
        return len(self.layers)

    def draft_group(self) -> KVGroupSpec | None:
        """The MTP layers, which have a KV group of their own. Raises: StartupError if their geometries differ."""
        if not self.mtp_layers:
            return None
        geometries = {(layer.window, layer.kv_heads, layer.head_dim) for layer in self.mtp_layers}
        if len(geometries) > 1:
            raise StartupError(f"MTP layers differ in window, KV heads or head size: {sorted(geometries, key=str)}")
        (window, kv_heads, head_dim) = geometries.pop()
        return KVGroupSpec("draft", tuple(layer.index for layer in self.mtp_layers), window, kv_heads, head_dim)

    def kv_groups(self) -> tuple[KVGroupSpec, ...]:
        """Main layers by attention kind, full first. Raises: StartupError if one kind has two KV geometries."""
        groups = []
        for kind, name in GROUPS.items():
            members = [layer for layer in self.layers if layer.kind == kind]
            geometries = {(layer.window, layer.kv_heads, layer.head_dim) for layer in members}
            if len(geometries) > 1:
                raise StartupError(f"{kind} layers differ in window, KV heads or head size: {sorted(geometries)}")
            if members:
                (window, kv_heads, head_dim) = geometries.pop()
                indices = tuple(layer.index for layer in members)
                groups.append(KVGroupSpec(name, indices, window, kv_heads, head_dim))
        return tuple(groups)


class VisionConfig(msgspec.Struct, frozen=True):
    """The image tower. Sizes of images and patches in pixels."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    image_size: int
    patch_size: int
    norm_eps: float


class ImageTokens(msgspec.Struct, frozen=True):
    """How images appear in a prompt: the id that features replace, and how many features a view has."""

    image_token_id: int
    image_tokens: int
    crop_tokens: int


class Step3p7Config(msgspec.Struct, frozen=True):
    """A whole checkpoint; `vision` and `images` are None for a text-only one."""

    architecture: str
    model_type: str
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    text: TextConfig
    vision: VisionConfig | None
    images: ImageTokens | None
    quant: QuantConfig | None = None
    """None: every tensor is plain numbers."""


def read_step3p7(root: Section, hf_quant_config: Section | None = None) -> Step3p7Config:
    """Read config.json, and hf_quant_config.json where a producer has left one.

    Raises: StartupError that names the key, its value and the rule it breaks.
    """
    model_type = root.text("model_type")
    multimodal = model_type == "step3p7"
    text = root.section("text_config") if multimodal else root
    architectures = root.texts("architectures")
    if not architectures:
        raise StartupError(f"{root.where} lacks architectures")
    dtype = text.text("dtype", "torch_dtype", default=root.text("dtype", "torch_dtype", default="bfloat16"))
    if dtype not in DTYPES:
        raise StartupError(f"{text.where}.dtype is {dtype!r}, it must be one of {', '.join(DTYPES)}")
    eos = root.integers("eos_token_id") + text.integers("eos_token_id")
    bos = text.maybe_integer("bos_token_id", least=0)
    return Step3p7Config(
        architecture=architectures[0],
        model_type=model_type,
        dtype=dtype,
        bos_token_id=root.maybe_integer("bos_token_id", least=0) if bos is None else bos,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        text=_read_text(text),
        vision=_read_vision(root) if multimodal else None,
        images=_read_images(root) if multimodal else None,
        quant=read_quant(root, hf_quant_config),
    )


def part_of(name: str, main_layers: int) -> Literal["text", "mtp", "vision"]:
    """Which part of the model a tensor belongs to, by its name in any of the spellings."""
    if "vision_model." in name or "multi_modal_projector" in name or "vit_large_projector" in name:
        return "vision"
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return "mtp" if layer and int(layer[1]) >= main_layers else "text"


# --- text ------------------------------------------------------------------------------------------------

SERVED: dict[str, object] = {
    "att_impl_type": "GQA",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_router_activation": "sigmoid",
    "need_fp32_gate": True,
    "norm_expert_weight": True,
    "sink": False,
    "tie_word_embeddings": False,
    "use_head_wise_attn_gate": True,
    "use_moe_router_bias": True,
    "use_qk_norm": True,
    "use_rope_layers": [],
    "zero_centered": True,
}
"""Keys that choose between variants, with the one variant that is implemented."""


class _Layers:
    """Per-layer values of the main layers followed by the MTP layers, from lists of either length."""

    def __init__(self, text: Section) -> None:
        self.main = text.integer("num_hidden_layers")
        self.mtp = text.integer("num_nextn_predict_layers", default=0, least=0)
        self.where = text.where

    def spread(self, name: str, values: list[V], tail: V) -> list[V]:
        """`values` for every layer; `tail` for MTP layers that the list leaves out."""
        total = self.main + self.mtp
        if len(values) not in (self.main, total):
            raise StartupError(
                f"{self.where}.{name} has {len(values)} entries, it must have {self.main} or, with MTP, {total}"
            )
        return values + [tail] * (total - len(values))


def _read_text(text: Section) -> TextConfig:
    for name, served in SERVED.items():
        text.demand(name, served)
    counts = _Layers(text)
    kinds = _kinds(text, counts)
    ropes = _ropes(text, counts, kinds)
    routed = _routed(text, counts)
    limits = _limits(text, counts, "swiglu_limits")
    shared_limits = _limits(text, counts, "swiglu_limits_shared")
    heads = _Heads(text)
    window = text.integer("sliding_window") if SLIDING in kinds else 0
    layers = [
        LayerConfig(
            index=index,
            kind=kind,
            q_heads=heads.queries(index, kind),
            kv_heads=heads.keys(kind),
            head_dim=heads.head_dim,
            window=window if kind == SLIDING else None,
            rope=ropes[index],
            routed=routed[index],
            limit=limits[index],
            shared_limit=shared_limits[index],
        )
        for index, kind in enumerate(kinds)
    ]
    return TextConfig(
        hidden_size=text.integer("hidden_size"),
        vocab_size=text.integer("vocab_size"),
        intermediate_size=text.integer("intermediate_size"),
        norm_eps=text.number("rms_norm_eps"),
        max_positions=text.integer("max_position_embeddings", "max_seq_len"),
        layers=tuple(layers[: counts.main]),
        mtp_layers=tuple(layers[counts.main :]),
        moe=_moe(text) if any(routed) else None,
    )


def _kinds(text: Section, counts: _Layers) -> list[str]:
    """Attention kind of each layer."""
    listed = text.texts("layer_types")
    if listed is None:
        listed = [FULL] * counts.main
    listed += text.texts("mtp_layer_types") or []
    kinds = counts.spread("layer_types", listed, SLIDING)
    unknown = sorted(set(kinds) - GROUPS.keys())
    if unknown:
        raise text.wrong("layer_types", unknown[0], f"one of {', '.join(GROUPS)}")
    return kinds


def _routed(text: Section, counts: _Layers) -> list[bool]:
    """Which layers have routed experts."""
    total = counts.main + counts.mtp
    kinds = text.texts("mlp_layer_types")
    if kinds is not None:
        kinds += text.texts("mtp_mlp_layer_types") or []
        spread = counts.spread("mlp_layer_types", kinds, "dense")
        unknown = sorted(set(spread) - {"dense", "sparse"})
        if unknown:
            raise text.wrong("mlp_layer_types", unknown[0], "dense or sparse")
        return [kind == "sparse" for kind in spread]
    if not text.flag("use_moe", True):
        return [False] * total
    chosen = _moe_layers(text, counts.main)
    beyond = [index for index in chosen if not 0 <= index < total]
    if beyond:
        raise text.wrong("moe_layers_enum", beyond[0], f"a layer number below {total}")
    return [index in chosen for index in range(total)]


def _moe_layers(text: Section, main: int) -> set[int]:
    """`moe_layers_enum`: "3,4,5", a list, or absent: every `moe_every_n_layer`-th from `moe_layer_offset` on."""
    if "moe_layers_enum" not in text:
        offset, every = (
            text.integer("moe_layer_offset", default=0, least=0),
            text.integer("moe_every_n_layer", default=1),
        )
        return set(range(offset, main, every))
    return set(text.integers("moe_layers_enum"))


def _limits(text: Section, counts: _Layers, name: str) -> list[float | None]:
    """Clamps of each layer; 0 and null both mean none."""
    listed: list[float | None] = text.numbers_or_nulls(name) or [None] * counts.main
    return [limit or None for limit in counts.spread(name, listed, None)]


def _moe(text: Section) -> MoeConfig:
    experts = text.integer("moe_num_experts", "n_routed_experts")
    chosen = text.integer("moe_top_k", "num_experts_per_tok")
    if chosen > experts:
        raise text.wrong("moe_top_k", chosen, f"at most the number of experts, {experts}")
    return MoeConfig(
        experts=experts,
        chosen=chosen,
        width=text.integer("moe_intermediate_size"),
        shared_width=text.integer("share_expert_dim", "share_expert_dims"),
        factor=text.number("moe_router_scaling_factor", default=1.0),
    )


class _Heads:
    """Head counts, which differ between full and sliding layers."""

    def __init__(self, text: Section) -> None:
        self._full = text.integer("num_attention_heads")
        self._kv = text.integer("num_attention_groups", "num_key_value_heads")
        self.head_dim = text.integer("head_dim")
        self._other_kind, self._other_kv = SLIDING, self._kv
        self._overrides = text.maybe_section("per_layer_config")
        other = text.maybe_section("attention_other_setting")
        if other is None:
            self._other = text.integer("num_sliding_attention_heads", default=self._full)
            return
        self._other_kind = other.text("attention_type", default=SLIDING)
        self._other = other.integer("num_attention_heads")
        self._other_kv = other.integer("num_attention_groups", default=self._kv)
        for name in ("head_dim", "true_head_dim"):
            other.demand(name, self.head_dim)

    def queries(self, index: int, kind: str) -> int:
        """Query heads of a layer."""
        count = self._other if kind == self._other_kind else self._full
        override = self._overrides.maybe_section(str(index)) if self._overrides is not None else None
        return count if override is None else override.integer("num_attention_heads", default=count)

    def keys(self, kind: str) -> int:
        """Key and value heads of a layer."""
        return self._other_kv if kind == self._other_kind else self._kv


def _ropes(text: Section, counts: _Layers, kinds: list[str]) -> list[RopeConfig]:
    """Rotation of each layer."""
    head_dim = text.integer("head_dim")
    saved = text.maybe_section("rope_parameters")
    if saved is not None and (FULL in saved or SLIDING in saved):
        by_kind = {
            kind: RopeConfig(
                theta=saved.section(kind).number("rope_theta"),
                rotary_dim=int(head_dim * saved.section(kind).number("partial_rotary_factor", default=1.0)),
                scaling=_scaling(saved.section(kind)),
            )
            for kind in sorted(set(kinds[: counts.main]))
        }
        plain = RopeConfig(theta=10_000.0, rotary_dim=head_dim, scaling=None)
        return [by_kind.get(kind, plain) for kind in kinds]
    section = text if saved is None or "rope_theta" in text else saved
    thetas = _thetas(section, counts)
    factors = text.numbers("partial_rotary_factors") or [1.0] * counts.main
    shares = counts.spread("partial_rotary_factors", factors, 1.0)
    scaled_kinds = text.texts("yarn_only_types")
    if scaled_kinds is None:
        scaled_kinds = [FULL]
    source = text.maybe_section("rope_scaling") or saved
    scaling = None if source is None else _scaling(source)
    return [
        RopeConfig(theta, int(head_dim * share), scaling if kind in scaled_kinds else None)
        for kind, theta, share in zip(kinds, thetas, shares, strict=True)
    ]


def _thetas(section: Section, counts: _Layers) -> list[float]:
    """`rope_theta`: one for all layers, or a list; MTP layers that the list leaves out have 10,000."""
    thetas = section.numbers("rope_theta")
    if not thetas:
        raise StartupError(f"{section.where} lacks rope_theta")
    if len(thetas) == 1:
        return thetas * (counts.main + counts.mtp)
    return counts.spread("rope_theta", thetas, 10_000.0)


def _scaling(rope: Section) -> Llama3Scaling | None:
    kind = rope.text("rope_type", "type", default="default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise rope.wrong("rope_type", kind, "llama3 or default")
    return Llama3Scaling(
        factor=rope.number("factor"),
        low_frequency_factor=rope.number("low_freq_factor"),
        high_frequency_factor=rope.number("high_freq_factor"),
        original_positions=rope.integer("original_max_position_embeddings"),
    )


# --- images ----------------------------------------------------------------------------------------------


def _read_vision(root: Section) -> VisionConfig:
    vision = root.section("vision_config")
    for name, served in {
        "use_cls_token": False,
        "use_ln_pre": True,
        "use_ln_post": False,
        "use_abs_posemb": True,
        "use_rope2d": True,
        "pool_type": "none",
        "hidden_act": "quick_gelu",
    }.items():
        vision.demand(name, served)
    width = vision.integer("width", "hidden_size")
    return VisionConfig(
        width=width,
        layers=vision.integer("layers", "num_hidden_layers"),
        heads=vision.integer("heads", "num_attention_heads"),
        mlp_width=vision.maybe_integer("intermediate_size") or round(width * vision.number("mlp_ratio")),
        image_size=vision.integer("image_size"),
        patch_size=vision.integer("patch_size"),
        norm_eps=vision.number("layer_norm_eps", default=1e-5),
    )


def _read_images(root: Section) -> ImageTokens:
    root.demand("projector_bias", False)
    root.demand("understand_projector_stride", 2)
    return ImageTokens(
        image_token_id=root.integer("image_token_id", least=0),
        image_tokens=root.integer("image_token_len", default=169),
        crop_tokens=root.integer("patch_token_len", default=81),
    )
