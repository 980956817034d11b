"""What a worker's memory holds, part by part: counted in the tensors that are there, beside what was planned."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Final

from torch import Tensor

from srt.configs.geometry import ATTENTION, EMBEDDING, EXPERTS, HEAD, MTP, NETWORKS, NORMS, ROUTERS, VISION
from srt.configs.plan import GroupPlan
from srt.layers.batch import KVLayer
from srt.layers.parameter import Parameters

PARTS: Final = (
    ("draft.", MTP),
    ("vision.", VISION),
    ("embedding.", EMBEDDING),
    ("head.", HEAD),
    (".attention.inputs.", ATTENTION),
    (".attention.output.", ATTENTION),
    (".network.experts.", EXPERTS),
    (".network.router.", ROUTERS),
    (".network.", NETWORKS),
)
"""What stands in the name of a parameter -> its part; the first that is found counts, norms have none of them."""
_SHARED: Final = (type, ModuleType, FunctionType, BuiltinFunctionType)
"""What is everybody's: nothing that hangs on it belongs to a model."""


def weight_bytes(parameters: Parameters, models: Iterable[object]) -> dict[str, int]:
    """Bytes of weights on this rank by the parts of the plan.

    A parameter leads to the layer that took it and to the tensors that this made of it, in whatever layout. What the
    models hold besides are tables.
    """
    ledger = _Ledger()
    sizes: dict[str, int] = {}
    for name, parameter in parameters.items():
        part = f"weights: {part_of_parameter(name)}"
        sizes[part] = sizes.get(part, 0) + ledger.add(parameter)
    return sizes | {"position tables": sum(ledger.add(model) for model in models)}


def kv_bytes_by_group(groups: Sequence[GroupPlan], memory: Sequence[KVLayer]) -> dict[str, int]:
    """Bytes of the pools on this rank; `memory` has the layers of all groups in order of their numbers."""
    order = sorted(layer for group in groups for layer in group.layers)
    layers: Mapping[int, KVLayer] = dict(zip(order, memory, strict=True))
    return {f"KV: {one.name}": sum(layers[at].k.nbytes + layers[at].v.nbytes for at in one.layers) for one in groups}


def part_of_parameter(name: str) -> str:
    """Which part of the plan a parameter belongs to."""
    return next((part for words, part in PARTS if words in name), NORMS)


class _Ledger:
    """Tensors that were counted, by the memory they lie in."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._memory: set[int] = set()
        self._kept: list[object] = []

    def add(self, root: object) -> int:
        """Bytes of all tensors that can be reached from an object and were not counted before."""
        total, waiting = 0, [root]
        while waiting:
            here = waiting.pop()
            if id(here) in self._seen or isinstance(here, _SHARED):
                continue
            self._seen.add(id(here))
            self._kept.append(here)  # an object that goes away would leave its number to another one
            if isinstance(here, Tensor):
                storage = here.untyped_storage()
                if storage.data_ptr() not in self._memory:
                    self._memory.add(storage.data_ptr())
                    total += storage.nbytes()
            else:
                waiting += gc.get_referents(here)
        return total
