"""Trains the built-in model: text, images and MTP modules together.

    python -m tools.builtin.train --seconds 480 --out build/builtin
    python -m tools.builtin.train --smoke --out build/smoke

One run takes `--seconds` on one GPU; `--resume` goes on from the weights of an earlier run.
"""

from __future__ import annotations

import argparse
import glob
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from tools.builtin.batch import Assembler, Batch, Pool, Sights
from tools.builtin.evaluate import EVALUATED, evaluate
from tools.builtin.export import export, round_in_place
from tools.builtin.layers import Experts
from tools.builtin.model import Model
from tools.builtin.muon import Muon
from tools.builtin.shape import Shape, smoke_shape
from tools.builtin.supply import NAMES, Supply

TEXT_MIX: Final[dict[str, float]] = {
    "sum": 1.2, "difference": 1.2, "product": 0.7, "sort": 1.6, "reverse": 1.2, "count": 1.0, "json": 0.5,
    "recall": 1.6, "recall_turns": 1.2, "greeting": 0.25, "effort": 0.3, "tool_call": 0.6, "tool_joined": 0.7,
    "tool_answer": 0.8, "unknown": 0.4, "tool_missing": 0.15,
}  # fmt: skip
IMAGE_MIX: Final[dict[str, float]] = {"image_object": 1.0, "image_digit": 1.6, "image_many": 1.0}
CLASSES: Final = (7, 4, 10)
PIECE_BYTES: Final = 15_000_000


@dataclass(frozen=True)
class Plan:
    """What a run does."""

    seconds: float
    deadline: float
    steps: int
    text_rows: int
    image_rows: int
    rate: float
    warm_up: int
    decay_from: float
    draft_weight: float
    sight_weight: float
    balance_rate: float


class Sightings(nn.Module):
    """Auxiliary heads on the global view: colour, shape and digit from its best token."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(hidden, count) for count in CLASSES)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the loss. Shapes: features [N, 169, H]; labels [N, 3], -1 for none."""
        losses = []
        for index, head in enumerate(self.heads):
            scores = head(features.float()).logsumexp(1)
            each = functional.cross_entropy(scores, labels[:, index], ignore_index=-1, reduction="sum")
            losses.append(each / (labels[:, index] >= 0).sum().clamp(min=1))
        return torch.stack(losses).sum()


def token_losses(logits: Tensor, ids: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
    """Return cross entropy and hits [B, L] for the tokens `ahead` places on."""
    target = torch.roll(ids, -ahead, dims=1)
    wide = logits.float()
    loss = functional.cross_entropy(wide.flatten(0, 1), target.flatten(), reduction="none")
    return loss.view_as(target), (wide.argmax(-1) == target)


class Trainer:
    """Model, optimisers and the sums that are logged."""

    def __init__(self, model: Model, plan: Plan, device: torch.device) -> None:
        self.model, self.plan, self.device = model.to(device), plan, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.sightings = Sightings(model.shape.hidden).to(device)
        self.losses = token_losses
        self.features = self._features
        if device.type == "cuda":
            self._compile()
        large = [p for name, p in model.named_parameters() if _is_matrix(name, p)]
        known = {id(p) for p in large}
        rest = [p for p in [*model.parameters(), *self.sightings.parameters()] if id(p) not in known]
        self.muon = Muon(large)
        self.adam = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda")
        self.small = rest
        self.sums = torch.zeros(8, len(NAMES), device=device)
        self.sight_sum = torch.zeros((), device=device)
        self.shares: dict[int, Tensor] = {}

    def _compile(self) -> None:
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.cache_size_limit = 64
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)
        for block in self.model.vision_model.transformer.resblocks:
            block.compile(dynamic=False)
        self.losses = torch.compile(token_losses, dynamic=False)

    def _features(self, sights: Sights) -> tuple[Tensor, Tensor]:
        wholes, crops = self.model.see(sights.wholes, self.dtype), self.model.see(sights.crops, self.dtype)
        return wholes, torch.cat((wholes.flatten(0, 1), crops.flatten(0, 1)))

    def step(self, batch: Batch, progress: float, index: int) -> None:
        """Do one step of training."""
        plan = self.plan
        x = self.model.embed(batch.ids, self.dtype)
        sight_loss: Tensor | None = None
        if batch.sights is not None:
            wholes, features = self.features(batch.sights)
            sight_loss = self.sightings(wholes, batch.sights.labels)
            places = batch.sights.places
            placed = features[places.clamp(min=0)]
            count = places.shape[0]
            pictured = torch.where(places[..., None] >= 0, placed, x[-count:])
            x = torch.cat((x[:-count], pictured))
        output = self.model(batch.ids, x, batch.rope, batch.masks)
        total = torch.zeros((), device=self.device)
        for ahead, logits in enumerate((output.logits, *output.drafts), start=1):
            each, hits = self.losses(logits, batch.ids, ahead)
            weights = torch.roll(batch.weights, -ahead, dims=1)
            loss = (each * weights).sum() / weights.sum()
            total = total + (loss if ahead == 1 else plan.draft_weight * loss)
            self._count(ahead, each.detach(), hits, weights, batch.families)
        if sight_loss is not None:
            total = total + plan.sight_weight * (1.0 - 0.7 * progress) * sight_loss
            self.sight_sum += sight_loss.detach()
        total.backward()
        self._update(progress, index)
        self._balance(output.shares, progress)

    def _count(self, ahead: int, each: Tensor, hits: Tensor, weights: Tensor, families: Tensor) -> None:
        asked = (weights > 0).float()
        if ahead == 1:
            self.sums[0].index_add_(0, families.flatten(), (each * asked).flatten())
            self.sums[1].index_add_(0, families.flatten(), asked.flatten())
        self.sums[1 + ahead].index_add_(0, families.flatten(), (hits * asked).flatten())
        if ahead > 1:
            self.sums[6, ahead] += asked.sum()

    def _update(self, progress: float, index: int) -> None:
        plan = self.plan
        rate = plan.rate * min(1.0, (index + 1) / plan.warm_up)
        if progress > plan.decay_from:
            rate *= max(0.0, (1.0 - progress) / (1.0 - plan.decay_from))
        for group in self.adam.param_groups:
            group["lr"] = rate * 0.2
        nn.utils.clip_grad_norm_(self.small, 1.0, foreach=self.device.type == "cuda")
        self.adam.step()
        self.muon.step(rate, 0.85 + 0.10 * min(1.0, index / 300))
        self.model.zero_grad(set_to_none=True)
        self.sightings.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _balance(self, shares: Mapping[int, Tensor], progress: float) -> None:
        """Move the router's biases toward equal shares; they stand still in the last part."""
        self.shares = {layer: share.detach() for layer, share in shares.items()}
        if progress > 0.5:
            return
        for layer, share in shares.items():
            experts = self.model.model.layers[layer].moe
            assert isinstance(experts, Experts)
            bias = experts.get_buffer("router_bias")
            bias += self.plan.balance_rate * torch.sign(share.mean() - share)
            bias -= bias.mean()

    def report(self) -> dict[str, Any]:
        """Return loss and accuracy per family since the last report, and reset the sums."""
        sums = self.sums.cpu().clone()
        self.sums.zero_()
        asked = sums[1].clamp(min=1)
        found = {
            name: [round(float(sums[row, i] / asked[i]), 4) for row in (0, 2)]
            for i, name in enumerate(NAMES)
            if sums[1, i] > 0
        }
        drafts = [round(float(sums[1 + ahead].sum() / sums[6, ahead].clamp(min=1)), 4) for ahead in (2, 3, 4)]
        return {"families": found, "drafts": drafts}


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    if parameter.dim() < 2 or "positional_embedding" in name or "conv1" in name:
        return False
    small = ("embed_tokens", "lm_head", "shared_head.output", "moe.gate.weight", "g_proj")
    return not any(part in name for part in small)


def save_weights(model: Model, sightings: nn.Module, out: Path) -> None:
    """Write the float32 weights in pieces, so that a later run can go on from them."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    tensors |= {f"aux.{name}": value.detach().cpu().contiguous() for name, value in sightings.state_dict().items()}
    piece: dict[str, Tensor] = {}
    size = count = 0
    for name, value in sorted(tensors.items()):
        if piece and size + value.nbytes > PIECE_BYTES:
            save_file(piece, out / f"weights-{count}.safetensors")
            piece, size, count = {}, 0, count + 1
        piece[name] = value
        size += value.nbytes
    save_file(piece, out / f"weights-{count}.safetensors")


def load_weights(model: Model, sightings: nn.Module, source: Path) -> None:
    """Read what `save_weights` wrote."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(source.glob("weights-*.safetensors")):
        tensors |= load_file(path)
    if not tensors:
        raise FileNotFoundError(f"no weights in {source}")
    model.load_state_dict({name: value for name, value in tensors.items() if not name.startswith("aux.")})
    sightings.load_state_dict({n.removeprefix("aux."): v for n, v in tensors.items() if n.startswith("aux.")})


def run(trainer: Trainer, supply: Supply, pool: Pool, out: Path) -> None:
    """Train until the time or the number of steps is used up."""
    plan = trainer.plan
    assembler = Assembler(trainer.model.shape, trainer.device)
    begun = time.monotonic()
    log = (out / "log.jsonl").open("w", encoding="utf-8")
    started, index, progress = begun, 0, 0.0
    last, last_index = begun, 0
    laying = stepping = 0.0
    while progress < 1.0:
        mark = time.perf_counter()
        batch = assembler.batch([supply.text_row() for _ in range(plan.text_rows)], pool.draw(plan.image_rows))
        laid = time.perf_counter()
        trainer.step(batch, progress, index)
        laying, stepping = laying + laid - mark, stepping + time.perf_counter() - laid
        index += 1
        if index == 3:
            _wait(trainer.device)
            started = time.monotonic()
            print(f"first steps took {started - begun:.1f} s", flush=True)
        end = min(started + plan.seconds, plan.deadline)
        by_time = (time.monotonic() - started) / max(1.0, end - started)
        progress = max(by_time, index / plan.steps) if plan.steps else by_time
        if index % 100 == 0 or (plan.steps and index % 20 == 0):
            now = time.monotonic()
            line = {"step": index, "seconds": round(now - started, 1), **trainer.report()}
            line |= {"sight": float(trainer.sight_sum), "fresh": supply.fresh, "again": supply.again}
            line |= {"image_rows": pool.received, "laying": round(laying, 1), "stepping": round(stepping, 1)}
            trainer.sight_sum.zero_()
            log.write(json.dumps(line) + "\n")
            log.flush()
            if index % 300 == 0 or (plan.steps and index % 20 == 0):
                print(json.dumps(line), f"{(now - last) / (index - last_index) * 1000:.0f} ms a step", flush=True)
            last, last_index = now, index
    log.close()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _mix(base: Mapping[str, float], changes: list[str]) -> dict[str, float]:
    mix = dict(base)
    for change in changes:
        name, _, value = change.partition("=")
        if name in mix:
            mix[name] = float(value)
    return mix


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the log, the weights and the checkpoint")
    parser.add_argument("--seconds", type=float, default=470.0, help="training time after the first steps")
    parser.add_argument("--total-seconds", type=float, default=1e9, help="training ends this long after the start")
    parser.add_argument("--steps", type=int, default=0, help="stop after this many steps, however long they take")
    parser.add_argument("--resume", type=Path, help="folder with the weights of an earlier run")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--rate", type=float, default=0.015)
    parser.add_argument("--decay-from", type=float, default=0.6)
    parser.add_argument("--draft-weight", type=float, default=0.3)
    parser.add_argument("--sight-weight", type=float, default=0.5)
    parser.add_argument("--balance-rate", type=float, default=1e-3)
    parser.add_argument("--text-rows", type=int, default=12)
    parser.add_argument("--image-rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--text-workers", type=int, default=5)
    parser.add_argument("--image-workers", type=int, default=6)
    parser.add_argument("--mix", nargs="*", default=[], help="family=weight")
    parser.add_argument("--fonts", default="", help="pattern of font files to draw digits with as well")
    parser.add_argument("--count", type=int, default=300, help="problems a family to evaluate on afterwards")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and a few steps, on any machine")
    given = parser.parse_args()
    if given.smoke:
        given.steps, given.text_rows, given.image_rows, given.length = given.steps or 10, 1, 1, 1536
        given.text_workers = given.image_workers = 1
        given.count = min(given.count, 2)
    return given


def main() -> None:
    """Train, export, evaluate."""
    begun = time.monotonic()
    given = arguments()
    torch.manual_seed(int(given.seed))
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        seconds=given.seconds, deadline=begun + given.total_seconds, steps=given.steps, text_rows=given.text_rows,
        image_rows=given.image_rows, rate=given.rate, warm_up=100, decay_from=given.decay_from,
        draft_weight=given.draft_weight, sight_weight=given.sight_weight, balance_rate=given.balance_rate,
    )  # fmt: skip
    fonts = sorted(glob.glob(given.fonts)) if given.fonts else []
    supply = Supply(
        _mix(TEXT_MIX, given.mix), _mix(IMAGE_MIX, given.mix), seed=given.seed, length=given.length,
        text_workers=given.text_workers, image_workers=given.image_workers, fonts=fonts,
    )  # fmt: skip
    model = Model(smoke_shape() if given.smoke else Shape())
    trainer = Trainer(model, plan, device)
    if given.resume:
        load_weights(model, trainer.sightings, given.resume)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}", flush=True)
    pool = Pool(supply, device, 600, given.seed)
    try:
        pool.start(given.image_rows if given.smoke else 24)
        print(f"data ready after {time.monotonic() - begun:.1f} s", flush=True)
        run(trainer, supply, pool, given.out)
    finally:
        pool.stop()
        supply.close()
    print("expert shares", {k: [round(float(x), 3) for x in v] for k, v in trainer.shares.items()}, flush=True)
    save_weights(model, trainer.sightings, given.out)
    size = export(model, given.out / "tiny")
    print(f"exported {size} bytes after {time.monotonic() - begun:.1f} s", flush=True)
    round_in_place(model)
    plain = Model(model.shape).to(device)
    plain.load_state_dict(model.state_dict())
    del trainer, pool
    found = evaluate(plain, count=given.count, dtype=_dtype(device), families=EVALUATED, processes=12)
    (given.out / "evaluation.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"done after {time.monotonic() - begun:.1f} s", flush=True)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


if __name__ == "__main__":
    main()
