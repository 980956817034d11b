"""`server convert`: what it writes is the published layout, loads here, and means what transformers computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from srt.cli import main
from srt.configs.census import expert_formats
from srt.configs.models import read_config
from srt.convert.run import Report, Request, convert
from srt.convert.tokens import read_sequences, seeded_sequences
from srt.errors import StartupError
from srt.layers.ops import TorchOps
from srt.layers.quant.fp8 import Fp8Blocks
from srt.layers.quant.nvfp4 import Nvfp4
from tests.models.test_quantised import GEOMETRY, PROMPT, assert_equal, logits_of
from tests.support.checkpoints import write_checkpoint
from tests.support.quantised import dequantise, quantise

LAYERS = range(1, 5)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def run(source: Path, target: Path, weight_format: str, **changes: Any) -> Report:
    sequences = changes.pop("sequences", [PROMPT])
    return convert(Request(source, target, weight_format, sequences=sequences, **changes), quiet)


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    shards = [load_file(path) for path in sorted(checkpoint.glob("*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def experts_of(checkpoint: Path) -> dict[str, Tensor]:
    """Tensors of routed experts as bytes, by the published name."""
    return {
        name.replace("model.language_model.", "model."): tensor.view(torch.uint8)
        for name, tensor in tensors_of(checkpoint).items()
        if ".moe." in name and "_proj" in name
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), **GEOMETRY)


@pytest.fixture(scope="module")
def converted(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint in each format."""
    torch.set_num_threads(1)
    paths = {name: tmp_path_factory.mktemp("out") / name for name in ("bf16", "fp8", "nvfp4")}
    for name, path in paths.items():
        run(plain, path, name, shard_bytes=1 << 20)
    return paths


def hugging_face(checkpoint: Path) -> Any:
    from transformers import Step3p7ForConditionalGeneration

    return Step3p7ForConditionalGeneration.from_pretrained(str(checkpoint), dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_a_converted_checkpoint_equals_hugging_face_on_the_decoded_weights(
    plain: Path, converted: dict[str, Path], tmp_path: Path, name: str
) -> None:
    model = hugging_face(dequantise(plain, tmp_path / "float", name))
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]
    assert_equal(logits_of(converted[name], tmp_path), expected)


def test_fp8_has_the_published_names_and_all_scales_in_the_index(plain: Path, converted: dict[str, Path]) -> None:
    tensors, before = tensors_of(converted["fp8"]), tensors_of(plain)
    scales = {f"model.layers.{n}.moe.{p}.weight_scale_inv" for n in LAYERS for p in PROJECTIONS}
    assert tensors.keys() == before.keys() | scales
    assert tensors["model.layers.2.moe.gate_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors["model.layers.2.moe.gate_proj.weight_scale_inv"].shape == (8, 4, 1)
    assert tensors["model.layers.2.moe.down_proj.weight_scale_inv"].shape == (8, 1, 4)
    index = json.loads((converted["fp8"] / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(set(index["weight_map"].values())) > 3
    quant = json.loads((converted["fp8"] / "config.json").read_text())["quantization_config"]
    assert (quant["quant_method"], quant["weight_block_size"]) == ("fp8", [128, 128])
    for module in ("lm_head", "model.layers.3.moe.gate", "model.layers.3.share_expert.up_proj",
                   "model.layers.5.eh_proj"):  # fmt: skip
        assert module in quant["modules_to_not_convert"]


def test_nvfp4_has_the_names_shapes_and_files_of_the_published_export(converted: dict[str, Path]) -> None:
    tensors = tensors_of(converted["nvfp4"])
    at = "model.language_model.layers.2.moe."
    for projection, rows, columns in (("gate_proj", 512, 128), ("up_proj", 512, 128), ("down_proj", 128, 512)):
        weight = tensors[f"{at}{projection}.weight"]
        assert (weight.dtype, tuple(weight.shape)) == (torch.uint8, (8, rows, columns // 2))
        scale = tensors[f"{at}{projection}.weight_scale"]
        assert (scale.dtype, tuple(scale.shape)) == (torch.float8_e4m3fn, (8, rows, columns // 16))
        for kind in ("weight_scale_2", "input_scale"):
            assert (tensors[f"{at}{projection}.{kind}"].dtype, tensors[f"{at}{projection}.{kind}"].shape) == (
                torch.float32,
                (8,),
            )
    for kind in "kv":
        assert tensors[f"model.language_model.layers.0.self_attn.{kind}_proj.{kind}_scale"].shape == ()
    assert "lm_head.weight" in tensors
    prefixes = ("model.language_model.", "model.vision_model.", "model.vit_large_projector.", "lm_head.")
    assert all(name.startswith(prefixes) for name in tensors)
    config = json.loads((converted["nvfp4"] / "config.json").read_text())["quantization_config"]
    told = json.loads((converted["nvfp4"] / "hf_quant_config.json").read_text())["quantization"]
    assert (config["quant_method"], config["quant_algo"], config["group_size"]) == ("modelopt", "NVFP4", 16)
    assert told["exclude_modules"] == config["ignore"]
    quant = read_config(converted["nvfp4"]).quant
    assert quant is not None
    for module in ("lm_head", "model.layers.1.self_attn.q_proj", "model.layers.2.share_expert.up_proj",
                   "model.layers.2.moe.gate", "model.layers.5.mlp.up_proj", "vision_model.conv1"):  # fmt: skip
        assert quant.ignores(module), module
    assert not any(quant.ignores(f"model.layers.{n}.moe.{p}") for n in (*LAYERS, 10, 11) for p in PROJECTIONS)


@pytest.mark.parametrize("name", ["bf16", "fp8", "nvfp4"])
def test_everything_but_routed_experts_keeps_its_bytes(plain: Path, converted: dict[str, Path], name: str) -> None:
    after = {key.replace("model.language_model.", "model."): at for key, at in tensors_of(converted[name]).items()}
    for source, tensor in tensors_of(plain).items():
        if ".moe." in source and "_proj" in source:
            continue
        found = after.get(source, after.get(f"model.{source}"))
        assert found is not None, source
        assert torch.equal(found.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), source
    assert (converted[name] / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("name", "weights"), [("fp8", Fp8Blocks()), ("nvfp4", Nvfp4())])
def test_the_codes_are_those_of_the_format(plain: Path, converted: dict[str, Path], name: str, weights: Any) -> None:
    before, after = tensors_of(plain), experts_of(converted[name])
    for layer in LAYERS:
        for projection in PROJECTIONS:
            at = f"model.layers.{layer}.moe.{projection}.weight"
            assert torch.equal(after[at], weights.pack(before[at]).weight.view(torch.uint8))


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_codes_survive_a_trip_through_bf16(converted: dict[str, Path], tmp_path: Path, name: str) -> None:
    run(converted[name], tmp_path / "bf16", "bf16")
    run(tmp_path / "bf16", tmp_path / "again", name)
    first, second = experts_of(converted[name]), experts_of(tmp_path / "again")
    for key, tensor in first.items():
        if key.endswith((".weight", ".weight_scale")):
            assert torch.equal(tensor, second[key]), key
        elif "input" not in key:
            torch.testing.assert_close(tensor.view(torch.float32), second[key].view(torch.float32), rtol=4e-3, atol=0)


@pytest.mark.parametrize(("dialect", "name"), [("fp8", "fp8"), ("nvfp4", "nvfp4"), ("nvfp4-experts", "nvfp4")])
def test_a_checkpoint_that_is_in_the_format_already_is_copied_bit_by_bit(
    plain: Path, tmp_path: Path, dialect: str, name: str
) -> None:
    stacked = quantise(plain, tmp_path / "in", name)
    report = run(quantise(plain, tmp_path / dialect, dialect), tmp_path / "out", name)
    assert all(torch.equal(tensor, experts_of(tmp_path / "out")[key]) for key, tensor in experts_of(stacked).items())
    assert {error.relative for error in report.errors} == {0.0}


@pytest.mark.parametrize("dialect", ["compressed-fp8", "compressed-nvfp4"])
def test_other_dialects_are_read_and_written_as_published(plain: Path, tmp_path: Path, dialect: str) -> None:
    name = dialect.split("-")[1]
    source = quantise(plain, tmp_path / "in", dialect)
    run(source, tmp_path / "out", name)
    torch.testing.assert_close(logits_of(tmp_path / "out", tmp_path), logits_of(source, tmp_path), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_mtp_modules_are_kept_as_stored_or_dropped_with_their_keys(
    plain: Path, converted: dict[str, Path], tmp_path: Path, name: str
) -> None:
    run(plain, tmp_path / "out", name, keep_mtp=False)
    assert any(".layers.5." in key for key in tensors_of(converted[name]))
    assert not any(".layers.5." in key for key in tensors_of(tmp_path / "out"))
    kept, dropped = (read_config(path).text for path in (converted[name], tmp_path / "out"))
    assert (len(kept.mtp_layers), len(dropped.mtp_layers)) == (1, 0)
    assert kept.layers == dropped.layers
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert len(text["layer_types"]) == len(text["swiglu_limits"]) == 5


def test_input_scales_are_the_ranges_that_transformers_sees(plain: Path, tmp_path: Path) -> None:
    source = dequantise(plain, tmp_path / "float", "none")
    run(source, tmp_path / "out", "nvfp4")
    tensors, model = tensors_of(tmp_path / "out"), hugging_face(source)
    layer = model.model.language_model.layers[2]
    seen: dict[str, Tensor] = {}
    layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0]))
    layer.self_attn.v_proj.register_forward_hook(lambda _, __, out: seen.update(values=out))
    with torch.inference_mode():
        model(input_ids=torch.tensor([PROMPT]), use_cache=False)
    hidden, before = seen["hidden"].reshape(-1, 128), tensors_of(source)
    at = "model.layers.2.moe."
    logits = functional.linear(hidden, before[f"{at}gate.weight"])
    choice = TorchOps().choose_experts(logits, before[f"{at}router_bias"], top_k=2, factor=3.0)
    at_out = "model.language_model.layers.2.moe."
    for expert in range(8):
        chosen = hidden[(choice.ids == expert).any(dim=1)]
        assert len(chosen)
        gate_up = torch.cat([before[f"{at}{half}_proj.weight"][expert] for half in ("gate", "up")])
        inner = TorchOps().gated_silu(functional.linear(chosen, gate_up), None)
        for projection, largest in (("gate_proj", chosen), ("up_proj", chosen), ("down_proj", inner)):
            found = tensors[f"{at_out}{projection}.input_scale"][expert]
            torch.testing.assert_close(found, largest.abs().max() / 2688, rtol=1e-4, atol=0)
    found = tensors["model.language_model.layers.2.self_attn.v_proj.v_scale"]
    torch.testing.assert_close(found, seen["values"].abs().max() / 448, rtol=1e-4, atol=0)


def test_experts_that_no_token_chose_are_counted_and_get_the_range_of_the_layer(plain: Path, tmp_path: Path) -> None:
    report = run(plain, tmp_path / "out", "nvfp4", sequences=[[7]])
    assert report.ranges[1].unchosen == 6
    scales = tensors_of(tmp_path / "out")["model.language_model.layers.1.moe.down_proj.input_scale"]
    assert (scales > 0).all()
    assert (scales == scales.max()).sum() >= 7


def test_the_error_of_each_module_and_its_worst_expert_are_told(plain: Path, tmp_path: Path) -> None:
    report = run(plain, tmp_path / "out", "fp8")
    before = tensors_of(plain)
    assert len(report.errors) == 12
    for error in report.errors:
        weight = before[error.name + ".weight"].float()
        missed = Fp8Blocks().unpack(Fp8Blocks().pack(weight)) - weight
        each = missed.flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)
        assert error.relative == pytest.approx(float(missed.norm() / weight.norm()), rel=1e-4)
        assert error.worst_expert == int(each.argmax())
        assert error.worst == pytest.approx(float(each.max()), rel=1e-4)
    assert report.bytes_after < report.bytes_before


def test_the_command_prints_the_errors_and_the_sizes(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model-path", str(plain), "--output", str(tmp_path / "out"), "--format", "nvfp4"]
    assert main(["convert", *options, "--calibration-tokens", "100", "--device", "cpu"]) == 0
    out, progress = capsys.readouterr()
    assert "model.layers.4.moe.down_proj" in out
    assert "with experts in nvfp4" in out
    assert "measure: 100%" in progress
    assert "convert: 100%" in progress
    assert expert_formats(tmp_path / "out", read_config(tmp_path / "out")) == dict.fromkeys(LAYERS, "nvfp4")


def test_what_cannot_be_converted_is_refused_in_one_sentence(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*options: str, source: Path = plain, target: Path = tmp_path / "out") -> str:
        assert main(["convert", "--model-path", str(source), "--output", str(target), *options]) == 1
        return capsys.readouterr().err.strip()

    assert "invalid choice: 'int4'" in told("--format", "int4")
    assert "is the checkpoint itself" in told("--format", "fp8", target=plain)
    assert "not an empty directory" in told("--format", "fp8", target=plain.parent)
    assert "has no config.json" in told("--format", "fp8", source=tmp_path)
    assert "--format fp8 stores none" in told("--format", "fp8", "--calibration", "x.txt")
    assert "x.txt cannot be read" in told("--format", "nvfp4", "--calibration", str(tmp_path / "x.txt"))
    assert "must be at least 1" in told("--format", "nvfp4", "--calibration-tokens", "0")


def test_a_weight_that_is_not_finite_is_named(plain: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(plain, broken)
    tensors = {name: tensor.clone() for name, tensor in load_file(broken / "model.safetensors").items()}
    tensors["model.layers.3.moe.up_proj.weight"][5, 1, 2] = float("nan")
    save_file(tensors, str(broken / "model.safetensors"))
    with pytest.raises(StartupError, match=r"layers\.3\.moe\.up_proj, expert 5: 1 of 65536 values are not finite"):
        run(broken, tmp_path / "out", "fp8")
    assert not (tmp_path / "out" / "config.json").exists()


def test_calibration_ids_come_from_json_lines_texts_and_the_tokenizer(plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text('[1, 2, 3]\n{"input_ids": [4, 5]}\n{"text": "hello"}\n"hello"\n')
    ids, listed, text, plain_text = read_sequences(file, plain, 512, 1000)
    assert (ids, listed) == ([1, 2, 3], [4, 5])
    assert text == plain_text
    (tmp_path / "some.txt").write_text("hello")
    assert read_sequences(tmp_path / "some.txt", plain, 512, 1000) == [text]
    assert read_sequences(file, plain, 512, 4) == [[1, 2, 3], [4]]
    long = seeded_sequences(512, 1100)
    assert [len(sequence) for sequence in long] == [512, 512, 76]
    assert long == seeded_sequences(512, 1100)
    for line, message in (("[1, 512]", "token ids are 0 to 511"), ("{}", "line 1 holds neither"), ("{", "is not JSON")):
        file.write_text(line)
        with pytest.raises(StartupError, match=message):
            read_sequences(file, plain, 512, 10)


def test_memory_stays_below_one_layer_and_one_shard(tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "in", vision=False, vocab=512, hidden=256, layers=9, expert_width=512, experts=32, mtp=0
    )
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests.convert.test_convert import run\n"
        "high = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = high()\n"
        "run(Path(sys.argv[1]), Path(sys.argv[2]), 'nvfp4', sequences=[[1, 2, 3]], shard_bytes=8 << 20)\n"
        "print(high() - before)\n"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size > 200e6
    assert grown < 0.6 * size
