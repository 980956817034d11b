"""srt: a serving runtime for multimodal mixture-of-experts language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srt.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> object:
    """`srt.Engine` is imported when it is asked for: the processes of a server have no use for it."""
    if name == "Engine":
        from srt.engine import Engine

        return Engine
    raise AttributeError(f"module 'srt' has no attribute {name!r}")
