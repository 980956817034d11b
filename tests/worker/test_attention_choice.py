"""Which backend attends: the one that was asked for or the best, with its reason."""

from __future__ import annotations

import msgspec
import pytest
import torch

from srt.configs.plan import RuntimePlan
from srt.errors import StartupError
from srt.layers.attention.flashinfer import Shape
from srt.layers.gpu import Gpu
from srt.worker import pick as picking
from srt.worker.pick import Pick, choose_attention, compiled_attention
from tests.support.checkpoints import write_checkpoint
from tests.support.steps import plan_for

TRITON = Pick("triton", "compiled for this GPU")
REFERENCE = Pick("reference", "runs everywhere")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RuntimePlan:
    return plan_for(write_checkpoint(tmp_path_factory.mktemp("tiny")), dtype="bfloat16")


def asking(plan: RuntimePlan, backend: str) -> RuntimePlan:
    return msgspec.structs.replace(plan, server=msgspec.structs.replace(plan.server, attention_backend=backend))


def chosen(found: Pick, plan: RuntimePlan) -> Pick:
    return choose_attention(found, plan, torch.bfloat16, torch.bfloat16)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picking, "current_gpu", lambda: Gpu((9, 0)))


def refusing(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> list[Shape]:
    shapes = list[Shape]()

    def answer(shape: Shape, gpu: Gpu) -> str | None:
        shapes.append(shape)
        return reason

    monkeypatch.setattr("srt.layers.attention.flashinfer.refusal", answer)
    return shapes


def test_auto_keeps_what_was_picked(plan: RuntimePlan, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picking, "AUTO_ATTENTION", "triton")
    assert chosen(TRITON, plan) is TRITON
    native = Pick("native", "vectors")
    assert chosen(native, plan) is native


def test_what_is_asked_for_is_taken(plan: RuntimePlan, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (head_dim,) = {group.head_dim for group in plan.groups}
    shapes = refusing(monkeypatch, None)
    found = chosen(TRITON, asking(plan, "flashinfer"))
    assert found.key == "flashinfer"
    assert found.reason == "fa3 for prompts once it is compiled, Triton until then and for all else"
    assert found.arguments == (Gpu((9, 0)), shapes[0])
    assert (set(shapes[0].head_dims), set(shapes[0].windows)) == ({head_dim}, {False, True})
    assert compiled_attention(found) == Pick("triton", found.reason, (Gpu((9, 0)),))
    assert chosen(TRITON, asking(plan, "reference")).key == "reference"
    assert chosen(REFERENCE, asking(plan, "triton")).key == "triton"


def test_what_cannot_run_here_is_refused_with_its_reason(plan: RuntimePlan) -> None:
    for backend in ("triton", "flashinfer"):
        with pytest.raises(StartupError, match=f"--attention-backend {backend}: needs a GPU"):
            chosen(REFERENCE, asking(plan, backend))


def test_flashinfer_refuses_aloud_if_asked_for_and_gives_way_if_it_is_only_preferred(
    plan: RuntimePlan, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, "has no kernels for heads of size 16")
    with pytest.raises(StartupError, match="--attention-backend flashinfer: has no kernels for heads of size 16"):
        chosen(TRITON, asking(plan, "flashinfer"))
    monkeypatch.setattr(picking, "AUTO_ATTENTION", "flashinfer")
    found = chosen(TRITON, plan)
    assert found.key == "triton"
    assert found.reason == "flashinfer: has no kernels for heads of size 16; compiled for this GPU"


def test_what_is_compiled_ahead_of_another_backend_is_all_of_it() -> None:
    assert compiled_attention(TRITON) is TRITON
