"""What is read from the kernel's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from srt.configs.device import read_device
from srt.configs.gpus import Gpu
from srt.errors import StartupError


def machine(root: Path, files: dict[str, str]) -> Path:
    """A folder that looks like the root of a machine."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 8000000 kB\nMemFree: 1 kB\nMemAvailable: 4000000 kB\n"}


def test_this_machine_has_memory_and_cores() -> None:
    facts = read_device("auto")
    assert facts.device == "cpu"
    assert facts.memory_bytes > 1 << 20
    assert facts.cores >= 1


def test_free_memory_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    facts = read_device("cpu", root=machine(tmp_path, MEMINFO | {"proc/cpuinfo": "model name\t: Fast CPU\n"}))
    assert facts.memory_bytes == 4_000_000 * 1024
    assert facts.name == "Fast CPU"
    assert facts.cuda_devices == 0


def test_the_limits_of_a_control_group_of_version_2_count(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/box\n",
        "sys/fs/cgroup/cgroup.controllers": "cpu memory",
        "sys/fs/cgroup/box/memory.max": "1000000\n",
        "sys/fs/cgroup/box/memory.current": "400000\n",
        "sys/fs/cgroup/box/cpu.max": "150000 100000\n",
    }
    facts = read_device("cpu", root=machine(tmp_path, MEMINFO | files))
    assert facts.memory_bytes == 600_000
    assert facts.cores == 1


def test_the_limits_of_a_control_group_of_version_1_count(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "1000000\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "1200000\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "100000\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
    }
    facts = read_device("cpu", root=machine(tmp_path, MEMINFO | files))
    assert facts.memory_bytes == 0
    assert facts.cores == 1


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cgroup.controllers": "cpu memory",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
    }
    assert read_device("cpu", root=machine(tmp_path, MEMINFO | files)).memory_bytes == 4_000_000 * 1024


NODES = {"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidiactl": ""}


def test_a_gpu_whose_driver_answers_is_taken(tmp_path: Path) -> None:
    root = machine(tmp_path, MEMINFO | NODES)
    torch = machine(tmp_path / "torch", {"lib/libtorch_cuda.so": ""})
    both = [Gpu("Big GPU", 5 << 30), Gpu("Big GPU", 3 << 30)]
    facts = read_device("auto", 2, root, lambda: both, torch)
    assert (facts.device, facts.name, facts.memory_bytes, facts.cuda_devices) == ("cuda", "Big GPU", 3 << 30, 2)
    assert read_device("auto", 1, root, lambda: both, torch).memory_bytes == 5 << 30, "the other is nobody's"
    assert read_device("cpu", root=root, gpus=lambda: [Gpu("Big GPU", 1)]).device == "cpu"


def test_a_gpu_whose_driver_is_silent_is_counted_and_left(tmp_path: Path) -> None:
    facts = read_device("auto", root=machine(tmp_path, MEMINFO | NODES), gpus=list)
    assert (facts.device, facts.cuda_devices) == ("cpu", 2)


def test_a_gpu_that_torch_is_not_built_for_is_left_with_the_reason(tmp_path: Path) -> None:
    root, torch = machine(tmp_path, MEMINFO | NODES), machine(tmp_path / "torch", {"lib/libtorch_cpu.so": ""})
    facts = read_device("auto", root=root, gpus=lambda: [Gpu("Big GPU", 5 << 30)], torch=torch)
    assert (facts.device, facts.cuda_devices) == ("cpu", 2)
    assert facts.unused_because == "torch is installed without CUDA"
    with pytest.raises(StartupError, match="--device cuda: torch is installed without CUDA; use --device cpu"):
        read_device("cuda", root=root, gpus=lambda: [Gpu("Big GPU", 5 << 30)], torch=torch)


def test_cuda_without_a_gpu_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--device cuda: no NVIDIA device is there; use --device cpu"):
        read_device("cuda", root=machine(tmp_path, MEMINFO))
    with pytest.raises(StartupError, match="its driver does not answer"):
        read_device("cuda", root=machine(tmp_path, MEMINFO | NODES), gpus=list)
