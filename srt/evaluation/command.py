"""The `server eval` command: options, the report, the exit status."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import Final

from srt.builtin.tasks import FAMILIES
from srt.command_line import CommandParser
from srt.errors import StartupError
from srt.evaluation.ask import Answers, Questions, ask_all
from srt.evaluation.score import Asked, score, table

EVALUATED: Final = {name: family.kind for name, family in FAMILIES.items() if family.evaluated}
"""Families that can be asked, with their kinds."""
KINDS: Final = tuple(dict.fromkeys(EVALUATED.values()))
INTERRUPTED: Final = 130

ABOUT: Final = f"""\
Ask a running server the tasks of the built-in model and count right answers. Nothing is started.

families:
  {", ".join(EVALUATED)};
  {", ".join(KINDS)} stand for all of a kind
"""
EXAMPLES: Final = """\
examples:
  server eval
      300 problems a family from the server at http://127.0.0.1:30000
  server eval --families recall tools --count 50 --concurrency 4
      one family of texts and all of tool calls, 50 problems each, 4 at a time
  server eval --seed 1 --threshold 0.97
      other problems; exit status 1 if a family has less than 97 % right
"""


def _bounded(least: float, most: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return value

    return convert


def parser() -> argparse.ArgumentParser:
    """The parser of `server eval`."""
    made = CommandParser(
        "server eval",
        description=ABOUT,
        epilog=EXAMPLES,
    )
    number = _bounded(1, 1_000_000, int)
    made.add_argument("--url", default="http://127.0.0.1:30000", help="where the server listens (default: %(default)s)")
    made.add_argument("--families", nargs="+", metavar="NAME", default=list(EVALUATED), help="what to ask (all)")
    made.add_argument("--count", type=number, default=300, metavar="N", help="problems a family (300)")
    made.add_argument("--concurrency", type=number, default=16, metavar="N", help="problems at a time (16)")
    made.add_argument("--seed", type=_bounded(0, 2**63, int), default=0, metavar="N", help="seed of the problems (0)")
    made.add_argument("--threshold", type=_bounded(0, 1, float), metavar="SHARE", help="least accuracy of each family")
    made.add_argument("--stream", action="store_true", help="ask for streamed answers")
    made.add_argument("--show-wrong", type=_bounded(0, 1_000_000, int), default=2, metavar="N",
                      help="wrong answers of each family to print (2)")  # fmt: skip
    made.add_argument("--api-key", metavar="KEY", help="the server's key; also read from SRT_API_KEY")
    return made


def _families(words: Sequence[str]) -> tuple[str, ...]:
    """Names of families, kinds resolved, each once. Raises: StartupError if one is unknown."""
    names: dict[str, None] = {}
    for word in words:
        chosen = [name for name, kind in EVALUATED.items() if word in (name, kind)]
        if not chosen:
            known = ", ".join((*EVALUATED, *KINDS))
            raise StartupError(f"--families: unknown family {word!r}, known are {known}")
        names.update(dict.fromkeys(chosen))
    return tuple(names)


def run(arguments: Sequence[str], environment_key: str | None = None) -> int:
    """Ask and report. Returns 0, or 1 if a family stays below --threshold.

    Raises: StartupError if an option is wrong, or no server answers.
    """
    options = parser().parse_args(arguments)
    questions = Questions(
        url=options.url if "://" in options.url else f"http://{options.url}",
        families=_families(options.families),
        count=options.count,
        concurrency=options.concurrency,
        seed=options.seed,
        stream=options.stream,
        api_key=options.api_key or environment_key,
    )
    try:
        answers = asyncio.run(ask_all(questions))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if not answers.asked:
        raise StartupError(_skipped_sentence(answers))
    return report(answers, shown=options.show_wrong, threshold=options.threshold)


def report(answers: Answers, *, shown: int, threshold: float | None) -> int:
    """Print wrong answers, the table, and what stays below the threshold. Returns the exit status."""
    for name, asked in answers.asked.items():
        wrong = [item for item in asked if not item.right]
        for item in wrong[:shown]:
            print(_wrong_lines(name, item))
    scores = [score(name, asked) for name, asked in answers.asked.items()]
    everything = score("all", [item for asked in answers.asked.values() for item in asked])
    print(table([*scores, everything]))
    if answers.skipped:
        print(_skipped_sentence(answers))
    low = [row for row in scores if threshold is not None and row.accuracy < threshold]
    for row in low:
        print(f"{row.family}: {100 * row.accuracy:.1f} % is below --threshold {threshold:g}", file=sys.stderr)
    return 1 if low else 0


def _skipped_sentence(answers: Answers) -> str:
    return f"not asked: {', '.join(answers.skipped)}: {answers.server.model} has no image understanding on this server"


def _wrong_lines(family: str, item: Asked) -> str:
    example, reply = item.example, item.reply
    wanted = [f"{call.name} {dict(call.arguments)}" for call in example.calls] or example.answer
    got = reply.error or f"{dict(reply.message)}, finish {reply.finish}"
    return f"wrong, {family}: {str(example.messages[-1]['content'])[-200:]}\n  wanted {wanted}\n  got    {got}"
