"""The checkpoint that is converted: its tensors by name, and its routed experts one matrix at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from srt.configs.census import expert_formats
from srt.configs.models import read_config
from srt.configs.quant import published
from srt.configs.shards import TensorEntry, all_entries
from srt.configs.step3p7 import Step3p7Config
from srt.errors import StartupError
from srt.layers.quant.contract import StoredWeight
from srt.layers.quant.registry import format_of
from srt.models.registry import FAMILIES
from srt.weights.files import Item, Listed, Shards
from srt.weights.rules import Claim, RuleBook

PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "": "down_proj"}
"""Piece of the merged parameters -> projection of the checkpoint."""
FOREIGN_TOWER = ("vision_model.layers.", "vision_model.embeddings.", "multi_modal_projector.")
"""Names of the image tower that transformers gives the running model; its q and k rows are in another order."""


@dataclass
class Module:
    """One projection of a layer's routed experts: for each key of its format, tensors by expert (None: stacked)."""

    layer: int
    projection: str
    format: str
    tensors: dict[str, dict[int | None, tuple[str, Claim]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in the published spelling."""
        return f"model.layers.{self.layer}.moe.{self.projection}"


class Checkpoint:
    """A directory in any dialect. One shard is open at a time: its pages count as memory while it is.

    Raises: StartupError for everything that loading would refuse.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: Step3p7Config = read_config(directory)
        self.formats = expert_formats(directory, self.config)
        self.book: RuleBook = FAMILIES[self.config.model_type].rules(self.config, self.formats, 0)
        self.entries: dict[str, tuple[Path, TensorEntry]] = {}
        for path, entry in all_entries(directory):
            self.entries[entry.name] = path, entry
        self.listed = {listed.name: listed for listed in Shards(directory).names()}
        self._open: tuple[Path, Any] | None = None
        self.modules: dict[str, Module] = {}
        self.others: list[str] = []
        self._sort()

    def _sort(self) -> None:
        """Routed experts by module; everything else in the order of its bytes."""
        for name in self.entries:
            if published(name).startswith(FOREIGN_TOWER):
                raise StartupError(f"tensor {name} is in the spelling of transformers; convert reads published names")
            claims = self.book.claims(name)
            if len(claims) != 1:
                raise StartupError(f"tensor {name} in {self.entries[name][0].name} is claimed by {len(claims)} rules")
            target = claims[0].target or ""
            if ".experts." not in target:
                self.others.append(name)
                continue
            layer, key = int(target.split(".")[1]), target.rsplit(".", 1)[1]
            for piece in claims[0].rule.pieces:
                module = Module(layer, PROJECTIONS[piece], self.formats[layer])
                module = self.modules.setdefault(module.name, module)
                module.tensors.setdefault(key, {})[claims[0].item] = name, claims[0]

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def expert(self, module: Module, expert: int) -> StoredWeight:
        """One expert's matrix as it is stored."""
        tensors = {}
        for key, places in module.tensors.items():
            stacked = None in places
            name, claim = places[None if stacked else expert]
            file = self._file(name)
            tensor = file.get_slice(name)[expert : expert + 1][0] if stacked else file.get_tensor(name)
            if len(claim.rule.pieces) > 1:
                half = [PROJECTIONS[piece] for piece in claim.rule.pieces].index(module.projection)
                tensor = tensor.chunk(len(claim.rule.pieces), dim=claim.rule.axis - 1)[half]
            tensors[key] = tensor.float().reciprocal() if claim.rule.reciprocal else tensor
        assert self.config.text.moe is not None
        width, hidden = self.config.text.moe.width, self.config.text.hidden_size
        shape = (hidden, width) if module.projection == "down_proj" else (width, hidden)
        grids = format_of(module.format, torch.float32).grids()
        fitted = {key: tensors[key].reshape(grid.shape(shape)) for key, grid in grids.items()}
        return StoredWeight(shape, fitted)

    def layer(self, prefix: str) -> LayerSource:
        """The tensors whose parameters begin with `prefix`."""
        wanted = {}
        for name, listed in self.listed.items():
            (claim,) = self.book.claims(name)
            if claim.target is not None and claim.target.startswith(prefix):
                wanted[name] = listed
        return LayerSource(self, wanted)

    def close(self) -> None:
        """Let go of the open shard."""
        self._open = None

    def _file(self, name: str) -> Any:
        path = self.entries[name][0]
        if self._open is None or self._open[0] != path:
            self._open = path, safe_open(str(path), framework="pt")
        return self._open[1]


class LayerSource:
    """Some tensors of a checkpoint, as `srt.weights.load` reads them."""

    def __init__(self, checkpoint: Checkpoint, listed: dict[str, Listed]) -> None:
        self._checkpoint, self._listed = checkpoint, listed

    def names(self) -> list[Listed]:
        return list(self._listed.values())

    def items(self) -> Iterator[Item]:
        for listed in self._listed.values():
            yield Item(listed.name, listed.bytes, lambda name=listed.name: self._checkpoint.read(name))  # type: ignore[misc]
