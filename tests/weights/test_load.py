"""Loading: every tensor claimed once, every slot filled once, and one error that lists all that is wrong."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from srt.configs.census import PLAIN
from srt.configs.models import read_config
from srt.distributed import TensorGroup
from srt.errors import StartupError
from srt.layers.attention.reference import ReferenceAttention
from srt.layers.linear import PlainLinear
from srt.layers.moe.reference import ReferenceExperts
from srt.layers.ops import TorchOps
from srt.layers.quant.plain import Plain
from srt.layers.toolkit import Toolkit
from srt.models.step3p7_text import Step3p7Text
from srt.models.step3p7_weights import step3p7_rules
from srt.weights.files import Item, Listed, RandomWeights, Shards
from srt.weights.load import LoadReport, load
from srt.weights.rules import Rule, RuleBook
from tests.support.checkpoints import PRESETS, text_shapes, vision_shapes, write_checkpoint
from tests.support.steps import Steps, plan_for, random_ids

PLAIN_LAYERS = dict.fromkeys(range(5), PLAIN)
EXPERTS = dict.fromkeys(range(5), ReferenceExperts(Plain(torch.float32)))
TOOLS = Toolkit(
    ops=TorchOps(), linear=PlainLinear(), attention=ReferenceAttention(), experts=EXPERTS,
    group=TensorGroup(), dtype=torch.float32, positions=8,
)  # fmt: skip
HF_NAMES = {
    "moe.gate.weight": "mlp.gate.weight",
    "moe.router_bias": "mlp.gate.e_score_correction_bias",
    "moe.down_proj.weight": "mlp.experts.down_proj",
    "share_expert.": "mlp.shared_experts.",
}


class InMemory:
    """A source of given tensors."""

    def __init__(self, tensors: list[tuple[str, Tensor]]) -> None:
        self._tensors = tensors

    def names(self) -> list[Listed]:
        return [Listed(name, tuple(tensor.shape), tensor.dtype, tensor.nbytes) for name, tensor in self._tensors]

    def items(self) -> Iterator[Item]:
        for name, tensor in self._tensors:
            yield Item(name, tensor.nbytes, tensor.clone)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), shards=3)


@pytest.fixture(scope="module")
def tensors(checkpoint: Path) -> dict[str, Tensor]:
    return {item.name: item.read().clone() for item in Shards(checkpoint).items()}


def load_tiny(checkpoint: Path, tensors: list[tuple[str, Tensor]]) -> LoadReport:
    config = read_config(checkpoint)
    model = Step3p7Text(config.text, TOOLS)
    return load(model.parameters(), step3p7_rules(config, PLAIN_LAYERS), InMemory(tensors), lambda done, total: None)


def test_all_parts_are_counted_and_only_text_is_read(checkpoint: Path) -> None:
    config = read_config(checkpoint)
    calls: list[tuple[int, int]] = []
    model, book = Step3p7Text(config.text, TOOLS), step3p7_rules(config, PLAIN_LAYERS)
    report = load(model.parameters(), book, Shards(checkpoint), lambda *at: calls.append(at))
    geometry = PRESETS["tiny"]
    text = len(text_shapes(replace(geometry, mtp=0)))
    mtp = len(text_shapes(geometry)) - text
    assert report.tensors == {"text": text, "mtp": mtp, "vision": len(vision_shapes(geometry))}
    assert mtp == 51
    assert calls[-1] == (report.bytes["text"], report.bytes["text"])
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_an_index_that_omits_tensors_does_not_matter(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    steps = Steps(plan_for(tmp_path), tmp_path)
    steps.add(0, [5, 6])
    assert len(steps.generate(0, 2)) == 2


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_names_with_and_without_the_language_model_prefix_load(
    checkpoint: Path, tensors: dict[str, Tensor], prefix: str
) -> None:
    renamed = [
        (f"{prefix}{name[6:]}" if name.startswith("model.") else name, tensor) for name, tensor in tensors.items()
    ]
    assert load_tiny(checkpoint, renamed).tensors["text"] > 0


def test_every_problem_of_a_checkpoint_is_listed_at_once(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    broken = dict(tensors)
    del broken["model.norm.weight"]
    del broken["model.layers.2.moe.up_proj.weight"]
    broken["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(3, 4)
    broken["model.layers.0.self_attn.rotary.inv_freq"] = torch.zeros(3)
    broken["lm_head.weight"] = broken["lm_head.weight"].to(torch.uint8)
    extra = [("model.language_model.layers.0.mlp.up_proj.weight", tensors["model.layers.0.mlp.up_proj.weight"])]
    with pytest.raises(StartupError) as caught:
        load_tiny(checkpoint, list(broken.items()) + extra)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the checkpoint does not fit the model, 6 problem(s):"
    assert {line.strip() for line in lines[1:]} == {
        "unexpected tensor model.layers.0.self_attn.rotary.inv_freq",
        "tensor model.layers.1.self_attn.q_proj.weight has shape [3, 4], expected [96, 64]",
        "tensor lm_head.weight has dtype torch.uint8, expected one of torch.bfloat16, torch.float16, torch.float32",
        "tensor model.language_model.layers.0.mlp.up_proj.weight is there twice",
        "missing tensor model.layers.2.moe.up_proj.weight",
        "missing tensor model.norm.weight",
    }


def test_a_tensor_in_two_spellings_is_there_twice(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    name = "model.layers.2.moe.router_bias"
    twice = [*tensors.items(), ("model.layers.2.mlp.gate.e_score_correction_bias", tensors[name])]
    with pytest.raises(StartupError, match="e_score_correction_bias is there twice"):
        load_tiny(checkpoint, twice)


def test_a_name_that_two_rules_claim_is_an_error(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    config = read_config(checkpoint)
    book = step3p7_rules(config, PLAIN_LAYERS)
    doubled = RuleBook([*book.rules, Rule("model.norm.{rest}", None, part="vision")], book.prefixes)
    parameters = Step3p7Text(config.text, TOOLS).parameters()
    with pytest.raises(StartupError, match=r"model\.norm\.weight is claimed by 2 rules: model\.norm\.weight, model"):
        load(parameters, doubled, InMemory(list(tensors.items())), lambda done, total: None)


def test_every_published_name_is_claimed_by_exactly_one_rule(checkpoint: Path) -> None:
    book = step3p7_rules(read_config(checkpoint), PLAIN_LAYERS)
    for name in text_shapes(PRESETS["tiny"]) | vision_shapes(PRESETS["tiny"]):
        spellings = {name, *(name.replace(old, new) for old, new in HF_NAMES.items())}
        for spelling in spellings:
            assert len(book.claims(spelling)) == 1, spelling
    assert book.claims("model.layers.0.moe.gate.weight") == []
    assert book.claims("model.layers.8.input_layernorm.weight") == []


def test_mtp_tensors_in_the_spelling_of_transformers_are_claimed(checkpoint: Path) -> None:
    book = step3p7_rules(read_config(checkpoint), PLAIN_LAYERS)
    for name in ("shared_head.norm", "shared_head.head", "transformer.shared_head.output"):
        (claim,) = book.claims(f"model.layers.6.{name}.weight")
        assert (claim.rule.part, claim.target) == ("mtp", None)


def test_dummy_weights_fill_every_slot_and_follow_the_seed(checkpoint: Path, tmp_path: Path) -> None:
    def tokens(seed: int) -> list[int]:
        plan = plan_for(checkpoint, load_format="dummy")
        steps = Steps(msgspec.structs.replace(plan, random_seed=seed), tmp_path)
        steps.add(0, random_ids(20, 1, 1024))
        return steps.generate(0, 8)

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_dummy_weights_need_no_weights_on_disk(checkpoint: Path, tmp_path: Path) -> None:
    config = read_config(checkpoint)
    model = Step3p7Text(config.text, TOOLS)
    book = step3p7_rules(config, PLAIN_LAYERS)
    report = load(model.parameters(), book, RandomWeights(model.parameters(), book, 3), lambda done, total: None)
    assert set(report.tensors) == {"text"}


def test_memory_while_loading_stays_below_weights_plus_a_shard() -> None:
    script = """
import resource, sys
from pathlib import Path
from tests.weights.test_load import PLAIN_LAYERS, TOOLS, Step3p7Text, read_config, step3p7_rules, Shards, load
def high() -> int: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
config = read_config(Path(sys.argv[1]))
before = high()
model, book = Step3p7Text(config.text, TOOLS), step3p7_rules(config, PLAIN_LAYERS)
report = load(model.parameters(), book, Shards(Path(sys.argv[1])), lambda done, total: None)
print(high() - before, report.bytes["text"])
"""
    with tempfile.TemporaryDirectory() as directory:
        path = write_checkpoint(
            Path(directory), vision=False, dtype=torch.float32, shards=4, hidden=512, expert_width=512, mtp=0
        )
        out = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
        largest = max(shard.stat().st_size for shard in path.glob("*.safetensors"))
    used, weights = map(int, out.stdout.split())
    assert weights > 100e6
    assert used < weights + largest + 16e6
