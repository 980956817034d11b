"""`server plan`: what a server would take on given GPUs, from headers alone; nothing is loaded or started."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from srt.command_line import CommandParser
from srt.configs.arguments import parse_launch
from srt.configs.device import read_device
from srt.configs.drafting import draft_model_path
from srt.configs.models import checkpoint_directory, read_facts
from srt.configs.plan import Choice, DeviceFacts, ModelFacts, RuntimePlan
from srt.configs.presets import PREFIX, PRESETS
from srt.configs.resolve import memory_of, resolve
from srt.configs.server import ServerConfig
from srt.configs.startup_table import human
from srt.errors import StartupError
from srt.launch.report import table_lines

GPU_MIB: Final = {
    "A100": 81_251, "H100": 81_079, "H200": 143_161, "B200": 182_632, "GB200": 188_416, "L40S": 45_458,
    "RTX4090": 24_081,
}  # fmt: skip
"""What the driver reports as free on an empty GPU of this name, about."""
SIZES: Final = (1, 2, 4, 8)
ABOUT: Final = """\
Say what a server would take: weights by part, KV of each group, what steps need. Only config.json and the headers
of the shards are read. A directory with config.json alone will do, and so will the published sizes:
"""
EXAMPLES: Final = """\
examples:
  server plan --model-path preset:step-3.7-flash-nvfp4 --gpus 1xH200 --context 32768 --concurrency 16
      would 16 conversations of 32768 tokens fit one H200?
  server plan --model-path ./step-3.7-flash --gpus 4x96GiB --ep-size 4
      any number of GPUs of any size; all options of `server launch` may follow
  server plan
      the built-in model on this machine
"""


def parser() -> argparse.ArgumentParser:
    """What `server plan` takes beside the options of `server launch`."""
    made = CommandParser(
        "server plan",
        usage="server plan [--model-path DIR] [--gpus NxNAME] [--context N] [--concurrency C] [options of launch]",
        description=f"{ABOUT}{', '.join(PREFIX + name for name in PRESETS)}",
        epilog=EXAMPLES,
    )
    known = ", ".join(GPU_MIB)
    made.add_argument("--gpus", metavar="NxNAME", help=f"{known}, or a size like 2x96GiB (default: this machine)")
    made.add_argument("--context", type=int, metavar="N", help="tokens of a conversation, prompt and answers")
    made.add_argument("--concurrency", type=int, metavar="C", help="conversations of that length at the same time")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns 0 if it fits, 1 if not.

    Raises: StartupError, one sentence, if an option is wrong or the checkpoint cannot be read.
    """
    given, rest = parser().parse_known_args(arguments)
    server, device = _asked(given, parse_launch(rest).server)
    facts = _facts(server)
    try:
        plan = resolve(server, facts, device)
    except StartupError as error:
        print(f"does not fit: {error}")
        print(_enough(server, facts, device))
        return 1
    print(*table_lines(lines(plan)), sep="\n")
    print(f"fits: {_kept_tokens(plan)}")
    return 0


def lines(plan: RuntimePlan) -> list[Choice]:
    """The memory table: each part over all ranks and on one of them, and what is left."""
    ranks, device = plan.server.tp_size, plan.device
    shared = ranks == 1 or device.device == "cpu"
    reasons = {row.name: row.reason.removesuffix(", all ranks") for row in plan.table}
    rows = [
        Choice(part, human(size), ("" if shared else f"{human(size // ranks)} a GPU; ") + reasons.get(part, ""))
        for part, size in plan.memory.items()
    ]
    total, filled = sum(plan.memory.values()), memory_of(plan.server, device)
    whole = human(device.memory_bytes * (1 if device.device == "cpu" else ranks))
    rows.append(Choice("sum", human(total), f"of {whole} on {device.name}; {human(filled)} may be filled"))
    return [*rows, Choice("left", human(filled - total), "for a longer context or more conversations")]


def _asked(given: argparse.Namespace, server: ServerConfig) -> tuple[ServerConfig, DeviceFacts]:
    """The server and the machine that are meant."""
    changes: dict[str, int] = {}
    for name, value in (("context", given.context), ("concurrency", given.concurrency)):
        if value is not None and value < 1:
            raise StartupError(f"--{name} is {value}; the smallest value is 1")
    if given.context is not None:
        changes["context_length"] = given.context
    if given.concurrency is not None:
        changes["max_running_requests"] = given.concurrency
    if given.context is not None and given.concurrency is not None and server.max_total_tokens is None:
        pages = -(-given.context // server.page_size)
        changes["max_total_tokens"] = pages * server.page_size * given.concurrency
    if given.gpus is None:
        return msgspec.structs.replace(server, **changes), read_device(server.device, server.tp_size)
    count, device = _gpus(given.gpus)
    if server.tp_size == 1:
        changes["tp_size"] = count
    return msgspec.structs.replace(server, **changes), device


def _gpus(text: str) -> tuple[int, DeviceFacts]:
    """How many GPUs, and what one of them is. Raises: StartupError that names what is known."""
    match = re.fullmatch(r"(?:(\d+)x)?(?:(\d+(?:\.\d+)?)GiB|(\w+))", text)
    if match is None or (match[3] and match[3].upper() not in GPU_MIB) or match[1] == "0":
        raise StartupError(f"--gpus is {text!r}; give a number and a name or size: 1x{', 1x'.join(GPU_MIB)}, 2x96GiB")
    count = int(match[1] or 1)
    size = int(float(match[2]) * 2**30) if match[2] else GPU_MIB[match[3].upper()] << 20
    name = f"{count} x {match[3].upper() if match[3] else match[2] + ' GiB'}"
    return count, DeviceFacts("cuda", name, size, cores=1, cuda_devices=count)


def _facts(server: ServerConfig) -> ModelFacts:
    """What there is to know of the model, as far as files are there."""
    path = server.model_path
    if path.startswith(PREFIX):
        values = PRESETS.get(path.removeprefix(PREFIX))
        if values is None:
            raise StartupError(f"--model-path is {path}; presets are {', '.join(PREFIX + name for name in PRESETS)}")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(values))
            return msgspec.structs.replace(read_facts(Path(folder), announced=True), path=path)
    directory, drafts = checkpoint_directory(path), draft_model_path(server)
    announced = not any(directory.glob("*.safetensors"))
    return read_facts(directory, draft_directory=None if drafts is None else Path(drafts), announced=announced)


def _kept_tokens(plan: RuntimePlan) -> str:
    """How many conversations the pool holds."""
    whole = plan.max_total_tokens // plan.context_length
    return (
        f"{whole} conversation{'s' * (whole != 1)} of {plan.context_length} tokens at the same time; "
        f"{plan.max_running_requests} requests may run"
    )


def _enough(server: ServerConfig, facts: ModelFacts, device: DeviceFacts) -> str:
    """The smallest number of such GPUs that would do."""
    if device.device == "cpu":
        return "give it more memory, a shorter --context or a smaller --concurrency"
    for size in SIZES:
        larger = msgspec.structs.replace(device, cuda_devices=size)
        try:
            resolve(msgspec.structs.replace(server, tp_size=size), facts, larger)
        except StartupError:
            continue
        return f"{size} such GPUs would do: --tp-size {size}"
    return f"{SIZES[-1]} such GPUs would not do either"
