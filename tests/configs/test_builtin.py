"""The checkpoint inside the package: where it lies, and that every copy of the package has it."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path

import pytest

from srt.configs.models import BUILTIN, checkpoint_directory, read_facts
from srt.errors import StartupError


def test_a_built_in_name_leads_to_a_checkpoint_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in BUILTIN:
        directory = checkpoint_directory(name)
        assert directory.is_absolute()
        assert read_facts(directory).weight_bytes["text"] > 0


def test_any_other_path_must_be_a_directory(tmp_path: Path) -> None:
    assert checkpoint_directory(str(tmp_path)) == tmp_path
    with pytest.raises(StartupError, match="--model-path is builtin:small; there is no such directory; built in: "):
        checkpoint_directory("builtin:small")


def test_every_file_of_it_is_package_data() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    patterns = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["*"]
    for file in checkpoint_directory("builtin:tiny").iterdir():
        assert any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns), file.name
