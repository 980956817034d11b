"""What the largest step takes beside weights and KV: as planned, and counted tensor by tensor. Needs no GPU.

    python -m benchmarks.workspace --preset full45 --format nvfp4 --mtp

The step is run on tensors that have shapes and no memory; counted is what is in use at the same time. What cuBLAS works
in is planned, and not counted.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.runtime import driver

from benchmarks.kernels import DRIVER, built
from benchmarks.presets import FORMATS, PRESETS, write_preset
from benchmarks.report import table
from srt.configs.memory import LIBRARY_BYTES
from srt.worker.device.ahead import META
from srt.worker.startup import passes_without_memory

MIB = 2**20


class Held(NamedTuple):
    """Memory that was taken: whether it is still there, its size, and by what."""

    storage: StorageWeakRef
    bytes: int
    what: str


class Meter(TorchDispatchMode):
    """Counts the memory of all tensors that are made within."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self.at_peak: list[Held] = []
        self._held: dict[int, Held] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and see what it made."""
        result = func(*args, **(kwargs or {}))
        given = {reference.cdata for reference in map(_storage, _tensors((args, kwargs)))}
        for tensor in _tensors(result):
            storage = _storage(tensor)
            if storage.cdata not in given and storage.cdata not in self._held:
                what = f"{func} {list(tensor.shape)} {tensor.dtype}"
                self._held[storage.cdata] = Held(storage, tensor.untyped_storage().nbytes(), what)
        self._held = {at: held for at, held in self._held.items() if not held.storage.expired()}
        total = sum(held.bytes for held in self._held.values())
        if total > self.peak_bytes:
            self.peak_bytes, self.at_peak = total, sorted(self._held.values(), key=lambda held: -held.bytes)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta]


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--format", choices=FORMATS, default="bf16", help="of the routed experts")
    parser.add_argument("--mtp", action="store_true", help="with draft modules")
    args = parser.parse_args()
    driver.set_active(DRIVER)
    with tempfile.TemporaryDirectory() as folder:
        path = write_preset(Path(folder), args.preset, args.format, mtp=args.mtp)
        made = built(str(path), announced=True, kv_dtype="auto", mtp=args.mtp)
    with knobs.runtime.scope(), torch.inference_mode(), META:
        knobs.runtime.jit_cache_hook = lambda **_: True  # compile nothing
        passes = passes_without_memory(made)
        with Meter() as meter:
            passes.rehearse_largest(made.plan.chunked_prefill_size, made.plan.drafting.drafts)
    planned = made.plan.memory["largest step"] - LIBRARY_BYTES
    rows = [(f"{held.bytes / MIB:.1f} MiB", held.what) for held in meter.at_peak if held.bytes > MIB]
    rows.append(("planned", f"{planned / MIB:.1f} MiB for {made.plan.max_step_tokens} tokens"))
    rows.append(("counted", f"{meter.peak_bytes / MIB:.1f} MiB"))
    rows.append(("off", f"{planned / meter.peak_bytes - 1:+.2%}"))
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
