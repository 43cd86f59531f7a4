"""A headless Chromium that looks at the page, and what it must never do there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")

WHY_NOT = (
    "there is no Chromium here: install Debian's package chromium (make setup does, with root)"
)


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a running Chromium; skip the test where there is none."""
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(WHY_NOT)
    from playwright.sync_api import sync_playwright

    # Without its sandbox, which a container may not let it have: it sees nothing but our own page.
    options = ["--no-sandbox", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options)
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A tab on the page.

    Args:
        browser: the browser.
        url: the server's address.
        context: options of the tab's context: its size, its colours.

    Attributes:
        page: the tab, as Playwright has it.
        asked: the addresses that it has asked for.
        wrong: errors of scripts, and what the page's policy has forbidden.
    """

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.url = url
        self.asked: list[str] = []
        self.wrong: list[str] = []
        size = {"viewport": {"width": 1280, "height": 900}}
        self.context = browser.new_context(**size | context)
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", self._told)

    def _told(self, message: Any) -> None:
        # What the server refuses, or does not answer, is told by the page itself.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.wrong.append(message.text)

    def open(self) -> "Tab":
        """Open the page, which asks for a key."""
        self.page.goto(f"{self.url}/cachescope")
        return self

    def enter(self, key: str | None) -> "Tab":
        """Enter a key, or go on without one."""
        if key is None:
            self.page.click("#no-key")
        else:
            self.page.fill("#key", key)
            self.page.click("#key-form .primary")
        return self

    def look(self, key: str | None) -> "Tab":
        """Open the page with a key, and wait until it shows requests."""
        self.open().enter(key)
        self.page.wait_for_selector("#tiles .value")
        return self

    def bars(self, session: str) -> Any:
        """Return the requests in a session's timeline that are in view."""
        return self.page.locator(f"article[aria-label={quoted(f'Session {session}')}] .request")

    def close(self) -> None:
        """Close the tab; see that it kept to its server, and that nothing went wrong in it."""
        self.context.close()
        assert self.wrong == []
        assert [url for url in self.asked if not url.startswith(f"{self.url}/cachescope")] == []


@contextmanager
def tab(browser: Any, url: str, **context: Any) -> Iterator[Tab]:
    """Yield a new tab, which is closed and checked at the end."""
    one = Tab(browser, url, **context)
    try:
        yield one
    except BaseException:
        one.context.close()
        raise
    one.close()


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
