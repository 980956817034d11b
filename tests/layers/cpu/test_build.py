from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from srt.layers.cpu import build as builder
from srt.layers.cpu.build import KernelsUnavailable, build, main
from srt.layers.cpu.kernels import Kernels, load_kernels


@pytest.fixture
def cache(pytestconfig: pytest.Config, kernels: Kernels) -> Path:
    """The cache that already has this machine's library."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("kernels")


def _script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_second_build_finds_the_first_ones_library(cache: Path) -> None:
    library = build(cache)
    written = library.stat().st_mtime_ns
    assert build(cache) == library
    assert library.stat().st_mtime_ns == written


def test_builders_that_race_compile_once_and_all_get_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(builder, "SOURCES", source)
    log = tmp_path / "log"
    compiler = _script(tmp_path / "cxx", f'#!/bin/sh\necho "$@" >> {log}\nexec c++ "$@"\n')
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build(tmp_path / "k", [str(compiler)]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert found[0].exists()
    assert sum(" -c " in line for line in log.read_text().splitlines()) == 1
    assert sorted(path.name for path in (tmp_path / "k").iterdir()) == sorted(["lock", found[0].name])


def test_other_sources_get_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for value in (1, 2):
        source = tmp_path / str(value)
        source.mkdir()
        (source / "one.cpp").write_text(f'extern "C" int one() {{ return {value}; }}\n')
        monkeypatch.setattr(builder, "SOURCES", source)
        names.append(build(tmp_path / "k").name)
    assert names[0] != names[1]


def test_no_compiler_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(KernelsUnavailable, match=r"^no C\+\+ compiler found \(looked for no-such-compiler\)$"):
        build(tmp_path, ["no-such-compiler"])


def test_without_a_compiler_a_library_built_earlier_will_do(cache: Path) -> None:
    assert build(cache, ["no-such-compiler"]) == build(cache)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    broken = _script(tmp_path / "cxx", "#!/bin/sh\necho 'x.cpp:1: error: it is Monday' >&2\nexit 3\n")
    with pytest.raises(KernelsUnavailable, match=r"failed with status 3: x\.cpp:1: error: it is Monday"):
        build(tmp_path / "k", [str(broken)])
    assert not list((tmp_path / "k").glob("*.so"))


def test_a_cache_under_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelsUnavailable, match="cannot be written"):
        build(tmp_path / "file" / "k")


def test_a_library_that_does_not_load_is_said(tmp_path: Path, cache: Path) -> None:
    (tmp_path / build(cache).name).write_text("not a library")
    with pytest.raises(KernelsUnavailable, match="does not load"):
        load_kernels(tmp_path, 1)


def test_the_command_prints_the_library(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cache", str(cache)]) == 0
    assert capsys.readouterr().out.strip() == str(build(cache))


def test_the_kernels_say_what_they_run_on(kernels: Kernels) -> None:
    assert kernels.threading == "2 threads of their own"
    assert kernels.vectors in ("portable loops", "AVX-512", "AVX-512 with bfloat16")
