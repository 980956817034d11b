"""Starting, supervising and stopping the processes of a server."""

from typing import Final

PLAN: Final = "plan.msgpack"
"""File in the server's directory that every child reads: the `RuntimePlan`."""
