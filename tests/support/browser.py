"""A headless Chromium, which a test drives by playwright. Debian's package `chromium`; no browser is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def why_not() -> str:
    """Why there is no browser here, or "". Where `INSTEP_BROWSER` is "required" that fails."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        missing = "playwright is not installed"
    else:
        missing = "" if CHROMIUM else "there is no Chromium"
    if missing and os.environ.get("INSTEP_BROWSER") == "required":
        pytest.fail(f"INSTEP_BROWSER is 'required' and {missing}.")
    return missing


@contextmanager
def opened(path: Path, *, width: int, dark: bool = False, touch: bool = False) -> Iterator[tuple[Any, list[str]]]:
    """The file as a page, and what it complains of: messages of its console, errors, requests to elsewhere."""
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            context = browser.new_context(
                viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light", has_touch=touch
            )
            page = context.new_page()
            page.on("console", lambda message: complaints.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
            page.on("request", lambda request: _note(request.url, complaints))
            page.goto(path.absolute().as_uri())
            page.wait_for_function("document.documentElement.dataset.drawn", timeout=60_000)
            yield page, complaints
        finally:
            browser.close()


def _note(url: str, complaints: list[str]) -> None:
    if not url.startswith(("file:", "data:", "blob:")):
        complaints.append(f"request: {url}")
