"""Makes the built-in model from nothing: two training runs, then the checkpoint in the package.

    python -m tools.builtin --work build/builtin

Each run takes under ten minutes on one H200. The second goes on from the weights of the first,
mostly on images, with more of what the first found hard.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

FIRST: Final = ("--seed", "1", "--seconds", "270", "--rate", "0.015", "--decay-from", "0.6")
SECOND: Final = (
    "--seed", "2", "--seconds", "360", "--rate", "0.007", "--decay-from", "0.3", "--sight-weight", "1.0",
    "--balance-rate", "0.0005", "--text-rows", "6", "--image-rows", "10", "--text-workers", "4", "--image-workers",
    "9", "--mix", "image_digit=3", "image_object=0.6", "image_many=1.2", "reverse=1.6", "sort=2.0", "effort=0.5",
    "tool_call=0.8",
)  # fmt: skip
PACKAGE: Final = Path("srt/builtin/tiny")


def main() -> None:
    """Run both parts and put the checkpoint in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    parser.add_argument("--fonts", default="", help="pattern of font files to draw digits with as well")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and a few steps, nothing is put in place")
    given = parser.parse_args()
    shared = ["--fonts", given.fonts] if given.fonts else []
    shared += ["--smoke"] if given.smoke else []
    first, second = given.work / "first", given.work / "second"
    _train([*FIRST, *shared, "--count", "50", "--out", str(first)])
    _train([*SECOND, *shared, "--resume", str(first), "--out", str(second)])
    if not given.smoke:
        shutil.copytree(second / "tiny", PACKAGE, dirs_exist_ok=True)


def _train(options: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "tools.builtin.train", *options], check=True)


if __name__ == "__main__":
    main()
