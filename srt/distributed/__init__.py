"""The tensor-parallel group as an object that is handed to layers; a group of one costs nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from srt.distributed.group import TensorGroup


def join_group(rank: int, size: int, directory: Path, device: torch.device | None = None) -> TensorGroup:
    """The group of `size` ranks that meet in `directory`; on GPUs if `device` is this rank's, else on the CPU."""
    if size == 1:
        return TensorGroup()
    if device is not None and device.type == "cuda":
        from srt.distributed.nccl import NcclGroup

        return NcclGroup(rank, size, directory / "tensor-group", device)
    from srt.distributed.gloo import GlooGroup

    return GlooGroup(rank, size, directory / "tensor-group")


__all__ = ["TensorGroup", "join_group"]
