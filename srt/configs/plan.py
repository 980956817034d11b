"""What start-up resolved, frozen: every process reads it, nothing writes to it.

`ServerConfig` (what the user asked) + `ModelFacts` (what the checkpoint says) + `DeviceFacts` (what the machine
is) --resolve--> `RuntimePlan`. The resolving function is in `srt/configs/resolve.py`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from srt.configs.server import ServerConfig


class KVGroupSpec(msgspec.Struct, frozen=True):
    """A set of layers that share window and KV geometry, hence one page pool and one page table.

    `window` counts the keys that a query sees, itself included; None is full attention.
    """

    name: str
    layers: tuple[int, ...]
    window: int | None
    kv_heads: int
    head_dim: int


class ImageConfig(msgspec.Struct, frozen=True):
    """An image becomes a global view and crops, all square. Sizes in pixels.

    `max_size`: longer sides are shrunk to it first. `mean` and `std` are those of red, green and blue in 0 to 1.
    """

    image_token_id: int
    view_size: int
    view_tokens: int
    crop_size: int
    crop_tokens: int
    max_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class WeightKind(msgspec.Struct, frozen=True):
    """Weights of one shape: `count` of them, each [rows, columns], or a stack of such matrices (experts).

    `format` is that of the numbers: plain (the model's dtype), float32, fp8, nvfp4 or nvfp4-a16. `split` says which
    dimension the ranks share out; `halves` is 2 where the rows are those of two matrices (gate and up). What is
    `packed` is multiplied with, and laid out for it.
    """

    part: str
    rows: int
    columns: int
    count: int = 1
    format: str = "plain"
    stack: int = 1
    halves: int = 1
    split: Literal["rows", "columns", "whole"] = "rows"
    packed: bool = True


class Moment(msgspec.Struct, frozen=True):
    """A moment of a step at which much is in use beside weights and KV: numbers a token. `whole` are on every rank,
    `split` shared out among the ranks, `width` among those that share an expert, each with `codes` bytes beside."""

    whole: int
    split: int = 0
    width: int = 0
    codes: float = 0.0
    drafting: bool = False
    """It comes with draft modules only."""


class Activations(msgspec.Struct, frozen=True):
    """What a step needs beside weights and KV, in numbers: for each token, for each row of logits; and of the rotary
    tables for each position, those of the draft modules apart."""

    moments: tuple[Moment, ...] = ()
    hidden_values: int = 0
    patch_values: int = 0
    """Of the image tower, for each of its patches."""
    patch_pixels: int = 0
    logit_values: int = 0
    layers: int = 0
    rotary_values: int = 0
    draft_rotary_values: int = 0


class ModelFacts(msgspec.Struct, frozen=True):
    """What the processes without torch need to know of a checkpoint."""

    path: str
    architecture: str
    model_type: str
    vocab_size: int
    context_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    groups: tuple[KVGroupSpec, ...]
    weight_bytes: dict[str, int]
    """Bytes on disk per part: text, mtp, vision; all 0 where no shard was looked at."""
    weights: tuple[WeightKind, ...] = ()
    """Every weight, by kind."""
    activations: Activations = Activations()
    has_vision: bool = False
    images: ImageConfig | None = None
    mtp_modules: int = 0
    draft_group: KVGroupSpec | None = None
    """The MTP modules' layers."""
    experts: str = "plain"
    """Format of the routed experts: plain, fp8, nvfp4 or nvfp4-a16; with a comma where layers differ."""
    producer: str = ""
    """Who quantised it: fp8 (the published release), modelopt, compressed-tensors; empty if nobody did."""
    kv_scales: bool = False
    """The checkpoint has scales for keys and values in FP8."""
    dtype: str = "bfloat16"
    """What the checkpoint says that it is stored in; `--dtype auto` means this one."""


class DeviceFacts(msgspec.Struct, frozen=True):
    """What the machine offers."""

    device: str
    name: str
    memory_bytes: int
    """Memory that this server may fill: what is free now, within the limit of its control group; of one GPU, the
    fullest of those that ranks have."""
    cores: int
    """Cores that this server may use at the same time."""
    cuda_devices: int = 0
    """NVIDIA devices that are visible, or there if none is used."""
    unused_because: str = ""
    """Why they are not, where nobody asked for the CPU."""

    @property
    def kind(self) -> str:
        """As a person says it."""
        return "CPU" if self.device == "cpu" else "GPU"


class GroupPlan(msgspec.Struct, frozen=True):
    """One KV group with its pool. Page 0 of every pool is the null page: never given out, never read unmasked."""

    name: str
    layers: tuple[int, ...]
    window: int | None
    kv_heads: int
    """KV heads over all ranks."""
    head_dim: int
    pages: int
    """Pages that can be given out; the pool has one more, the null page."""
    page_bytes: int
    """Bytes of K and V of one page over all layers of the group, on one rank."""


class Choice(msgspec.Struct, frozen=True):
    """One line of the start-up table: what was resolved, to what, and why."""

    name: str
    value: str
    reason: str


class DraftTraits(msgspec.Struct, frozen=True):
    """How tokens are guessed ahead: all that scheduler, pages, cache and metrics know of a drafter.

    `drafts`: the most tokens that it guesses for a row and step; 0 without a drafter. `modules`: draft modules of the
    model that it runs; they have a KV group of their own, the last one. `look_ahead`: how many tokens behind a
    position its draft KV depends on, so that it is final, and its pages may be shared, when so many more are known.
    """

    algorithm: Literal["off", "mtp", "ngram"] = "off"
    drafts: int = 0
    modules: int = 0
    look_ahead: int = 0
    weights_path: str = ""
    """Checkpoint that the modules are loaded from."""


class RuntimePlan(msgspec.Struct, frozen=True):
    """Everything resolved. Sizes in tokens unless the name says otherwise."""

    server: ServerConfig
    model: ModelFacts
    device: DeviceFacts
    dtype: str
    kv_dtype: str
    page_size: int
    context_length: int
    max_total_tokens: int
    groups: tuple[GroupPlan, ...]
    max_running_requests: int
    max_queued_requests: int
    chunked_prefill_size: int
    """Largest number of tokens that one request computes in one step."""
    max_step_tokens: int
    """Largest number of tokens of one step over all requests."""
    steps_in_flight: int
    """2 with overlap, else 1."""
    worker_threads: int
    random_seed: int
    image_processes: int = 0
    """Processes that decode images, beside the tokenizer; 0 if the model takes none."""
    memory: dict[str, int] = {}
    """Planned bytes of each part over all ranks: weights, position tables, KV of each group, image features."""
    drafting: DraftTraits = DraftTraits()
    reasoning_format: str = ""
    """Name in `srt.formats.description.FORMATS` of how reasoning is written; empty: it is not looked for."""
    call_format: str = ""
    """The same for tool calls."""
    table: tuple[Choice, ...] = ()
