"""Compile the kernels on the machine that runs them, once, into a cache.

A library's name holds what it depends on: sources, flags and the processor, then the compiler. The same name means
the same code, so several processes may build at once: each takes the lock, and all but the first find the file.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).parent / "csrc"
COMPILERS: Final = ("g++", "clang++", "c++")
FLAGS: Final = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-math-errno",
    # A multiply-add is fused where the source says so: results must not depend on what the compiler finds in a loop.
    "-ffp-contract=off",
)
COMPILE_SECONDS_MAX: Final = 300


class KernelsUnavailable(Exception):
    """The native kernels cannot be had here; the message is one sentence that says why."""


def default_cache() -> Path:
    """Where libraries go unless someone says otherwise: the user's cache directory."""
    return Path.home() / ".cache" / "srt" / "kernels"


def build(cache: Path, compilers: Sequence[str] = COMPILERS, flags: Sequence[str] = FLAGS) -> Path:
    """Path of the library for this machine, compiled if the cache does not have it.

    Without any compiler a library that an earlier one built from the same sources for this processor will do.
    Raises: KernelsUnavailable if there is no compiler, compiling fails or the cache cannot be written.
    """
    stem = f"kernels-{_digest(*_sources(), *flags, *_processor())}"
    compiler = next((found for name in compilers if (found := shutil.which(name))), None)
    if compiler is None:
        built = sorted(cache.glob(f"{stem}-*.so"))
        if built:
            return built[-1]
        raise KernelsUnavailable(f"no C++ compiler found (looked for {', '.join(compilers)})")
    library = cache / f"{stem}-{_digest(_version(compiler))}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _compile(compiler, flags, library)
    except OSError as error:
        raise KernelsUnavailable(f"the kernel cache {cache} cannot be written: {error.strerror}") from error
    return library


def _compile(compiler: str, flags: Sequence[str], library: Path) -> None:
    """Compile each source to an object, link them, put the library in its place in one step."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        units = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(scratch) / f"{unit.stem}.o" for unit in units]
        commands = [[compiler, *flags, "-c", str(u), "-o", str(o)] for u, o in zip(units, objects, strict=True)]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = Path(scratch) / "kernels.so"
        _run([compiler, "-shared", "-pthread", *map(str, objects), "-o", str(linked)])
        linked.replace(library)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS_MAX, check=False)
    except subprocess.TimeoutExpired as error:
        raise KernelsUnavailable(f"{command[0]} took more than {COMPILE_SECONDS_MAX} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
        raise KernelsUnavailable(f"{command[0]} failed with status {done.returncode}: {lines[0].strip()}")


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return f"{compiler} {done.stdout}"


def _sources() -> list[str]:
    files = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    return [f"{file.name}\n{file.read_text()}" for file in files]


def _processor() -> list[str]:
    """Architecture, model and features: what -march=native looks at."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return [platform.machine(), platform.processor()]
    first = text.split("\n\n", 1)[0].splitlines()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part", "cpu family", "model")
    return [platform.machine(), *(line for line in first if line.split("\t", 1)[0].strip(" :") in wanted)]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m srt.layers.cpu.build [--cache DIR]`: compile now; print the path or the reason."""
    parser = argparse.ArgumentParser(description="Compile the CPU kernels for this machine.")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="directory of compiled kernels")
    cache: Path = parser.parse_args(arguments).cache
    try:
        print(build(cache))
    except KernelsUnavailable as error:
        print(f"native CPU kernels are not available: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
