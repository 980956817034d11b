"""Records of steps where there is no GPU to record them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from srt.worker.device.graphs import Graphs


class Recorder(Graphs):
    """Records that compute again what they were made from, where it lay: what a GPU does when it plays them back."""

    def _captured(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        left = work()
        return lambda: put(work(), left), left


def put(found: Any, where: Any) -> None:
    """Write all tensors of a record into those of another."""
    if isinstance(found, Tensor):
        where.copy_(found.clone())
    elif isinstance(found, tuple):
        for one, its in zip(found, where, strict=True):
            put(one, its)
    elif is_dataclass(found):
        for field in fields(found):
            put(getattr(found, field.name), getattr(where, field.name))
