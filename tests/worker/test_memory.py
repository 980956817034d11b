"""What a worker holds is what was planned, part by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from srt.configs.device import read_device
from srt.configs.models import checkpoint_directory, read_facts
from srt.configs.resolve import resolve
from srt.configs.server import ServerConfig
from srt.convert.run import Request, convert
from srt.worker.memory import weight_bytes
from srt.worker.startup import start

TOLERANCE = 0.03


def measured_and_planned(model: Path, rundir: Path, **options: Any) -> dict[str, tuple[int, int]]:
    """Bytes of each part that a worker holds, and those of the plan."""
    server = ServerConfig(model_path=str(model), **options)
    device = msgspec.structs.replace(read_device("cpu"), memory_bytes=4 << 30)
    plan = resolve(server, read_facts(model), device)
    started = start(plan, rundir, 0, lambda done, total: None)
    assert started.memory.keys() == plan.memory.keys() - {"image features"}
    return {part: (size, plan.memory[part]) for part, size in started.memory.items()}


@pytest.mark.parametrize("form", ["bf16", "fp8", "nvfp4"])
def test_every_part_is_within_3_percent_of_the_plan(tmp_path: Path, form: str) -> None:
    torch.set_num_threads(1)
    model = checkpoint_directory("builtin:tiny")
    if form != "bf16":
        convert(Request(model, tmp_path / form, form, sequences=[[5, 6, 7]]), lambda stage, done, total: None)
        model = tmp_path / form
    kv = {} if form == "bf16" else {"kv_cache_dtype": "fp8_e4m3"}
    parts = measured_and_planned(model, tmp_path, speculative_algorithm="mtp", **kv)
    assert {"weights: routed experts", "weights: mtp", "weights: vision", "KV: full", "KV: draft"} <= parts.keys()
    off = {part: size / planned - 1 for part, (size, planned) in parts.items()}
    assert all(abs(error) < TOLERANCE for error in off.values()), off


def test_memory_is_counted_once_however_many_hold_it() -> None:
    whole = torch.zeros(1000, dtype=torch.float32)
    assert weight_bytes({}, [[whole, whole[10:20], {"again": whole}], (whole,)]) == {"position tables": 4000}
