"""What a server takes in memory beside KV, part by part: arithmetic on the model's list of weights and activations.

First weights, over all ranks; then, on a GPU, what the largest step, rows and recorded steps of one rank take.

Weights in float32 or bfloat16 take the width of the model's dtype whatever they are stored in; coded ones keep their
codes and scales. What every rank holds whole counts once a rank.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from srt.configs.geometry import MTP, VISION
from srt.configs.plan import ModelFacts, WeightKind
from srt.errors import StartupError

ITEM_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8_e4m3": 1}
PANEL_ROWS: Final = 32
"""The native CPU kernels keep matrices in panels of so many rows (srt/layers/cpu/csrc/gemm.h)."""
CODE_BITS: Final = {"fp8": 8, "nvfp4": 4, "nvfp4-a16": 4}
WIDTH_GRAIN: Final = {"fp8": 128, "nvfp4": 16, "nvfp4-a16": 16}
"""A rank's part of an expert's width is padded to a multiple of this."""
GPU_WIDTH_GRAIN: Final = WIDTH_GRAIN | {"nvfp4": 64, "nvfp4-a16": 64}
"""There kernels read words of 64 columns."""
FINE: Final = 8
"""Up to so many rows every number has a record; beyond, an eighth of the number may be filled up."""
PIXELS_PER_BATCH: Final = 16_384 * 14 * 14
"""What one run of the image tower sees: 6 global views of 728 pixels, or 12 crops. Its activations take memory."""
DRAW_BYTES: Final = 40 << 10
"""What drawing from a row of logits takes beside them."""
LIBRARY_BYTES: Final = 32 << 20
"""What cuBLAS works in."""
LIBRARY_TOKENS: Final = 8
"""Up to so many a step does without it."""
TOKEN_BYTES: Final = 192
"""Beside a token's numbers: its id, position, slots, and where it belongs."""
LAYER_KERNELS: Final = 15
OTHER_KERNELS: Final = 20
GUESS_KERNELS: Final = 46
"""Of one draft module behind a step; it is recorded twice, behind the largest logits and behind draws."""
KERNEL_BYTES: Final = 8430
"""What the driver keeps of a recorded kernel; measured on an H200, by slice8's 48 records and by full45's 96 with draft
modules."""
BLOCK_BYTES: Final = 20 << 20
"""Of such blocks torch's allocator hands out pieces."""
CONTEXT_BYTES: Final = 757 << 20
"""What the driver, the libraries and their kernels hold on one GPU; measured on an H200, slice8 in nvfp4."""
RANKS_BYTES: Final = 779 << 20
"""What NCCL and memory that ranks share hold beside it, where there are several; measured with two."""


class Spread(NamedTuple):
    """Over how many ranks weights are split, over how many groups of them experts are; bytes of a plain number; and
    whether matrices are padded to the CPU's panels."""

    ranks: int
    expert_groups: int
    item_bytes: int
    panels: bool


def weight_parts(model: ModelFacts, spread: Spread, modules: int, *, tower: bool) -> dict[str, int]:
    """Bytes of each part over all ranks: `modules` draft modules, and the image tower if it is loaded."""
    parts: dict[str, int] = {}
    for kind in model.weights:
        if kind.part == VISION and not tower:
            continue
        size = kind.count * rank_bytes(kind, spread) * spread.ranks
        if kind.part == MTP:
            size = size * modules // max(1, model.mtp_modules)
        if size:
            parts[kind.part] = parts.get(kind.part, 0) + size
    return parts


def rank_bytes(kind: WeightKind, spread: Spread) -> int:
    """Bytes of one weight of a kind on one rank, as large as on the one that has most."""
    rows, columns, stack = kind.rows, kind.columns, kind.stack
    shares = spread.ranks
    if stack > 1:
        shares, stack = spread.ranks // spread.expert_groups, stack // spread.expert_groups
    grain = WIDTH_GRAIN.get(kind.format, 1) if spread.panels else GPU_WIDTH_GRAIN.get(kind.format, 1)
    if kind.split == "rows":
        one = -(-rows // (kind.halves * shares))
        rows = kind.halves * (-(-one // grain) * grain)
    elif kind.split == "columns":
        columns = -(-columns // shares)
        columns = -(-columns // grain) * grain
    if spread.panels and kind.packed:
        rows = -(-rows // PANEL_ROWS) * PANEL_ROWS
    return stack * _stored(kind.format, rows, columns, spread.item_bytes)


def _stored(form: str, rows: int, columns: int, item_bytes: int) -> int:
    """Bytes of a matrix in a format, its scales included."""
    if form == "float32":
        return 4 * rows * columns
    if form not in CODE_BITS:
        return item_bytes * rows * columns
    size = rows * columns * CODE_BITS[form] // 8
    return size + (4 * -(-rows // 128) * -(-columns // 128) if form == "fp8" else rows * columns // 16)


def check_split(model: ModelFacts, ranks: int, expert_groups: int) -> None:
    """Raises: StartupError that names the sizes that work, if coded experts do not split over the ranks as asked."""
    for kind in model.weights:
        grain, parts = WIDTH_GRAIN.get(kind.format, 1), ranks // expert_groups
        if kind.stack == 1 or kind.split != "columns" or parts <= 1 or kind.columns % (parts * grain) == 0:
            continue
        legal = [size for size in range(1, kind.columns + 1) if size == 1 or kind.columns % (size * grain) == 0]
        raise StartupError(
            f"an expert width of {kind.columns} in {kind.format} does not split over {parts} ranks "
            f"(--tp-size {ranks} / --ep-size {expert_groups}) at multiples of {grain}; "
            f"it splits over {', '.join(map(str, legal))}"
        )


def position_bytes(model: ModelFacts, context: int, modules: int) -> int:
    """Bytes of the rotary tables of one rank: in float32, a row for each position of a request and one more."""
    values = model.activations.rotary_values + (model.activations.draft_rotary_values if modules else 0)
    return 4 * values * (context + 1)


class Work(NamedTuple):
    """Sizes of the largest step: tokens in it, rows with logits, guesses of each, draft modules that run."""

    tokens: int
    rows: int
    drafts: int
    modules: int

    @property
    def logits(self) -> int:
        """Wanted rows of logits."""
        return self.rows * (1 + self.drafts)


def step_bytes(model: ModelFacts, work: Work, spread: Spread) -> int:
    """What the largest step of one rank needs: activations of all its tokens, or, when these are gone, logits and what
    drawing from them takes."""
    sampling = work.tokens * model.activations.hidden_values * spread.item_bytes + _logit_bytes(model, work, spread)
    guessed = work.rows * model.activations.logit_values * spread.item_bytes * (work.modules > 1)
    busiest = max(_layer_bytes(model, work.tokens, work.modules, spread) + guessed, sampling + work.logits * DRAW_BYTES)
    return max(busiest + work.tokens * TOKEN_BYTES, _image_bytes(model, spread)) + LIBRARY_BYTES


def _image_bytes(model: ModelFacts, spread: Spread) -> int:
    """What the image tower takes, which runs before a step."""
    needs = model.activations
    if not model.has_vision or not needs.patch_pixels:
        return 0
    return PIXELS_PER_BATCH // needs.patch_pixels * needs.patch_values * spread.item_bytes


def _layer_bytes(model: ModelFacts, tokens: int, modules: int, spread: Spread) -> int:
    """Activations at the moment when most are in use."""
    busiest = 0.0
    for moment in model.activations.moments:
        if modules or not moment.drafting:
            width = moment.width * spread.expert_groups / spread.ranks
            values = moment.whole + moment.split / spread.ranks + width
            busiest = max(busiest, values * spread.item_bytes + width * moment.codes)
    return int(tokens * busiest)


def _logit_bytes(model: ModelFacts, work: Work, spread: Spread) -> int:
    """The wanted logits; several ranks each hold their share beside the whole."""
    return work.logits * model.activations.logit_values * spread.item_bytes * (2 if spread.ranks > 1 else 1)


def row_bytes(model: ModelFacts, work: Work, context: int, tables: int, item_bytes: int) -> int:
    """What the rows of requests hold on a GPU: tokens, `tables` entries of page tables, state; and hidden states for
    draft modules."""
    line = 3 * 8 + 4 * (context + 1 + work.drafts) + 4 * tables
    if work.modules:
        line += 3 * 8 + work.modules * model.activations.hidden_values * item_bytes
    return (work.rows + 1) * line


def record_sizes(most: int) -> list[int]:
    """Numbers of rows that have a recorded step: all small ones, then eight between a power of two and the next."""
    found, size, step = list(range(1, min(most, FINE) + 1)), FINE, 1
    while size < most:
        step = step * 2 if size >= 16 * step else step
        size += step
        found.append(min(size, most))
    return found


def graph_bytes(model: ModelFacts, work: Work, spread: Spread) -> int:
    """An estimate of what recorded steps hold on one GPU: the memory that the largest works in, which all share; what
    each leaves; and what the driver keeps of each of its kernels.

    Logits find room where activations were, unless they are larger than a block.
    """
    sizes, kinds = record_sizes(work.rows), sorted({0, work.drafts})
    logits = _logit_bytes(model, work, spread)
    pieces = -(-_layer_bytes(model, work.logits, work.modules, spread) // BLOCK_BYTES)
    # What is larger than half a block has memory of its own, so that the others do not fill theirs: one more.
    blocks = BLOCK_BYTES * max(1, pieces + (pieces > 1))
    blocks += logits if logits > BLOCK_BYTES else 0
    blocks += LIBRARY_BYTES if work.logits > LIBRARY_TOKENS else 0
    kept = sum(size * (1 + drafts) for size in sizes for drafts in kinds)
    left = kept * (model.activations.hidden_values * spread.item_bytes + TOKEN_BYTES)
    kernels = LAYER_KERNELS * model.activations.layers + OTHER_KERNELS + 2 * GUESS_KERNELS * work.modules
    return blocks + left + len(sizes) * len(kinds) * kernels * KERNEL_BYTES
