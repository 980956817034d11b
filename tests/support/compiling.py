"""A process that has kernels compiled ahead, as a worker on a GPU does: its own driver may not be asked, since a copy
that asked a GPU's would fail.

python -m tests.support.compiling MODEL FOLDER NOTE...   a start for each note; what is built for launches, into FOLDER
python -m tests.support.compiling undeclared             a model that launches what cannot be compiled ahead
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import triton
from triton.runtime import driver

from benchmarks.kernels import DRIVER, built, needed
from srt.worker.device.ahead import META, Ahead, Note, Shape, Target
from srt.worker.device.passes import Passes
from srt.worker.startup import passes_without_memory

SHAPES = [Shape(1, 1)]


class Untouchable:
    """A driver that no copy may ask."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AssertionError(f"a copy asks the GPU's driver for {name}")


@triton.jit  # type: ignore[untyped-decorator]
def undeclared_kernel(x: Any) -> None:
    """Does nothing."""


def launch_undeclared() -> Passes:
    """What no model may do."""
    undeclared_kernel[1,](torch.empty(1))
    raise AssertionError("it was launched")


def write_launcher(folder: Path, source: Any, metadata: Any) -> None:
    """Stands for the compiled file that launches a kernel; the one of norms cannot be built."""
    if metadata.name == "norm_kernel":
        raise OSError("no compiler for launchers")
    with (folder / metadata.name).open("a") as file:
        file.write("built\n")


def main() -> None:
    """Command line entry."""
    driver.set_active(Untouchable())
    target = DRIVER.get_current_target()
    if sys.argv[1] == "undeclared":
        print(Ahead(launch_undeclared, SHAPES, Note("undeclared"), Target(target), 2).result())
        return
    model, folder, *notes = sys.argv[1:]
    made = built(model, announced=False, kv_dtype="auto", mtp=False)
    build = partial(passes_without_memory, made)
    for note in notes:
        launcher = partial(write_launcher, Path(folder)) if note == "launchers" else None
        print(Ahead(build, SHAPES, Note(note), Target(target, launcher), 2).result(), flush=True)
    driver.set_active(DRIVER)
    with torch.inference_mode(), META:
        passes = build()
    print(len(needed(passes, SHAPES)))


if __name__ == "__main__":
    main()
