"""KV memory in FP8: what the reference backend writes and reads, and what a whole model makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from srt.layers.attention.contract import AttentionSpec
from srt.layers.attention.reference import ReferenceAttention
from srt.layers.batch import ForwardBatch, KVLayer
from srt.layers.quant.codes import E4M3, encode_e4m3
from srt.worker.startup import start
from tests.support.checkpoints import write_checkpoint
from tests.support.steps import Steps, plan_for, random_ids


def _spec(k_scale: float, v_scale: float) -> AttentionSpec:
    return AttentionSpec(
        layer=0, group=0, q_heads=2, kv_heads=1, head_dim=8, rotary_dim=8, window=None, scale=8**-0.5,
        q_norm=torch.zeros(8), k_norm=torch.zeros(8), rope=torch.cat([torch.ones(64, 4), torch.zeros(64, 4)], dim=1),
        eps=1e-5, k_scale=torch.tensor(k_scale), v_scale=torch.tensor(v_scale),
    )  # fmt: skip


def _batch(tokens: int) -> ForwardBatch:
    positions = torch.arange(tokens)
    starts, lens = [0, tokens], [tokens]
    return ForwardBatch(
        input_ids=positions, positions=positions, query_starts=torch.tensor(starts, dtype=torch.int32),
        query_starts_list=starts, kv_lens=torch.tensor(lens, dtype=torch.int32), kv_lens_list=lens,
        page_tables=(torch.tensor([[1, 2]], dtype=torch.int32),), slots=(positions + 4,),
        logit_tokens=positions[-1:], page_size=4,
    )  # fmt: skip


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.01, 0.25)])
def test_keys_and_values_are_stored_as_codes_of_the_scaled_numbers(scales: tuple[float, float]) -> None:
    spec, batch = _spec(*scales), _batch(6)
    qkv = torch.randn(6, 4 * 8, generator=torch.Generator().manual_seed(0))
    plain, coded = (
        KVLayer(torch.zeros(3, 4, 1, 8, dtype=t), torch.zeros(3, 4, 1, 8, dtype=t)) for t in (qkv.dtype, E4M3)
    )
    backend = ReferenceAttention()
    assert torch.equal(backend.store(qkv, spec, plain, batch), backend.store(qkv, spec, coded, batch))
    for number, code, scale in ((plain.k, coded.k, scales[0]), (plain.v, coded.v, scales[1])):
        assert torch.equal(code.float(), encode_e4m3(number / scale).float())


def test_attention_reads_the_numbers_that_the_codes_stand_for() -> None:
    spec, batch = _spec(0.01, 0.25), _batch(6)
    qkv = torch.randn(6, 4 * 8, generator=torch.Generator().manual_seed(0))
    coded = KVLayer(*(torch.zeros(3, 4, 1, 8, dtype=E4M3) for _ in range(2)))
    backend, gates = ReferenceAttention(), torch.randn(6, 2)
    q = backend.store(qkv, spec, coded, batch)
    decoded = KVLayer(coded.k.float() * 0.01, coded.v.float() * 0.25)
    assert torch.equal(backend.attend(q, gates, spec, coded, batch), backend.attend(q, gates, spec, decoded, batch))


def test_values_beyond_the_range_saturate() -> None:
    spec, batch = _spec(1.0, 0.001), _batch(2)
    coded = KVLayer(*(torch.zeros(3, 4, 1, 8, dtype=E4M3) for _ in range(2)))
    ReferenceAttention().store(torch.ones(2, 32), spec, coded, batch)
    assert coded.v.float().max() == 448.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), vision=False, vocab=512, mtp=1)


def test_a_model_with_fp8_kv_stays_close_to_one_with_plain_kv(checkpoint: Path, tmp_path: Path) -> None:
    logits = []
    for kv_dtype in ("float32", "fp8_e4m3"):
        steps = Steps(plan_for(checkpoint, kv_dtype=kv_dtype), tmp_path)
        steps.add(0, random_ids(60, 1, 512))
        steps.prefill(0, 25)
        logits.append(steps.all_logits(0))
    error = float((logits[1] - logits[0]).norm() / logits[0].norm())
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("name", ["self_attn.{0}_proj.{0}_scale", "self_attn.{0}_scale"])
def test_scales_of_the_checkpoint_are_used_and_their_absence_is_said(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    def lines(directory: Path) -> str:
        plan = plan_for(directory, kv_dtype="fp8_e4m3")
        return start(plan, tmp_path, 0, lambda done, total: None).facts["kv memory"]

    assert "0 of 10 scales from the checkpoint, 1.0 for the others" in lines(checkpoint)
    scaled = tmp_path / "scaled"
    scaled.mkdir()
    for path in checkpoint.iterdir():
        (scaled / path.name).write_bytes(path.read_bytes())
    tensors = load_file(scaled / "model.safetensors")
    scales = {f"model.layers.{layer}.{name.format(kind)}": torch.tensor(0.5) for layer in range(5) for kind in "kv"}
    save_file(tensors | scales, str(scaled / "model.safetensors"))
    assert "scales from the checkpoint" in lines(scaled)
    assert "1.0" not in lines(scaled)
