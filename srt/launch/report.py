"""What a person at the terminal sees of a start: one table, the progress of weights, one line when it is ready."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from srt.configs.plan import Choice, RuntimePlan
from srt.configs.startup_table import human

LINE_EVERY_S: Final = 2.0
"""Without a terminal, progress is a line at most so often."""

logger = logging.getLogger(__name__)


def table_lines(rows: Sequence[Choice]) -> Iterable[str]:
    """Rows in three columns: name, value, reason."""
    names = max(len(row.name) for row in rows)
    values = max((len(row.value) for row in rows if len(row.value) <= 24), default=0)
    for row in rows:
        yield f"  {row.name:<{names}}  {row.value:<{values}}  {row.reason}".rstrip()


def show_table(title: str, rows: Sequence[Choice], form: str) -> None:
    """Print rows to stderr as a table, or as one log line if logs are JSON."""
    if form == "json":
        logger.info("%s: %s", title, json.dumps([[row.name, row.value, row.reason] for row in rows]))
    else:
        print(title, *table_lines(rows), sep="\n", file=sys.stderr, flush=True)


def url(plan: RuntimePlan) -> str:
    """Where clients find the server."""
    host = f"[{plan.server.host}]" if ":" in plan.server.host else plan.server.host
    scheme = "http" if plan.server.ssl_certfile is None else "https"
    return f"{scheme}://{host}:{plan.server.port}"


class Bar(Protocol):
    """What a progress bar of a library offers."""

    n: float

    def refresh(self) -> object:
        """Draw the bar again."""

    def close(self) -> None:
        """Draw it for the last time."""


class LoadProgress:
    """Bytes of weights loaded, over all ranks: a bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._ranks: dict[int, tuple[int, int]] = {}
        self._bar: Bar | None = None
        self._last_line: float | None = None

    def update(self, rank: int, done_bytes: int, total_bytes: int) -> None:
        """A rank has `done_bytes` of its `total_bytes`."""
        self._ranks[rank] = (done_bytes, total_bytes)
        done, total = (sum(column) for column in zip(*self._ranks.values(), strict=True))
        if sys.stderr.isatty():
            self._draw(done, total)
        else:
            self._write(done, total)

    def close(self) -> None:
        """Leave the line to others."""
        if self._bar is not None:
            self._bar.close()

    def _write(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._last_line is None:
            self._last_line = now  # a load that is over soon needs no line
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            logger.info("loading weights: %s of %s", human(done), human(total))

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm  # here: most starts are over before a bar is worth its import

            self._bar = tqdm(desc="weights", total=total, unit="B", unit_scale=True, leave=False)
        self._bar.n = done
        self._bar.refresh()
