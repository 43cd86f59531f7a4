"""Takes the pictures of the page that stand in ``docs/pictures``: run it when the page has changed.

It starts the demo's server, has the demo's agents use it, and looks with Chromium.

    python scripts/page_pictures.py [DIRECTORY]
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from demo.hold import KEYS, Agents  # noqa: E402
from demo.model import SMALL, build  # noqa: E402
from demo.run import serving  # noqa: E402
from demo.traffic import steps  # noqa: E402

TOKEN = "the operator of the pictures"
WIDE = {"viewport": {"width": 1360, "height": 1130}, "device_scale_factor": 1.5}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}


def take(browser: Any, url: str, path: Path, key: str, opens: bool, **context: Any) -> None:
    """Take one picture.

    Args:
        browser: the browser.
        url: the server.
        path: where the picture goes.
        key: who looks.
        opens: whether the details of a break are open.
        context: the size and colours of the tab.
    """
    page = browser.new_context(**context).new_page()
    page.goto(f"{url}/cachescope")
    page.fill("#key", key)
    page.click("#key-form .primary")
    page.wait_for_selector(".request")
    page.click("#pause")
    if opens:
        session = page.locator("article:has-text('night-desk')").first
        session.scroll_into_view_if_needed()
        broken = session.locator(".request.break").first
        broken.click(force=True)
        page.locator("#details .suggestion").wait_for()
        page.click("text=Show the diff")
        page.locator("pre.diff").wait_for()
        page.locator("#details .verdict").scroll_into_view_if_needed()
        page.mouse.move(5, 5)
        if not context.get("is_mobile"):
            page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(400)
    page.screenshot(path=path)
    page.context.close()


def main() -> None:
    """Take all pictures."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "pictures"
    directory.mkdir(parents=True, exist_ok=True)
    program = shutil.which("chromium") or sys.exit("there is no chromium")
    with tempfile.TemporaryDirectory(prefix="cachescope-pictures-") as scratch:
        model = build(Path(scratch) / "model", SMALL)
        with serving(model, TOKEN) as server, sync_playwright() as playwright:
            Agents(server.url).send(steps(iter(range(2))), pause_s=0.4)
            browser = playwright.chromium.launch(
                executable_path=program, args=["--no-sandbox", "--hide-scrollbars"]
            )
            for name, opens, context in (
                ("page.png", True, WIDE),
                ("page-dark.png", False, WIDE | {"color_scheme": "dark"}),
                ("page-phone.png", True, PHONE),
            ):
                take(browser, server.url, directory / name, TOKEN, opens, **context)
            tenant = directory / "page-tenant.png"
            take(browser, server.url, tenant, KEYS["south"], False, **WIDE)
            browser.close()


if __name__ == "__main__":
    main()
