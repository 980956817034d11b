"""The script that keeps files, functions and classes small."""

from __future__ import annotations

from pathlib import Path

from tools.check_sizes import findings


def of(folder: Path, source: str) -> list[str]:
    """What the script says about a file with this source."""
    (folder / "module.py").write_text(source)
    return list(findings(folder / "module.py"))


def test_small_things_pass(tmp_path: Path) -> None:
    assert of(tmp_path, "class A:\n    def f(self) -> None:\n        self.x = 1\n") == []


def test_a_file_of_501_lines_fails(tmp_path: Path) -> None:
    assert "501 lines, the limit is 500" in of(tmp_path, "x = 1\n" * 501)[0]


def test_a_function_of_71_lines_fails(tmp_path: Path) -> None:
    assert of(tmp_path, "def f():\n" + "    x = 1\n" * 69) == []
    assert "function f has 71 lines" in of(tmp_path, "def f():\n" + "    x = 1\n" * 70)[0]


def test_a_class_of_16_attributes_fails(tmp_path: Path) -> None:
    body = "".join(f"        self.a{index} = 1\n" for index in range(16))
    assert "class A has 16 attributes" in of(tmp_path, f"class A:\n    def f(self):\n{body}")[0]
