"""`server convert`: options in, a table of errors out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from srt.command_line import CommandParser
from srt.configs.models import checkpoint_directory, read_config
from srt.configs.startup_table import human
from srt.convert.run import FORMATS, Report, Request, convert
from srt.convert.tokens import DEFAULT_TOKENS, read_sequences, seeded_sequences
from srt.errors import StartupError

EXAMPLES = """\
examples:
  server convert --model-path ./step --output ./step-fp8 --format fp8
      routed experts in FP8, 128 x 128 blocks; everything else as stored
  server convert --model-path ./step --output ./step-nvfp4 --format nvfp4 --calibration chats.jsonl
      routed experts in NVFP4, with activation ranges measured on your own texts
"""


def parser() -> argparse.ArgumentParser:
    """The options of `server convert`."""
    options = CommandParser(
        "server convert",
        description="Write a checkpoint with its routed experts in another weight format, in the published layout.",
        epilog=EXAMPLES,
    )
    options.add_argument(
        "--model-path", type=checkpoint_directory, required=True, metavar="IN", help="checkpoint to read"
    )
    options.add_argument("--output", type=Path, required=True, metavar="OUT", help="empty or new directory to write")
    options.add_argument("--format", required=True, choices=tuple(FORMATS), help="format of the routed experts")
    options.add_argument("--mtp", choices=("keep", "drop"), default="keep", help="MTP modules: as stored, or left out")
    options.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text or JSON lines to measure activations on (nvfp4; default: seeded random token ids)",
    )
    options.add_argument(
        "--calibration-tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help="tokens to measure on (default %(default)s)",
    )
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises: StartupError, one sentence, if it cannot be done.
    """
    given = parser().parse_args(arguments)
    if given.calibration_tokens < 1:
        raise StartupError(f"--calibration-tokens is {given.calibration_tokens}, it must be at least 1")
    if given.calibration is not None and given.format != "nvfp4":
        raise StartupError(f"--calibration measures activations for nvfp4; --format {given.format} stores none")
    request = Request(
        source=given.model_path,
        target=given.output,
        format=given.format,
        keep_mtp=given.mtp == "keep",
        sequences=_sequences(given) if given.format == "nvfp4" else (),
        device=_device(given.device),
    )
    began = time.perf_counter()
    bars = _Bars()
    try:
        report = convert(request, bars.show)
    finally:
        bars.close()
    print(*lines(report, request), sep="\n")
    print(f"wrote {request.target} in {time.perf_counter() - began:.1f} s on {request.device}")
    return 0


def lines(report: Report, request: Request) -> list[str]:
    """What a person wants to know of a conversion."""
    width = max((len(error.name) for error in report.errors), default=6)
    table = [f"{'module':<{width}}  relative error  worst expert"]
    table += [
        f"{error.name:<{width}}  {error.relative:14.3e}  {error.worst:.3e} (number {error.worst_expert})"
        for error in report.errors
    ]
    unchosen = {layer: ranges.unchosen for layer, ranges in report.ranges.items() if ranges.unchosen}
    if unchosen:
        told = ", ".join(f"layer {layer}: {count}" for layer, count in unchosen.items())
        table.append(f"experts that no calibration token chose, measured as the largest of their layer: {told}")
    table.append(f"{human(report.bytes_before)} -> {human(report.bytes_after)} with experts in {request.format}")
    return table


def _sequences(given: argparse.Namespace) -> list[list[int]]:
    vocab_size = read_config(given.model_path).text.vocab_size
    if given.calibration is None:
        return seeded_sequences(vocab_size, given.calibration_tokens)
    return read_sequences(given.calibration, given.model_path, vocab_size, given.calibration_tokens)


def _device(asked: str) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: no CUDA device is there")
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


class _Bars:
    """A progress bar for each stage; bytes for the conversion, layers for the measurement."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: tqdm[NoReturn] | None = None

    def show(self, stage: str, done: int, total: int) -> None:
        """Draw `done` of `total`."""
        if stage != self._stage:
            self.close()
            size = stage == "convert"
            unit = "B" if size else "layer"
            self._bar = tqdm(total=total, desc=stage, unit=unit, unit_scale=size, file=sys.stderr, mininterval=0.5)
            self._stage = stage
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Finish the bar that is drawn."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
