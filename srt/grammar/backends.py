"""Which grammar backends there are. A library is imported when its backend is opened, not before."""

from __future__ import annotations

import importlib
from typing import Any, Final

from srt.grammar.contract import GrammarBackend, Vocabulary

BACKENDS: Final = {
    "xgrammar": "srt.grammar.xgrammar_backend:XGrammar",
    "llguidance": "srt.grammar.llguidance_backend:LLGuidance",
}


def open_backend(name: str, vocabulary: Vocabulary) -> GrammarBackend:
    """A backend for a vocabulary. Takes a second or more: it imports a large library."""
    module, _, member = BACKENDS[name].partition(":")
    made: Any = getattr(importlib.import_module(module), member)(vocabulary)
    backend: GrammarBackend = made
    return backend
