"""Which backend attends: the one that was asked for or the best, with its reason."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from srt.configs.plan import RuntimePlan
from srt.errors import StartupError
from srt.layers.attention.flashinfer import Shape
from srt.layers.gpu import Gpu
from srt.worker import startup
from srt.worker.startup import Pick, _attending, reference_backends
from tests.support.checkpoints import write_checkpoint
from tests.support.steps import plan_for

TRITON = replace(reference_backends("under test"), attention=Pick("triton", "compiled for this GPU"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RuntimePlan:
    return plan_for(write_checkpoint(tmp_path_factory.mktemp("tiny")), dtype="bfloat16")


def asking(plan: RuntimePlan, backend: str) -> RuntimePlan:
    return msgspec.structs.replace(plan, server=msgspec.structs.replace(plan.server, attention_backend=backend))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "current_gpu", lambda: Gpu((9, 0)))


def refusing(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> list[Shape]:
    shapes = list[Shape]()

    def answer(shape: Shape, gpu: Gpu) -> str | None:
        shapes.append(shape)
        return reason

    monkeypatch.setattr("srt.layers.attention.flashinfer.refusal", answer)
    return shapes


def test_auto_keeps_what_was_picked(plan: RuntimePlan, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "AUTO_ATTENTION", "triton")
    assert _attending(TRITON, plan) is TRITON
    native = replace(TRITON, attention=Pick("native", "vectors"))
    assert _attending(native, plan) is native


def test_what_is_asked_for_is_taken(plan: RuntimePlan, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (head_dim,) = {group.head_dim for group in plan.groups}
    shapes = refusing(monkeypatch, None)
    found = _attending(TRITON, asking(plan, "flashinfer")).attention
    assert found.key == "flashinfer"
    assert found.reason == "fa3 for prompts once it is compiled, Triton until then and for all else"
    assert found.arguments == (Gpu((9, 0)), shapes[0])
    assert (set(shapes[0].head_dims), set(shapes[0].windows)) == ({head_dim}, {False, True})
    assert _attending(TRITON, asking(plan, "reference")).attention.key == "reference"
    reference = reference_backends("under test")
    assert _attending(reference, asking(plan, "triton")).attention.key == "triton"


def test_what_cannot_run_here_is_refused_with_its_reason(plan: RuntimePlan) -> None:
    for backend in ("triton", "flashinfer"):
        with pytest.raises(StartupError, match=f"--attention-backend {backend}: needs a GPU"):
            _attending(reference_backends("under test"), asking(plan, backend))


def test_flashinfer_refuses_aloud_if_asked_for_and_gives_way_if_it_is_only_preferred(
    plan: RuntimePlan, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, "has no kernels for heads of size 16")
    with pytest.raises(StartupError, match="--attention-backend flashinfer: has no kernels for heads of size 16"):
        _attending(TRITON, asking(plan, "flashinfer"))
    monkeypatch.setattr(startup, "AUTO_ATTENTION", "flashinfer")
    found = _attending(TRITON, plan).attention
    assert found.key == "triton"
    assert found.reason == "flashinfer: has no kernels for heads of size 16; compiled for this GPU"
