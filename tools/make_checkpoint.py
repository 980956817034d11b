"""Write a small checkpoint with random weights in the published layout.

    python tools/make_checkpoint.py --preset nano --seed 7 DIR

It answers nonsense, but through every part of a real server. The directory appears when it is complete.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.checkpoints import PRESETS, write_checkpoint


def main() -> None:
    """Parse arguments and write."""
    parser = argparse.ArgumentParser(description="Write a small checkpoint with random weights.")
    parser.add_argument("directory", type=Path, help="where to write it; must not exist")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="nano", help="its size (default: nano)")
    parser.add_argument("--seed", type=int, default=7, help="seed of the weights (default: 7)")
    options = parser.parse_args()
    if options.directory.exists():
        parser.error(f"{options.directory} exists already")
    options.directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory.parent) as scratch:
        write_checkpoint(Path(scratch) / "new", options.preset, seed=options.seed).rename(options.directory)
    print(options.directory)


if __name__ == "__main__":
    main()
