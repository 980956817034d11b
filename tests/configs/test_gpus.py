"""Which GPUs a process may use, from what `nvidia-smi` and the driver's library print."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

from srt.configs.gpus import Gpu, ask_driver, visible_uuids

UUIDS = ("GPU-00000000-0000-0000-0000-000000000001", "GPU-00000000-0000-0000-0000-000000000002")
LISTED = f"{UUIDS[0]}, NVIDIA H200, 143161\n{UUIDS[1]}, NVIDIA H200, 17408\n"
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 7 - ordinal; return 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { memset(uuid, 0, 16); uuid[15] = device - 5; return 0; }
"""


def printed(text: str) -> list[str]:
    """A command that prints this."""
    return [sys.executable, "-c", f"print({text!r}, end='')"]


def test_only_visible_gpus_are_told_of_in_their_order() -> None:
    free, full = Gpu("NVIDIA H200", 143161 << 20), Gpu("NVIDIA H200", 17408 << 20)
    assert ask_driver(printed(LISTED), printed("\n".join(UUIDS))) == [free, full]
    assert ask_driver(printed(LISTED), printed("\n".join(reversed(UUIDS)))) == [full, free]
    assert ask_driver(printed(LISTED), printed(UUIDS[0])) == [free]
    assert ask_driver(printed(LISTED), printed("GPU-a-part-of-one")) == []


def test_what_is_told_of_gpus_that_are_not_visible_does_not_matter() -> None:
    listed = LISTED.replace("17408", "[Insufficient Permissions]")
    assert ask_driver(printed(listed), printed(UUIDS[0])) == [Gpu("NVIDIA H200", 143161 << 20)]
    assert ask_driver(printed(listed), printed("\n".join(UUIDS))) == [], "nobody knows what fits"


def test_a_driver_that_does_not_answer_has_no_gpus() -> None:
    assert ask_driver(["/nowhere/nvidia-smi"], printed(UUIDS[0])) == []
    assert ask_driver([sys.executable, "-c", "raise SystemExit(9)"], printed(UUIDS[0])) == []
    assert ask_driver(printed("No devices were found"), printed(UUIDS[0])) == []
    assert ask_driver(printed(LISTED), printed("")) == []


def test_uuids_come_from_the_drivers_library_in_the_order_of_ordinals(tmp_path: Path) -> None:
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so"
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    assert ctypes.CDLL(str(library)).cuInit(0) == 0
    assert visible_uuids(str(library)) == list(reversed(UUIDS))
    assert visible_uuids(str(tmp_path / "nowhere.so")) == []
