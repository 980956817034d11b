"""A checkpoint that cannot be served ends the start with one sentence, soon, and nothing was started."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import write_checkpoint
from tests.support.quantised import quantise

GATE = "model.layers.2.moe.gate_proj.weight"
SECONDS = 5.0


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def tensors(checkpoint: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = checkpoint / "model-00001-of-00001.safetensors"
    content = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(content)
    save_file(content, str(path))


def config(checkpoint: Path, **quantisation: object) -> None:
    path = checkpoint / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] |= quantisation
    path.write_text(json.dumps(content))


BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a shard cut short": (truncate, ("model-00001-of-00001.safetensors is cut short",)),
    "a missing scale": (
        lambda c: tensors(c, lambda t: t.pop(f"{GATE}_scale_inv")),
        (f"{GATE}_scale_inv is missing", "model-00001-of-00001.safetensors"),
    ),
    "codes of another dtype": (
        lambda c: tensors(c, lambda t: t.update({GATE: t[GATE].view(torch.int8)})),
        (f"{GATE} in model-00001-of-00001.safetensors has dtype I8",),
    ),
    "blocks of another size": (
        lambda c: tensors(c, lambda t: t.update({f"{GATE}_scale_inv": torch.ones(8, 4, 2)})),
        (f"{GATE}_scale_inv in model-00001-of-00001.safetensors has shape [8, 4, 2]",),
    ),
    "another size announced": (lambda c: config(c, weight_block_size=[64, 64]), ("weight_block_size is [64, 64]",)),
    "codes that were not announced": (
        lambda c: config(c, modules_to_not_convert=["model.layers.2.moe.gate_proj"]),
        (f"{GATE} in model-00001-of-00001.safetensors has dtype F8_E4M3, but config.json lists",),
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), vocab=512, hidden=128, expert_width=256)


@pytest.mark.parametrize("fault", BROKEN)
def test_the_sentence_names_tensor_and_file_and_nothing_was_started(plain: Path, tmp_path: Path, fault: str) -> None:
    breaks, words = BROKEN[fault]
    checkpoint = quantise(plain, tmp_path / "broken", "fp8")
    breaks(checkpoint)
    home = tmp_path / "run"
    home.mkdir()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "srt.cli", "launch", "--model-path", str(checkpoint), "--port", "0"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "TMPDIR": str(home)}, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 1
    assert done.stderr.startswith("server: error: ")
    for word in words:
        assert word in done.stderr
    assert "weights: " not in done.stderr, "no table, no process"
    assert list(home.iterdir()) == [], "the directory of a server is gone"
    # Of the processor, all descendants included: on a machine that does other things too, the clock says nothing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
