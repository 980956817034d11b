"""The `server` command from the outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from srt import __version__
from tests.support.server import free_port


def server(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "srt.cli", *words], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )


def test_the_version_is_printed() -> None:
    assert server("--version").stdout == f"srt {__version__}\n"


def test_without_words_it_says_what_it_can_do() -> None:
    done = server()
    assert done.returncode == 0
    assert "server launch" in done.stdout
    assert "server eval" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lunch"], "unknown command 'lunch'"),
        (["launch", "--prot", "1"], "unknown option --prot; did you mean --port"),
        (["launch", "--model-path", "nowhere"], "--model-path is nowhere; there is no such directory"),
        (["launch", "--model-path", ".", "--api-key", ""], "--api-key is empty"),
        (["launch", "--model-path", ".", "--admin-api-key", "a b"], "--admin-api-key is not visible ASCII"),
        (["launch", "--model-path", "builtin:huge"], "no such directory; built in: builtin:tiny"),
        (["eval", "--cuont", "3"], "--cuont"),
        pytest.param(
            ["launch", "--model-path", ".", "--device", "cuda"],
            "no NVIDIA device is there; use --device cpu",
            marks=pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU"),
        ),
        (["launch", "--model-path", ".", "--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_1(words: list[str], sentence: str) -> None:
    done = server(*words, *(["--port", str(free_port())] if words[0] == "launch" else []))
    assert done.returncode == 1
    assert done.stderr.startswith("server: error: ")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_empty_key_in_the_environment_is_not_taken_for_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRT_ADMIN_API_KEY", "")
    assert "SRT_ADMIN_API_KEY is empty" in server("launch", "--model-path", ".").stderr


def test_a_taken_port_is_one_sentence_before_anything_is_read() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = server("launch", "--model-path", "nowhere", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr == f"server: error: port {port} of 127.0.0.1 is taken; choose another one with --port\n"


def test_starting_imports_no_torch_and_no_web_framework() -> None:
    code = "import sys, srt.launch.start; print([m for m in ('torch', 'fastapi', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_nothing_but_the_command_and_the_entries_of_processes_reads_the_environment() -> None:
    readers = [
        str(path)
        for path in Path("srt").rglob("*.py")
        if any(word in path.read_text() for word in ("os.environ", "os.getenv", "getenv("))
    ]
    assert sorted(readers) == ["srt/cli.py", "srt/launch/child.py", "srt/launch/hosted.py"]
