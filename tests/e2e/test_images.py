"""Images over HTTP: answers, batches, caches and limits, with a real server and the real `openai` client."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch

from srt.configs.models import read_facts
from srt.evaluation.ask import Questions, ask_all
from srt.evaluation.command import EVALUATED
from tests.support.checkpoints import write_checkpoint
from tests.support.gpu import DEVICES, ON_A_GPU
from tests.support.pictures import ROOMY, data_uri, file_of, picture
from tests.support.server import Answer, Server
from tests.tokenizer.test_images import png

MARGIN = 1e-4
"""A greedy token may differ from transformers only where its own two best logits are closer than this."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Views of 112 pixels and crops of 84, so that many images are quick."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), max_positions=2048)


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    with Server("--model-path", str(tiny), "--dtype", "float32", "--max-image-bytes", "4000000") as running:
        yield running


def chat(*parts: str | bytes, detail: str | None = None) -> list[dict[str, Any]]:
    """One user message; bytes are image files."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            image: dict[str, Any] = {"url": data_uri(part)}
            content.append({"type": "image_url", "image_url": image | ({"detail": detail} if detail else {})})
    return [{"role": "user", "content": content}]


def ask(server: Server, *parts: str | bytes, detail: str | None = None, **body: Any) -> dict[str, Any]:
    asked = {"messages": chat(*parts, detail=detail), "max_tokens": 8, "temperature": 0, **body}
    answer = server.post("/v1/chat/completions", asked)
    assert answer.status == 200, answer.text
    result: dict[str, Any] = answer.json
    return result


def text_of(result: dict[str, Any]) -> str:
    text: str = result["choices"][0]["message"]["content"]
    return text


# --- answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_answers_about_several_images_equal_hugging_face(device: str, tiny: Path) -> None:
    """Through the HTTP API, template, tiles, tower and paged attention; transformers gets ids and pixels."""
    from transformers import Step3p7ForConditionalGeneration

    from srt.tokenizer.images import make_views

    config = read_facts(tiny).images
    assert config is not None
    files = [file_of(picture(200, 90)), file_of(picture(60, 50, 3)), file_of(picture(90, 300, 5))]
    text = "Compare <im_patch> with <im_patch> and <im_patch> now."
    images = [base64.b64encode(file).decode() for file in files]
    params = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    body = {"text": text, "image_data": images, "sampling_params": params, "return_prompt_token_ids": True}
    with Server("--model-path", str(tiny), "--dtype", "float32", device=device) as server:
        answer = server.post("/generate", body).json
    prompt, output = answer["prompt_token_ids"], answer["output_ids"]
    truth = Step3p7ForConditionalGeneration.from_pretrained(str(tiny), dtype=torch.float32)
    views = [make_views(file, config, ROOMY, "vendor") for file in files]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))

    def pixels(parts: list[Any]) -> torch.Tensor:
        whole = torch.cat([torch.from_numpy(part.copy()) for part in parts])
        return (whole.permute(0, 3, 1, 2).float() / 255 - mean) / std

    with torch.inference_mode():
        logits = truth(
            input_ids=torch.tensor([prompt + output]), use_cache=False,
            pixel_values=pixels([view.view for view in views]),
            pixel_values_local=pixels([view.crops for view in views]),
            num_local_patches=[len(view.crops) for view in views],
        ).logits[0, len(prompt) - 1 : -1]  # fmt: skip
    assert answer["meta_info"]["image_tokens"] == sum(6 * len(view.crops) + max(0, view.rows - 1) + 6 for view in views)
    for row, token in zip(logits, output, strict=True):
        assert row[token] > row.max() - MARGIN


@dataclass(frozen=True)
class Question:
    """A request of the crowd: texts, and images by number."""

    parts: tuple[str | int, ...]


def crowd(seed: int) -> tuple[list[Question], list[bytes]]:
    """64 requests: a third is text, the others have 1 to 4 images out of 40, some of them cropped."""
    rng = random.Random(seed)
    sizes = [(60, 50), (70, 100), (112, 112), (40, 40), (100, 100), (64, 48), (90, 70), (200, 90)]
    files = [file_of(picture(*sizes[at % len(sizes)], shift=at)) for at in range(40)]
    questions = []
    for _ in range(64):
        parts: list[str | int] = [f"Question {rng.randrange(1000)}: "]
        for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
            parts += [rng.randrange(40), rng.choice((" and ", " or ", ". Then "))]
        questions.append(Question((*parts, "what?")))
    return questions, files


@pytest.mark.parametrize(
    ("page_size", "dtype", "device"),
    [(16, "float32", "cpu"), (1, "bfloat16", "cpu"), pytest.param(16, "float32", "cuda", marks=ON_A_GPU)],
)
def test_64_concurrent_requests_with_images_answer_as_one_at_a_time(
    tiny: Path, page_size: int, dtype: str, device: str
) -> None:
    questions, files = crowd(page_size)

    def parts(question: Question) -> list[str | bytes]:
        return [part if isinstance(part, str) else files[part] for part in question.parts]

    used = {part for question in questions for part in question.parts if isinstance(part, int)}
    count = sum(isinstance(part, int) for question in questions for part in question.parts)
    arguments = ["--model-path", str(tiny), "--dtype", dtype, "--page-size", str(page_size)]
    with Server(*arguments, device=device) as server:
        with ThreadPoolExecutor(64) as pool:
            together = list(pool.map(lambda question: ask(server, *parts(question)), questions))
        encoded, batches = server.metric("images_encoded_total"), server.metric("image_batches_total")
        assert encoded == len(used), "each distinct image once"
        assert batches < encoded, "the tower ran fewer times than there are images"
        assert server.metric("images_total") == count
        assert server.metric("kv_pages_leaked") == 0
    with Server(*arguments, "--disable-radix-cache", "--max-running-requests", "1", device=device) as server:
        alone = [ask(server, *parts(question)) for question in questions]
    assert [text_of(result) for result in together] == [text_of(result) for result in alone]
    for one, other in zip(together, alone, strict=True):
        assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]
        assert (
            one["usage"]["prompt_tokens_details"]["image_tokens"]
            == (other["usage"]["prompt_tokens_details"]["image_tokens"])
        )


@pytest.mark.parametrize("device", DEVICES)
def test_the_built_in_model_sees_what_is_in_images(device: str) -> None:
    """Shapes, digits and one of several images, from 8 clients at once; in the long run 99 of 100 are right."""
    families = tuple(name for name, kind in EVALUATED.items() if kind == "images")
    with Server("--model-path", "builtin:tiny", device=device) as server:
        questions = Questions(server.url, families, 10, 8, 17, True)
        asked = asyncio.run(ask_all(questions, quiet=True)).asked
        assert server.metric("images_encoded_total") > 30
    wrong = [item for items in asked.values() for item in items if not item.right]
    assert len(asked) == 3
    assert len(wrong) <= 2


def test_prefixes_hit_across_images_by_content_and_layout(server: Server) -> None:
    cat, dog = file_of(picture(200, 90, 50)), file_of(picture(200, 90, 51))
    lead = "A rather long introduction to what is shown below, word by word by word: "

    def cached(*parts: str | bytes, **how: Any) -> int:
        found: int = ask(server, lead, *parts, **how)["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    first = cached(cat, "one question")
    again = cached(cat, "another one")
    other = cached(dog, "another one")
    low = cached(cat, "another one", detail="low")
    reencoded = cached(file_of(picture(200, 90, 50), "WEBP", lossless=True), "another one")
    salted = cached(cat, "another one", cache_salt="x")
    before = other
    assert first < again
    assert again - before >= 16, "the image is found"
    assert before == low, "another image, or another layout of it, shares the words before it alone"
    assert reencoded >= again
    assert salted == 0


def test_usage_and_model_info_speak_of_images(server: Server) -> None:
    assert server.get("/model_info").json["has_image_understanding"] is True
    usage = ask(server, "Look: ", file_of(picture(200, 90)))["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 3 * 6 + 6
    assert ask(server, "No image.")["usage"]["prompt_tokens_details"]["image_tokens"] == 0
    low = ask(server, "Look: ", file_of(picture(200, 90)), detail="low")
    assert low["usage"]["prompt_tokens_details"]["image_tokens"] == 6


def test_several_answers_to_a_prompt_see_the_same_images(server: Server) -> None:
    parts = ("What", file_of(picture(90, 70)), "and", file_of(picture(30, 200)), "?")
    several = ask(server, *parts, n=3, seed=5, temperature=1.5, logprobs=True)
    alone = [ask(server, *parts, seed=5 + copy, temperature=1.5) for copy in range(3)]
    assert [choice["message"]["content"] for choice in several["choices"]] == [text_of(each) for each in alone]
    assert (
        several["usage"]["prompt_tokens_details"]["image_tokens"]
        == (alone[0]["usage"]["prompt_tokens_details"]["image_tokens"])
    )
    assert len(several["choices"][2]["logprobs"]["content"]) == 8


def test_native_requests_take_images_in_every_form(server: Server) -> None:
    one, two = (base64.b64encode(file_of(picture(60 + at, 50))).decode() for at in range(2))
    params = {"max_new_tokens": 4, "temperature": 0}

    def tokens(text: Any, images: Any) -> Any:
        answer = server.post("/generate", {"text": text, "image_data": images, "sampling_params": params})
        assert answer.status == 200, answer.text
        found = answer.json
        return [item["output_ids"] for item in found] if isinstance(found, list) else found["output_ids"]

    single = tokens("See <im_patch>!", one)
    assert tokens("See <im_patch>!", [one]) == single
    assert tokens("See <im_patch>!", f"data:image/png;base64,{one}") == single
    pair = tokens("<im_patch><im_patch>", [one, two])
    batch = tokens(["See <im_patch>!", "no image", "<im_patch><im_patch>"], [one, None, [one, two]])
    assert [batch[0], batch[2]] == [single, pair]
    assert tokens(["See <im_patch>!"] * 2, [one, one]) == [single, single]


def test_tokens_of_a_chat_with_images_can_be_asked_for_and_sent_back(server: Server) -> None:
    messages = chat("What is ", file_of(picture(200, 90)), "?")
    asked = server.post("/tokenize", {"messages": messages}).json
    answer = ask(server, "What is ", file_of(picture(200, 90)), "?", return_token_ids=True)
    assert answer["prompt_token_ids"] == asked["tokens"]
    image = base64.b64encode(file_of(picture(200, 90))).decode()
    params = {"max_new_tokens": 8, "temperature": 0}
    again = server.post(
        "/generate", {"input_ids": asked["tokens"], "image_data": image, "sampling_params": params}
    ).json
    assert again["output_ids"] == answer["choices"][0]["token_ids"]


def test_the_openai_client_sends_images_and_streams_the_answer(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    messages: Any = chat("What is ", file_of(picture(90, 300)), " beside ", file_of(picture(60, 50)), "?")
    whole = client.chat.completions.create(model="default", messages=messages, max_tokens=12, temperature=0)
    chunks = client.chat.completions.create(
        model="default", messages=messages, max_tokens=12, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


# --- attacks ---------------------------------------------------------------------------------------------


def attacks(site: str = "http://169.254.169.254/latest/meta-data") -> list[tuple[str, str]]:
    good = file_of(picture(300, 200))
    return [
        ("file:///etc/passwd", "local files are never read"),
        ("/etc/hosts.png", "local files are never read"),
        ("../../secret.png", "local files are never read"),
        (site, "--allowed-media-domains lists no host"),
        ("https://example.com/a.png", "--allowed-media-domains lists no host"),
        ("ftp://example.com/a.png", "not as 'ftp:"),
        ("data:text/html;base64,PGI+", "it must hold an image"),
        ("data:image/png,abc", "not marked as base64"),
        ("data:image/png;base64,@@@@", "nor base64"),
        ("not base64 at all", "nor base64"),
        ("", "empty"),
        (data_uri(b""), "0 bytes"),
        (data_uri(good[: len(good) // 2]), "cannot be decoded"),
        (data_uri(b"BM" + bytes(5000)), "not a readable PNG, JPEG, WebP or GIF"),
        (data_uri(png(50_000, 50_000, b"\0" * 10_000)), "2500000000 pixels, the limit is 67108864"),
        (data_uri(png(100_000, 30, b"")), "100000 x 30 pixels; a side may have 65535"),
        (data_uri(png(60_000, 10, b"")), "padded to a square"),
        (data_uri(bytes(5_000_000)), "the image has 5000000 bytes, the limit is 4000000"),
        ("A" * 50_000_000, "the limit is 4000000"),
    ]


def resident(server: Server) -> int:
    """Bytes that the server's processes have in memory, image processes included."""
    assert server.process is not None
    parent = psutil.Process(server.process.pid)
    total = 0
    for process in [parent, *parent.children(recursive=True)]:
        total += process.memory_info().rss
    return total


def test_attacks_are_told_what_is_wrong_and_disturb_nobody(server: Server) -> None:
    good = ask(server, "Undisturbed? ", file_of(picture(61, 50)))

    def attempt(attack: tuple[str, str]) -> tuple[Answer, str]:
        url, problem = attack
        content = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url}}]
        return server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}), problem

    def wave() -> None:
        with ThreadPoolExecutor(8) as pool:
            bystanders = [pool.submit(ask, server, "Undisturbed? ", file_of(picture(61, 50))) for _ in range(4)]
            for answer, problem in pool.map(attempt, attacks()):
                assert answer.status == 400, answer.text
                assert problem in answer.json["error"]["message"]
            assert {text_of(bystander.result()) for bystander in bystanders} == {text_of(good)}

    wave()
    wave()
    before = resident(server)
    for _ in range(3):
        wave()
    assert resident(server) < before + (96 << 20)
    assert server.metric("num_running_reqs") == 0
    assert server.metric("kv_pages_leaked") == 0


def test_too_many_images_and_too_many_placeholders_are_refused(server: Server) -> None:
    image = data_uri(file_of(picture(40, 40)))
    many = server.post("/generate", {"text": "<im_patch>" * 65, "image_data": [image] * 65})
    assert (many.status, many.json["error"]["message"]) == (
        400, "the request has 65 images, the limit is 64 (--max-images-per-request)"
    )  # fmt: skip
    for text, images in (("no place", [image]), ("<im_patch>", []), ("<im_patch><im_patch>", [image])):
        refused = server.post("/generate", {"text": text, "image_data": images})
        assert refused.status == 400
        assert "image placeholders (<im_patch>) for" in refused.json["error"]["message"]
    long = server.post(
        "/generate", {"text": "<im_patch>" * 60, "image_data": [data_uri(file_of(picture(90, 700)))] * 60}
    )
    assert long.status == 400
    assert "the context length is 2048 tokens" in long.json["error"]["message"]
    bad = server.post("/v1/chat/completions", {"messages": chat(file_of(picture(9, 9)), detail="ultra")})
    assert "must be one of auto, low, high" in bad.json["error"]["message"]


def test_clients_that_leave_while_images_are_made_or_computed_leave_nothing_behind(server: Server) -> None:
    """Cancels at every moment: in line, while decoding, in the queue, in the middle of an image."""
    rng = random.Random(5)

    def leave(number: int) -> None:
        files = [file_of(picture(300 + rng.randrange(40), 200, shift=number)) for _ in range(3)]
        body = {"messages": chat("a", *files), "max_tokens": 64, "temperature": 0}
        try:
            with openai.OpenAI(
                base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=rng.choice((0.02, 0.05, 0.1, 0.3))
            ) as client:
                client.post("/chat/completions", body=body, cast_to=object)
        except (openai.APITimeoutError, openai.APIConnectionError):
            pass

    expected = text_of(ask(server, "Still here? ", file_of(picture(200, 90))))
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(leave, range(48)))
    assert text_of(ask(server, "Still here? ", file_of(picture(200, 90)))) == expected
    for _ in range(100):
        if server.metric("num_running_reqs") == 0 and server.metric("num_queue_reqs") == 0:
            break
    assert server.metric("num_running_reqs") == 0
    assert server.metric("kv_pages_leaked") == 0


def test_retracted_requests_with_images_answer_as_if_alone(tiny: Path) -> None:
    """A pool so small that requests are retracted in the middle of their answers."""
    files = [file_of(picture(60 + at, 90, shift=at)) for at in range(8)]
    arguments = ["--model-path", str(tiny), "--dtype", "float32", "--context-length", "200"]

    def answer(server: Server, at: int) -> str:
        return text_of(ask(server, f"{at}: ", files[at], " ", files[(at + 1) % 8], max_tokens=100, ignore_eos=True))

    with Server(*arguments) as server:
        alone = [answer(server, at) for at in range(8)]
    with Server(*arguments, "--max-total-tokens", "288", "--disable-radix-cache") as server:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda at: answer(server, at), range(8)))
        assert server.metric("num_retracted_requests_total") > 0
    assert together == alone
