"""A GPU that wakes up while a worker imports torch: its driver takes a second or more for that, and needs no torch."""

from __future__ import annotations

import ctypes
import threading
from typing import Final

LIBRARY: Final = "libcuda.so.1"


def wake(ordinal: int, library: str = LIBRARY) -> threading.Thread:
    """Begin to make the GPU's primary context, which torch will find and use. What fails here, torch will tell of."""
    thread = threading.Thread(target=_retain, args=(ordinal, library), name="gpu", daemon=True)
    thread.start()
    return thread


def _retain(ordinal: int, library: str) -> None:
    try:
        cuda = ctypes.CDLL(library)  # its functions run without the interpreter's lock
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if not cuda.cuInit(0) and not cuda.cuDeviceGet(ctypes.byref(device), ordinal):
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
