"""The command line of `server launch`: from arguments (and a YAML file of arguments) to a checked `ServerConfig`.

Everything is derived from two tables: the options of srt/configs/server.py and the flags of other servers in
srt/configs/foreign.py.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from srt.command_line import CommandParser
from srt.configs.foreign import FOREIGN, Foreign
from srt.configs.server import NETWORK, Field, ServerConfig, fields
from srt.errors import StartupError

SECRETS: Final = {
    "api_key": "Key that clients send as `Authorization: Bearer KEY`; without it everyone may ask.",
    "admin_api_key": "Second key; when set, administrative routes need this one.",
}
"""Options that are kept out of `ServerConfig`; also read from SRT_API_KEY and SRT_ADMIN_API_KEY."""

EXAMPLES: Final = """\
examples:
  server launch
      serve the small trained model inside the package at http://127.0.0.1:30000
  server launch --model-path ./step-3.7-flash
      serve a checkpoint of your own
  server launch --model-path ./step-3.7-flash --context-length 32768 --max-running-requests 16
      state what you need; the start-up table shows what it costs in memory
  server launch --model-path ./step-3.7-flash --max-total-tokens 200000 --schedule-policy lpm
      a fixed KV pool, requests with the longest cached prefix first
  server launch --config server.yaml --port 8080
      options from a file (`model-path: ./step-3.7-flash`); the command line wins
"""


class Launch(msgspec.Struct, frozen=True):
    """A parsed command line. `notices` are lines to print about flags that were understood differently."""

    server: ServerConfig
    api_key: str | None = None
    admin_api_key: str | None = None
    notices: tuple[str, ...] = ()


class _Store(argparse.Action):
    """Keep the value; say so if the name is another server's."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, "true" if self.nargs == 0 else values)
        for field in fields():
            if option in field.option.peer_names:
                namespace.notices.append(f"{option} is taken as {field.flag}")


class _Answer(argparse.Action):
    """Give a flag of another server the answer that `const` holds."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        foreign: Foreign = self.const
        given = " ".join([str(option), *values])
        if foreign.refused and not (len(values) == 1 and values[0] in foreign.accepts):
            raise StartupError(f"{given} is refused: {foreign.sentence}")
        namespace.notices.append(f"{given} changes nothing: {foreign.sentence}")


def launch_parser() -> argparse.ArgumentParser:
    """The parser of `server launch`; values stay texts until `parse_launch` checks them."""
    parser = CommandParser(
        "server launch",
        usage="server launch [--model-path DIR] [options]",
        description="Serve a checkpoint over HTTP: OpenAI's REST API and the native /generate.",
        epilog=EXAMPLES,
    )
    parser.set_defaults(notices=[])
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line wins.")
    groups: dict[str, Any] = {}
    for field in fields():
        if field.option.group not in groups:
            groups[field.option.group] = parser.add_argument_group(field.option.group)
        _add_field(groups[field.option.group], field)
    for name, text in SECRETS.items():
        groups[NETWORK].add_argument("--" + name.replace("_", "-"), metavar="KEY", help=text)
    for foreign in FOREIGN:
        shape: dict[str, Any] = {"action": _Answer, "const": foreign, "nargs": "*" if foreign.refused else 0}
        parser.add_argument(*foreign.names, dest="foreign", help=argparse.SUPPRESS, **shape)
    return parser


def _add_field(group: Any, field: Field) -> None:
    option = field.option
    names = [name for name in option.aliases if not name.startswith("--")] + [field.flag]
    names += [name for name in option.aliases if name.startswith("--")]
    about = "; ".join(part for part in (option.unit, f"default: {field.default_text}") if part)
    shape: dict[str, Any] = {"action": _Store, "dest": field.name, "default": None}
    if field.kind is bool:
        shape["nargs"] = 0
    else:
        shape["metavar"] = "|".join(option.choices) or ("TEXT" if field.kind is str else "N")
    group.add_argument(*names, help=f"{option.help} ({about})".replace("%", "%%"), **shape)
    if option.peer_names:
        group.add_argument(*option.peer_names, **{**shape, "help": argparse.SUPPRESS})


def _convert(field: Field, text: str) -> str | int | float | bool:
    """A value as its field wants it. Raises: StartupError with the value and the rule."""
    if field.kind is bool:
        return True
    option = field.option
    if field.kind is str:
        if option.choices and text not in option.choices:
            rule = f"it must be one of {', '.join(option.choices)}" if len(option.choices) > 1 else option.beyond
            raise StartupError(f"{field.flag} is {text!r}; {rule}")
        if not text:
            raise StartupError(f"{field.flag} is empty")
        return text
    try:
        value = int(text) if field.kind is int else float(text)
    except ValueError:
        noun = "an integer" if field.kind is int else "a number"
        raise StartupError(f"{field.flag} is {text!r}; it must be {noun}") from None
    unit = f" {option.unit}" if option.unit else ""
    if option.minimum is not None and not value >= option.minimum:
        raise StartupError(f"{field.flag} is {value}; the smallest value is {option.minimum:g}{unit}")
    if option.maximum is not None and not value <= option.maximum:
        raise StartupError(f"{field.flag} is {value}; the largest value is {option.maximum:g}{unit}")
    return value


def _suggest(flag: str, parser: argparse.ArgumentParser) -> str:
    """` (did you mean ...?)`, or nothing if no known flag is near."""
    known = [name for action in parser._actions for name in action.option_strings if action.help != argparse.SUPPRESS]
    near = difflib.get_close_matches(flag, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else "; `server launch --help` lists all options"


def _file_arguments(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """Arguments that a YAML mapping of option names stands for. Raises: StartupError with the file and the key."""
    import yaml  # here: a server without a file need not load it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StartupError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise StartupError(f"--config {path} must hold a mapping of option names to values")
    return _mapping_arguments(content, parser, f"--config {path}")


def _mapping_arguments(content: Mapping[Any, Any], parser: argparse.ArgumentParser, where: str) -> list[str]:
    """Arguments that a mapping of option names stands for. Raises: StartupError with `where` and the key."""
    takes_value = {name: action.nargs != 0 for action in parser._actions for name in action.option_strings}
    arguments: list[str] = []
    for key, value in content.items():
        flag = "--" + str(key).replace("_", "-")
        if flag not in takes_value or flag in ("--config", "--help"):
            raise StartupError(f"{where}: unknown key {key!r}{_suggest(flag, parser)}")
        if value is None or (value is False and not takes_value[flag]):
            continue
        if takes_value[flag] == isinstance(value, bool) or not isinstance(value, str | int | float):
            wanted = "a text or a number" if takes_value[flag] else "true or false"
            raise StartupError(f"{where}: {key} is {value!r}; it must be {wanted}")
        arguments.append(f"{flag}={value}" if takes_value[flag] else flag)
    return arguments


def options_config(options: Mapping[str, Any]) -> ServerConfig:
    """Options by name, as a Python program gives them. Raises: StartupError as `parse_launch`."""
    launch = parse_launch(_mapping_arguments(options, launch_parser(), "options"))
    if launch.api_key is not None or launch.admin_api_key is not None:
        raise StartupError("options: keys guard HTTP routes; a program that has the server inside needs none")
    return launch.server


def parse_launch(arguments: Sequence[str]) -> Launch:
    """Parse and check the arguments of `server launch`.

    Raises: StartupError, one sentence that names the flag, its value and the rule; SystemExit after --help.
    """
    parser = launch_parser()
    first, _ = parser.parse_known_args(arguments)
    if first.config is not None:
        arguments = [*_file_arguments(Path(first.config), parser), *arguments]
    parser.set_defaults(notices=[])
    namespace, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("-"):
            raise StartupError(f"unknown option {word.split('=')[0]}{_suggest(word.split('=')[0], parser)}")
    if rest:
        raise StartupError(f"unexpected argument {rest[0]!r}; options start with --")
    values = vars(namespace)
    given = {field.name: _convert(field, values[field.name]) for field in fields() if values[field.name] is not None}
    return Launch(
        server=msgspec.convert(given, ServerConfig),
        api_key=namespace.api_key,
        admin_api_key=namespace.admin_api_key,
        notices=tuple(dict.fromkeys(namespace.notices)),
    )
