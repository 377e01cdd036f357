"""Check pages of `repshift report` in a real browser, and take screenshots.

    pip install playwright axe-playwright-python
    python scripts/check_report.py report.html --chromium /usr/bin/chromium --output shots/

Checked, at 390 and 1280 pixels, in light and dark: no message on the console, no request, no horizontal scrolling, no
violation of axe's rules; and that the sliders change the text and the image, by keyboard. The exit code is 1 if a check
fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

SIZES = {390: 844, 1280: 900}
SCHEMES = ("light", "dark")


def open_page(browser: Browser, path: Path, width: int, scheme: Any) -> tuple[Page, list[str]]:
    """The page, and what it does that it must not."""
    viewport: Any = {"width": width, "height": SIZES[width]}
    page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:")) else problems.append(f"loads {request.url}"),
    )
    page.goto(path.resolve().as_uri())
    return page, problems


def check_view(browser: Browser, path: Path, width: int, scheme: str, output: Path | None) -> list[str]:
    page, problems = open_page(browser, path, width, scheme)
    if (found := page.evaluate("document.documentElement.scrollWidth")) > width:
        problems.append(f"it is {found} pixels wide")
    for each in Axe().run(page).response["violations"]:
        problems.append(f"{each['id']}: {each['help']} ({each['nodes'][0]['target']})")
    if output:
        page.screenshot(path=str(output / f"{path.stem}_{width}_{scheme}.png"), full_page=True)
    page.context.close()
    return [f"{width} {scheme}: {each}" for each in problems]


def check_sliders(browser: Browser, path: Path) -> list[str]:
    page, problems = open_page(browser, path, 1280, "light")
    frame, said = page.locator(".frame").first, page.locator(".stage-text").first
    if not frame.count():
        return problems
    before = said.inner_text(), frame.screenshot()
    page.locator(".stage").first.focus()
    page.keyboard.press("Home")
    after = said.inner_text(), frame.screenshot()
    if before[0] == after[0] or before[1] == after[1]:
        problems.append("the slider of an image changes nothing")
    page.locator("#all").focus()
    page.keyboard.press("Home")
    page.keyboard.press("End")
    if set(page.locator(".stage-text").all_inner_texts()) != {before[0]}:
        problems.append("the slider of all images does not set each")
    tokens = page.locator(".token")
    if tokens.count():
        plain = frame.screenshot()
        tokens.first.focus()
        page.keyboard.press("ArrowRight")
        if "token at row" not in page.locator(".token-text").first.inner_text() or plain == frame.screenshot():
            problems.append("the slider of tokens changes nothing")
        frame.click()
        if "none" in page.locator(".token-text").first.inner_text():
            problems.append("a click chooses no token")
    page.context.close()
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--chromium", help="a browser; default: the one that playwright installed")
    parser.add_argument("--output", type=Path, help="folder for screenshots")
    given = parser.parse_args()
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
    problems = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        for path in given.pages:
            found = [
                each
                for width in SIZES
                for scheme in SCHEMES
                for each in check_view(browser, path, width, scheme, given.output)
            ]
            problems += [f"{path}: {each}" for each in (*found, *check_sliders(browser, path))]
        browser.close()
    print("\n".join(problems) or f"{len(given.pages)} pages, no problem")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
