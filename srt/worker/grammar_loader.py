"""A worker's thread that loads grammars beside its steps: no step waits for a file."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any, Final

import zmq

from srt.grammar.errors import GrammarError
from srt.grammar.shelf import Shelf
from srt.messages import GrammarLoaded, ToGrammars
from srt.wire import Inbox, Outbox

POLL_MS: Final = 200

log = logging.getLogger(__name__)


class GrammarLoader:
    """The thread; it lives from here to `close`."""

    def __init__(self, context: zmq.Context[Any], rundir: Path, rank: int, shelf: Shelf) -> None:
        self._rank, self._shelf = rank, shelf
        self._inbox: Inbox[ToGrammars] = Inbox(context, rundir, f"grammar{rank}", ToGrammars)
        self._tokenizer = Outbox(context, rundir, "tokenizer")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="grammars", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._stopping.set()
        self._thread.join()

    def _serve(self) -> None:
        try:
            self._shelf.open()
        except Exception as error:  # a library that does not load; whoever wants a grammar of it is told
            log.error("requests with constraints will fail, their library does not load: %s", _told(error))
        while not self._stopping.is_set():
            self._inbox.wait(POLL_MS)
            for message in self._inbox.drain():
                self._tokenizer.send(GrammarLoaded(message.key, self._rank, self._fault(message.key)))
        self._tokenizer.close()
        self._inbox.close()

    def _fault(self, key: bytes) -> str:
        """Load a grammar: empty, or why it cannot be. The thread outlives whatever the library does."""
        try:
            self._shelf.get(key)
        except GrammarError as error:
            return str(error)
        except Exception as error:
            return f"worker {self._rank} cannot load it: {_told(error)}"
        return ""


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
