"""Fail when a file, a function or a class outgrows what a reader can hold in mind.

    python tools/check_sizes.py FOLDER...

Limits: 500 lines a file, 70 lines a function, 15 attributes of `self` a class.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

FILE_LINES: Final = 500
FUNCTION_LINES: Final = 70
CLASS_ATTRIBUTES: Final = 15

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def function_lines(node: FunctionNode) -> int:
    """Lines from `def` to the last statement."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def self_attributes(node: ast.ClassDef) -> set[str]:
    """Names that the methods of a class assign on `self`."""
    return {
        target.attr
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }


def findings(path: Path) -> Iterator[str]:
    """One sentence for each limit that the file breaks."""
    source = path.read_text(encoding="utf-8")
    lines = source.count("\n")
    if lines > FILE_LINES:
        yield f"{path}: {lines} lines, the limit is {FILE_LINES}"
    for node in ast.walk(ast.parse(source, filename=str(path))):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() if function_lines(node) > FUNCTION_LINES:
                yield (
                    f"{path}:{node.lineno}: function {node.name} has {function_lines(node)} lines, "
                    f"the limit is {FUNCTION_LINES}"
                )
            case ast.ClassDef() if len(self_attributes(node)) > CLASS_ATTRIBUTES:
                yield (
                    f"{path}:{node.lineno}: class {node.name} has {len(self_attributes(node))} attributes, "
                    f"the limit is {CLASS_ATTRIBUTES}"
                )


def main(folders: list[str]) -> int:
    """Print every finding; exit status 1 if there is one."""
    found = [text for folder in folders for path in sorted(Path(folder).rglob("*.py")) for text in findings(path)]
    for text in found:
        print(text)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
