"""What the machine offers: read from the kernel's files and asked of the GPU's driver, without torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from srt.configs.gpus import Gpu, ask_driver
from srt.configs.plan import DeviceFacts
from srt.errors import StartupError


def read_device(
    asked: str,
    ranks: int = 1,
    root: Path = Path("/"),
    gpus: Callable[[], list[Gpu]] | None = None,
    torch: Path | None = None,
) -> DeviceFacts:
    """Facts of the device that `--device` asks for: auto, cpu or cuda; auto takes a GPU where a driver answers and
    torch is built for it. Rank r has the r-th GPU that is visible; what the others hold does not matter.

    `root` is where /proc, /sys and /dev are; `gpus` asks the driver; `torch` is the folder of torch's package.
    Raises: StartupError for cuda without a GPU.
    """
    nodes = len(list(root.glob("dev/nvidia[0-9]*")))
    found = (gpus or ask_driver)() if nodes and asked != "cpu" else []
    cores = min(len(os.sched_getaffinity(0)), _group_cores(root))
    why = "" if asked == "cpu" or not nodes else _refusal(found, torch or _torch_folder())
    if found and not why:
        free = min(gpu.free_bytes for gpu in found[:ranks])
        return DeviceFacts("cuda", found[0].name, memory_bytes=free, cores=cores, cuda_devices=len(found))
    if asked == "cuda":
        raise StartupError(f"--device cuda: {why or 'no NVIDIA device is there'}; use --device cpu")
    return DeviceFacts(
        device="cpu",
        name=_processor(root),
        memory_bytes=min(_available_memory(root), _group_memory(root)),
        cores=cores,
        cuda_devices=nodes,
        unused_because=why,
    )


def _refusal(gpus: Sequence[Gpu], torch: Path | None) -> str:
    """Why GPUs that are there cannot be used; empty if they can."""
    if not gpus:
        return (
            "its driver does not answer (nvidia-smi, libcuda.so.1), or shows no whole GPU (CUDA_VISIBLE_DEVICES, MIG)"
        )
    # This process does not import torch; what it is built for shows in its libraries.
    if torch is None or not (torch / "lib" / "libtorch_cuda.so").is_file():
        return "torch is installed without CUDA"
    return ""


def _torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _text(path: Path) -> str:
    """Content of a kernel file; empty where this kernel has no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _processor(root: Path) -> str:
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return "CPU"


def _available_memory(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group(root: Path, controller: str) -> Path:
    """Folder of this process's control group, version 2 or the given controller of version 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            folder = root / "sys/fs/cgroup" / controller
            return folder / path.lstrip("/") if (folder / path.lstrip("/")).is_dir() else folder
        if not controllers and (root / "sys/fs/cgroup/cgroup.controllers").is_file():
            folder = root / "sys/fs/cgroup" / path.lstrip("/")
            return folder if folder.is_dir() else root / "sys/fs/cgroup"
    return root / "sys/fs/cgroup"


def _group_memory(root: Path) -> int:
    """Bytes left below the control group's memory limit; more than any machine has where there is no limit."""
    folder = _group(root, "memory")
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = _text(folder / limit_name), _text(folder / used_name)
        if limit.isdigit():
            return max(0, int(limit) - int(used or 0))
    return 1 << 62


def _group_cores(root: Path) -> int:
    """Whole cores of the control group's CPU quota, at least one."""
    folder = _group(root, "cpu")
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit():
        return max(1, int(quota) // int(period))
    return 1 << 20
