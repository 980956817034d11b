"""FlashInfer's paged attention for prompts; everything else is Triton's.

It plans on the host, so it computes only steps whose lengths the host knows. Its kernels are compiled at first use, for
tens of seconds: a thread does that while Triton attends. Nothing here waits for the GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from srt.layers.attention.contract import COMPILING, AttentionSpec
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.cuda.attention import FEW_LINES, TritonAttention
from srt.layers.cuda.launch import Launch
from srt.layers.cuda.prompt_kernels import gate_kernel
from srt.layers.gpu import Gpu, to_device

log = logging.getLogger(__name__)

HEAD_DIMS: Final = (64, 128, 256)
DTYPES: Final = (torch.bfloat16, torch.float16)
OLDEST_GPU: Final = (8, 0)
HOPPER: Final = 9
WORKSPACE_BYTES: Final = 16 << 20
"""For partial results, of which there are none: keys are not split."""
MOST_PLANS: Final = 4
"""Plans of a kind of layers that may be on their way to the GPU at once, each with 8 MiB there and here."""
GATE_HEADS: Final = 16
Ints = NDArray[np.int64]
Passed = Callable[[], bool]


@dataclass(frozen=True)
class Shape:
    """What kernels are compiled for."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    head_dims: frozenset[int]
    windows: frozenset[bool]
    """Whether layers have a window: those that have are compiled apart."""


class Wrapper(Protocol):
    """The part of FlashInfer's BatchPrefillWithPagedKVCacheWrapper that is used."""

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *, causal: bool, sm_scale: float,
        window_left: int, q_data_type: torch.dtype, kv_data_type: torch.dtype, disable_split_kv: bool,
    ) -> None:  # fmt: skip
        """Prepare for a batch: where queries and page lists of rows begin, the lists, tokens on last pages."""
        ...

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor, enable_pdl: bool) -> Tensor:
        """Attend; with `enable_pdl`, begin while the kernel before still runs."""
        ...


class Library(Protocol):
    """FlashInfer, as far as it is there."""

    @property
    def ready(self) -> bool:
        """Whether its kernels are compiled."""
        ...

    def wrapper(self) -> Wrapper:
        """Another wrapper with memory of its own."""
        ...

    def mark(self) -> Passed:
        """What tells whether all that was enqueued so far has been done."""
        ...


def backend_of(gpu: Gpu) -> str:
    """Which of its kernels a GPU takes."""
    return "fa3" if gpu.capability[0] == HOPPER else "fa2"


def refusal(shape: Shape, gpu: Gpu) -> str | None:
    """Why FlashInfer cannot attend for these layers; None if it can."""
    if importlib.util.find_spec("flashinfer") is None:
        return "FlashInfer is not installed"
    if gpu.capability < OLDEST_GPU:
        return f"needs a GPU of SM80 or newer, this is {gpu.text}"
    if shape.dtype not in DTYPES:
        return f"has no kernels for {shape.dtype}"
    if shape.kv_dtype != shape.dtype:
        return f"its kernels for KV memory in {shape.kv_dtype} want queries in it too"
    odd = sorted(shape.head_dims - set(HEAD_DIMS))
    return f"has no kernels for heads of size {odd[0]}" if odd else None


class FlashInfer:
    """The installed FlashInfer; its kernels for a shape are compiled, or found compiled, by a thread."""

    def __init__(self, gpu: Gpu, shape: Shape) -> None:
        self._shape, self._backend = shape, backend_of(gpu)
        self._wrapper: Callable[..., Wrapper] | None = None
        self._workspace: Tensor | None = None
        self.failed: str | None = None
        """Why it never will be ready."""
        self.thread = threading.Thread(target=self._compile, name=COMPILING, daemon=True)
        self.thread.start()

    @property
    def ready(self) -> bool:
        return self._wrapper is not None

    def wrapper(self) -> Wrapper:
        assert self._wrapper is not None, "asked before it was ready"
        if self._workspace is None:
            self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        return self._wrapper(self._workspace, "NHD", backend=self._backend)

    def mark(self) -> Passed:
        event = torch.cuda.Event()
        event.record()
        query: Passed = event.query
        return query

    def _compile(self) -> None:
        dtype = self._shape.dtype
        try:
            prefill = importlib.import_module("flashinfer.prefill")
            for size in sorted(self._shape.head_dims):
                for window in sorted(self._shape.windows):
                    # query, keys and values, results, indices; sizes of keys and values; no positions, window, no cap,
                    # sums in float32
                    prefill.get_batch_prefill_module(
                        self._backend, dtype, dtype, dtype, torch.int32, size, size, 0, window, False, False
                    )
        except Exception as error:  # compilers, linkers and loaders have no common error
            self.failed = " ".join(str(error).split())[:200] or type(error).__name__
            log.warning("FlashInfer cannot be used, Triton attends: %s", self.failed)
            return
        self._wrapper = prefill.BatchPrefillWithPagedKVCacheWrapper
        log.info("FlashInfer's %s kernels are ready; they attend for prompts from now on", self._backend)


@dataclass(frozen=True)
class PageLists:
    """Pages that the rows of a batch see, row by row: [N] lines among the batch's rows and places in their tables.

    A row's pages that lie wholly before its window are left out, as if its sequence began behind them.
    """

    lines: Ints
    places: Ints
    starts: Ints
    """[R + 1]: where each row's pages begin."""
    last: Ints
    """[R]: tokens on the last page of each row."""


def page_lists(query_starts: Sequence[int], lens: Sequence[int], page_size: int, window: int | None) -> PageLists:
    """Pages of rows that have `lens` keys and whose queries are the last of them."""
    ends, counts = np.array(lens, np.int64), np.diff(np.array(query_starts, np.int64))
    pages = -(-ends // page_size)
    first = np.zeros_like(ends) if window is None else np.maximum(0, ends - counts - window + 1) // page_size
    seen = pages - first
    starts = np.concatenate([[0], np.cumsum(seen)])
    lines = np.repeat(np.arange(len(ends)), seen)
    places = np.arange(starts[-1]) - np.repeat(starts[:-1] - first, seen)
    return PageLists(lines, places, starts, ends - (pages - 1) * page_size)


class FlashInferAttention:
    """`AttentionBackend` that gives prompts to FlashInfer as soon as it is ready."""

    def __init__(self, gpu: Gpu | None, library: Library) -> None:
        self._triton = TritonAttention(gpu)
        self._launch = Launch(gpu)
        self._library = library
        self._rings: dict[tuple[object, ...], deque[tuple[Wrapper, Passed]]] = {}
        self._planned: dict[tuple[object, ...], Wrapper | None] = {}
        self._longest = 0
        self._known = False

    def begin(self, batch: ForwardBatch) -> None:
        self._triton.begin(batch)
        self._planned = {}
        self._longest = int(np.diff(batch.query_starts_list).max())
        lens = batch.kv_lens_list
        room = batch.page_tables[0].shape[1] * batch.page_size
        self._known = lens is not None and self._library.ready and max(lens) <= room

    def store(self, qkv: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        return self._triton.store(qkv, spec, kv, batch)

    def attend(self, q: Tensor, gates: Tensor, spec: AttentionSpec, kv: KVLayer, batch: ForwardBatch) -> Tensor:
        wrapper = None
        if self._known and self._longest * (spec.q_heads // spec.kv_heads) > FEW_LINES:
            wrapper = self._plan(spec, batch, q.dtype)
        if wrapper is None:
            return self._triton.attend(q, gates, spec, kv, batch)
        out = torch.empty_like(q)
        # Not early: what its kernels read before they wait is not ours to know (`srt/layers/cuda/launch.py`).
        wrapper.run(q, (kv.k, kv.v), out=out, enable_pdl=False)
        gate_kernel[q.shape[0], triton.cdiv(spec.q_heads, GATE_HEADS)](
            out, gates, gates.stride(0), Q_HEADS=spec.q_heads, SIZE=spec.head_dim, HEADS=GATE_HEADS, **self._launch
        )
        return out.view(q.shape[0], -1)

    def _plan(self, spec: AttentionSpec, batch: ForwardBatch, dtype: torch.dtype) -> Wrapper | None:
        """The wrapper that has planned this step for layers like this one; None if all are still on their way."""
        key = (spec.group, spec.window, spec.q_heads, spec.kv_heads, spec.head_dim)
        if key not in self._planned:
            ring = self._rings.setdefault(key, deque())
            wrapper = self._free(ring)
            self._planned[key] = wrapper
            if wrapper is not None:
                self._plan_with(wrapper, spec, batch, dtype)
                ring.append((wrapper, self._library.mark()))
        return self._planned[key]

    def _free(self, ring: deque[tuple[Wrapper, Passed]]) -> Wrapper | None:
        """A wrapper whose last plan has left the host's memory; a new one if there may be more."""
        if ring and ring[0][1]():
            return ring.popleft()[0]
        return self._library.wrapper() if len(ring) < MOST_PLANS else None

    def _plan_with(self, wrapper: Wrapper, spec: AttentionSpec, batch: ForwardBatch, dtype: torch.dtype) -> None:
        assert batch.kv_lens_list is not None, "planned although the host does not know"
        lists = page_lists(batch.query_starts_list, batch.kv_lens_list, batch.page_size, spec.window)
        both = torch.from_numpy(np.concatenate([lists.lines, lists.places]))
        table = batch.page_tables[spec.group]
        lines, places = to_device(both, table.device).split(len(lists.lines))
        if batch.table_rows is not None:
            lines = batch.table_rows[lines]
        starts, pages, last = (
            torch.from_numpy(np.asarray(column, np.int32))
            for column in (batch.query_starts_list, lists.starts, lists.last)
        )
        wrapper.plan(
            starts, pages, table[lines, places], last, spec.q_heads, spec.kv_heads, spec.head_dim, batch.page_size,
            causal=True, sm_scale=spec.scale, window_left=-1 if spec.window is None else spec.window - 1,
            q_data_type=dtype, kv_data_type=dtype, disable_split_kv=True,
        )  # fmt: skip


def attention_for(gpu: Gpu, shape: Shape) -> FlashInferAttention:
    """The backend with the installed FlashInfer."""
    return FlashInferAttention(gpu, FlashInfer(gpu, shape))
