"""Write docs/options.md from the table in srt/configs/server.py: `python tools/options_page.py > docs/options.md`."""

from __future__ import annotations

from collections.abc import Iterator

from srt.configs.arguments import EXAMPLES, SECRETS
from srt.configs.foreign import FOREIGN, Foreign
from srt.configs.server import Field, fields

INTRODUCTION = """\
# Options of `server launch`

Made from `srt/configs/server.py` by `python tools/options_page.py`; a test fails when it is stale.

"auto" and unset values are resolved at start-up from the checkpoint and the machine, and printed with the reason.
`--config FILE` reads options from a YAML mapping (`page-size: 32`); the command line wins, an unknown key is an error.
"""

KEYS = """\
## Keys

Kept out of every plan, log line and process list; also read from `SRT_API_KEY` and `SRT_ADMIN_API_KEY`.
"""

FOREIGN_FLAGS = """\
## Flags of other servers

Accepted with a notice where they ask for what happens anyway, refused with a sentence where they ask for more.
No flag is ignored.

| Flag | Answer |
|---|---|"""


def names(field: Field) -> str:
    """All names of an option, ours first."""
    return ", ".join(f"`{name}`" for name in (field.flag, *field.option.aliases, *field.option.peer_names))


def values(field: Field) -> str:
    """What an option takes: choices, or its unit and bounds."""
    option = field.option
    if field.kind is bool:
        return "flag"
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    kind = {str: "text", int: "integer", float: "number"}[field.kind]
    bounds = [f"{bound:g}" if bound is not None else "" for bound in (option.minimum, option.maximum)]
    between = f" {bounds[0]} to {bounds[1]}" if all(bounds) else f" from {bounds[0]}" if bounds[0] else ""
    return f"{kind}{between}" + (f", {option.unit}" if option.unit else "")


def answer(foreign: Foreign) -> str:
    """What happens when the flag is given."""
    if not foreign.refused:
        return f"changes nothing: {foreign.sentence}"
    accepted = f" (`{foreign.accepts[0]}` is accepted)" if foreign.accepts else ""
    return f"refused: {foreign.sentence}{accepted}"


def page() -> Iterator[str]:
    """The page, line by line."""
    yield INTRODUCTION
    yield f"```text\n{EXAMPLES.rstrip()}\n```"
    group = ""
    for field in fields():
        if field.option.group != group:
            group = field.option.group
            yield f"\n## {group}\n\n| Option | Values | Default | Meaning |\n|---|---|---|---|"
        yield f"| {names(field)} | {values(field)} | {field.default_text} | {field.option.help} |"
    yield f"\n{KEYS}\n| Option | Meaning |\n|---|---|"
    for name, text in SECRETS.items():
        yield f"| `--{name.replace('_', '-')}` | {text} |"
    yield f"\n{FOREIGN_FLAGS}"
    for foreign in FOREIGN:
        yield f"| {', '.join(f'`{name}`' for name in foreign.names)} | {answer(foreign)} |"


def main() -> None:
    """Print the page."""
    print("\n".join(page()))


if __name__ == "__main__":
    main()
