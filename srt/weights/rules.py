"""Which tensor of a checkpoint fills which parameter, as a list of rules.

A name must be claimed by exactly one rule. `{layer}` in a rule stands for a layer number, `{rest}` for anything.
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
    a part of the model that is not built here: they are counted and not read.
    """

    source: str
    target: str | None
    pieces: tuple[str, ...] = ("",)
    layers: tuple[int, ...] = ()
    part: str = "text"
    axis: int = 0


@dataclass(frozen=True)
class Claim:
    """A rule that matched a name; `target` has its layer number filled in."""

    rule: Rule
    target: str | None


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
                found.append(Claim(rule, target))
        return found

    def sources(self, parameters: Parameters) -> Iterator[tuple[str, str, str]]:
        """(name in a checkpoint, parameter, piece) of every piece; of several spellings the first rule's."""
        found: dict[tuple[str, str], str] = {}
        for rule in self.rules:
            if rule.target is None or len(rule.pieces) > 1:
                continue
            for layer in rule.layers or (0,):
                found.setdefault((_at(rule.target, layer), rule.pieces[0]), _at(rule.source, layer))
        for name, parameter in parameters.items():
            for piece in parameter.pieces:
                yield found[name, piece], name, piece


def _at(template: str, layer: int) -> str:
    return template.replace("{layer}", str(layer))


def _pattern(source: str) -> re.Pattern[str]:
    escaped = re.escape(source)
    return re.compile(escaped.replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{rest\}", ".+"))
