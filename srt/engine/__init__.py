"""The server inside a Python program: everything that HTTP offers, without HTTP."""

from srt.engine.engine import Engine

__all__ = ["Engine"]
