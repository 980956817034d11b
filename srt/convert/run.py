"""The conversion itself: everything that stays is copied, routed experts are encoded anew, matrix by matrix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from srt.configs.census import PLAIN
from srt.configs.models import read_json
from srt.configs.quant import published
from srt.configs.step3p7 import part_of
from srt.convert.calibrate import Ranges, calibrate
from srt.convert.layout import SUFFIXES, hf_quant_config, kv_scale_name, output_config, output_name
from srt.convert.source import Checkpoint, Module
from srt.convert.writer import SHARD_BYTES, ShardWriter
from srt.errors import StartupError
from srt.layers.quant.codes import E4M3_MAX
from srt.layers.quant.contract import StoredWeight, WeightFormat
from srt.layers.quant.fp8 import Fp8Blocks
from srt.layers.quant.nvfp4 import INPUT_SCALE, Nvfp4, reach_scale
from srt.layers.quant.plain import Plain
from srt.layers.quant.registry import format_of

FORMATS: dict[str, WeightFormat] = {"bf16": Plain(torch.bfloat16), "fp8": Fp8Blocks(), "nvfp4": Nvfp4()}
_SAME = {"fp8": "fp8", "nvfp4": "nvfp4", "bf16": PLAIN}
_LEFT = (".safetensors", ".py")
"""Files that are not copied beside the new shards, by ending: weights, and code."""
_WRITTEN = ("config.json", "hf_quant_config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Request:
    """What to convert. `sequences` are token ids to measure activations with; only nvfp4 needs them."""

    source: Path
    target: Path
    format: str
    keep_mtp: bool = True
    sequences: Sequence[Sequence[int]] = ()
    device: str = "cpu"
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class ModuleError:
    """How far the new numbers of a module are from the old ones, relative to their norm."""

    name: str
    relative: float
    worst: float
    worst_expert: int


@dataclass
class Report:
    """What came of it: an error for each module that was encoded, bytes before and after, what was measured."""

    errors: list[ModuleError] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    ranges: dict[int, Ranges] = field(default_factory=dict)


Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""


def convert(request: Request, progress: Progress) -> Report:
    """Write the checkpoint in another format.

    Raises: StartupError if the source cannot be read, or the target is not an empty place.
    """
    checkpoint = Checkpoint(request.source)
    _claim(request.target, checkpoint)
    report = Report(bytes_before=sum(entry.bytes for _, entry in checkpoint.entries.values()))
    coded = all(name == _SAME[request.format] for name in checkpoint.formats.values())
    if request.format == "nvfp4" and not coded:
        layers = len(checkpoint.config.text.layers)
        device = torch.device(request.device)
        report.ranges = calibrate(
            checkpoint, request.sequences, device, lambda layer: progress("measure", layer + 1, layers)
        )
    writer = ShardWriter(request.target, request.shard_bytes)
    work = _Work(request, checkpoint, report)
    done = 0
    for size, tensors in work.steps():
        for name, tensor in tensors:
            writer.add(name, tensor)
        done += size
        progress("convert", done, report.bytes_before)
    writer.finish()
    _write_configs(request, checkpoint)
    report.bytes_after = writer.total_bytes
    return report


class _Work:
    """The tensors of the new checkpoint, in an order that reads the old one once."""

    def __init__(self, request: Request, checkpoint: Checkpoint, report: Report) -> None:
        self._request, self._checkpoint, self._report = request, checkpoint, report
        self._format = FORMATS[request.format]

    def steps(self) -> Iterator[tuple[int, Iterator[tuple[str, Tensor]]]]:
        """Bytes read, and what they become."""
        for name in kept_names(self._request, self._checkpoint, measured=bool(self._report.ranges)):
            yield self._checkpoint.entries[name][1].bytes, self._copy(name)
        for module in self._checkpoint.modules.values():
            names = {name for places in module.tensors.values() for name, _ in places.values()}
            size = sum(self._checkpoint.entries[name][1].bytes for name in names)
            yield size, self._module(module)
            self._checkpoint.close()
        for layer, ranges in self._report.ranges.items():
            yield 0, self._kv_scales(layer, ranges)

    def _copy(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """A tensor that stays as it is stored."""
        yield output_name(name, self._request.format), self._checkpoint.read(name)

    def _kv_scales(self, layer: int, ranges: Ranges) -> Iterator[tuple[str, Tensor]]:
        for kind, largest in (("k", ranges.keys), ("v", ranges.values)):
            yield kv_scale_name(layer, kind), torch.tensor(max(largest, 1e-6) / E4M3_MAX)

    def _module(self, module: Module) -> Iterator[tuple[str, Tensor]]:
        """All tensors of one projection, stacked."""
        moe = self._checkpoint.config.text.moe
        assert moe is not None
        encoded: dict[str, Tensor] = {}
        errors = []
        for expert in range(moe.experts):
            old = self._checkpoint.expert(module, expert)
            new, error = self._encode(module, old, expert)
            errors.append(error)
            for key, tensor in new.tensors.items():
                if key not in encoded:
                    encoded[key] = torch.empty((moe.experts, *tensor.shape), dtype=tensor.dtype)
                encoded[key][expert] = tensor
        relative = torch.tensor(errors, dtype=torch.float64)
        norms, misses = relative.unbind(1)
        ratio = misses.div(norms.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
        whole = float((misses.sum() / norms.sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt())
        self._report.errors.append(ModuleError(module.name, whole, float(ratio.max()), int(ratio.argmax())))
        for key, tensor in encoded.items():
            flat = tensor[:, 0] if tensor.dim() == 2 else tensor  # one number an expert is stored as [E]
            name = f"{output_name(module.name, self._request.format)}.{SUFFIXES[self._request.format][key]}"
            yield name, flat

    def _encode(self, module: Module, old: StoredWeight, expert: int) -> tuple[StoredWeight, tuple[float, float]]:
        """One matrix in the new format; (sum of squares, sum of squared misses)."""
        if module.format == _SAME[self._request.format] and module.format != PLAIN:
            return old, (1.0, 0.0)
        device = torch.device(self._request.device)
        before = format_of(module.format, torch.float32).unpack(
            StoredWeight(old.shape, {key: tensor.to(device) for key, tensor in old.tensors.items()})
        )
        try:
            packed = self._format.pack(before)
        except ValueError as error:
            raise StartupError(f"{module.name}, expert {expert}: {error}") from error
        tensors = dict(packed.tensors)
        if self._request.format == "nvfp4":
            ranges = self._report.ranges[module.layer]
            largest = ranges.down if module.projection == "down_proj" else ranges.gate_up
            tensors[INPUT_SCALE] = reach_scale(largest[expert : expert + 1])
        missed = (self._format.unpack(packed) - before).double().square().sum()
        return StoredWeight(old.shape, tensors), (float(before.double().square().sum()), float(missed))


def kept_names(request: Request, checkpoint: Checkpoint, *, measured: bool) -> list[str]:
    """Tensors that are copied: everything but routed experts and, if asked, MTP modules.

    Scales of FP8 keys and values belong to the nvfp4 layout alone, and give way to newly measured ones.
    """
    layers = checkpoint.config.text.main_layers
    names = checkpoint.others
    if measured or request.format != "nvfp4":
        names = [name for name in names if not name.endswith((".k_scale", ".v_scale"))]
    return [name for name in names if request.keep_mtp or part_of(name, layers) != "mtp"]


def _claim(target: Path, checkpoint: Checkpoint) -> None:
    """Make the target directory, and copy what lies beside the weights."""
    if target.resolve() == checkpoint.directory.resolve():
        raise StartupError(f"--output {target} is the checkpoint itself")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StartupError(f"--output {target} is there already and not an empty directory")
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(checkpoint.directory.iterdir()):
        if path.is_file() and path.suffix not in _LEFT and path.name not in _WRITTEN:
            shutil.copy(path, target / path.name)


def _write_configs(request: Request, checkpoint: Checkpoint) -> None:
    """config.json last: a directory without it is not yet a checkpoint."""
    kept = kept_names(request, checkpoint, measured=True)
    modules = sorted({published(name).removesuffix(".weight") for name in kept if _is_matrix(checkpoint, name)})
    if request.format == "nvfp4":
        _write_json(request.target / "hf_quant_config.json", hf_quant_config(modules))
    raw = read_json(checkpoint.directory / "config.json").values()
    text = checkpoint.config.text
    _write_json(
        request.target / "config.json", output_config(raw, text, request.format, modules, keep_mtp=request.keep_mtp)
    )


def _is_matrix(checkpoint: Checkpoint, name: str) -> bool:
    return name.endswith(".weight") and len(checkpoint.entries[name][1].shape) == 2


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
