"""The built-in model, converted: its experts in four or eight bits and its keys in eight still answer rightly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from srt.builtin.tasks import evaluation_set, read_completion
from srt.configs.models import checkpoint_directory
from srt.convert.run import Request, convert
from srt.convert.tokens import seeded_sequences
from tests.support.steps import Steps, plan_for
from tools.builtin import text

FAMILIES = ("sum", "product", "reverse", "json", "recall", "tool_call")
EACH = 3
ANSWER_TOKENS = 90


@pytest.mark.parametrize("kv_dtype", ["", "fp8_e4m3"])
@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_a_converted_model_still_answers_a_sample_of_its_tasks(tmp_path: Path, form: str, kv_dtype: str) -> None:
    torch.set_num_threads(1)
    source = checkpoint_directory("builtin:tiny")
    sequences = seeded_sequences(512, 512)
    convert(Request(source, tmp_path / form, form, sequences=sequences), lambda stage, done, total: None)
    tokenizer: Tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    end = tokenizer.token_to_id(text.TURN_END)
    examples = [example for name in FAMILIES for example in evaluation_set(name, EACH)]
    steps = Steps(plan_for(tmp_path / form, dtype="bfloat16", kv_dtype=kv_dtype, pages=512), tmp_path)
    right = 0
    for row, example in enumerate(examples):
        place = row % 8
        prompt = tokenizer.encode(text.render_prompt(example), add_special_tokens=False).ids
        steps.add(place, prompt)
        steps.prefill(place)
        while steps.tokens[place][-1] != end and len(steps.tokens[place]) < len(prompt) + ANSWER_TOKENS:
            steps.run({place: 1})
        written = tokenizer.decode(steps.tokens[place][len(prompt) : -1], skip_special_tokens=False)
        right += example.check(read_completion(written, example.tools).message())
    assert right >= len(examples) - 1, f"{right} of {len(examples)}"
