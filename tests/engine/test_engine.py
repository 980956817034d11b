"""`srt.Engine`: the real processes, driven from Python."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import srt
from srt.errors import ErrorCode, ProcessLost, ServingError, StartupError
from tests.support.server import Server

QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]
GREEDY = {"max_new_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def engine() -> Iterator[srt.Engine]:
    with srt.Engine(device="cpu", context_length=512, max_running_requests=8) as made:
        yield made


def server_processes(parent: int) -> set[int]:
    """Pids of all processes below `parent`."""
    return {process.pid for process in psutil.Process(parent).children(recursive=True)}


def test_a_program_gets_the_answers_that_http_gives(engine: srt.Engine) -> None:
    with Server("--context-length", "512", "--max-running-requests", "8") as server:
        over_http = server.post("/generate", {"text": "1, 2, 3,", "sampling_params": GREEDY}).json
        chat_over_http = server.post("/v1/chat/completions", {"messages": QUESTION, "temperature": 0}).json
    inside = engine.generate("1, 2, 3,", sampling_params=GREEDY)
    assert (inside["text"], inside["output_ids"]) == (over_http["text"], over_http["output_ids"])
    assert inside["meta_info"].keys() == over_http["meta_info"].keys()
    assert engine.chat(QUESTION, temperature=0)["choices"] == chat_over_http["choices"]


def test_lists_of_prompts_give_lists_of_answers(engine: srt.Engine) -> None:
    alone = [engine.generate(prompt, sampling_params=GREEDY)["text"] for prompt in ("7 8 9", "blue red")]
    together = engine.generate(["7 8 9", "blue red"], sampling_params=GREEDY)
    assert [item["text"] for item in together] == alone


def test_a_stream_ends_with_the_whole_answer(engine: srt.Engine) -> None:
    whole = engine.generate("1, 2, 3,", sampling_params=GREEDY)
    events = list(engine.generate("1, 2, 3,", stream=True, sampling_params=GREEDY))
    assert len(events) > 1
    assert events[-1]["text"] == whole["text"]
    chunks = engine.chat(QUESTION, stream=True, temperature=0)
    told = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert told == engine.chat(QUESTION, temperature=0)["choices"][0]["message"]["content"]


def test_many_tasks_of_any_event_loop_share_it(engine: srt.Engine) -> None:
    prompts = [f"{number}, {number + 1}," for number in range(12)]

    async def together() -> list[str]:
        answers = await asyncio.gather(*(engine.async_generate(one, sampling_params=GREEDY) for one in prompts))
        return [answer["text"] for answer in answers]

    async def streamed() -> list[int]:
        events = [event async for event in engine.async_generate_stream("1, 2, 3,", sampling_params=GREEDY)]
        return list(events[-1]["output_ids"])

    assert asyncio.run(together()) == [engine.generate(one, sampling_params=GREEDY)["text"] for one in prompts]
    assert asyncio.run(streamed()) == engine.generate("1, 2, 3,", sampling_params=GREEDY)["output_ids"]


def test_what_http_refuses_is_raised_with_its_code_and_field(engine: srt.Engine) -> None:
    with pytest.raises(ServingError, match="temperature") as refused:
        engine.generate("x", sampling_params={"temperature": -1})
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    with pytest.raises(ServingError, match="600 tokens, the context length is 512"):
        list(engine.generate(input_ids=[[1] * 600], stream=True))
    assert engine.request("POST", "/no/such/route", {}).status == 404
    with pytest.raises(ServingError, match="Out of range float"):
        engine.generate("x", sampling_params={"temperature": float("nan")})
    with pytest.raises(ValueError, match=r"text/event-stream.*events come by `stream`"):
        engine.call("/v1/chat/completions", {"messages": QUESTION, "stream": True})


def test_an_iterator_that_is_left_early_frees_its_request(engine: srt.Engine) -> None:
    long = {"max_new_tokens": 400, "ignore_eos": True}
    for _ in engine.generate("1, 2, 3,", stream=True, sampling_params=long):
        break
    deadline = time.monotonic() + 10
    while running_requests(engine):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def running_requests(engine: srt.Engine) -> float:
    """What `/metrics` says of them."""
    lines = engine.request("GET", "/metrics").body.decode().splitlines()
    [line] = [line for line in lines if line.startswith("sglang:num_running_reqs{")]
    return float(line.rpartition(" ")[2])


def test_wrong_options_are_refused_in_the_words_of_the_command_line() -> None:
    with pytest.raises(StartupError, match="unknown key 'tp_siz'; did you mean --tp-size"):
        srt.Engine(tp_siz=2)
    with pytest.raises(StartupError, match="--page-size is 0"):
        srt.Engine(page_size=0)
    with pytest.raises(StartupError, match="needs none"):
        srt.Engine(api_key="secret")


def test_a_lost_process_ends_every_call_with_its_name() -> None:
    before = server_processes(os.getpid())
    with srt.Engine(device="cpu", context_length=2048) as engine:
        events = engine.generate("1,", stream=True, sampling_params={"max_new_tokens": 2000, "ignore_eos": True})
        next(events)
        started = server_processes(os.getpid()) - before
        [worker] = [pid for pid in started if title(pid).startswith("srt:worker")]
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(ProcessLost, match=r"worker.*SIGKILL"):
            list(events)
        with pytest.raises(ProcessLost):
            engine.generate("again")


def title(pid: int) -> str:
    """A process's title, empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
    except OSError:
        return ""


def test_a_program_that_is_killed_leaves_no_process_behind() -> None:
    start = "import srt, time\nengine = srt.Engine(device='cpu', context_length=256)"
    code = f"{start}\nprint('up', flush=True)\ntime.sleep(600)"
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(srt.__file__).parents[1])
    assert program.stdout is not None
    assert program.stdout.readline() == b"up\n"
    below = server_processes(program.pid)
    assert len(below) >= 4
    program.kill()
    program.wait()
    program.stdout.close()
    deadline = time.monotonic() + 20
    while left := [title(pid) for pid in below if psutil.pid_exists(pid) and title(pid).startswith("srt:")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
