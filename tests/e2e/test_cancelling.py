"""Clients that go away at random moments: pages come back, nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

from tests.support.server import Server
from tests.support.workload import Request, generate_all, mixed_requests

CANCELS = 2000
AT_ONCE = 24


def http(path: str, body: dict[str, Any]) -> bytes:
    """A complete HTTP/1.1 POST."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def random_body(rng: random.Random, index: int) -> tuple[str, dict[str, Any]]:
    """A request that runs long enough to be caught in any state, on one of the three endpoints."""
    prompt = [rng.randrange(16, 4000) for _ in range(rng.choice((4, 40, 400, 1500)))]
    stream = rng.random() < 0.5
    if rng.random() < 0.5:
        params = {"max_new_tokens": 400, "ignore_eos": True, "temperature": 0}
        return "/generate", {"input_ids": prompt, "sampling_params": params, "stream": stream, "rid": f"c{index}"}
    return "/v1/completions", {
        "model": "default",
        "prompt": prompt,
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": stream,
    }


async def cancel_many(port: int, count: int, seed: int) -> None:
    """Send `count` requests and close each connection after a random moment."""
    rng = random.Random(seed)
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(index: int) -> None:
        path, body = random_body(rng, index)
        patience_s = rng.choice((0.0, 0.002, 0.02, 0.1)) * rng.random()
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(http(path, body))
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(rng.choice((1, 200, 2000))), patience_s or 0.0001)
            writer.transport.abort()

    await asyncio.gather(*(one(index) for index in range(count)))


def wait_until_idle(server: Server, timeout_s: float = 20.0) -> None:
    """Wait until no request is left; fails with the gauges if some stay."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        gauges = {name: server.metric(name) for name in ("num_running_reqs", "num_queue_reqs", "num_used_tokens")}
        if not any(gauges.values()):
            return
        time.sleep(0.1)
    raise AssertionError(f"requests or pages stayed: {gauges}")


def test_2000_cancels_leave_no_page_behind_and_no_other_answer_changed(nano: Path) -> None:
    bystanders = mixed_requests(24, vocab=4096, seed=3, longest=600)
    with Server("--model-path", str(nano), "--dtype", "float32", "--max-total-tokens", "16384") as server:
        calm = [answer["output_ids"] for answer in generate_all(server, bystanders, at_once=4)]
        server.post("/flush_cache")
        wait_until_idle(server)
        free = server.metric("kv_available_tokens")

        async def storm() -> list[list[int]]:
            cancelling = asyncio.create_task(cancel_many(server.port, CANCELS, seed=11))
            seen: list[list[list[int]]] = []
            while not cancelling.done():
                answers = await asyncio.to_thread(generate_all, server, bystanders, 4)
                seen.append([answer["output_ids"] for answer in answers])
            await cancelling
            return [ids for answers in seen for ids in answers]

        stormy = asyncio.run(storm())
        wait_until_idle(server)
        assert stormy, "no bystander finished during the storm"
        for index, output in enumerate(stormy):
            assert output == calm[index % len(calm)], f"bystander {index % len(calm)} changed"
        assert server.metric("kv_pages_leaked") == 0
        assert server.metric("num_used_tokens") == 0
        assert server.post("/flush_cache").status == 200
        wait_until_idle(server)
        assert server.metric("kv_available_tokens") == free


def test_an_aborted_request_ends_with_finish_reason_abort_and_its_neighbour_lives(server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(rid: str) -> Any:
        params = {"max_new_tokens": 300, "ignore_eos": True, "temperature": 0}
        return server.post("/generate", {"input_ids": [5, 6, 7], "sampling_params": params, "rid": rid})

    with ThreadPoolExecutor(2) as pool:
        short, long = pool.submit(ask, "job1"), pool.submit(ask, "job10")
        time.sleep(0.15)
        assert server.post("/abort_request", {"rid": "job1"}).status == 200
        assert len(long.result().json["output_ids"]) == 300
        aborted = short.result()
    assert aborted.json["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.post("/abort_request", {"rid": "never seen"}).status == 200


def test_requests_are_still_served_after_a_client_vanished_while_queued(nano: Path) -> None:
    options = ("--dtype", "float32", "--max-running-requests", "1")
    with Server("--model-path", str(nano), *options) as server:
        asyncio.run(cancel_many(server.port, 60, seed=5))
        wait_until_idle(server)
        request = Request((1, 2, 3), 4)
        assert len(generate_all(server, [request])[0]["output_ids"]) == 4
