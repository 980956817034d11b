"""Which kernels a start compiles ahead, by name, and how long that takes. Needs no GPU.

python -m benchmarks.kernels --preset slice8 --format fp8            list them
python -m benchmarks.kernels --preset slice8 --format fp8 --compile  compile them for an H200, into Triton's cache
python -m benchmarks.kernels --preset slice8 --every 600             steps of 1 to 600 tokens need no others
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.presets import FORMATS, PRESETS, write_preset
from benchmarks.report import table
from srt.configs.census import announced_formats
from srt.configs.models import checkpoint_directory, read_config, read_facts
from srt.configs.plan import DeviceFacts, RuntimePlan
from srt.configs.resolve import resolve
from srt.configs.server import ServerConfig
from srt.distributed import TensorGroup
from srt.layers.gpu import Gpu
from srt.layers.moe.backends import RunnerChoice
from srt.layers.moe.triton_experts import TritonExperts
from srt.layers.quant.registry import format_of
from srt.worker.device.ahead import META, Ahead, Shape, Target, run, shapes_for
from srt.worker.device.passes import Passes
from srt.worker.startup import DTYPES, Built, Pick, Picks, note_of, passes_without_memory

H200: Final = Gpu((9, 0))
DRIVER: Final = Target(GPUTarget("cuda", 90, 32))
"""Of an H200 that is not there."""
MEMORY: Final = 1 << 40


def built(path: str, *, announced: bool, kv_dtype: str, mtp: bool) -> Built:
    """What a server on an H200 would build its model from."""
    server = ServerConfig(
        model_path=path, device="cuda", kv_cache_dtype=kv_dtype, speculative_algorithm="mtp" if mtp else None
    )
    directory = checkpoint_directory(path)
    facts, config = read_facts(directory, announced=announced), read_config(directory)
    plan = resolve(server, facts, DeviceFacts("cuda", "H200", MEMORY, cores=torch.get_num_threads(), cuda_devices=1))
    formats = announced_formats(config)
    runners = {name: TritonExperts(format_of(name, DTYPES[plan.dtype]), H200) for name in formats.values()}
    experts = {layer: RunnerChoice(runners[name], "triton", "") for layer, name in formats.items()}
    own = Pick("triton", "", (H200,))
    picks = Picks(own, own, own, own, Pick("graphs", "", (H200,)))
    return Built(plan, config, formats, experts, picks, TensorGroup())


def needed(passes: Passes, shapes: Iterable[Shape]) -> set[tuple[str, str]]:
    """Kernels that steps of these shapes ask for: name and all that they are compiled for."""
    found: set[tuple[str, str]] = set()

    def ask(*, key: str, fn: Any, **_: object) -> bool:
        found.add((fn.name, key))
        return True  # do not compile it

    with knobs.runtime.scope(), torch.inference_mode(), META:
        knobs.runtime.jit_cache_hook = ask
        for shape in shapes:
            run(passes, shape)
    return found


def planned(plan: RuntimePlan) -> list[Shape]:
    """What a start looks at."""
    return shapes_for(plan.max_running_requests, plan.drafting.drafts, plan.max_step_tokens)


def every(plan: RuntimePlan, most: int) -> list[Shape]:
    """Prompts of 1 to `most` tokens, decodes of all numbers of rows, and rows of a few tokens each."""
    depth, rows = plan.drafting.drafts, range(1, min(most, plan.max_running_requests) + 1)
    prompts = [Shape(1, tokens) for tokens in range(1, most + 1)]
    return prompts + [
        Shape(size, width, drafts)
        for size in rows
        for width, drafts in ((1, 0), (1, depth), *((few, 0) for few in range(2, 9)))
        if size * (width + drafts) <= most
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model-path", help="checkpoint directory")
    model.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--format", choices=FORMATS, default="bf16", help="of a preset's routed experts")
    parser.add_argument("--mtp", action="store_true", help="with draft modules")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--compile", action="store_true", help="compile them, or find them in the cache")
    parser.add_argument("--cores", type=int, default=torch.get_num_threads(), help="to compile on")
    parser.add_argument(
        "--every", type=int, default=0, metavar="N", help="tell what steps of 1 to N tokens need beside"
    )
    return parser.parse_args()


def main() -> int:
    """Command line entry; 1 if steps need kernels that no start compiles."""
    args = parse()
    driver.set_active(DRIVER)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model_path or str(write_preset(Path(folder), args.preset, args.format, mtp=args.mtp))
        made = built(path, announced=bool(args.preset), kv_dtype=args.kv_cache_dtype, mtp=args.mtp)
    shapes = planned(made.plan)
    with torch.inference_mode(), META:
        passes = passes_without_memory(made)
    ahead = needed(passes, shapes)
    rows = [(name, str(count)) for name, count in sorted(Counter(name for name, _ in ahead).items())]
    rows += [("kernels", f"{len(ahead)} of {len(shapes)} steps")]
    more = needed(passes, every(made.plan, args.every)) - ahead
    rows += [("needed beside", f"{name} {key}") for name, key in sorted(more)]
    if args.compile:
        note = note_of(made, shapes, DRIVER)
        compiling = Ahead(partial(passes_without_memory, made), shapes, note, DRIVER, args.cores)
        rows.append(("compiled", compiling.result()))
    print(table(rows))
    return 1 if more else 0


if __name__ == "__main__":
    raise SystemExit(main())
