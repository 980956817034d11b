"""No process outlives the one that made it."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

PR_SET_PDEATHSIG: Final = 1


def die_with(parent: int) -> bool:
    """Have the kernel kill this process when the thread of `parent` that made it ends. False if that has happened."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent
