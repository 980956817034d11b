"""Kernels that a start compiles before they are needed. No GPU is needed to know which: only to launch them."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from msgspec import structs
from triton import knobs
from triton.backends.compiler import GPUTarget

from benchmarks.kernels import DRIVER, built
from srt.distributed import TensorGroup
from srt.worker.device.ahead import Ahead, Note, Shape, Target, doubling, quarters
from srt.worker.device.passes import Passes
from srt.worker.startup import Built, note_of
from tests.support.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[3]

BROKEN_ASSEMBLER = """#!/bin/sh
[ "$1" = --version ] && exec echo "Cuda compilation tools, release 12.8, V12.8.93"
exit 1
"""


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a tool in a process of its own, where Triton compiles."""
    return python("-m", f"benchmarks.{tool}", *arguments)


def python(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run Python where kernels are compiled, not interpreted, with changes to the environment."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | changes
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def compiling(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Have kernels compiled by copies of a process, as a worker does."""
    return python("-m", "tests.support.compiling", *arguments, **changes)


def test_copies_compile_each_kernel_once_and_a_later_start_finds_them_without_asking_a_gpu(tmp_path: Path) -> None:
    model, cache = str(write_checkpoint(tmp_path / "tiny")), tmp_path / "cache"
    (tmp_path / "built").mkdir()
    told = compiling(model, str(tmp_path / "built"), "launchers", "later", "later", TRITON_CACHE_DIR=str(cache))
    assert told.returncode == 0, told.stdout + told.stderr
    first, later, again, needed = told.stdout.splitlines()
    count = int(needed)
    launchers = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "built").iterdir()}
    done = sum(launchers.values())
    assert 10 < done < count and "norm_kernel" not in launchers, "what launches those cannot be built"
    assert first.startswith(f"{done} of {count} compiled in "), told.stdout
    assert f"{count - done} kernels of {count} cannot be compiled" in told.stderr
    assert told.stderr.count("OSError: no compiler for launchers") == 1  # however many
    assert later.startswith(f"0 of {count} compiled in "), told.stdout
    assert again == f"{count}, all in {cache}"
    assert len(list(cache.glob("srt-*"))) == 1, "not of the start that failed"


def test_a_kernel_that_is_not_declared_is_not_launched_on_tensors_without_memory(tmp_path: Path) -> None:
    told = compiling("undeclared", TRITON_CACHE_DIR=str(tmp_path))
    assert told.stdout.startswith("when they are first launched: TypeError: "), told.stdout + told.stderr
    assert told.stdout.strip().endswith("undeclared_kernel is not declared with srt.layers.cuda.jit")
    assert not list(tmp_path.glob("srt-*"))


def test_the_note_of_a_start_is_of_all_that_decides_on_kernels(tmp_path: Path) -> None:
    model = str(write_checkpoint(tmp_path / "tiny"))
    made = built(model, announced=False, kv_dtype="auto", mtp=False)
    shapes = [Shape(1, 1)]

    def server(**changes: object) -> Built:
        return replace(made, plan=structs.replace(made.plan, server=structs.replace(made.plan.server, **changes)))

    class Group(TensorGroup):
        rank, size = 1, 2

    others = [
        note_of(server(ep_size=2), shapes, DRIVER),
        note_of(replace(made, group=Group()), shapes, DRIVER),
        note_of(replace(made, plan=structs.replace(made.plan, dtype="float32")), shapes, DRIVER),
        note_of(replace(made, plan=structs.replace(made.plan, kv_dtype="fp8_e4m3")), shapes, DRIVER),
        note_of(made, [Shape(2, 1)], DRIVER),
        note_of(made, shapes, Target(GPUTarget("cuda", 89, 32))),
    ]
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        note_of(made, shapes, DRIVER).write("123")
        assert note_of(server(port=1, random_seed=7), shapes, DRIVER).read() == "123"
        assert note_of(replace(made, group=TensorGroup()), shapes, DRIVER).read() == "123"
    assert [note.read() for note in others] == [None] * len(others)


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
    told = compiling(model, "-", "first", **changes)
    *_, last, count = told.stdout.splitlines()
    assert last.startswith(f"0 of {count} compiled in "), told.stdout + told.stderr
    assert f"{count} kernels of {count} cannot be compiled" in told.stderr
    assert not list(tmp_path.glob("srt-*"))


def test_a_full_disk_costs_a_start_its_note_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str, encoding: str) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        note = Note("a model")
        note.write("123")
    assert "No space left on device" in caplog.text
    assert note.read() is None and not list(tmp_path.iterdir())


def test_sizes_are_as_many_as_there_are_kernels_for() -> None:
    assert doubling(12) == [1, 2, 3, 4, 5, 8, 9, 12]
    assert list(quarters(20)) == [2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20]
