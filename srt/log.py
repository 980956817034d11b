"""Log lines on stderr, as text or JSON, each with the process that wrote it; and what a request's line may contain.

Modules log with `logging.getLogger(__name__)`; only the entry of a process calls `configure`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

REQUESTS: Final = "srt.requests"
"""Logger of request lines, so that they can be told from all others."""

SHORT_CHARACTERS: Final = 2048
"""At level 2 a text is cut to so many characters, and says so."""


def configure(process: str, level: str = "info", form: str = "text") -> None:
    """Send the log lines of this process to stderr.

    `level`: debug, info, warning or error. `form`: text or json, one object a line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if form == "json" else TextLines(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class TextLines(logging.Formatter):
    """`18:04:05.123 INFO srt:api message`; further lines of a message are indented."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)s {process} %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """One record as text."""
        return super().format(record).replace("\n", "\n    ")


class JsonLines(logging.Formatter):
    """`{"time", "level", "process", "logger", "message"}` and, where there is one, `error` with its traceback."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One record as a JSON object."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def request_line(
    event: str,
    level: int,
    form: str,
    facts: Mapping[str, Any],
    sampling: Mapping[str, Any],
    texts: Mapping[str, str],
) -> str:
    """One line about a request, with no more of it than `level` allows.

    Level 0: `facts`, which hold ids, sizes and times only. 1: and `sampling`. 2: and `texts` (prompt, answer), each
    cut to `SHORT_CHARACTERS`. 3: and `texts` whole. `form`: text (key=value) or json.
    """
    shown: dict[str, Any] = {"event": event, **facts}
    if level >= 1:
        shown.update(sampling)
    if level >= 2:
        shown.update({key: text if level >= 3 else shortened(text) for key, text in texts.items()})
    if form == "json":
        return json.dumps(shown, ensure_ascii=False)
    return " ".join([event, *(f"{key}={value!r}" for key, value in shown.items() if key != "event")])


def shortened(text: str) -> str:
    """The beginning of `text`, and how much was left out."""
    if len(text) <= SHORT_CHARACTERS:
        return text
    return f"{text[:SHORT_CHARACTERS]}... ({len(text) - SHORT_CHARACTERS} more characters)"
