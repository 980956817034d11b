"""Parts of the training: image cutting, packing, the optimiser, and that a few steps learn."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from srt.builtin.tasks import draw_group
from tools.builtin import text
from tools.builtin.batch import Assembler
from tools.builtin.model import Model
from tools.builtin.muon import orthogonal
from tools.builtin.packing import Sight, document, encode, look
from tools.builtin.preprocess import cut, image_tokens, plan
from tools.builtin.shape import smoke_shape
from tools.builtin.supply import Source
from tools.builtin.train import Plan, Trainer

SIZES = {
    (300, 200): 171, (728, 728): 171, (500, 300): 337, (300, 700): 422, (729, 729): 504, (1024, 768): 504,
    (1920, 1080): 836, (800, 300): 337, (2000, 400): 586, (3000, 200): 1416, (4000, 3000): 2665, (610, 1210): 671,
    (504, 2100): 506, (1600, 1000): 670, (100, 20): 171, (20, 10): 337,
}  # fmt: skip


@pytest.mark.parametrize(("size", "tokens"), SIZES.items())
def test_an_image_becomes_as_many_tokens_as_it_should(size: tuple[int, int], tokens: int) -> None:
    ids = text.token_ids(text.build_tokenizer())
    assert len(image_tokens(plan(*size), ids)) == tokens


def test_a_crop_that_leaves_the_image_is_filled_with_black() -> None:
    layout, _, crops = cut(Image.new("RGB", (800, 300), (255, 255, 255)))
    assert (layout.columns, layout.rows, layout.window) == (2, 1, 504)
    assert crops[0][:290].min() == 255
    assert crops[0][310:].max() == 0


def test_documents_of_branches_read_like_the_plain_chats() -> None:
    tokenizer = text.build_tokenizer()
    ids = text.token_ids(tokenizer)
    rng = random.Random(4)
    for family in ("recall", "tool_joined", "recall_turns", "image_many", "sum"):
        group = draw_group(family, rng, split="train", size=4)
        sight = look(group[0], []) if group[0].pictures else Sight()
        made = document(tokenizer, ids, group, 0, sight, 4096)
        assert made is not None
        prefix = made.ids[made.branches == 0].tolist()
        for branch in range(1, int(made.branches.max()) + 1):
            whole = encode(tokenizer, ids, text.render_whole(group[branch - 1]), sight.layouts)
            prompt = encode(tokenizer, ids, text.render_prompt(group[branch - 1]), sight.layouts)
            own = made.branches == branch
            assert prefix + made.ids[own].tolist() == whole
            assert int((made.weights[own] > 0).sum()) == len(whole) - len(prompt)


def test_muon_makes_a_matrix_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 24, 64)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_few_steps_learn() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    source = Source({"product": 1.0, "json": 1.0}, "steps", 256, images=False)
    plan_of_run = Plan(
        seconds=0, deadline=0, steps=0, text_rows=2, image_rows=0, rate=0.02, warm_up=1, decay_from=1.0,
        draft_weight=0.3, sight_weight=0.0, balance_rate=1e-3,
    )  # fmt: skip
    trainer = Trainer(Model(smoke_shape()), plan_of_run, torch.device("cpu"))
    assembler = Assembler(trainer.model.shape, torch.device("cpu"))
    batch = assembler.batch([source.row(), source.row()], [])
    losses = []
    for index in range(8):
        trainer.step(batch, 0.0, index)
        found = trainer.report()["families"]
        losses.append(float(np.mean([value[0] for value in found.values()])))
    assert losses[-1] < 0.7 * losses[0]
