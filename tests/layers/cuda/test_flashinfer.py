"""Prompts through FlashInfer: what it is asked for where there is no GPU, and what it answers where there is one."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from srt.layers.attention.flashinfer import (
    MOST_PLANS,
    FlashInfer,
    FlashInferAttention,
    Shape,
    Wrapper,
    page_lists,
    refusal,
)
from srt.layers.attention.reference import ReferenceAttention
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.cuda.attention import TritonAttention
from srt.layers.gpu import Gpu, current_gpu
from tests.layers.cuda.test_attention import Case, random, spec_of

HOPPER = Gpu((9, 0))
SHAPE = Shape(torch.bfloat16, torch.bfloat16, frozenset({128}), frozenset({False, True}))
PROMPTS = [
    Case([0, 90, 7], [70, 1, 5], page_size=64),
    Case([0, 50], [30, 13], page_size=16),
    Case([30], [90], page_size=1, rows=False),
]


class PlainWrapper:
    """FlashInfer's contract in plain torch: paged lists, the last queries of each row, a window to the left."""

    def __init__(self) -> None:
        self.plans = 0

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *, causal: bool, sm_scale: float,
        window_left: int, q_data_type: torch.dtype, kv_data_type: torch.dtype, disable_split_kv: bool,
    ) -> None:  # fmt: skip
        lists = qo_indptr, paged_kv_indptr, paged_kv_last_page_len
        assert {one.dtype for one in (*lists, paged_kv_indices)} == {torch.int32}
        assert {one.device.type for one in lists} == {"cpu"}, "would wait for the device"
        assert causal and disable_split_kv and head_dim_qk == 16
        assert q_data_type == kv_data_type == torch.float32
        self.plans += 1
        starts, pages, last = (one.tolist() for one in lists)
        assert min(last) >= 1 and max(last) <= page_size
        self._lists = starts, pages, paged_kv_indices, last
        self._numbers = num_qo_heads // num_kv_heads, page_size, sm_scale, window_left

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor, enable_pdl: bool) -> Tensor:
        assert not enable_pdl
        starts, pages, indices, last = self._lists
        group, page_size, scale, window_left = self._numbers
        for row, (begin, end) in enumerate(itertools.pairwise(starts)):
            own = indices[pages[row] : pages[row + 1]].long()
            length = (len(own) - 1) * page_size + last[row]
            k, v = (memory[own].flatten(0, 1)[:length].repeat_interleave(group, 1) for memory in paged_kv_cache)
            scores = torch.einsum("qhd,khd->hqk", q[begin:end], k) * scale
            distance = torch.arange(length - (end - begin), length)[:, None] - torch.arange(length)[None]
            hidden = (distance < 0) | ((distance > window_left) if window_left >= 0 else False)
            out[begin:end] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        return out


@dataclass
class PlainLibrary:
    """Wrappers whose plans leave the host's memory when the test says so."""

    ready: bool = True
    passed: bool = True
    wrappers: list[PlainWrapper] = field(default_factory=list)

    def wrapper(self) -> Wrapper:
        self.wrappers.append(PlainWrapper())
        return self.wrappers[-1]

    def mark(self) -> Callable[[], bool]:
        return lambda: self.passed

    @property
    def plans(self) -> int:
        return sum(wrapper.plans for wrapper in self.wrappers)


def known(case: Case) -> ForwardBatch:
    batch = case.batch()
    return replace(batch, kv_lens_list=batch.kv_lens.tolist())


def attended(backend: FlashInferAttention | TritonAttention | ReferenceAttention, batch: ForwardBatch) -> Tensor:
    """Two layers of one window and one of another; what all of them attend."""
    torch.manual_seed(3)
    specs = [spec_of(torch.float32, 6, 2, 16, 8, window) for window in (None, 40, 40)]
    pages, tokens = int(batch.page_tables[1].max()) + 1, len(batch.positions)
    kv = KVLayer(*(random(pages, batch.page_size, 2, 16, dtype=torch.float32) for _ in range(2)))
    q, gates = random(tokens, 6, 16, dtype=torch.float32), random(tokens, 6, dtype=torch.float32)
    backend.begin(batch)
    return torch.cat([backend.attend(q, gates, spec, kv, batch) for spec in specs])


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in computes on the CPU")


@on_cpu
@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_are_planned_once_for_each_kind_of_layer_and_attend_as_the_reference(case: Case) -> None:
    library, batch = PlainLibrary(), known(case)
    found = attended(FlashInferAttention(None, library), batch)
    torch.testing.assert_close(found, attended(ReferenceAttention(), batch), atol=2e-5, rtol=2e-5)
    assert library.plans == 2


@on_cpu
@pytest.mark.parametrize(
    ("batch", "library"),
    [
        (PROMPTS[1].batch(), PlainLibrary()),
        (known(PROMPTS[1]), PlainLibrary(ready=False)),
        (known(Case([5, 20], [1, 1])), PlainLibrary()),
        (replace(known(PROMPTS[1]), kv_lens_list=[30, 100_000]), PlainLibrary()),
    ],
    ids=["lengths that the host does not know", "kernels not compiled", "decodes", "more than tables hold"],
)
def test_triton_attends_for(batch: ForwardBatch, library: PlainLibrary) -> None:
    found = attended(FlashInferAttention(None, library), batch)
    assert torch.equal(found, attended(TritonAttention(), batch))
    assert not library.plans


@on_cpu
def test_a_wrapper_is_planned_anew_only_when_its_plan_has_left_and_triton_attends_meanwhile() -> None:
    library, batch = PlainLibrary(passed=False), known(Case([3], [24], page_size=4))
    backend = FlashInferAttention(None, library)
    expected = attended(ReferenceAttention(), batch)
    for _ in range(MOST_PLANS + 2):
        torch.testing.assert_close(attended(backend, batch), expected, atol=2e-5, rtol=2e-5)
    assert [wrapper.plans for wrapper in library.wrappers] == [1] * (2 * MOST_PLANS)
    library.passed = True
    attended(backend, batch)
    assert library.plans == 2 * MOST_PLANS + 2
    assert len(library.wrappers) == 2 * MOST_PLANS


def test_pages_before_a_window_are_left_out() -> None:
    lists = page_lists([0, 3, 4], [50, 7], 8, window=10)
    # The first query of the first row is at 47 and sees keys from 38 on: pages 4 to 6.
    assert (lists.lines.tolist(), lists.places.tolist()) == ([0, 0, 0, 1], [4, 5, 6, 0])
    assert (lists.starts.tolist(), lists.last.tolist()) == ([0, 3, 4], [2, 7])
    assert page_lists([0, 3, 4], [50, 7], 8, window=None).places.tolist() == [0, 1, 2, 3, 4, 5, 6, 0]


def test_what_it_cannot_compute_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json") if name == "flashinfer" else find(name))
    assert refusal(SHAPE, HOPPER) is None
    assert refusal(SHAPE, Gpu((7, 5))) == "needs a GPU of SM80 or newer, this is SM75"
    assert refusal(replace(SHAPE, dtype=torch.float32), HOPPER) == "has no kernels for torch.float32"
    coded = "its kernels for KV memory in torch.float8_e4m3fn want queries in it too"
    assert refusal(replace(SHAPE, kv_dtype=torch.float8_e4m3fn), HOPPER) == coded
    assert refusal(replace(SHAPE, head_dims=frozenset({128, 32})), HOPPER) == "has no kernels for heads of size 32"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal(SHAPE, HOPPER) == "FlashInfer is not installed"


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="FlashInfer is not installed")
def test_the_installed_version_takes_what_it_is_given() -> None:
    prefill = importlib.import_module("flashinfer.prefill")
    wrapper = prefill.BatchPrefillWithPagedKVCacheWrapper
    for name in ("plan", "run"):
        given, ours = (inspect.signature(getattr(cls, name)).parameters for cls in (wrapper, PlainWrapper))
        assert set(ours) <= set(given), name
        positional = [name for name, one in ours.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
        assert list(given)[: len(positional)] == positional
    assert {"float_workspace_buffer", "kv_layout", "backend"} <= set(inspect.signature(wrapper).parameters)
    assert callable(prefill.get_batch_prefill_module)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="FlashInfer is not installed")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_flashinfer_attends_as_the_reference(window: int | None, page_size: int) -> None:
    gpu = current_gpu()
    assert gpu is not None
    library = FlashInfer(gpu, replace(SHAPE, windows=frozenset({window is not None})))
    library.thread.join(280)
    assert library.ready, library.failed
    batch, spec = known(Case([0, 90, 7], [70, 1, 5], page_size)), spec_of(torch.bfloat16, 24, 2, 128, 64, window)
    pages, tokens = int(batch.page_tables[1].max()) + 1, len(batch.positions)
    kv = KVLayer(*(random(pages, page_size, 2, 128, dtype=torch.bfloat16) for _ in range(2)))
    q, gates = random(tokens, 24, 128, dtype=torch.bfloat16), random(tokens, 24, dtype=torch.bfloat16)
    backend = FlashInferAttention(gpu, library)
    backend.begin(batch)
    found = backend.attend(q, gates, spec, kv, batch).float()
    expected = ReferenceAttention().attend(q.float(), gates.float(), spec, kv, batch)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
