"""Greedy answers over HTTP equal Hugging Face's, whatever happens around them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import write_checkpoint
from tests.support.gpu import ON_A_GPU, ON_FOUR_GPUS, ON_TWO_GPUS
from tests.support.server import Server
from tests.support.workload import HuggingFace, generate_all, long_answers, mixed_requests

REQUESTS = mixed_requests(200, vocab=4096, seed=20)

SETTINGS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "without the radix cache": ("--disable-radix-cache",),
    "with too little memory": ("--max-total-tokens", "3072"),
    "without overlap": ("--disable-overlap-schedule",),
    "with pages of one token": ("--page-size", "1"),
    "with small chunks and big pages": ("--chunked-prefill-size", "64", "--page-size", "64"),
    "with two ranks": ("--tp-size", "2"),
}
GPU_SETTINGS = ("defaults", "with too little memory", "with pages of one token", "with small chunks and big pages")


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[tuple[int, ...], tuple[int, ...]], str | None]:
    """Answers already compared: the settings mostly give the same ones, and one comparison of each is enough."""
    return {}


@pytest.mark.parametrize(
    ("device", "setting"),
    [("cpu", setting) for setting in SETTINGS]
    + [pytest.param("cuda", setting, marks=ON_A_GPU) for setting in GPU_SETTINGS]
    + [pytest.param("cuda", "with two ranks", marks=ON_TWO_GPUS)],
)
def test_200_greedy_requests_equal_hugging_face(
    device: str,
    setting: str,
    nano: Path,
    truth: HuggingFace,
    verdicts: dict[tuple[tuple[int, ...], tuple[int, ...]], str | None],
) -> None:
    requests = REQUESTS if setting != "with two ranks" else REQUESTS[:60]
    if setting == "with too little memory":
        requests = long_answers(60, vocab=4096, seed=21) + requests
    with Server("--model-path", str(nano), "--dtype", "float32", *SETTINGS[setting], device=device) as server:
        answers = generate_all(server, requests)
        retracted = server.metric("num_retracted_requests_total")
        evicted = server.metric("evicted_tokens_total")
    wrong = []
    for request, answer in zip(requests, answers, strict=True):
        output = tuple(answer["output_ids"])
        assert len(output) == request.new_tokens
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": request.new_tokens}
        assert answer["meta_info"]["prompt_tokens"] == len(request.prompt)
        key = (request.prompt, output)
        if key not in verdicts:
            verdicts[key] = truth.disagreement(request.prompt, output)
        if verdicts[key] is not None:
            wrong.append(verdicts[key])
    assert not wrong, f"{len(wrong)} of {len(requests)} answers differ, the first: {wrong[0]}"
    if setting == "with too little memory":
        assert retracted > 0, "the pool was too large to force a retraction"
        assert evicted > 0, "the pool was too large to force an eviction"
    if setting == "without the radix cache":
        assert all(answer["meta_info"]["cached_tokens"] == 0 for answer in answers)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_FOUR_GPUS)])
def test_greedy_requests_of_four_ranks_equal_hugging_face(device: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "wide", "nano", seed=8, kv_heads=4, heads=8, sliding_heads=12)
    requests = mixed_requests(16, vocab=4096, seed=22, longest=600)
    truth = HuggingFace(checkpoint)
    with Server("--model-path", str(checkpoint), "--dtype", "float32", "--tp-size", "4", device=device) as server:
        answers = generate_all(server, requests)
    outputs = [tuple(answer["output_ids"]) for answer in answers]
    assert [len(output) for output in outputs] == [request.new_tokens for request in requests]
    wrong = [truth.disagreement(request.prompt, output) for request, output in zip(requests, outputs, strict=True)]
    assert wrong == [None] * len(requests)
