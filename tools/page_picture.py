"""Write docs/pictures/page.png: the page at `/` after a small conversation with the built-in model. Needs Chromium.

usage: PYTHONPATH=. python tools/page_picture.py http://127.0.0.1:30000 [docs/pictures/page.png]
"""

from __future__ import annotations

import shutil
import sys

from playwright.sync_api import expect, sync_playwright

QUESTIONS = ("What is 17 + 25?", "Reverse the word gate.", "Count from 1 to 20.")


def main(url: str, path: str = "docs/pictures/page.png") -> None:
    """Hold the conversation and take the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 620})
        page.goto(url)
        for number, question in enumerate(QUESTIONS, 1):
            page.fill("#text", question)
            page.press("#text", "Enter")
            expect(page.locator(".assistant .facts")).to_have_count(number)
        page.locator("details").nth(1).locator("summary").click()
        page.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
