"""One schema for all benchmark results: what ran, where, on which commit, and the figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def percentile(values: Sequence[float], share: float) -> float | None:
    """Linear interpolation between the nearest ranks; None without values."""
    if not values:
        return None
    ranked = sorted(values)
    position = (len(ranked) - 1) * share
    low = int(position)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (position - low)


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float | None]:
    """Mean, median, 90th and 99th percentile, times `scale`."""
    figures = {f"p{int(share * 100)}": percentile(values, share) for share in (0.5, 0.9, 0.99)}
    figures["mean"] = sum(values) / len(values) if values else None
    return {name: None if value is None else round(value * scale, 3) for name, value in figures.items()}


def context() -> dict[str, Any]:
    """Commit, machine and command line."""
    here = Path(__file__).resolve().parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    model = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "commit": described.stdout.strip() or "unknown",
        "command": " ".join(sys.argv),
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def append(path: Path, result: dict[str, Any]) -> None:
    """Add a result to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
