"""Facts of a small imagined checkpoint and machine, and plans made from them."""

from __future__ import annotations

from typing import Any

from srt.configs.plan import DeviceFacts, KVGroupSpec, ModelFacts, RuntimePlan, WeightKind
from srt.configs.resolve import resolve
from srt.configs.server import ServerConfig


def kinds(**part_bytes: int) -> tuple[WeightKind, ...]:
    """Weights of so many bytes in bfloat16, by part; all that a rank needs to know of an imagined model."""
    return tuple(
        WeightKind(part, size // 2, 1, split="whole", packed=False) for part, size in part_bytes.items() if size
    )


MODEL = ModelFacts(
    path="checkpoint",
    architecture="Step3p5ForCausalLM",
    model_type="step3p5",
    vocab_size=4096,
    context_length=8192,
    bos_token_id=0,
    eos_token_ids=(1,),
    groups=(
        KVGroupSpec(name="full", layers=(0, 4), window=None, kv_heads=2, head_dim=32),
        KVGroupSpec(name="sliding", layers=(1, 2, 3), window=64, kv_heads=2, head_dim=32),
    ),
    weight_bytes={"text": 5_000_000, "mtp": 1_000_000, "vision": 0},
    weights=kinds(text=5_000_000, mtp=1_000_000),
    mtp_modules=3,
    draft_group=KVGroupSpec(name="draft", layers=(5, 6, 7), window=64, kv_heads=2, head_dim=32),
)
DEVICE = DeviceFacts(device="cpu", name="a CPU", memory_bytes=8 << 30, cores=4)


PLAIN: dict[str, Any] = {"model_path": "checkpoint", "speculative_algorithm": "off"}
"""Options of a server without a drafter."""


def make_plan(**options: Any) -> RuntimePlan:
    """The plan of a server with these options on the imagined checkpoint and machine, without a drafter
    unless they ask for one."""
    return resolve(ServerConfig(**PLAIN | options), MODEL, DEVICE, fresh_seed=11)
