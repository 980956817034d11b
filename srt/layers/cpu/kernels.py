"""The compiled kernels as Python callables: argument types set."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, Final

import torch

from srt.layers.cpu.build import KernelsUnavailable, build

CODES: Final[dict[torch.dtype, int]] = {torch.float32: 0, torch.bfloat16: 1}
"""The number that stands for a dtype in calls; the dtypes that the kernels compute in."""
KV_CODES: Final[dict[torch.dtype, int]] = {**CODES, torch.float8_e4m3fn: 2}
"""The same for KV memory: the dtype of the computation, or codes."""


class StoreCall(ctypes.Structure):
    """What stays the same from step to step in a layer's store."""

    _fields_ = (
        ("dtype", c_int32),
        ("kv_dtype", c_int32),
        ("q_heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary_dim", c_int32),
        ("eps", c_float),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("rope", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_scale", c_void_p),
        ("v_scale", c_void_p),
    )


class AttendCall(ctypes.Structure):
    """What stays the same from step to step in a layer's attention; window 0 means none."""

    _fields_ = (
        ("dtype", c_int32),
        ("kv_dtype", c_int32),
        ("q_heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("page_size", c_int32),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_scale", c_void_p),
        ("v_scale", c_void_p),
    )


class AttendBatch(ctypes.Structure):
    """What the layers of a KV group share in a step."""

    _fields_ = (
        ("tables", c_void_p),
        ("table_stride", c_int64),
        ("query_starts", c_void_p),
        ("kv_lens", c_void_p),
        ("rows", c_int32),
    )


class Matrix(ctypes.Structure):
    """A stack of packed matrices with `elements` columns each (see csrc/matrix.h)."""

    _fields_ = (
        ("coding", c_int32),
        ("elements", c_int32),
        ("data", c_void_p),
        ("groups", c_void_p),
        ("scales", c_void_p),
    )


class MoeCall(ctypes.Structure):
    """The experts of a layer; an infinite limit means none, a shared width of 0 no shared expert."""

    _fields_ = (
        ("dtype", c_int32),
        ("hidden", c_int32),
        ("experts", c_int32),
        ("chosen", c_int32),
        ("width", c_int32),
        ("limit", c_float),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("shared_width", c_int32),
        ("shared_limit", c_float),
        ("shared_gate_up", c_void_p),
        ("shared_down", c_void_p),
    )


# Matrices are a pointer and the elements from one row to the next; then sizes.
SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "srt_pack": (c_int, c_void_p, c_int64, c_int, c_int, c_void_p, c_void_p),
    "srt_linear": (c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int, c_int, c_int),
    "srt_rms_norm": (c_int, c_void_p, c_int64, c_void_p, c_int64, *(c_void_p,) * 3, c_int, c_int, c_float),
    "srt_store": (POINTER(StoreCall), c_void_p, c_int64, c_int, c_void_p, c_void_p, c_void_p),
    "srt_attend": (POINTER(AttendCall), POINTER(AttendBatch), c_void_p, c_void_p, c_int64, c_void_p),
    "srt_moe": (POINTER(MoeCall), c_void_p, c_int64, c_void_p, c_void_p, c_int, c_void_p),
    "srt_route": (
        c_int,
        c_void_p,
        c_int64,
        c_int,
        c_int,
        c_void_p,
        c_void_p,
        c_int,
        c_int,
        c_float,
        c_void_p,
        c_void_p,
    ),
    "srt_gated_silu": (c_int, c_void_p, c_int64, c_int, c_int, c_float, c_void_p),
    "srt_argmax": (c_int, c_void_p, c_int64, c_int, c_int, c_void_p),
    "srt_set_threads": (c_int,),
}


class Kernels:
    """One loaded library. Calls release the interpreter's lock and do not check what they are given.

    `threading` and `vectors` say in words what it runs on. Sharing one library between threads that call at the same
    time is fine, as each calling thread has its own scratch memory.
    """

    def __init__(self, library: Path, threads: int) -> None:
        loaded = ctypes.CDLL(str(library))
        self._functions = {name: _function(loaded, name, arguments) for name, arguments in SIGNATURES.items()}
        self["srt_set_threads"](threads)
        self.threading = f"{threads} thread{'s' * (threads != 1)} of their own"
        self.vectors = ("portable loops", "AVX-512", "", "AVX-512 with bfloat16")[loaded["srt_vector_units"]()]
        loaded["srt_packed_words"].argtypes = (c_int, c_int, c_int)
        loaded["srt_packed_words"].restype = c_int64
        self._packed_words = loaded["srt_packed_words"]

    def __getitem__(self, name: str) -> Callable[..., None]:
        """A function of `SIGNATURES`, to be fetched once and kept."""
        return self._functions[name]

    def packed_words(self, code: int, rows: int, columns: int) -> int:
        """32-bit words of a packed matrix [rows, columns] of a dtype."""
        return int(self._packed_words(code, rows, columns))


def load_kernels(cache: Path, threads: int) -> Kernels:
    """The kernels for this machine, compiled now if the cache does not have them.

    `threads` counts the calling one. Beside them torch should have one thread: two pools would fight for the cores.
    Raises: KernelsUnavailable, with the reason.
    """
    library = build(cache)
    try:
        return Kernels(library, threads)
    except OSError as error:
        raise KernelsUnavailable(f"{library} does not load: {error}") from error


def _function(library: ctypes.CDLL, name: str, arguments: tuple[Any, ...]) -> Callable[..., None]:
    function = library[name]
    function.argtypes = arguments
    function.restype = None
    return function
