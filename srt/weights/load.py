"""Fill a model's parameters from a source, then prove that each piece came exactly once.

Names, shapes and dtypes of all tensors are checked before the first byte of a tensor is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from srt.errors import StartupError
from srt.layers.parameter import Misfit, Parameters
from srt.weights.files import Item, Listed, Source
from srt.weights.rules import Claim, RuleBook

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each tensor that was read."""


@dataclass
class LoadReport:
    """Tensors and bytes of the source by part of the model; only parts with parameters were read."""

    tensors: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def count(self, part: str, size: int) -> None:
        """One more tensor of a part."""
        self.tensors[part] = self.tensors.get(part, 0) + 1
        self.bytes[part] = self.bytes.get(part, 0) + size


def load(parameters: Parameters, book: RuleBook, source: Source, progress: Progress) -> LoadReport:
    """Fill every parameter.

    Raises: StartupError that lists all names that no rule or several rules claim, tensors of a wrong shape or dtype
        or that came twice, and pieces that are not there, each with its file. Nothing was read then.
    """
    report, problems = LoadReport(), list[str]()
    claims: dict[str, Claim] = {}
    wanted_bytes = 0
    for listed in source.names():
        found = book.claims(listed.name)
        if len(found) != 1:
            problems.append(f"unexpected tensor {listed}" if not found else _ambiguous(listed, found))
            continue
        claims[listed.name] = found[0]
        report.count(found[0].rule.part, listed.bytes)
        if found[0].target is not None:
            wanted_bytes += listed.bytes
            problems += _misfits(parameters, found[0], found[0].target, listed)
    problems += _twice(claims)
    problems += _missing(parameters, book, claims)
    if problems:
        raise _unfit(problems)
    done_bytes = 0
    for item in source.items():
        claim = claims[item.name]
        if claim.target is not None:
            problems += _fill(parameters, claim, claim.target, item)
            done_bytes += item.bytes
            progress(done_bytes, wanted_bytes)
    if problems:
        raise _unfit(problems)
    return report


def _unfit(problems: list[str]) -> StartupError:
    listed = "".join(f"\n  {problem}" for problem in problems)
    return StartupError(f"the checkpoint does not fit the model, {len(problems)} problem(s):{listed}")


def _ambiguous(listed: Listed, found: list[Claim]) -> str:
    return f"tensor {listed} is claimed by {len(found)} rules: {', '.join(claim.rule.source for claim in found)}"


def _misfits(parameters: Parameters, claim: Claim, target: str, listed: Listed) -> Iterator[str]:
    """What its header says is wrong with a tensor."""
    shape, pieces, axis = listed.shape, claim.rule.pieces, claim.rule.axis
    if len(pieces) > 1:
        if len(shape) <= axis or shape[axis] % len(pieces):
            yield f"tensor {listed} has shape {list(shape)}, dimension {axis} must hold {len(pieces)} parts"
            return
        shape = (*shape[:axis], shape[axis] // len(pieces), *shape[axis + 1 :])
    for piece in pieces:
        wrong = parameters[target].misfit(piece, claim.item, shape, listed.dtype)
        if wrong is not None:
            yield f"tensor {listed} {wrong}"


def _twice(claims: dict[str, Claim]) -> Iterator[str]:
    """Tensors for a place that another one has filled: the same piece, or an expert of a stack that is whole."""
    filled: dict[tuple[str | None, str], set[int | None]] = defaultdict(set)
    for name, claim in claims.items():
        for piece in claim.rule.pieces if claim.target is not None else ():
            items = filled[claim.target, piece]
            if items and (claim.item in items or None in items or claim.item is None):
                yield f"tensor {name} is there twice"
            items.add(claim.item)


def _missing(parameters: Parameters, book: RuleBook, claims: dict[str, Claim]) -> Iterator[str]:
    """Pieces, and single experts of pieces, that no tensor is there for."""
    there: dict[tuple[str, str], set[int | None]] = defaultdict(set)
    for claim in claims.values():
        for piece in claim.rule.pieces:
            if claim.target is not None:
                there[claim.target, piece].add(claim.item)
    for wanted in book.wanted(parameters):
        items = there.get((wanted.target, wanted.piece))
        if not items:
            yield f"missing tensor {wanted.name}"
        elif None not in items:
            count = parameters[wanted.target].pieces[wanted.piece].shape[0]
            for item in sorted(set(range(count)) - items):
                yield f"missing tensor {wanted.item_name.replace('{expert}', str(item))}"


def _fill(parameters: Parameters, claim: Claim, target: str, item: Item) -> Iterator[str]:
    """Put a tensor where its claim says; yields what is wrong with it."""
    tensor = item.read()
    parts: tuple[Tensor, ...] = (tensor,)
    if len(claim.rule.pieces) > 1:
        parts = tensor.chunk(len(claim.rule.pieces), dim=claim.rule.axis)
    for piece, part in zip(claim.rule.pieces, parts, strict=True):
        try:
            parameters[target].fill(piece, part.float().reciprocal() if claim.rule.reciprocal else part, claim.item)
        except Misfit as misfit:
            yield f"tensor {item.name} {misfit}"
