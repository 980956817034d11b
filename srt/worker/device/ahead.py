"""Kernels compiled before they are needed: beside the loading of weights, as many at a time as there are cores.

Which ones, the model itself says: steps of all shapes are run on tensors that have shapes and no memory ("meta"), where
a launch only asks for its kernel. A copy of this process does so, and copies of that one compile. What was compiled
lies in Triton's cache, beside a note of what it was for: a start that finds its note there asks for nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
import triton
from torch import Tensor
from triton import AsyncCompileMode, knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import _async_compile, driver

from srt.configs.step3p7 import LayerConfig, TextConfig
from srt.copies import Copies, CopyError
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
TITLE: Final = "srt:kernels"
MOST_COPIES: Final = 32
NUMBER_BYTES: Final = 4
LONGEST_S: Final = 240.0
"""Copies are given no longer: kernels are compiled when they are launched, too. Ranks wait longer for each other."""


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
        """Leave it for later starts; without it they ask again."""
        half = self._path.with_suffix(f".{os.getpid()}")
        try:
            half.write_text(text, encoding="utf-8")
            half.replace(self._path)
        except OSError as error:
            log.warning("later starts will look for kernels again: %s: %s", half.parent, error.strerror)
            half.unlink(missing_ok=True)


class Target:
    """Triton's driver for copies of a process, which must ask no GPU: what to compile for."""

    def __init__(self, target: GPUTarget, launcher: Callable[..., object] | None = None) -> None:
        self._target = target
        self.launcher = launcher
        """Builds what launches a kernel, another compiled file; None where there is no GPU to link it for."""

    @classmethod
    def here(cls) -> Target:
        """Of this process's GPU."""
        return cls(driver.active.get_current_target(), driver.active.launcher_cls)

    def __repr__(self) -> str:
        """Of a note."""
        return repr(self._target)

    def get_current_target(self) -> GPUTarget:
        """The GPU's kind."""
        return self._target

    def get_current_device(self) -> int:
        """The first, of none."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nothing runs there."""
        return device


class Share(msgspec.Struct, frozen=True):
    """What came of kernels: how many were `compiled`, and what of those that `failed`. The others were in the cache."""

    compiled: int
    failed: list[str]


class Compiled(msgspec.Struct, frozen=True):
    """What came of all that are `wanted`, in so many seconds."""

    wanted: int
    compiled: int
    failed: list[str]
    seconds: float


class Ahead:
    """Compiles what steps need, in copies of this process, from here on. `build` makes their passes, on "meta"."""

    def __init__(
        self, build: Callable[[], Passes], shapes: list[Shape], note: Note, target: Target, cores: int
    ) -> None:
        self._note, self._known, self._cores = note, note.read(), max(1, min(cores, MOST_COPIES))
        if self._known is None:
            self._copy = Copies(1, TITLE, LONGEST_S, partial(_compile_all, build, shapes, target, self._cores))

    def result(self) -> str:
        """Wait for the last kernel; what came of it, as a line of the start-up table. Once only."""
        if self._known is not None:
            return f"{self._known}, all in {knobs.cache.dir}"
        (outcome,) = self._copy.outcomes()
        if isinstance(outcome, CopyError):  # the server runs without
            log.error("kernels are not compiled ahead but when they are first launched: %s", outcome)
            return f"when they are first launched: {str(outcome).splitlines()[-1]}"
        made = msgspec.msgpack.decode(outcome, type=Compiled)
        if made.failed:
            told = "%d kernels of %d cannot be compiled; the first step to need one will say why, too:\n%s"
            log.error(told, len(made.failed), made.wanted, "\n".join(_unlike(made.failed)))
        else:
            self._note.write(str(made.wanted))
        took = f"{made.seconds:.1f} s in {self._cores} processes"
        return f"{made.compiled} of {made.wanted} compiled in {took}, into {knobs.cache.dir}"


def _compile_all(build: Callable[[], Passes], shapes: list[Shape], target: Target, cores: int) -> bytes:
    """Find out which kernels there are, and compile them in copies. Returns a `Compiled`, packed. Changes this process
    for good."""
    began_s = time.monotonic()
    driver.set_active(target)
    knobs.runtime.jit_cache_hook = _refuse_others
    with torch.inference_mode(), _Asking() as asking, META:
        passes = build()
        for shape in shapes:
            run(passes, shape)
    # Imported for tensors without memory by now: hundreds of torch's modules, which no copy has to import again.
    wanted = list(asking.wanted.values())
    numbers, writing = os.pipe()
    for number in range(len(wanted)):
        os.write(writing, number.to_bytes(NUMBER_BYTES))
    os.close(writing)  # so that whoever finds nothing left is told
    left_s = LONGEST_S - (time.monotonic() - began_s)
    copies = Copies(cores, TITLE, left_s, partial(_compile_some, wanted, numbers, target))
    compiled, failed = 0, list[str]()
    for outcome in copies.outcomes():
        if isinstance(outcome, CopyError):  # with the kernel that it was at; the others took what it had not
            failed.append(str(outcome))
        else:
            share = msgspec.msgpack.decode(outcome, type=Share)
            compiled += share.compiled
            failed += share.failed
    return msgspec.msgpack.encode(Compiled(len(wanted), compiled, failed, time.monotonic() - began_s))


def _compile_some(wanted: list[Callable[[], Any]], numbers: int, target: Target) -> bytes:
    """Compile kernels whose numbers are read from there, until all are taken. Returns a `Share`, packed."""
    compiled, hits, failed = 0, list[bool](), list[str]()
    knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
    while number := os.read(numbers, NUMBER_BYTES):
        hits.clear()
        try:
            kernel = wanted[int.from_bytes(number)]()
            if target.launcher is not None:
                target.launcher(kernel.src, kernel.metadata)
            compiled += hits == [False]
        except Exception:  # as many others as can be compiled shall be
            failed.append(traceback.format_exc())
    return msgspec.msgpack.encode(Share(compiled, failed))


def _unlike(texts: list[str]) -> list[str]:
    """One of all that end in the same line."""
    return list({text.splitlines()[-1]: text for text in texts}.values())


def _refuse_others(*, fn: Any, **_: object) -> bool:
    """Called before a kernel is compiled: whatever else were launched here, would be on tensors without memory."""
    if _async_compile.active_mode.get() is not None and not isinstance(fn.jit_function, Kernel):
        raise TypeError(f"{fn.name} is not declared with srt.layers.cuda.jit")
    return False


class _Asking(AsyncCompileMode):  # type: ignore[misc]
    """Where kernels are asked for, and neither compiled nor launched."""

    def __init__(self) -> None:
        super().__init__(None)
        self.wanted: dict[str, Callable[[], Any]] = {}
        """By what it is compiled from: what compiles it."""

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> object:
        """Keep what compiles a kernel. Returns what stands for it where launches look for it."""
        self.wanted[key] = compile_fn
        finalize_fn(key)
        return key


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
