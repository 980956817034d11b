"""The `server` command: arguments and environment in, exit status out. Nothing else reads the environment."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from srt import __version__
from srt.configs.arguments import parse_launch
from srt.errors import StartupError

USAGE = """\
usage: server launch [--model-path DIR] [options]   serve a checkpoint, or the built-in model, over HTTP
       server launch --help                         all options, with examples
       server plan [--gpus 1xH200] [options]        what would it take? from headers alone
       server chat [--url URL | launch options]     talk with a model in this terminal
       server batch IN.jsonl OUT.jsonl [options]    answer a file of requests
       server eval [--url URL] [options]            ask a running server the tasks of the built-in model
       server convert --model-path IN --output OUT --format fp8|nvfp4|bf16
       server convert --help
       server --version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        match words:
            case [] | ["-h" | "--help" | "help", *_]:
                print(USAGE, end="")
                return 0
            case ["--version" | "-V" | "version", *_]:
                print(f"srt {__version__}")
                return 0
            case [word, *options] if word in COMMANDS:
                return COMMANDS[word](options)
            case [word, *_]:
                raise StartupError(f"unknown command {word!r}; `server launch --help` shows what there is")
            case _:
                raise AssertionError(words)
    except StartupError as error:
        print(f"server: error: {error}", file=sys.stderr)
        return 1


def _plan(options: Sequence[str]) -> int:
    from srt.launch.planning import main as plan  # here: a server has no use for it

    return plan(options)


def _convert(options: Sequence[str]) -> int:
    # By name: this module stays free of torch, which the command needs.
    status: int = importlib.import_module("srt.convert.command").main(options)
    return status


def _launch(options: Sequence[str]) -> int:
    request = parse_launch(options)
    environment = dict(os.environ)
    request = msgspec.structs.replace(
        request,
        api_key=_key(request.api_key, "--api-key", environment),
        admin_api_key=_key(request.admin_api_key, "--admin-api-key", environment),
    )
    from srt.launch.start import launch  # here: a wrong option is answered before sockets are imported

    return launch(request, environment)


def _key(given: str | None, flag: str, environment: Mapping[str, str]) -> str | None:
    """A key from the command line, or else from the environment; None if nobody gave one.

    Raises: StartupError if it is empty or could not be sent: such a key would lock nobody out, or everybody.
    """
    variable = "SRT_" + flag.strip("-").replace("-", "_").upper()
    source, key = (variable, environment.get(variable)) if given is None else (flag, given)
    if key is not None and not (key and all("!" <= character <= "~" for character in key)):
        raise StartupError(
            f"{source} is {'not visible ASCII' if key else 'empty'}; a key has 1 or more visible ASCII characters"
        )
    return key


def _evaluate(options: Sequence[str]) -> int:
    from srt.evaluation.command import run  # here: a server has no use for it

    return run(options, os.environ.get("SRT_API_KEY"))


def _chat(options: Sequence[str]) -> int:
    from srt.commands.chat import run

    return run(options, os.environ.get("SRT_API_KEY"))


def _batch(options: Sequence[str]) -> int:
    from srt.commands.batch import run

    return run(options, os.environ.get("SRT_API_KEY"))


COMMANDS: Final[dict[str, Callable[[Sequence[str]], int]]] = {
    "launch": _launch,
    "plan": _plan,
    "eval": _evaluate,
    "chat": _chat,
    "batch": _batch,
    "convert": _convert,
}
"""What each command runs."""


if __name__ == "__main__":
    sys.exit(main())
