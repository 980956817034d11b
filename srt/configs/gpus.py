"""The NVIDIA GPUs that a process may use, asked of the driver without torch and without CUDA in this process.

`nvidia-smi` knows names and free memory, of all GPUs. Which of them `CUDA_VISIBLE_DEVICES` leaves, and in which order,
only the driver's library says: this file, run as a program, prints their UUIDs.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import uuid
from collections.abc import Sequence
from typing import Final, NamedTuple

LIBRARY: Final = "libcuda.so.1"
TIMEOUT_S: Final = 20.0
QUERY: Final = ("nvidia-smi", "--query-gpu=uuid,name,memory.free", "--format=csv,noheader,nounits")
VISIBLE: Final = (sys.executable, "-I", __file__)


class Gpu(NamedTuple):
    """An NVIDIA GPU as its driver describes it."""

    name: str
    free_bytes: int


def ask_driver(query: Sequence[str] = QUERY, visible: Sequence[str] = VISIBLE) -> list[Gpu]:
    """The GPUs that processes started from here see, in their order; none if nothing answers.

    A part of a GPU (MIG) is not among them: nobody says how much of its memory is free.
    """
    with subprocess.Popen(visible, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asked:
        try:
            listed = subprocess.run(query, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
            order = asked.communicate(timeout=TIMEOUT_S)[0].split()
            # Of one that is not visible anything may be told: of one in parts, that nobody may know its free memory.
            lines = (line.partition(",") for line in listed.splitlines())
            found = {number: _gpu(rest) for number, _, rest in lines if number in order}
        except (OSError, subprocess.SubprocessError, ValueError):
            asked.kill()
            return []
    return [found[number] for number in order if number in found]


def _gpu(text: str) -> Gpu:
    """ "NVIDIA H200, 143161" (MiB). Raises: ValueError for anything else."""
    name, _, free_mib = text.rpartition(",")
    return Gpu(name.strip(), int(free_mib) << 20)


def visible_uuids(library: str = LIBRARY) -> list[str]:
    """UUIDs of the GPUs that this process sees, as `nvidia-smi` writes them, in the order of their ordinals."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return []
    count, device, number = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    names = []
    for ordinal in range(count.value):
        if cuda.cuDeviceGet(ctypes.byref(device), ordinal) or cuda.cuDeviceGetUuid_v2(number, device):
            return []
        names.append(f"GPU-{uuid.UUID(bytes=bytes(number))}")
    return names


if __name__ == "__main__":
    print("\n".join(visible_uuids()))
