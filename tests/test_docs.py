"""The pages of the documentation: what they link to is there, and the table of dependencies is complete."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TARGET = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What headings can be linked as."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_to_a_file_and_a_heading_of_it(page: Path) -> None:
    for target in TARGET.findall(page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_first_page_leads_to_every_page_once() -> None:
    told = [target for target in TARGET.findall((ROOT / "README.md").read_text()) if target.endswith(".md")]
    index = re.findall(r"^- .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    listed = [target for line in index for target in TARGET.findall(line)]
    assert len(listed) == len(set(listed))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= {Path(target).name for target in told}


def test_the_table_of_dependencies_names_each_and_no_other() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    names = {re.split(r"[<>=!~\[ ]", entry, maxsplit=1)[0] for entry in wanted}
    table = (ROOT / "README.md").read_text().partition("| Dependency | For |")[2]
    cells = re.findall(r"^\| ([^|]+) \|", table.partition("|---|---|")[2], re.MULTILINE)
    told = {name for cell in cells for name in re.split(r", | with ", re.sub(r" \(.*?\)", "", cell))}
    assert told == names
