"""What the start-up table says of a rank, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from srt.configs.plan import RuntimePlan
from srt.layers.moe.backends import RunnerChoice
from srt.layers.parameter import Parameters
from srt.weights.load import LoadReport


def expert_facts(experts: Mapping[int, RunnerChoice], formats: Mapping[int, str]) -> dict[str, str]:
    """Lines of the start-up table: which layers run their experts how, and why."""
    lines: dict[str, list[int]] = {}
    for layer, choice in experts.items():
        lines.setdefault(f"{choice.name}, weights {formats[layer]} ({choice.reason})", []).append(layer)
    if len(lines) == 1:
        return {"experts": next(iter(lines))}
    return {f"experts of {_spans(layers)}": line for line, layers in lines.items()}


def _spans(layers: Sequence[int]) -> str:
    """ "layers 3-42"."""
    first, last = layers[0], layers[-1]
    dense = list(layers) == list(range(first, last + 1))
    return f"layers {first}-{last}" if dense else f"layers {', '.join(map(str, layers))}"


def kv_scales(plan: RuntimePlan, parameters: Parameters) -> str:
    """What stored keys and values are multiplied with; only said where they are codes."""
    if plan.kv_dtype != "fp8_e4m3":
        return ""
    scales = [name for name in parameters if name.endswith((".k_scale", ".v_scale"))]
    found = sum(parameters[name].missing("") == [] for name in scales)
    if found == len(scales):
        return ", scales from the checkpoint"
    return f", {found} of {len(scales)} scales from the checkpoint, 1.0 for the others"


def loaded(report: LoadReport) -> str:
    """ "text 229.3 MB (left on disk: mtp 47.6 MB)"."""
    sizes = {part: f"{part} {size / 1e6:.1f} MB" for part, size in sorted(report.bytes.items())}
    read = ", ".join(text for part, text in sizes.items() if part in report.read)
    left = ", ".join(text for part, text in sizes.items() if part not in report.read)
    return f"{read} (left on disk: {left})" if left else read
