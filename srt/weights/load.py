"""Fill a model's parameters from a source, then prove that each piece came exactly once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from srt.errors import StartupError
from srt.layers.parameter import Misfit, Parameters
from srt.weights.files import Item, Source
from srt.weights.rules import Claim, RuleBook

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each tensor that was read."""


@dataclass
class LoadReport:
    """Tensors and bytes of the source by part of the model; parts without parameters are not in `read`."""

    tensors: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def count(self, part: str, size: int, *, read: bool) -> None:
        """One more tensor of a part."""
        if read:
            self.read.add(part)
        self.tensors[part] = self.tensors.get(part, 0) + 1
        self.bytes[part] = self.bytes.get(part, 0) + size


def load(parameters: Parameters, book: RuleBook, source: Source, progress: Progress) -> LoadReport:
    """Fill every parameter.

    Raises: StartupError that lists all names that no rule or several rules claim, tensors of a wrong shape or dtype
        or that came twice, and pieces that never came.
    """
    report, problems = LoadReport(), list[str]()
    claims: dict[str, Claim] = {}
    wanted_bytes = 0
    for name, size in source.names():
        found = book.claims(name)
        if len(found) != 1:
            problems.append(f"unexpected tensor {name}" if not found else _ambiguous(name, found))
            continue
        claims[name] = found[0]
        report.count(found[0].rule.part, size, read=found[0].target is not None)
        wanted_bytes += size if found[0].target is not None else 0
    done_bytes = 0
    tried: set[tuple[str, str]] = set()
    for item in source.items():
        claim = claims.get(item.name)
        if claim is None or claim.target is None:
            continue
        problems += _fill(parameters, claim, claim.target, item)
        tried |= {(claim.target, piece) for piece in claim.rule.pieces}
        done_bytes += item.bytes
        progress(done_bytes, wanted_bytes)
    for expected, target, rule in book.sources(parameters):
        if any((target, piece) not in tried for piece in rule.pieces):
            problems.append(f"missing tensor {expected}")
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise StartupError(f"the checkpoint does not fit the model, {len(problems)} problem(s):{listed}")
    return report


def _ambiguous(name: str, found: list[Claim]) -> str:
    return f"tensor {name} is claimed by {len(found)} rules: {', '.join(claim.rule.source for claim in found)}"


def _fill(parameters: Parameters, claim: Claim, target: str, item: Item) -> list[str]:
    """Put a tensor where its claim says; returns what is wrong with it."""
    tensor = item.read() if claim.rule.reorder is None else claim.rule.reorder(item.read())
    pieces, axis = claim.rule.pieces, claim.rule.axis
    if len(pieces) > 1 and (tensor.dim() <= axis or tensor.shape[axis] % len(pieces)):
        return [f"tensor {item.name} has shape {list(tensor.shape)}, dimension {axis} must hold {len(pieces)} parts"]
    parts = tensor.chunk(len(pieces), dim=axis) if len(pieces) > 1 else (tensor,)
    problems = []
    for piece, part in zip(pieces, parts, strict=True):
        try:
            parameters[target].fill(piece, part)
        except Misfit as misfit:
            problems.append(f"tensor {item.name} {misfit}")
    return problems
