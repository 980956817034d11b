"""The shipped checkpoint: its size, its layout, its answers, and agreement with transformers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from srt.builtin.tasks import Example, evaluation_set, read_completion
from tools.builtin import text
from tools.builtin.decode import acceptance, generate
from tools.builtin.evaluate import Evaluator
from tools.builtin.export import BYTES_MAX, export, load_model
from tools.builtin.layers import Experts
from tools.builtin.model import Model, dense_masks, rope_for
from tools.builtin.packing import Sight, look
from tools.builtin.preprocess import MEAN, STD

TINY = Path(__file__).parents[2] / "srt" / "builtin" / "tiny"
Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    """The shipped config.json."""
    found: dict[str, Any] = json.loads((TINY / "config.json").read_text())
    return found


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """Shapes and types of all shipped tensors."""
    with safe_open(TINY / "model.safetensors", "pt") as file:
        return {name: (tuple(file.get_tensor(name).shape), file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """The shipped model, ready to be asked."""
    torch.set_num_threads(1)
    return Evaluator(load_model(TINY).eval(), text.build_tokenizer(), torch.float32)


def answers(evaluator: Evaluator, examples: list[Example], room: int = 120) -> list[tuple[list[int], list[int]]]:
    """Return prompt and greedy completion of each example."""
    pairs = []
    for example in examples:
        prompt = evaluator.prompt(example, look(example, []) if example.pictures else Sight())
        patch_id = evaluator.ids[text.PATCH]
        written = generate(
            evaluator.model, [prompt], room=room, stops=evaluator.stops, patch_id=patch_id, dtype=torch.float32
        )
        pairs.append((prompt.ids, written[0]))
    return pairs


def test_the_directory_holds_a_hub_checkout_within_its_limit() -> None:
    names = {path.name for path in TINY.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json", "preprocessor_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= BYTES_MAX


def test_the_model_has_every_feature_of_the_family(settings: dict[str, Any], tensors: Tensors) -> None:
    inner = settings["text_config"]
    kinds = inner["layer_types"]
    assert kinds == ["full_attention", *["sliding_attention"] * 3] * 2 + ["sliding_attention"] * 3
    assert inner["sliding_window"] == 64
    assert inner["attention_other_setting"]["num_attention_heads"] != inner["num_attention_heads"]
    assert inner["swiglu_limits"][6:8] != [0.0, 0.0]
    assert inner["max_position_embeddings"] == 4096
    assert sum(name.startswith(("model.layers.8.", "model.layers.9.", "model.layers.10.")) for name in tensors) == 51
    assert all(kind == torch.bfloat16 or name.endswith("router_bias") for name, (_, kind) in tensors.items())
    shape = tensors["model.layers.8.transformer.shared_head.output.weight"][0]
    assert shape == (inner["vocab_size"], inner["hidden_size"])


def test_export_writes_the_shipped_tensors_again(tmp_path: Path, evaluator: Evaluator) -> None:
    export(evaluator.model, tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (TINY / name).read_bytes()


@pytest.mark.parametrize(
    "family", ["sum", "difference", "product", "reverse", "json", "recall", "tool_call", "tool_answer"]
)
def test_it_answers_and_its_modules_guess_the_answer(evaluator: Evaluator, family: str) -> None:
    examples = evaluation_set(family, 3, seed=1)
    right = 0
    for example, (ids, written) in zip(examples, answers(evaluator, examples), strict=True):
        assert written[-1] == evaluator.ids[text.TURN_END]
        completion = evaluator.tokenizer.decode(written[:-1], skip_special_tokens=False)
        right += example.check(read_completion(completion, example.tools).message())
        prompt = evaluator.prompt(example, Sight())
        counts = acceptance(evaluator.model, [prompt], [written], patch_id=-1, dtype=torch.float32)
        assert prompt.ids == ids
        assert counts.chained[2] >= 0.7 * counts.rows
    assert right >= 2


def test_the_clamps_of_the_last_layers_bind(evaluator: Evaluator) -> None:
    example = evaluation_set("recall", 1)[0]
    prompt = evaluator.prompt(example, Sight())
    free = Model(evaluator.model.shape).eval()
    free.load_state_dict(evaluator.model.state_dict())
    for layer in list(free.main_layers())[-2:]:
        assert isinstance(layer.moe, Experts)
        layer.moe.limit = 0.0
    hidden = [last_logits(model, prompt.ids) for model in (evaluator.model, free)]
    assert (hidden[0] - hidden[1]).abs().max() > 0.01


def hugging_face() -> Any:
    """Import the library when it is needed: that takes seconds."""
    return importlib.import_module("transformers")


def last_logits(model: Model, ids: list[int]) -> torch.Tensor:
    positions = torch.arange(len(ids))[None]
    zeros = torch.zeros_like(positions)
    x = model.embed(torch.tensor([ids]), torch.float32)
    with torch.no_grad():
        output = model(
            torch.tensor([ids]), x, rope_for(model.shape, positions), dense_masks(model.shape, positions, zeros, zeros)
        )
    last: torch.Tensor = output.logits[0, -1]
    return last


@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_the_same_greedy_answers(evaluator: Evaluator) -> None:
    model, report = hugging_face().Step3p7ForConditionalGeneration.from_pretrained(
        TINY, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = hugging_face().AutoTokenizer.from_pretrained(TINY)
    for family in ("difference", "tool_call"):
        example = evaluation_set(family, 1, seed=2)[0]
        rendered = tokenizer.apply_chat_template(
            list(example.messages), tools=example.tools, add_generation_prompt=True, tokenize=False
        )
        assert rendered == text.render_prompt(example)
        ids, written = answers(evaluator, [example])[0]
        assert tokenizer(rendered, add_special_tokens=False).input_ids == ids
        found = model.generate(torch.tensor([ids]), max_new_tokens=120, do_sample=False)
        assert found[0, len(ids) :].tolist() == written


@pytest.mark.filterwarnings("ignore")
def test_transformers_sees_the_same_image(evaluator: Evaluator) -> None:
    example = next(item for item in evaluation_set("image_object", 20) if max(item.pictures[0].pixels.size) < 300)
    sight = look(example, [])
    model = hugging_face().Step3p7ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)

    def pixels(pictures: list[Any]) -> torch.Tensor:
        whole = torch.stack([torch.from_numpy(picture.copy()) for picture in pictures]).float() / 255
        return ((whole - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)

    given: dict[str, Any] = {"pixel_values": pixels(sight.wholes)}
    if sight.crops:
        given["pixel_values_local"] = pixels(sight.crops)
    given["num_local_patches"] = torch.tensor([layout.crops for layout in sight.layouts])
    ids, written = answers(evaluator, [example])[0]
    found = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, **given)
    assert found[0, len(ids) :].tolist() == written
    completion = evaluator.tokenizer.decode(written[:-1], skip_special_tokens=False)
    assert example.check(read_completion(completion).message())
