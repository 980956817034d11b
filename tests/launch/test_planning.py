"""`server plan`: the published sizes without files, a checkpoint's headers, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from srt.cli import main
from srt.configs.models import read_facts
from srt.configs.presets import PRESETS
from srt.errors import StartupError
from srt.launch.planning import main as plan
from tests.support.checkpoints import write_checkpoint

FLASH = "preset:step-3.7-flash"


def facts_of(folder: Path, name: str) -> dict[str, int]:
    """Numbers in each part of a published release, computed from its configuration."""
    (folder / "config.json").write_text(json.dumps(PRESETS[name]))
    numbers: dict[str, int] = {}
    for kind in read_facts(folder, announced=True).weights:
        numbers[kind.part] = numbers.get(kind.part, 0) + kind.count * kind.stack * kind.rows * kind.columns
    return numbers


def test_the_published_sizes_have_the_published_numbers_of_parameters(tmp_path: Path) -> None:
    numbers = facts_of(tmp_path, "step-3.7-flash")
    assert sum(numbers.values()) == 201_365_316_160
    assert numbers["routed experts"] == 190_253_629_440
    assert numbers["embedding"] + numbers["output head"] == 1_055_916_032
    assert numbers["dense networks"] == 415_236_096 + 660_602_880
    assert (numbers["routers"], numbers["mtp"], numbers["vision"]) == (49_557_312, 2_428_171_008, 1_981_014_784)


def test_the_four_bit_release_fits_one_gpu_and_the_bf16_one_four(capsys: pytest.CaptureFixture[str]) -> None:
    intent = ["--context", "32768", "--concurrency", "2"]
    assert plan(["--model-path", f"{FLASH}-nvfp4", "--gpus", "1xH200", *intent]) == 0
    shown = capsys.readouterr().out
    assert "fits: 2 conversations of 32768 tokens" in shown
    for part in ("routed experts  99.67 GiB", "KV: full", "KV: sliding", "largest step", "graphs", "left"):
        assert part in shown
    assert plan(["--model-path", FLASH, "--gpus", "1xH200", *intent]) == 1
    shown = capsys.readouterr().out
    assert "does not fit: the weights need 375.16 GiB" in shown
    assert "4 such GPUs would do: --tp-size 4" in shown


def test_a_format_that_does_not_split_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model-path", f"{FLASH}-fp8", "--gpus", "4xH200", "--context", "4096"]
    assert plan(asked) == 1
    assert "it splits over 1, 2, 5, 10" in capsys.readouterr().out
    assert plan([*asked, "--ep-size", "2"]) == 0
    assert "a GPU" in capsys.readouterr().out


def test_config_json_alone_will_do_and_says_the_same_as_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, bare = write_checkpoint(tmp_path / "whole", mtp=3), tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(whole / name, bare)
    tables = []
    for directory in (whole, bare):
        assert plan(["--model-path", str(directory), "--gpus", "1x2GiB", "--context", "64", "--concurrency", "3"]) == 0
        tables.append([line for line in capsys.readouterr().out.splitlines() if "in the checkpoint" not in line])
    assert tables[0] == tables[1]
    assert "fits: 3 conversations of 64 tokens at the same time; 3 requests may run" in tables[0][-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpus", "1xH300"], "--gpus is '1xH300'; give a number and a name or size: 1xA100"),
        (["--gpus", "0xH200"], "--gpus is '0xH200'"),
        (["--context", "0"], "--context is 0; the smallest value is 1"),
        (["--model-path", "preset:step-9"], "presets are preset:step-3.7-flash,"),
        (["--concurency", "3"], "unknown option --concurency"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StartupError, match=sentence.replace("(", r"\(")):
        plan(words)
    assert main(["plan", *words]) == 1
    assert sentence in capsys.readouterr().err


def test_without_gpus_it_is_about_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(["--context", "1024", "--concurrency", "4", "--device", "cpu"]) == 0
    assert "fits: 4 conversations of 1024 tokens" in capsys.readouterr().out
