"""Seeded task families of the built-in model: prompts, images, expected answers and checkers.

Importing this package needs neither torch nor a checkpoint, so a client, a test or the training
code can all draw the same prompts.
"""

from srt.builtin.tasks.example import EFFORTS, Call, Example, Message, Picture, Split
from srt.builtin.tasks.families import FAMILIES, Family, draw, draw_group, evaluation_set
from srt.builtin.tasks.transcript import Answer, read_completion

__all__ = [
    "EFFORTS",
    "FAMILIES",
    "Answer",
    "Call",
    "Example",
    "Family",
    "Message",
    "Picture",
    "Split",
    "draw",
    "draw_group",
    "evaluation_set",
    "read_completion",
]
