"""Which tensor of a checkpoint fills which parameter, as a list of rules.

A name must be claimed by exactly one rule. `{layer}` in a rule stands for a layer number, `{expert}` for the number of
an item of the target's stack, `{rest}` for anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from srt.layers.parameter import Parameters


@dataclass(frozen=True)
class Rule:
    """Tensors named `source`, of these layers, fill pieces of the parameter `target`.

    A tensor that holds several pieces is cut into equal parts along `axis`. A rule without target claims tensors of
    a part of the model that is not built here: they are counted and not read. With `reciprocal` the parameter gets
    1 / x. A parameter that only optional rules fill may stay empty.
    """

    source: str
    target: str | None
    pieces: tuple[str, ...] = ("",)
    layers: tuple[int, ...] = ()
    part: str = "text"
    axis: int = 0
    reciprocal: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Claim:
    """A rule that matched a name; `target` has its layer number filled in, `item` is the number of an expert."""

    rule: Rule
    target: str | None
    item: int | None = None


@dataclass(frozen=True)
class RuleBook:
    """All rules of a model. `prefixes` rewrites the beginning of names before rules see them."""

    rules: Sequence[Rule]
    prefixes: Mapping[str, str] = field(default_factory=dict)
    _patterns: list[re.Pattern[str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_patterns", [_pattern(rule.source) for rule in self.rules])

    def claims(self, name: str) -> list[Claim]:
        """Every rule that matches `name`: one if all is well."""
        for prefix, replacement in self.prefixes.items():
            if name.startswith(prefix):
                name = replacement + name[len(prefix) :]
                break
        found = []
        for rule, pattern in zip(self.rules, self._patterns, strict=True):
            match = pattern.fullmatch(name)
            if match is None:
                continue
            layer = match.groupdict().get("layer")
            if layer is None or int(layer) in rule.layers:
                target = rule.target if rule.target is None or layer is None else _at(rule.target, int(layer))
                expert = match.groupdict().get("expert")
                found.append(Claim(rule, target, None if expert is None else int(expert)))
        return found

    def wanted(self, parameters: Parameters) -> Iterator[Wanted]:
        """Every piece that must come, with its name in a checkpoint; of several spellings the first rule's."""
        whole: dict[tuple[str, str], str] = {}
        items: dict[tuple[str, str], str] = {}
        optional: set[tuple[str, str]] = set()
        for rule in self.rules:
            if rule.target is None or len(rule.pieces) > 1:
                continue
            for layer in rule.layers or (0,):
                place = _at(rule.target, layer), rule.pieces[0]
                if rule.optional:
                    optional.add(place)
                    continue
                names = items if "{expert}" in rule.source else whole
                names.setdefault(place, _at(rule.source, layer))
        for target, parameter in parameters.items():
            for piece in parameter.pieces:
                if (target, piece) not in optional:
                    name = whole[target, piece]
                    yield Wanted(name, items.get((target, piece), name), target, piece)


@dataclass(frozen=True)
class Wanted:
    """A piece of a parameter: its name in a checkpoint, and that of one item of it with `{expert}` left in."""

    name: str
    item_name: str
    target: str
    piece: str


def _at(template: str, layer: int) -> str:
    return template.replace("{layer}", str(layer))


def _pattern(source: str) -> re.Pattern[str]:
    escaped = re.escape(source)
    for word in ("layer", "expert"):
        escaped = escaped.replace(rf"\{{{word}\}}", rf"(?P<{word}>\d+)")
    return re.compile(escaped.replace(r"\{rest\}", ".+"))
