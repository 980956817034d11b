"""Kernels compiled before they are needed: beside the loading of weights, as many at a time as there are cores.

Which ones, the model itself says: steps of all shapes are run on tensors that have shapes and no memory ("meta"), where
a launch only asks for its kernel. What was compiled lies in Triton's cache, beside a note of what it was for: a start
that finds its note there asks for nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
import triton
from torch import Tensor
from triton import AsyncCompileMode, knobs
from triton.runtime import _async_compile

from srt.configs.step3p7 import LayerConfig, TextConfig
from srt.distributed import TensorGroup
from srt.layers.cuda.jit import Kernel
from srt.layers.parameter import Parameters
from srt.worker.device.layout import layout_of
from srt.worker.device.passes import Passes

log = logging.getLogger(__name__)

META: Final = torch.device("meta")
SOURCES: Final = Path(__file__).resolve().parents[2]
"""Of this package: other kernels, other notes."""
FEW_ROWS: Final = 64
"""More rows than that leave attention nothing to share out."""
WIDTHS: Final = (2, 3, 5)
"""Tokens of each row for which attention has kernels, beside one and many."""


@dataclass(frozen=True)
class Shape:
    """A step of `rows` rows of `tokens` tokens and `drafts` guesses each."""

    rows: int
    tokens: int
    drafts: int = 0


class Note:
    """In Triton's cache: that all kernels were compiled there for a model, sizes, GPU and versions."""

    def __init__(self, *facts: object) -> None:
        digest = hashlib.blake2b(repr((*facts, torch.__version__, triton.__version__)).encode(), digest_size=16)
        for path in sorted(SOURCES.rglob("*.py")):
            digest.update(path.read_bytes())
        self._path = Path(knobs.cache.dir) / f"srt-{digest.hexdigest()}"

    def read(self) -> str | None:
        """What it says; None if it is not there."""
        return self._path.read_text(encoding="utf-8") if self._path.is_file() else None

    def write(self, text: str) -> None:
        """Leave it for later starts."""
        half = self._path.with_suffix(f".{os.getpid()}")
        half.write_text(text, encoding="utf-8")
        half.replace(self._path)


class Ahead:
    """Compiles what steps need, in threads of its own, from here on. `build` makes their passes, on "meta"."""

    def __init__(
        self, build: Callable[[], Passes], shapes: list[Shape], note: Note, threads: int, device: torch.device
    ) -> None:
        self._build, self._shapes, self._note, self._threads, self._device = build, shapes, note, threads, device
        thread = ThreadPoolExecutor(1, "kernels")
        self._compiled: Future[str] = thread.submit(self._compile)
        thread.shutdown(wait=False)

    def result(self) -> str:
        """Wait for the last kernel; what came of it, as a line of the start-up table."""
        try:
            return self._compiled.result()
        except Exception as error:  # whatever it was, the server runs without
            log.exception("kernels are not compiled ahead but when they are first launched")
            return f"when they are first launched: {error}"

    def _compile(self) -> str:
        known = self._note.read()
        if known is not None:
            return f"{known}, all in {knobs.cache.dir}"
        began = time.perf_counter()
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        hits = list[bool]()
        with knobs.compilation.scope(), knobs.runtime.scope(), ThreadPoolExecutor(self._threads) as compilers:
            knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
            knobs.runtime.jit_cache_hook = _refuse_others
            with torch.inference_mode(), _Asking(compilers, ignore_errors=True) as asking, META:
                passes = self._build()
                for shape in self._shapes:
                    run(passes, shape)
        wanted = len(asking.future_kernels)
        if len(hits) < wanted:
            failed = wanted - len(hits)
            log.error("%d kernels of %d cannot be compiled; the first step to need one will say why", failed, wanted)
        else:
            self._note.write(str(wanted))
        took = f"{time.perf_counter() - began:.1f} s on {self._threads} cores"
        return f"{hits.count(False)} of {wanted} compiled in {took}, into {knobs.cache.dir}"


def _refuse_others(*, fn: Any, **_: object) -> bool:
    """Called before a kernel is compiled. One that would be launched on tensors without memory would end the GPU's
    context; kernels of other threads are none of ours."""
    if _async_compile.active_mode.get() is not None and not isinstance(fn.jit_function, Kernel):
        raise TypeError(f"{fn.name} is not declared with srt.layers.cuda.jit")
    return False


class _Asking(AsyncCompileMode):  # type: ignore[misc]
    """A kernel is asked for once; whoever launches it before it is there waits for it."""

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> Any:
        """Begin to compile; `finalize_fn` puts what it is given where launches look for the kernel."""
        asked = super().submit(key, compile_fn, finalize_fn)
        finalize_fn(asked)
        return asked


def run(passes: Passes, shape: Shape) -> None:
    """One step for nobody, without numbers."""
    whole = np.ones(shape.rows, np.int64)
    layout = layout_of(0 * whole, shape.tokens * whole, whole > 0, shape.drafts * whole, META)
    passed = passes.compute(layout, passes.windows(layout))
    outcome = passes.take_largest(passed)
    for filtered in (False, True):
        passes.draw(passed, filtered=filtered)
    if passed.windows is not None:
        passes.guess(outcome, passed)


def shapes_for(rows: int, depth: int, tokens: int) -> list[Shape]:
    """Steps that together need every kernel of up to `rows` rows, `depth` guesses and `tokens` tokens."""
    few = [size for size in doubling(rows) if size <= 2 * FEW_ROWS]
    decodes = [Shape(size, 1, drafts) for size in doubling(rows) for drafts in sorted({0, depth})]
    short = [Shape(size, width) for size in few for width in WIDTHS]
    return decodes + short + [Shape(1, size) for size in quarters(tokens)]


def doubling(most: int) -> list[int]:
    """1, 2, 3, 4, 5, 8, 9, ..: powers of two up to `most` and what follows them, and `most`."""
    powers = [1 << bit for bit in range(most.bit_length())]
    return sorted({size for power in powers for size in (power, power + 1) if size <= most} | {most})


def quarters(most: int) -> Iterator[int]:
    """2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, ..: four sizes from one power of two to the next, and `most`."""
    size = 2
    while size < most:
        yield size
        size += max(1, (1 << (size.bit_length() - 1)) // 4)
    yield most


def without_repeats(text: TextConfig, formats: Mapping[int, str]) -> TextConfig:
    """The language model with one layer of each kind: what is compiled for one serves the others."""
    kinds: dict[tuple[LayerConfig, str | None], LayerConfig] = {}
    for layer in text.layers:
        kind = msgspec.structs.replace(layer, index=0), formats.get(layer.index)
        kinds.setdefault(kind, layer)
    return msgspec.structs.replace(text, layers=tuple(kinds.values()))


def fill(parameters: Parameters) -> None:
    """Give every parameter tensors without memory."""
    for parameter in parameters.values():
        for name, piece in parameter.pieces.items():
            parameter.fill(name, torch.empty(piece.shape, dtype=parameter.dtype, device=META))


class Lookalike(TensorGroup):
    """A rank of a group that it does not speak to."""

    def __init__(self, group: TensorGroup) -> None:
        self.rank, self.size = group.rank, group.size

    def all_gather(self, x: Tensor) -> Tensor:
        """As wide as the others' parts would make it."""
        return x if self.size == 1 else torch.cat([x] * self.size, dim=-1)
