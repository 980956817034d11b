"""The thread that loads grammars tells of every one whether it could, whatever the library does."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from srt.grammar.contract import GrammarBackend
from srt.grammar.shelf import GrammarFiles, Shelf
from srt.messages import GrammarLoaded, PrepareGrammar, ToTokenizer
from srt.wire import Inbox, Outbox
from srt.worker.grammar_loader import GrammarLoader


def test_a_library_that_does_not_load_is_told_to_everyone_who_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> GrammarBackend:
        raise ImportError("no library of that name")

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    answers: Inbox[ToTokenizer] = Inbox(context, tmp_path, "tokenizer", ToTokenizer)
    files = GrammarFiles(tmp_path)
    files.make()
    files.write(b"k" * 16, b"compiled", "test")
    loader = GrammarLoader(context, tmp_path, 0, Shelf(files, missing))
    asks = Outbox(context, tmp_path, "grammar0")
    told: list[object] = []
    for key in (b"k" * 16, b"k" * 16):
        asks.send(PrepareGrammar(key))
        assert answers.wait(5_000), "the thread answers"
        told += answers.drain()
    loader.close()
    asks.close()
    answers.close()
    context.term()
    faults = [news.fault for news in told if isinstance(news, GrammarLoaded)]
    assert faults == ["worker 0 cannot load it: ImportError: no library of that name"] * 2
    assert "requests with constraints will fail" in caplog.text
