"""`server chat`: a conversation in the terminal, with the built-in model, a checkpoint, or a server that runs."""

from __future__ import annotations

import argparse
import asyncio
import base64
import mimetypes
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TextIO

import aiohttp

from srt.command_line import CommandParser
from srt.commands.servers import Server, reached
from srt.errors import ProcessLost, ServingError, StartupError

ABOUT: Final = "Talk with a model in the terminal. Answers come as they are made; thinking is dimmed."
EXAMPLES: Final = """\
examples:
  server chat
      with the built-in model, started for the conversation
  server chat --model-path ./step-3.7-flash --context-length 32768
      with a checkpoint; further options are those of server launch
  server chat --url http://127.0.0.1:30000 --system "Answer in one sentence." --temperature 0
      with a server that runs
"""
HELP: Final = """\
  /image FILE   show an image with the next message
  /system TEXT  what the model is told first; forgets the conversation
  /clear        forget the conversation
  /help         this
  /quit         end; so does Ctrl-D. Ctrl-C stops an answer
"""
PROMPT: Final = "> "


def parser() -> argparse.ArgumentParser:
    """The parser of `server chat`."""
    made = CommandParser(
        "server chat",
        description=ABOUT,
        epilog="in the conversation:\n" + HELP + "\n" + EXAMPLES,
    )
    made.add_argument("--url", help="a server that runs; without it one is started")
    made.add_argument("--api-key", metavar="KEY", help="the key of the server at --url; also read from SRT_API_KEY")
    made.add_argument("--system", metavar="TEXT", help="what the model is told first")
    made.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    made.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token always")
    made.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answers")
    return made


def run(arguments: Sequence[str], environment_key: str | None = None) -> int:
    """Talk until the input ends. Returns the exit status.

    Raises: StartupError if an option is wrong or no server can be reached.
    """
    options, launch = parser().parse_known_args(arguments)
    fields = {name: vars(options)[name] for name in ("max_tokens", "temperature", "seed")}
    asked = {name: value for name, value in fields.items() if value is not None}
    return asyncio.run(_talk(options, options.api_key or environment_key, launch, asked))


async def _talk(options: argparse.Namespace, api_key: str | None, launch: list[str], asked: dict[str, Any]) -> int:
    terminal = sys.stdin.isatty()
    if terminal and options.url is None:
        print("starting ...", file=sys.stderr)
    async with reached(options.url, api_key, launch) as server:
        talk = Conversation(server, asked, options.system, sys.stdout)
        if terminal:
            import readline  # noqa: F401  for its side effect: input() edits lines and has a history

            print("/help says what can be typed", file=sys.stderr)
        while (line := await asyncio.to_thread(_read, PROMPT if terminal else "")) is not None:
            if line.strip() in ("/quit", "/exit"):
                break
            try:
                await talk.take(line)
            except (aiohttp.ClientError, TimeoutError, ProcessLost) as error:
                raise StartupError(f"the server is gone: {error}") from error
    return 1 if talk.failed and not terminal else 0


def _read(prompt: str) -> str | None:
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        return None


class Conversation:
    """Messages so far, and what is done with a typed line."""

    def __init__(self, server: Server, asked: dict[str, Any], system: str | None, out: TextIO) -> None:
        self._server, self._asked, self._system = server, asked, system
        self._screen = Screen(out)
        self._messages: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self.failed = False
        """Whether any message got an error for an answer."""
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self._images = []
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    async def take(self, line: str) -> None:
        """Obey a command or answer a message."""
        word, _, rest = line.strip().partition(" ")
        match word:
            case "":
                return
            case "/help":
                self._screen.note(HELP.rstrip())
            case "/clear":
                self.clear()
            case "/system":
                self._system = rest or None
                self.clear()
            case "/image":
                self._show(Path(rest.strip()).expanduser())
            case _ if word.startswith("/") and word[1:].isalpha():
                self._screen.note(f"there is no {word}; /help says what there is")
            case _:
                await self._answer(line)

    def _show(self, path: Path) -> None:
        try:
            raw = path.read_bytes()
        except OSError as error:
            self._screen.note(f"{path}: {error.strerror}")
            return
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        url = f"data:{kind};base64,{base64.b64encode(raw).decode()}"
        self._images.append({"type": "image_url", "image_url": {"url": url}})
        self._screen.note(f"{path.name} goes with the next message")

    async def _answer(self, text: str) -> None:
        """Ask and show; a message that got no answer is taken back."""
        content: Any = [*self._images, {"type": "text", "text": text}] if self._images else text
        messages = [*self._messages, {"role": "user", "content": content}]
        task = asyncio.create_task(self._ask(messages))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            self._messages = [*messages, await task]
            self._images = []
        except asyncio.CancelledError:
            self._screen.note("\nstopped")
        except ServingError as error:
            self.failed = True
            self._screen.note(f"error: {error.text}")
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def _ask(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Stream one answer to the screen; returns it as a message."""
        body = {**self._asked, "messages": messages, "stream_options": {"include_usage": True}}
        began, first = time.perf_counter(), None
        usage: dict[str, Any] = {}
        answer: list[str] = []
        async for chunk in self._server.stream("/v1/chat/completions", body):
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                delta = choice.get("delta") or {}
                said, thought = delta.get("content") or "", delta.get("reasoning_content") or ""
                if first is None and (said or thought or delta.get("tool_calls")):
                    first = time.perf_counter()
                self._screen.think(thought)
                self._screen.say(said)
                for call in delta.get("tool_calls") or ():
                    self._screen.call(call)
                answer.append(said)
        ended = time.perf_counter()
        first = ended if first is None else first
        self._screen.end(_facts(usage, first - began, ended - began))
        return {"role": "assistant", "content": "".join(answer)}


def _facts(usage: dict[str, Any], first_s: float, whole_s: float) -> str:
    """ "12 tokens, 310 tokens/s, first after 20 ms, 48 of 60 prompt tokens cached, 3.1 tokens a step"."""
    tokens = usage.get("completion_tokens", 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    parts = [
        f"{tokens} tokens",
        f"{tokens / whole_s:.0f} tokens/s",
        f"first after {1000 * first_s:.0f} ms",
        f"{cached} of {usage.get('prompt_tokens', 0)} prompt tokens cached",
    ]
    if usage.get("spec_verify_ct"):
        parts.append(f"{tokens / (usage['spec_verify_ct'] + usage.get('spec_plain_ct', 0)):.1f} tokens a step")
    return ", ".join(parts)


class Screen:
    """Writes an answer; on a terminal what is not the answer itself is dimmed."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._dim, self._plain = ("\x1b[2m", "\x1b[0m") if out.isatty() else ("", "")
        self._thinking = False

    def think(self, text: str) -> None:
        """Thinking as it comes."""
        if text:
            self._thinking = True
            self._write(self._dim + text + self._plain)

    def say(self, text: str) -> None:
        """The answer as it comes."""
        if text:
            self._close_thinking()
            self._write(text)

    def call(self, part: dict[str, Any]) -> None:
        """A piece of a tool call."""
        self._close_thinking()
        function = part.get("function") or {}
        if function.get("name"):
            self._write(f"\n{self._dim}calls{self._plain} {function['name']} ")
        self._write(function.get("arguments") or "")

    def _close_thinking(self) -> None:
        if self._thinking:
            self._thinking = False
            self._write("\n")

    def end(self, facts: str) -> None:
        """The answer is complete."""
        self._close_thinking()
        self._write(f"\n{self._dim}{facts}{self._plain}\n")

    def note(self, text: str) -> None:
        """A line beside the conversation."""
        self._write(f"{self._dim}{text}{self._plain}\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
