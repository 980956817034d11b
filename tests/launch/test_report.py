"""What a person sees of a start."""

from __future__ import annotations

import json
import logging

import pytest

from srt.configs.plan import Choice
from srt.launch import report
from srt.launch.report import LoadProgress, show_table, table_lines, url
from tests.support.resolved import make_plan


def test_rows_stand_in_columns() -> None:
    rows = [Choice("a", "1", "because"), Choice("longer", "22", "why not")]
    assert list(table_lines(rows)) == ["  a       1   because", "  longer  22  why not"]


def test_a_long_value_does_not_widen_the_column_of_all() -> None:
    lines = list(table_lines([Choice("a", "x" * 60, "r"), Choice("b", "1", "r")]))
    assert lines[1] == "  b  1  r"


def test_the_table_names_every_resolved_value_and_the_bytes_of_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("plan", make_plan().table, "text")
    shown = capsys.readouterr().err
    for name in ("dtype", "context length", "page size", "weights: text", "KV: full", "KV: sliding", "sum"):
        assert name in shown
    assert "4.8 MiB" in shown


def test_with_json_logs_the_table_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        show_table("plan", make_plan().table, "json")
    (line,) = caplog.messages
    assert ["dtype", "bfloat16", "the checkpoint's"] in json.loads(line.removeprefix("plan: "))


def test_the_address_of_an_ipv6_host_has_brackets() -> None:
    assert url(make_plan(host="::1", port=8000)) == "http://[::1]:8000"
    assert url(make_plan()) == "http://127.0.0.1:30000"


def test_without_a_terminal_a_short_load_is_silent_and_a_long_one_sums_its_ranks(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = LoadProgress()
    with caplog.at_level(logging.INFO):
        progress.update(0, 1 << 20, 4 << 20)
        progress.update(1, 1 << 20, 4 << 20)
        assert caplog.messages == []
        monkeypatch.setattr(report, "LINE_EVERY_S", 0.0)
        progress.update(1, 3 << 20, 4 << 20)
    assert caplog.messages == ["loading weights: 4.0 MiB of 8.0 MiB"]
    progress.close()


def test_on_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = LoadProgress()
    progress.update(0, 50, 100)
    assert "weights:  50%" in capsys.readouterr().err
    progress.update(0, 100, 100)
    progress.close()
