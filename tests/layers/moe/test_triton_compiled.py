"""What the compiler makes of the experts' kernels. No GPU is needed to read it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from srt.layers.moe.triton_experts import FIRST_FP8

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from srt.layers.moe.triton_kernels import NVFP4, SORTED, down_kernel
from srt.layers.moe.triton_tiles import tiles_for

width, pairs, capability = map(int, sys.argv[1:])
hopper = capability == 90
tiles = tiles_for(NVFP4.value, pairs, 288, hopper)
tile = tiles.down
constants = dict(
    EXPERTS=288, WIDTH=width, HIDDEN=4096, KIND=NVFP4.value, MODE=SORTED.value, ROWS=tiles.rows, COLUMNS=tile.columns,
    STEP=tile.step, PACKED=True, TMA=False, JOINED=tile.joined, PDL=hopper,
)
given = dict(w="*i16", w_scale="*i32", matrix="*fp32", inner="*bf16", inner_scale="*bf16", out="*bf16", pairs="i32")
names = down_kernel.arg_names
signature = {name: "constexpr" if name in constants else given.get(name, "*i32") for name in names}
aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if signature[name].startswith("*")}
source = ASTSource(down_kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
options = dict(num_warps=tile.warps, num_stages=tile.stages, launch_pdl=hopper)
print(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"])
"""


def compiled(width: int, pairs: int, capability: int = 90) -> str:
    """The down kernel of NVFP4 experts of this width, as PTX; in a process of its own, where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED, str(width), str(pairs), str(capability)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert told.returncode == 0, told.stderr
    return told.stdout


@pytest.mark.parametrize("pairs", [64, 2000])
@pytest.mark.parametrize("width", [1280, 640, 320])
def test_words_are_loaded_many_at_a_time_also_by_ranks_whose_width_no_step_divides(width: int, pairs: int) -> None:
    instructions = compiled(width, pairs)
    assert "cp.async.cg.shared.global" in instructions
    assert "ld.global.b16" not in instructions


@pytest.mark.parametrize("pairs", [64, 6000])
def test_codes_are_decoded_two_at_a_time_on_the_oldest_gpu_that_may_have_them(pairs: int) -> None:
    major, minor = FIRST_FP8
    assert "bf16x2" in compiled(1280, pairs, 10 * major + minor)
