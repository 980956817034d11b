"""Kernels compiled before they are needed: beside the loading of weights, as many at a time as there are cores.

Which ones, the model itself says: steps of all shapes are run on tensors that have shapes and no memory ("meta"), where
a launch only asks for its kernel. Copies of this process do so, each of them all steps, and whichever comes to a kernel
first compiles it. What was compiled lies in Triton's cache, beside a note of what it was for: a start that finds its
note there asks for nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from srt.distributed import TensorGroup
from srt.layers.cuda.jit import Kernel
from srt.layers.parameter import Parameters
from srt.worker.device.copies import Copies
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
MOST_COPIES: Final = 32
LONGEST_S: Final = 600.0
"""A start does not wait longer for kernels: they are compiled when they are launched, too."""


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
    """What one copy did: kernels that it `compiled` itself, `found` in the cache, or could not compile (`failed`, why),
    of those that are `wanted`."""

    wanted: int
    compiled: int
    found: int
    failed: list[str]


class Ahead:
    """Compiles what steps need, in copies of this process, from here on. `build` makes their passes, on "meta"; copies
    claim kernels in a folder `claims`, which is made for it."""

    def __init__(
        self, build: Callable[[], Passes], shapes: list[Shape], note: Note, target: Target, claims: Path, cores: int
    ) -> None:
        self._note, self._known, self._claims = note, note.read(), claims
        self._began_s = time.perf_counter()
        if self._known is None:
            claims.mkdir()
            self._count = min(cores, MOST_COPIES)
            self._copies = Copies(self._count, "srt:kernels", lambda _: compile_share(build, shapes, claims, target))

    def result(self) -> str:
        """Wait for the last kernel; what came of it, as a line of the start-up table."""
        if self._known is not None:
            return f"{self._known}, all in {knobs.cache.dir}"
        try:
            return self._result()
        except Exception as error:  # whatever it was, the server runs without
            log.exception("kernels are not compiled ahead but when they are first launched")
            return f"when they are first launched: {str(error).splitlines()[-1]}"
        finally:
            shutil.rmtree(self._claims)

    def _result(self) -> str:
        shares = [msgspec.msgpack.decode(answer, type=Share) for answer in self._copies.answers(LONGEST_S)]
        wanted, compiled = shares[0].wanted, sum(share.compiled for share in shares)
        failed = [why for share in shares for why in share.failed]
        if failed:
            told = f"{len(failed)} kernels of {wanted} cannot be compiled; the first step to need one will say why, too"
            log.error("%s:\n%s", told, "\n".join(failed))
        elif compiled + sum(share.found for share in shares) == wanted:
            self._note.write(str(wanted))
        took_s = time.perf_counter() - self._began_s
        return f"{compiled} of {wanted} compiled in {took_s:.1f} s on {self._count} cores, into {knobs.cache.dir}"


def compile_share(build: Callable[[], Passes], shapes: list[Shape], claims: Path, target: Target) -> bytes:
    """Compile every kernel that no other copy has claimed. Returns a `Share`, packed. Changes this process for good."""
    driver.set_active(target)
    hits = list[bool]()
    knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
    knobs.runtime.jit_cache_hook = _refuse_others
    with torch.inference_mode(), _Asking(claims, target.launcher) as asking, META:
        passes = build()
        for shape in shapes:
            run(passes, shape)
    share = Share(len(asking.seen), hits.count(False), hits.count(True), asking.failed)
    return msgspec.msgpack.encode(share)


def _refuse_others(*, fn: Any, **_: object) -> bool:
    """Called before a kernel is compiled: whatever else were launched here, would be on tensors without memory."""
    if _async_compile.active_mode.get() is not None and not isinstance(fn.jit_function, Kernel):
        raise TypeError(f"{fn.name} is not declared with srt.layers.cuda.jit")
    return False


class _Asking(AsyncCompileMode):  # type: ignore[misc]
    """Where kernels are asked for, not launched; one is compiled at once if it can be claimed."""

    def __init__(self, claims: Path, launcher: Callable[..., object] | None) -> None:
        super().__init__(None)
        self._claims, self._launcher = claims, launcher
        self.seen: set[str] = set()
        self.failed: list[str] = []

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> object:
        """Compile a kernel, or leave it to another. Returns what stands for it where launches look for it."""
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        if digest not in self.seen:
            self.seen.add(digest)
            if self._claimed(digest):
                self._compile(compile_fn)
        finalize_fn(digest)
        return digest

    def _claimed(self, digest: str) -> bool:
        try:
            (self._claims / digest).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _compile(self, compile_fn: Callable[[], Any]) -> None:
        try:
            kernel = compile_fn()
            if self._launcher is not None:
                self._launcher(kernel.src, kernel.metadata)
        except Exception:  # as many others as can be compiled shall be
            self.failed.append(traceback.format_exc())


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
