"""Routed experts on a GPU through Triton: plain, FP8 block (W8A8) and NVFP4 (W4A16) weights, any clamp.

No step waits for the GPU: which program computes what lies in tables that the GPU makes itself, and grids are as
large as the worst routing needs, so that the whole may be recorded in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from srt.layers.cuda.launch import Launch
from srt.layers.gpu import Gpu
from srt.layers.moe import triton_dispatch as dispatch
from srt.layers.moe import triton_kernels as kernels
from srt.layers.moe.contract import ExpertShape, PackedExperts, Route, StoredExperts
from srt.layers.moe.triton_packing import COLUMNS, FOLDED, encode_words
from srt.layers.moe.triton_tiles import Tile, Tiles, dense_tiles, for_float32, tiles_for
from srt.layers.ops import Choice
from srt.layers.quant.codes import E4M3
from srt.layers.quant.contract import StoredWeight, WeightFormat
from srt.layers.quant.fp8 import BLOCK, BLOCK_SCALE
from srt.layers.quant.nvfp4 import GROUP_SCALE, MATRIX_SCALE

PLAIN, FP8, NVFP4 = (kind.value for kind in (kernels.PLAIN, kernels.FP8, kernels.NVFP4))
KINDS: Final = {"bf16": PLAIN, "fp16": PLAIN, "fp32": PLAIN, "fp8": FP8, "nvfp4": NVFP4, "nvfp4-a16": NVFP4}
"""`KIND` of the kernels by weight format."""
LEAST_STEP: Final = {PLAIN: 16, NVFP4: COLUMNS}
"""Columns that a step of a product has at least, where products see activations as they are: what a matrix unit takes,
or one word of group scales."""
SORTED, SINGLE, DENSE = 0, 1, 2
"""`MODE` of the kernels."""
FIRST_FP8: Final = (8, 9)
"""Least compute capability that has e4m3."""
HOPPER: Final = 9
"""Major compute capability of the GPUs that the table of tiles was measured on."""
SINGLE_TOKENS: Final = 4
"""Up to so many tokens every pair is a block of its own: hardly any two share an expert."""
BY_ITSELF: Final = Launch(None)
"""For kernels that do not begin before the one in front of them has ended: those beside the main stream."""
EARLY_TOKENS: Final = 16
"""Up to so many tokens the experts' products begin early; with more they would take the GPU from the shared expert."""
COMBINE_COLUMNS: Final = 1024
ENCODE_ROWS: Final = 8
ACTIVATE_COLUMNS: Final = 256
SCHEDULE_CHUNK: Final = 1024
"""Ids that a program looks at together."""
SCHEDULE_SHARE: Final = 512
"""Pairs that a program puts in order where each has a share of them."""
SCHEDULE_MANY: Final = 2048
"""Pairs from which on sorting is worth two kernels, of which the first counts."""


@dataclass(frozen=True)
class Schedule:
    """Which pairs (token, expert) each block of programs computes. A pair's number is token * K + its place."""

    mode: int
    order: Tensor
    """Pairs sorted by expert, [T * K] int32; those of experts elsewhere are left out."""
    starts: Tensor
    """Where an expert's pairs begin in `order`, [E + 1] int32."""
    block_expert: Tensor
    """Expert of each block of `rows` pairs, E for a block that has nothing to do, [B] int32."""
    block_row: Tensor
    """Where the block's pairs begin in `order`, [B] int32."""
    rows: int
    blocks: int

    @property
    def table(self) -> tuple[Tensor, ...]:
        """What the kernels take."""
        return self.order, self.starts, self.block_expert, self.block_row


def schedule(ids: Tensor, experts: int, rows: int, launch: Launch) -> Schedule:
    """Blocks of at most `rows` pairs of one expert, made without asking the device for a number.

    Shapes: ids [T, K] int32, of which `experts` stands for an expert elsewhere.
    """
    pairs, device = ids.numel(), ids.device
    most = min(pairs, pairs // rows + min(experts, pairs))
    order, starts, block_expert, block_row = (
        torch.empty(size, dtype=torch.int32, device=device) for size in (pairs, experts + 1, most, most)
    )
    table = (order, starts, block_expert, block_row)
    padded, chunk = _power(experts + 1), min(SCHEDULE_CHUNK, _power(pairs))
    if pairs <= SCHEDULE_MANY:
        dispatch.schedule_kernel[experts + 1,](
            ids, *table, pairs, most, EXPERTS=experts, PADDED=padded, ROWS=rows, CHUNK=chunk,
            num_warps=max(1, min(4, chunk // 256)), **launch,
        )  # fmt: skip
    else:
        chunk = SCHEDULE_SHARE
        chunks = -(-pairs // chunk)
        counts = torch.empty(chunks, padded, dtype=torch.int32, device=device)
        dispatch.count_kernel[chunks,](ids, counts, pairs, EXPERTS=experts, PADDED=padded, CHUNK=chunk, **launch)
        dispatch.place_kernel[chunks,](
            ids, counts, *table, pairs, most, chunks, EXPERTS=experts, PADDED=padded, ROWS=rows, CHUNK=chunk,
            READ=8, PART=16, num_warps=8, **launch,
        )  # fmt: skip
    return Schedule(SORTED, *table, rows=rows, blocks=most)


def unsorted(ids: Tensor, mode: int, blocks: int, rows: int) -> Schedule:
    """A schedule without a table: each pair for itself, or all tokens with the one expert there is."""
    return Schedule(mode, ids, ids, ids, ids, rows, blocks)


def _power(number: int) -> int:
    """The least power of two that is no less than this and 16."""
    return max(16, 1 << (number - 1).bit_length())


class TritonExperts:
    """`ExpertRunner` for one GPU. Rounds where the reference does: an expert's output, and once at the end.

    FP8 activations are encoded per token and 128 columns; NVFP4 activations stay as they are.
    """

    def __init__(self, weights: WeightFormat, gpu: Gpu | None) -> None:
        self.weights = weights
        self._gpu = gpu
        self._hopper = gpu is not None and gpu.capability[0] == HOPPER
        self._kind = KINDS[weights.name]
        self._launch = Launch(gpu)
        self._other: torch.cuda.Stream | None = None
        self.width_multiple = COLUMNS if self._kind == NVFP4 else 1

    def refuses(self, shape: ExpertShape) -> str | None:
        if self._gpu is None:
            return "needs a GPU"
        if self._kind and self._gpu.capability < FIRST_FP8:
            return f"{self.weights.name} weights need SM89 or newer, this is {self._gpu.text}"
        multiple = {PLAIN: 1, FP8: BLOCK, NVFP4: COLUMNS}[self._kind]
        if shape.hidden % multiple:
            return f"a hidden size of {shape.hidden} does not divide by {multiple}"
        return None

    def pack(self, experts: StoredExperts, shape: ExpertShape) -> PackedExperts:
        kind = self._kind
        return PackedExperts(shape, packed(kind, "gate_up", experts.gate_up) | packed(kind, "down", experts.down))

    def run(self, hidden: Tensor, choice: Choice, experts: PackedExperts) -> Tensor:
        return self._combine(self._pairs(hidden, choice, experts), choice, experts.shape, None)

    def run_with_shared(self, hidden: Tensor, route: Route, experts: PackedExperts, shared: PackedExperts) -> Tensor:
        """The shared expert runs on a stream of its own, beside the choice, which leaves most of the GPU's memory
        bandwidth to it, and beside the routed experts.

        What either stream allocates it also uses last, or the other has been waited for: no block is handed out early.
        """
        if not hidden.is_cuda:
            choice, dense = route(), self.run_shared(hidden, shared)
            return self._combine(self._pairs(hidden, choice, experts), choice, experts.shape, dense)
        here, other = torch.cuda.current_stream(), self._stream()
        other.wait_stream(here)
        with torch.cuda.stream(other):
            dense = self.run_shared(hidden, shared)
        choice = route()
        pairs = self._pairs(hidden, choice, experts)
        here.wait_stream(other)
        return self._combine(pairs, choice, experts.shape, dense)

    def _stream(self) -> torch.cuda.Stream:
        if self._other is None:
            self._other = torch.cuda.Stream()
        return self._other

    def pack_shared(self, shared: StoredExperts, shape: ExpertShape) -> PackedExperts:
        return PackedExperts(shape, packed(PLAIN, "gate_up", shared.gate_up) | packed(PLAIN, "down", shared.down))

    def run_shared(self, hidden: Tensor, shared: PackedExperts) -> Tensor:
        """[T, H] -> [T, H]."""
        if not hidden.shape[0]:
            return torch.empty_like(hidden)
        tokens = hidden.shape[0]
        tiles = for_dtype(dense_tiles(tokens, self._hopper), PLAIN, hidden.dtype)
        plan = unsorted(hidden, DENSE, -(-tokens // tiles.rows), tiles.rows)
        inner = gate_up(PLAIN, hidden, shared, plan, tiles.gate_up, 1, BY_ITSELF)
        return down(PLAIN, inner, shared, plan, tiles.down, BY_ITSELF)

    def _pairs(self, hidden: Tensor, choice: Choice, experts: PackedExperts) -> Tensor:
        """Every chosen expert's output: [T, H] -> [T * K, H]; rows of experts elsewhere are not written."""
        tokens, top_k = choice.ids.shape
        tiles = tiles_for(self._kind, tokens * top_k, experts.shape.experts, self._hopper)
        tiles = for_dtype(tiles, self._kind, hidden.dtype)
        if not tokens:
            return hidden.new_empty(0, experts.shape.hidden)
        launch = self._launch if tokens <= EARLY_TOKENS else BY_ITSELF
        if tokens <= SINGLE_TOKENS:
            plan = unsorted(choice.ids, SINGLE, tokens * top_k, tiles.rows)
        else:
            plan = schedule(choice.ids, experts.shape.experts, tiles.rows, self._launch)
        inner = gate_up(self._kind, hidden, experts, plan, tiles.gate_up, top_k, launch)
        return down(self._kind, inner, experts, plan, tiles.down, launch)

    def _combine(self, pairs: Tensor, choice: Choice, shape: ExpertShape, shared: Tensor | None) -> Tensor:
        tokens, top_k = choice.ids.shape
        out = torch.empty(tokens, shape.hidden, dtype=pairs.dtype, device=pairs.device)
        if tokens:
            dispatch.combine_kernel[tokens, -(-shape.hidden // COMBINE_COLUMNS)](
                pairs, choice.ids, choice.weights, out if shared is None else shared, out,
                EXPERTS=shape.experts, HIDDEN=shape.hidden, TOP_K=top_k, SHARED=shared is not None,
                COLUMNS=COMBINE_COLUMNS,
            )  # fmt: skip
        return out


def for_dtype(tiles: Tiles, kind: int, dtype: torch.dtype) -> Tiles:
    """The tiles for activations of this dtype; those of FP8 are encoded, whatever they were."""
    return for_float32(tiles, LEAST_STEP[kind]) if dtype is torch.float32 and kind in LEAST_STEP else tiles


def packed(kind: int, name: str, stored: StoredWeight) -> dict[str, Tensor]:
    """A weight as the kernels read it: `NAME.weight`, `.scale` and `.matrix`, the latter two empty if unused."""
    tensors, none = stored.tensors, torch.empty(0, device=stored.weight.device)
    if kind == NVFP4:
        words, scales = encode_words(stored.weight, tensors[GROUP_SCALE])
        matrix = tensors[MATRIX_SCALE] * FOLDED
        return {f"{name}.weight": words, f"{name}.scale": scales, f"{name}.matrix": matrix}
    scale = tensors[BLOCK_SCALE].contiguous() if kind == FP8 else none
    return {f"{name}.weight": stored.weight.contiguous(), f"{name}.scale": scale, f"{name}.matrix": none}


def gate_up(
    kind: int, hidden: Tensor, experts: PackedExperts, plan: Schedule, tile: Tile, top_k: int, launch: Launch
) -> Tensor:
    """What enters the down products, in the order of the schedule: [T, H] -> [T * K, I]."""
    shape, tensors = experts.shape, experts.tensors
    pairs = hidden.shape[0] * top_k
    x, x_scale = _operand(kind, hidden, launch)
    weight = _weight(tensors["gate_up.weight"], tile)
    shares = tile.shares if shape.hidden % (tile.shares * tile.step) == 0 else 1
    # Pairs of experts elsewhere have no place in the order; FP8 encodes what is there, so let it be numbers.
    allocate = torch.zeros if shape.elsewhere else torch.empty
    inner = allocate(pairs, shape.width, dtype=hidden.dtype, device=hidden.device)
    parts = inner if shares == 1 else allocate(shares, pairs, 2, shape.width, device=hidden.device)
    limit, clamp = shape.limit or 0.0, shape.limit is not None
    kernels.gate_up_kernel[-(-shape.width // tile.columns), plan.blocks, shares](
        x, x_scale, x.stride(0), weight, tensors["gate_up.scale"], tensors["gate_up.matrix"], parts, *plan.table,
        pairs, limit, EXPERTS=shape.experts, K=shape.hidden, WIDTH=shape.width, TOP_K=top_k, CLAMP=clamp, KIND=kind,
        MODE=plan.mode, ROWS=plan.rows, SHARES=shares, **_constants(tile, hidden), **launch,
    )  # fmt: skip
    if shares > 1:
        kernels.activate_kernel[pairs, -(-shape.width // ACTIVATE_COLUMNS)](
            parts, inner, pairs, limit, WIDTH=shape.width, SHARES=shares, CLAMP=clamp, COLUMNS=ACTIVATE_COLUMNS,
            num_warps=2, **launch,
        )  # fmt: skip
    return inner


def down(kind: int, inner: Tensor, experts: PackedExperts, plan: Schedule, tile: Tile, launch: Launch) -> Tensor:
    """Every pair's output, in the order of tokens: [T * K, I] -> [T * K, H]."""
    shape, tensors = experts.shape, experts.tensors
    out = torch.empty(inner.shape[0], shape.hidden, dtype=inner.dtype, device=inner.device)
    x, x_scale = _operand(kind, inner, launch)
    weight = _weight(tensors["down.weight"], tile)
    kernels.down_kernel[-(-shape.hidden // tile.columns), plan.blocks](
        x, x_scale, weight, tensors["down.scale"], tensors["down.matrix"], out, *plan.table, inner.shape[0],
        EXPERTS=shape.experts, WIDTH=shape.width, HIDDEN=shape.hidden, KIND=kind, MODE=plan.mode, ROWS=plan.rows,
        **_constants(tile, inner), **launch,
    )  # fmt: skip
    return out


def _constants(tile: Tile, x: Tensor) -> dict[str, Any]:
    """Compile-time constants of a tile. Two codes at a time need a GPU and bfloat16."""
    return {
        "COLUMNS": tile.columns, "STEP": tile.step, "JOINED": tile.joined, "TMA": tile.tma,
        "PACKED": x.device.type != "cpu" and x.dtype is torch.bfloat16,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _weight(weight: Tensor, tile: Tile) -> Any:
    """The weight as the kernel takes it: itself, or its descriptor."""
    if not tile.tma:
        return weight
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(weight.flatten(0, 1), [tile.columns, tile.step])


def _operand(kind: int, x: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """Activations as the products take them: encoded for FP8, else as they are."""
    return encode(x, launch) if kind == FP8 else (x, x)


def encode(x: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    """`srt.layers.quant.fp8.encode_tokens` in one kernel, for a K that divides by 128."""
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=E4M3, device=x.device)
    scales = torch.empty(rows, width // BLOCK, dtype=torch.float32, device=x.device)
    dispatch.encode_kernel[-(-rows // ENCODE_ROWS), width // BLOCK](
        x, x.stride(0), codes, scales, rows, K=width, ROWS=ENCODE_ROWS, **launch
    )
    return codes, scales
