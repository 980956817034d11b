"""The driver's calls that wake a GPU, against a library that notes them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from srt.launch.gpu import wake

DRIVER = """
#include <stdio.h>
static FILE *notes(void) { return fopen("%s", "a"); }
int cuInit(unsigned flags) { FILE *f = notes(); fprintf(f, "init %%u\\n", flags); fclose(f); return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 40; return ordinal > 7; }
int cuDevicePrimaryCtxRetain(void **context, int device) {
    FILE *f = notes(); fprintf(f, "retain %%d\\n", device); fclose(f); *context = 0; return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize(("ordinal", "told"), [(3, "init 0\nretain 43\n"), (8, "init 0\n")])
def test_the_context_of_the_ranks_own_gpu_is_made(tmp_path: Path, ordinal: int, told: str) -> None:
    source, library, notes = tmp_path / "driver.c", tmp_path / "libdriver.so", tmp_path / "notes"
    source.write_text(DRIVER % notes)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    wake(ordinal, str(library)).join(timeout=10)
    assert notes.read_text() == told


def test_a_machine_without_a_driver_is_left_to_torch() -> None:
    thread = wake(0, "no such library")
    thread.join(timeout=10)
    assert not thread.is_alive()
