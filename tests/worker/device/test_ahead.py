"""Kernels that a start compiles before they are needed. No GPU is needed to know which: only to launch them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton import knobs

from benchmarks.kernels import DRIVER
from srt.worker.device.ahead import Ahead, Note, doubling, quarters
from srt.worker.device.passes import Passes
from tests.support.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[3]

BROKEN_ASSEMBLER = """#!/bin/sh
[ "$1" = --version ] && exec echo "Cuda compilation tools, release 12.8, V12.8.93"
exit 1
"""

COMPILE_A_STEP = """
import sys
from functools import partial

from triton.runtime import driver

from benchmarks.kernels import DRIVER, built
from benchmarks.kernels import DRIVER
from srt.worker.device.ahead import Ahead, Note, Shape
from srt.worker.startup import passes_without_memory

driver.set_active(DRIVER)
model, *starts = sys.argv[1:]
build = partial(passes_without_memory, built(model, announced=False, kv_dtype="auto", mtp=False))
for start in starts:
    print(Ahead(build, [Shape(1, 1)], Note(start), DRIVER, 2).result())
"""


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a tool in a process of its own, where Triton compiles."""
    return python("-m", f"benchmarks.{tool}", *arguments)


def python(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run Python where kernels are compiled, not interpreted, with changes to the environment."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | changes
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_copies_of_a_process_compile_each_kernel_once_and_a_later_start_finds_them(tmp_path: Path) -> None:
    model = str(write_checkpoint(tmp_path / "tiny"))
    told = python("-c", COMPILE_A_STEP, model, "first", "second", "first", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert told.returncode == 0, told.stdout + told.stderr
    first, second, again = told.stdout.splitlines()
    count = int(first.split()[0])
    assert count > 10 and first.startswith(f"{count} of {count} compiled in "), told.stdout
    assert second.startswith(f"0 of {count} compiled in "), told.stdout
    assert again == f"{count}, all in {tmp_path / 'cache'}"


def test_steps_of_any_number_of_tokens_need_no_kernels_but_those_of_the_start(tmp_path: Path) -> None:
    told = run("kernels", "--model-path", str(write_checkpoint(tmp_path / "tiny")), "--mtp", "--every", "33")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "needed beside" not in told.stdout
    counts = {line.split()[0]: int(line.split()[1]) for line in told.stdout.splitlines()}
    assert counts["attend_kernel"] > 1 and counts["gate_up_kernel"] > 1 and counts["begin_kernel"] == 3


@pytest.mark.parametrize("model", ["slice8 --format fp8", "full45 --format nvfp4 --mtp"])
def test_the_largest_step_takes_what_is_planned(model: str) -> None:
    told = run("workspace", "--preset", *model.split())
    assert told.returncode == 0, told.stdout + told.stderr
    lines = dict(line.split(maxsplit=1) for line in told.stdout.splitlines())
    assert abs(float(lines["off"].rstrip("%"))) < 3, told.stdout


def test_every_kernel_that_is_launched_can_be_compiled_ahead() -> None:
    sources = [path for folder in ("srt", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [re.findall(r"^@(\S+?)[(\s](?:[^@]*?)^def (\w+_kernel)\(", path.read_text(), re.M) for path in sources]
    declared = [pair for pairs in found for pair in pairs]
    assert len(declared) > 15
    assert {decorator for decorator, _ in declared} == {"jit"}, declared


def test_a_start_that_finds_its_note_compiles_nothing(tmp_path: Path) -> None:
    def build() -> Passes:
        raise AssertionError("nothing is asked for")

    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        note = Note("a model", 1)
        note.write("123")
        assert Note("a model", 1).read() == "123" and Note("a model", 2).read() is None
        assert Ahead(build, [], note, DRIVER, 1).result() == f"123, all in {tmp_path}"


def test_a_start_goes_on_where_nothing_can_be_compiled_ahead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def build() -> Passes:
        raise RuntimeError("no compiler")

    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        note = Note("a model")
        told = Ahead(build, [], note, DRIVER, 2).result()
    assert told == "when they are first launched: RuntimeError: no compiler"
    assert "not compiled ahead" in caplog.text
    assert note.read() is None


def test_a_kernel_that_cannot_be_compiled_is_told_and_leaves_no_note(tmp_path: Path) -> None:
    model = str(write_checkpoint(tmp_path / "tiny"))
    assembler = tmp_path / "ptxas"
    assembler.write_text(BROKEN_ASSEMBLER)
    assembler.chmod(0o755)
    changes = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_PTXAS_PATH": str(assembler)}
    told = python("-c", COMPILE_A_STEP, model, "first", **changes)
    last = told.stdout.splitlines()[-1]
    count = int(last.split()[2])
    assert last.startswith(f"0 of {count} compiled in "), told.stdout + told.stderr
    assert f"{count} kernels of {count} cannot be compiled" in told.stderr
    assert not list(tmp_path.glob("srt-*"))


def test_sizes_are_as_many_as_there_are_kernels_for() -> None:
    assert doubling(12) == [1, 2, 3, 4, 5, 8, 9, 12]
    assert list(quarters(20)) == [2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20]
