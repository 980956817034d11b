"""What is wrong with a constraint."""

from __future__ import annotations


class GrammarError(Exception):
    """A constraint cannot be obeyed; the message tells its author why."""
