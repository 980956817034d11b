"""Guessing ahead over HTTP, with the trained built-in model: the same answers in far fewer steps."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from srt.builtin.tasks import evaluation_set
from srt.configs.step3p7 import part_of
from tests.support.gpu import ON_A_GPU, ON_TWO_GPUS
from tests.support.server import Server

TINY = Path(__file__).parents[2] / "srt" / "builtin" / "tiny"
FAMILIES = ("sum", "product", "sort", "reverse", "count", "json", "recall", "difference")
MAIN_LAYERS = 8
GATE = 3.2
"""Tokens a step, of 4 with three guesses."""


def bodies() -> list[dict[str, Any]]:
    """Greedy and sampled chats, with stops and limits at every offset of a chain of guesses."""
    made: list[dict[str, Any]] = []
    for number, example in enumerate(e for family in FAMILIES for e in evaluation_set(family, 6)):
        body: dict[str, Any] = {"messages": example.messages, "max_tokens": 60 + number % 5, "return_token_ids": True}
        match number % 4:
            case 0 | 1:
                body["temperature"] = 0
            case 2:
                body |= {"temperature": 1.3, "seed": number}
            case _:
                body |= {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": number, "min_tokens": number % 9}
        if number % 5 == 2:
            body |= {"frequency_penalty": 0.4, "presence_penalty": 0.2, "repetition_penalty": 1.1}
            body["logit_bias"] = {"300": 2.0, "301": -100}
        if number % 6 == 5:
            body["stop"] = ["1", " a"]
        if number % 5 == 1:
            body |= {"frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.1}
        if number % 5 == 2:
            body |= {"logit_bias": {"50": 3.5, "100": -100.0}, "min_tokens": 12}
        if number % 3 == 0:
            body |= {"logprobs": True, "top_logprobs": 3}
        made.append(body)
    return made


def answers(server: Server, asked: list[dict[str, Any]]) -> list[Any]:
    """What clients get, 16 at a time."""

    def ask(body: dict[str, Any]) -> Any:
        answer = server.request("POST", "/v1/chat/completions", body)
        assert answer.status == 200, answer
        choice = answer.json["choices"][0]
        text, ids = choice["message"]["content"], choice["token_ids"]
        return text, ids, choice["finish_reason"], choice["matched_stop"], choice.get("logprobs")

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, asked))


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    """The answers without guesses."""
    with Server("--model-path", str(TINY), "--speculative-algorithm", "off") as server:
        return answers(server, bodies())


SETTINGS: dict[str, tuple[str, ...]] = {
    "mtp": (),
    "mtp without overlap": ("--disable-overlap-schedule",),
    "mtp in a tiny pool": ("--context-length", "1024", "--max-total-tokens", "1024"),
    "mtp with pages of one token, small chunks, no cache": (
        "--page-size", "1", "--chunked-prefill-size", "7", "--disable-radix-cache",
    ),
    "one module": ("--speculative-num-steps", "1"),
    "two ranks": ("--tp-size", "2"),
    "n-gram": ("--speculative-algorithm", "ngram"),
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_01_06_09_27_29_30_31_answers_are_those_without_guesses(setting: str, plain: list[Any]) -> None:
    with Server("--model-path", str(TINY), *SETTINGS[setting]) as server:
        told = answers(server, bodies())
        if setting == "two ranks":  # sums over ranks round in another way
            assert [answer[:4] for answer in told] == [answer[:4] for answer in plain]
        else:
            assert told == plain
        assert server.metric("spec_accepted_tokens_total") > 0
        assert server.metric("kv_pages_leaked") == 0
        if setting == "mtp in a tiny pool":
            assert server.metric("evicted_tokens_total") > 0


@pytest.fixture(scope="module")
def plain_on_a_gpu() -> list[Any]:
    """The answers without guesses, in float32: there sums of other batches round in another way, but hardly."""
    with Server(
        "--model-path", str(TINY), "--dtype", "float32", "--speculative-algorithm", "off", device="cuda"
    ) as server:
        return answers(server, bodies())


@pytest.mark.parametrize(
    "setting",
    [pytest.param(setting, marks=ON_A_GPU) for setting in SETTINGS if setting.startswith(("mtp", "one"))]
    + [pytest.param("two ranks", marks=ON_TWO_GPUS)],
)
def test_on_a_gpu_answers_are_those_without_guesses(setting: str, plain_on_a_gpu: list[Any]) -> None:
    with Server("--model-path", str(TINY), "--dtype", "float32", *SETTINGS[setting], device="cuda") as server:
        told = answers(server, bodies())
        assert server.metric("spec_accepted_tokens_total") > 0
        assert server.metric("kv_pages_leaked") == 0
    assert [answer[:4] for answer in told] == [answer[:4] for answer in plain_on_a_gpu]


@pytest.fixture(scope="module")
def stripped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model without the tensors of its modules, as exporters leave it: its configuration names them."""
    directory = tmp_path_factory.mktemp("stripped")
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, directory)
            continue
        kept = {name: tensor for name, tensor in load_file(file).items() if part_of(name, MAIN_LAYERS) != "mtp"}
        save_file(kept, directory / file.name, {"format": "pt"})
    for index in directory.glob("*.index.json"):
        index.unlink()
    return directory


def test_39_a_checkpoint_without_modules_says_so_and_takes_them_from_another(stripped: Path, plain: list[Any]) -> None:
    asked = bodies()[:16]
    with Server("--model-path", str(stripped)) as server:
        assert "the checkpoint has no MTP modules" in server.log
        assert answers(server, asked) == plain[:16]
    with Server("--model-path", str(stripped), "--draft-model-path", str(TINY)) as server:
        assert f"weights from {TINY}" in server.log
        assert answers(server, asked) == plain[:16]
        assert server.metric("spec_accept_length") >= GATE


def test_images_are_seen_alike_with_guesses() -> None:
    asked: list[dict[str, Any]] = []
    for family in ("image_object", "image_digit", "image_many"):
        for example in evaluation_set(family, 2):
            messages = example.openai_messages()
            asked.append({"messages": messages, "max_tokens": 60, "temperature": 0, "return_token_ids": True})
    with Server("--model-path", str(TINY)) as server:
        guessed = answers(server, asked)
        assert server.metric("spec_accept_length") >= GATE
        assert answers(server, asked) == guessed, "with the images' pages from the tree"
        assert answers(server, [{**body, "speculative": "off"} for body in asked]) == guessed


def test_earlier_text_takes_half_the_steps_where_an_answer_repeats_it() -> None:
    """A chat whose last question was asked before: the answer stands in the prompt."""
    steps = {}
    with Server("--model-path", str(TINY), "--speculative-algorithm", "ngram") as server:
        asked = []
        for example in (e for family in FAMILIES for e in evaluation_set(family, 2)):
            question = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in example.messages)
            question += "<|im_start|>assistant\n<think>\n"
            body = {"text": question, "sampling_params": {"temperature": 0, "max_new_tokens": 200}}
            said = server.request("POST", "/generate", body).json["text"]
            asked.append({**body, "text": f"{question}{said}<|im_end|>\n{question}"})
        told = []
        for speculative in ("off", "auto"):
            before = server.metric("scheduler_steps_total")
            told.append([
                server.request("POST", "/generate", {**body, "speculative": speculative}).json for body in asked
            ])  # fmt: skip
            steps[speculative] = server.metric("scheduler_steps_total") - before
    assert [answer["output_ids"] for answer in told[0]] == [answer["output_ids"] for answer in told[1]]
    counted = [answer["meta_info"] for answer in told[1] if "spec_verify_ct" in answer["meta_info"]]
    assert counted
    for info in counted:
        assert 1 <= info["spec_accept_length"] <= 8, "no step brings more than its guesses and one token"
    assert steps["off"] >= 2 * steps["auto"]


def test_43_greedy_answers_take_at_least_3_2_tokens_a_step() -> None:
    asked = [
        {"messages": example.messages, "temperature": 0, "max_tokens": 100}
        for family in FAMILIES
        for example in evaluation_set(family, 4)
    ]
    with Server("--model-path", str(TINY)) as server:
        for body in asked:
            assert server.request("POST", "/v1/chat/completions", body).status == 200
        assert server.metric("spec_accept_length") >= GATE
        assert server.metric("spec_accept_rate") >= 0.7


def test_32_a_request_tells_what_guessing_came_to_and_can_do_without() -> None:
    body = {
        "text": "<|im_start|>user\nCount from 1 to 30.<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "sampling_params": {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True},
    }
    with Server("--model-path", str(TINY)) as server:
        guessed = server.request("POST", "/generate", body).json
        plain = server.request("POST", "/generate", {**body, "speculative": "off"}).json
        wrong = server.request("POST", "/generate", {**body, "speculative": "no"})
    info = guessed["meta_info"]
    assert guessed["output_ids"] == plain["output_ids"]
    assert "spec_verify_ct" not in plain["meta_info"]
    assert sum(info["spec_accept_histogram"]) == info["spec_verify_ct"]
    assert sum(n * count for n, count in enumerate(info["spec_accept_histogram"])) == info["spec_accept_token_num"]
    steps = info["spec_verify_ct"] + info["spec_plain_ct"]
    assert info["spec_plain_ct"] >= 1, "the prompt's last step, at least"
    assert steps + info["spec_accept_token_num"] == 60, "each step brought one token, and one for each right guess"
    assert info["spec_accept_length"] == pytest.approx(60 / steps)
    assert info["spec_accept_rate"] == pytest.approx(info["spec_accept_token_num"] / info["spec_draft_token_num"])
    assert wrong.status == 400
    assert "'speculative' is" in wrong.text
