"""Draw what `benchmarks.step` measured over the least time that its bytes need, by batch size, as a picture.

    python -m benchmarks.plot docs/results/h200-steps.jsonl docs/pictures/steps.svg

A step must read every weight but the embedding once, of the routed experts those that its tokens chose: with C of E
drawn evenly for each of B tokens, E * (1 - (1 - C / E)^B) of them. Keys and values are left out, with short prompts
they are little.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.presets import write_preset
from srt.configs.models import read_config, read_facts
from srt.configs.plan import DeviceFacts
from srt.configs.resolve import resolve
from srt.configs.server import ServerConfig

H200: Final = DeviceFacts("cuda", "NVIDIA H200", 139 << 30, 16, 1)
UNREAD: Final = ("embedding", "vision", "mtp")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 860, 430, 60, 20, 190, 50
HIGHEST: Final = 2.25
"""Of the scale: times the floor."""
COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


@dataclass(frozen=True)
class Line:
    """Measured over floor by batch size."""

    name: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Weights:
    """Bytes of a preset that every step reads, those of all routed experts, and what share of these a token needs."""

    always: int
    routed: int
    share: float

    def floor_ms(self, rows: int, bandwidth: float, ranks: int = 1) -> float:
        """Milliseconds that the bytes of a step of `rows` rows need at `bandwidth` bytes a second on each rank."""
        touched = 1 - (1 - self.share) ** rows
        return (self.always + self.routed * touched) / bandwidth / ranks * 1e3


def weights_of(preset: str, form: str) -> Weights:
    """What the plan for a preset says of it."""
    with tempfile.TemporaryDirectory() as name:
        path = write_preset(Path(name), preset, form)
        server = ServerConfig(model_path=name, load_format="dummy", context_length=8192, max_running_requests=256)
        plan = resolve(server, read_facts(path, announced=True), H200)
        moe = read_config(path).text.moe
    parts = {part.removeprefix("weights: "): size for part, size in plan.memory.items() if part.startswith("weights: ")}
    routed = parts.pop("routed experts", 0)
    always = sum(size for part, size in parts.items() if part not in UNREAD)
    return Weights(always, routed, moe.chosen / moe.experts if moe else 0.0)


def lines_of(results: Sequence[dict[str, Any]], bandwidth: float) -> list[Line]:
    """One line for each result of a preset that decoded."""
    lines = []
    for result in results:
        options, decoded = result["options"], result["decode_step_ms"]
        ranks = options.get("tp_size", 1)
        if not options.get("preset") or len(decoded) < 2 or options.get("mtp"):
            continue
        weights = weights_of(options["preset"], options["format"])
        points = [
            (int(rows), figures["mean"] / weights.floor_ms(int(rows), bandwidth, ranks))
            for rows, figures in decoded.items()
        ]
        name = f"{options['preset']} {options['format']}" + (f", {ranks} GPUs" if ranks > 1 else "")
        lines.append(Line(name, points))
    return lines


def draw(lines: Sequence[Line]) -> str:
    """A picture in SVG that can be read on light and on dark ground."""
    batches = sorted({rows for line in lines for rows, _ in line.points})
    most = math.log2(max(batches)) or 1.0

    def x(rows: int) -> float:
        return LEFT + math.log2(rows) / most * (WIDTH - LEFT - RIGHT)

    def y(ratio: float) -> float:
        return TOP + (HIGHEST - ratio) / (HIGHEST - 1) * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
        ' font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for step in range(6):
        ratio = 1 + step * 0.25
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(ratio):.1f}" y2="{y(ratio):.1f}" stroke="#dddddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(ratio) + 4:.1f}" text-anchor="end">{ratio:g}</text>')
    for rows in batches:
        out.append(f'<text x="{x(rows):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{rows}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">rows of a step</text>')
    out.append(f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">times the floor</text>')
    for number, line in enumerate(lines):
        color, at = COLORS[number % len(COLORS)], TOP + 14 + 22 * number
        path = " ".join(f"{x(rows):.1f},{y(min(ratio, HIGHEST)):.1f}" for rows, ratio in line.points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        out += [
            f'<circle cx="{x(rows):.1f}" cy="{y(min(ratio, HIGHEST)):.1f}" r="3" fill="{color}"/>'
            for rows, ratio in line.points
        ]
        out.append(f'<rect x="{WIDTH - RIGHT + 14}" y="{at - 10}" width="12" height="12" fill="{color}"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 32}" y="{at + 1}">{line.name}</text>')
    return "\n".join([*out, "</svg>", ""])


def main() -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON lines of benchmarks.step")
    parser.add_argument("picture", type=Path, help="SVG file to write")
    parser.add_argument(
        "--bandwidth", type=float, default=4.3, help="TB/s of the floor (default %(default)s, an H200's)"
    )
    args = parser.parse_args()
    results = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    lines = lines_of(results, args.bandwidth * 1e12)
    args.picture.write_text(draw(lines), encoding="utf-8")
    for line in lines:
        print(f"{line.name:<24}" + "".join(f"{rows:>6}: {ratio:.2f}" for rows, ratio in line.points))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
