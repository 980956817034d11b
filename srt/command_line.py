"""How every command of `server` reads its words: one way of help, one way of saying what is wrong."""

from __future__ import annotations

import argparse
from typing import NoReturn

from srt.errors import StartupError


class CommandParser(argparse.ArgumentParser):
    """The parser of one command. Help keeps the lines of its texts; names of options are never abbreviated.

    Raises: StartupError, one sentence, for words that are wrong.
    """

    def __init__(self, prog: str, *, description: str, epilog: str, usage: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise StartupError(message)
