"""The page at `/`, as people meet it: in Chromium, against a real server with the built-in model and a key."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.pictures import file_of, picture
from tests.support.server import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--no-first-run"]  # fmt: skip
KEY = "a-key-for-the-page"

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--api-key", KEY, "--speculative-algorithm", "mtp") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page with its key given. Fails if it asked any other place for anything, or complained."""
    page = browser.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#state")).to_contain_text("key")
    page.fill("#key", KEY)
    page.locator("#key").blur()
    expect(page.locator("#model")).to_have_text("builtin:tiny")
    page.fill("#temperature", "0")
    yield page
    page.close()
    assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []
    assert complaints == []


def ask(page: Page, question: str) -> None:
    page.fill("#text", question)
    page.press("#text", "Enter")


@needs_chromium
def test_an_answer_streams_in_and_says_what_it_cost(page: Page) -> None:
    ask(page, "What is 12 + 30?")
    facts = page.locator(".assistant .facts")
    expect(facts).to_contain_text("tokens/s")
    expect(facts).to_contain_text("prompt tokens cached")
    expect(facts).to_contain_text("tokens a step")
    expect(page.locator(".assistant .said")).to_contain_text("42")
    ask(page, "What is 1 + 1?")
    expect(page.locator(".assistant .facts")).to_have_count(2)
    assert page.locator(".user .said").all_inner_texts() == ["What is 12 + 30?", "What is 1 + 1?"]


@needs_chromium
def test_an_image_that_is_dropped_goes_with_the_message(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(file_of(picture(64, 64)))
    page.set_input_files("#file", path)
    expect(page.locator("#pictures img")).to_have_count(1)
    ask(page, "What is in the picture?")
    expect(page.locator(".user img")).to_have_count(1)
    expect(page.locator(".assistant .facts")).to_contain_text("tokens")
    expect(page.locator("#pictures img")).to_have_count(0)


@needs_chromium
def test_an_error_is_shown_and_the_next_message_is_answered(page: Page) -> None:
    page.fill("#max-tokens", "999999")
    ask(page, "hello")
    expect(page.locator(".assistant .error")).to_contain_text("999999")
    page.fill("#max-tokens", "8")
    ask(page, "hello")
    expect(page.locator(".assistant .facts").last).to_contain_text("8 tokens")


@needs_chromium
def test_stop_ends_an_answer_here_and_on_the_server(page: Page, server: Server) -> None:
    ask(page, "Count from 100 to 299.")
    expect(page.locator(".assistant .said")).to_contain_text(" 103 ")
    page.click("#send")
    expect(page.locator(".assistant .facts")).to_have_text("stopped")
    assert "298" not in page.locator(".assistant .said").inner_text()


def test_the_page_needs_no_key_and_lets_the_browser_reach_nobody_else(server: Server) -> None:
    for path, kind in (("/", "text/html"), ("/static/chat.css", "text/css"), ("/static/chat.js", "text/javascript")):
        answer = server.get(path)
        assert answer.status == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text
        assert "https://" not in answer.text
    assert server.get("/static/app.py").status == 401
    assert server.get("/v1/models").status == 401
