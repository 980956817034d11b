"""In which format the routed experts of each layer are stored, from the shards' headers alone.

The tensors decide, module by module: their dtypes name the format, the scales beside them must be complete and of the
right size, and the checkpoint's own description must not contradict them. Everything else must be plain numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from srt.configs.quant import QuantConfig, published
from srt.configs.shards import TensorEntry, all_entries
from srt.configs.step3p7 import Step3p7Config
from srt.errors import StartupError

PLAIN: Final = "plain"
PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")
_PLAIN_DTYPES: Final = ("BF16", "F16", "F32")
_EXPERT = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?P<stack>moe|moe\.experts|mlp\.experts)\."
    r"(?:(?P<expert>\d+)\.)?(?P<projection>gate_proj|up_proj|down_proj|gate_up_proj)(?:\.(?P<kind>\w+))?"
)
_WEIGHTS: Final = ("weight", "weight_packed", "")
"""Kinds of tensor that hold the numbers themselves; HF's stacked tensors have no such word in their name."""


@dataclass(frozen=True)
class _Scale:
    """A tensor that must lie beside a weight: its key among the format's tensors, its names by producer, dtypes, and
    values of the matrix per entry (0: one entry for the matrix)."""

    key: str
    names: Mapping[str, str]
    dtypes: tuple[str, ...]
    rows: int
    columns: int

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape for a matrix; () for one number."""
        if not self.rows:
            return ()
        return (-(-rows // self.rows), -(-columns // self.columns))


_MATRIX = {"modelopt": "weight_scale_2", "compressed-tensors": "weight_global_scale"}
_INPUT = {"modelopt": "input_scale", "compressed-tensors": "input_global_scale"}
_GROUPED = (
    _Scale("group_scale", {"modelopt": "weight_scale", "compressed-tensors": "weight_scale"}, ("F8_E4M3",), 1, 16),
    _Scale("matrix_scale", _MATRIX, ("F32",), 0, 0),
)
SCALES: Final = {
    "fp8": (
        _Scale(
            "block_scale", {"fp8": "weight_scale_inv", "compressed-tensors": "weight_scale"}, _PLAIN_DTYPES, 128, 128
        ),
    ),
    "nvfp4": (*_GROUPED, _Scale("input_scale", _INPUT, ("F32",), 0, 0)),
    "nvfp4-a16": _GROUPED,
    PLAIN: (),
}
"""Scales of each format."""
_CODES: Final = {"F8_E4M3": "fp8", "U8": "nvfp4"}


@dataclass
class _Module:
    """One projection, of all experts of a layer or of one: its tensors by kind, each with the file it lies in."""

    name: str
    layer: int
    projection: str
    expert: int | None
    tensors: dict[str, tuple[str, TensorEntry]] = field(default_factory=dict)

    @property
    def weight(self) -> tuple[str, TensorEntry] | None:
        """File and entry of the numbers themselves."""
        for kind in _WEIGHTS:
            if kind in self.tensors:
                return self.tensors[kind]
        return None


def expert_formats(directory: Path, config: Step3p7Config) -> dict[int, str]:
    """Layer -> `plain`, `fp8`, `nvfp4` or `nvfp4-a16`, for each layer with routed experts.

    Raises: StartupError that lists each tensor that is missing, of a wrong dtype or size, or at odds with
        config.json, with its file.
    """
    modules, problems = _collect(all_entries(directory))
    formats: dict[int, str] = {}
    for module in modules:
        found, wrong = _judge(module, config)
        problems += wrong
        known = formats.setdefault(module.layer, found)
        if known != found and not wrong:
            problems.append(f"layer {module.layer} has experts in {known} and, in {module.name}, in {found}")
    if config.quant is not None and formats and set(formats.values()) == {PLAIN}:
        problems.append(
            f"config.json says that routed experts are stored in {config.quant.format}, all of them are plain numbers"
        )
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise StartupError(f"the checkpoint's quantisation is broken, {len(problems)} problem(s):{listed}")
    return formats


def announced_formats(config: Step3p7Config) -> dict[int, str]:
    """The same from config.json alone, for weights that are made up: all routed experts alike."""
    name = PLAIN if config.quant is None else config.quant.format
    return {layer.index: name for layer in config.text.layers if layer.routed}


def _collect(entries: Iterable[tuple[Path, TensorEntry]]) -> tuple[list[_Module], list[str]]:
    """Routed experts by module; and complaints about codes anywhere else."""
    modules: dict[str, _Module] = {}
    problems: list[str] = []
    for path, entry in entries:
        match = _EXPERT.fullmatch(published(entry.name))
        if match is None:
            if entry.dtype not in _PLAIN_DTYPES:
                problems.append(
                    f"{entry.name} in {path.name} has dtype {entry.dtype}: only routed experts may be quantised"
                )
            continue
        kind = match["kind"] or ""
        name = entry.name.removesuffix("." + kind) if kind else entry.name
        expert = None if match["expert"] is None else int(match["expert"])
        module = modules.setdefault(name, _Module(name, int(match["layer"]), match["projection"], expert))
        module.tensors[kind] = (path.name, entry)
    return list(modules.values()), problems


def _judge(module: _Module, config: Step3p7Config) -> tuple[str, list[str]]:
    """Format of a module and what is wrong with it."""
    if module.weight is None:
        file, _ = next(iter(module.tensors.values()))
        return PLAIN, [f"{module.name}.weight is missing, its scales are in {file}"]
    file, entry = module.weight
    at = f"{entry.name} in {file}"
    if entry.dtype in _PLAIN_DTYPES:
        return PLAIN, []
    found = _CODES.get(entry.dtype)
    quant = config.quant
    if found is None:
        return PLAIN, [f"{at} has dtype {entry.dtype}, expected one of {', '.join((*_PLAIN_DTYPES, *_CODES))}"]
    if quant is None:
        return found, [f"{at} has dtype {entry.dtype}, but config.json has no quantization_config"]
    if quant.format.split("-")[0] != found:
        return found, [f"{at} has dtype {entry.dtype}, but config.json says {quant.format}"]
    if published(module.name) in quant.ignored:
        return found, [f"{at} has dtype {entry.dtype}, but config.json lists {module.name} as not quantised"]
    return quant.format, _wrong_sizes(module, file, entry, config, quant)


def _wrong_sizes(
    module: _Module, file: str, entry: TensorEntry, config: Step3p7Config, quant: QuantConfig
) -> list[str]:
    """What is wrong with the tensors of a quantised module."""
    moe, hidden = config.text.moe, config.text.hidden_size
    assert moe is not None
    matrix = (hidden, moe.width) if module.projection == "down_proj" else (moe.width, hidden)
    stack = () if module.expert is not None else (moe.experts,)
    packed = 2 if quant.format.startswith("nvfp4") else 1
    problems = []
    expected = (*stack, matrix[0], matrix[1] // packed)
    if entry.shape != expected:
        problems.append(f"{entry.name} in {file} has shape {list(entry.shape)}, expected {list(expected)}")
    for scale in SCALES[quant.format]:
        kind = scale.names[quant.producer]
        if kind not in module.tensors:
            problems.append(f"{module.name}.{kind} is missing, {entry.name} is in {file}")
            continue
        place, found = module.tensors[kind]
        wanted = (*stack, *scale.shape(*matrix))
        if found.shape not in (wanted, (*wanted, 1)):
            problems.append(f"{found.name} in {place} has shape {list(found.shape)}, expected {list(wanted)}")
        if found.dtype not in scale.dtypes:
            allowed = ", ".join(scale.dtypes)
            problems.append(f"{found.name} in {place} has dtype {found.dtype}, expected {allowed}")
    return problems
