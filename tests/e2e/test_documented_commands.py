"""What the documentation shows is what happens: its requests are sent to a server, its programs are run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import Server

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = "http://127.0.0.1:30000"
WITH_OPTIONS = ("open-sesame", "_profile")
"""Marks of requests to servers that were started with options of their own."""


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Examples in this language, with their page."""
    for page in PAGES:
        for found in re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield page.stem, found[1]


def requests() -> Iterator[tuple[str, str]]:
    """Every `curl` of the pages that asks a server without options."""
    for page, block in blocks("bash"):
        for command in re.split(r"\n(?=curl )", "\n" + re.sub(r"(?m)^# .*$", "", block)):
            if command.startswith("curl ") and SHOWN in command and not any(mark in command for mark in WITH_OPTIONS):
                yield page, command


def programs() -> Iterator[tuple[str, str]]:
    """Every whole Python program of the pages."""
    return ((page, block) for page, block in blocks("python") if "import " in block)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def test_the_pages_show_requests_and_programs() -> None:
    assert len(list(requests())) >= 12
    assert len(list(programs())) >= 6


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_every_request_is_answered(server: Server) -> None:
    for page, command in requests():
        words = shlex.split(command.replace("\\\n", " ").replace(SHOWN, server.url))
        done = subprocess.run([*words, "-sS", "--fail-with-body"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{page}: {command}\n{done.stdout}{done.stderr}"
        assert "unknown field" not in done.stdout, f"{page}: {command}\n{done.stdout}"
        assert "has no effect" not in done.stdout, f"{page}: {command}\n{done.stdout}"


def test_every_program_runs_and_prints_what_it_says(server: Server) -> None:
    for page, program in programs():
        command = [sys.executable, "-W", "error", "-c", program.replace(SHOWN, server.url)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{page}:\n{program}\n{done.stderr}"
        for said in re.findall(r"print\(.*\)  # (.*)$", program, re.MULTILINE):
            assert said in done.stdout, f"{page}:\n{program}\n{done.stdout}"
