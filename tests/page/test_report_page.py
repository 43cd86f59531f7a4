"""The page of `cachescope report --html`, in a real browser, from its file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.core.agent_session import Agent
from tests.page.browser import quoted
from vllm_cachescope.cli.main import main
from vllm_cachescope.cli.report import page as report_page

MARKUP = '</script><script>document.title=1</script><img src="x" onerror="document.title=2">\u202e'
TURNS = 12


def recorded(path: Path) -> Path:
    """Write three sessions: in one a tool changes, one has names that are markup."""
    lines = []
    for number, session in enumerate(["calm", "changed", MARKUP]):
        agent = Agent(session, scale=0.4)
        agent.tools[3]["name"] = MARKUP if session == MARKUP else agent.tools[3]["name"]
        for turn in range(TURNS):
            if turn == 6 and session != "calm":
                agent.tools[3]["description"] += " Revision 2."
            at = 1.763e9 + 1000 * number + 20 * turn
            body = agent.turn().body()
            lines.append({"timestamp": at, "session_id": session, "body": body})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    page = folder / "report.html"
    traffic = recorded(folder / "traffic.jsonl")
    assert main(["report", str(traffic), "--price", "3", "--html", str(page)]) == 0
    return page


@contextmanager
def opened(browser: Any, path: Path, **context: Any) -> Iterator[Any]:
    """Yield the page in a tab; see that it asked for nothing and that nothing went wrong."""
    size = {"viewport": {"width": 1280, "height": 900}}
    tab = browser.new_context(**size | context)
    tab.set_default_timeout(20_000)
    page = tab.new_page()
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
    page.goto(path.as_uri())
    page.locator("#sessions").scroll_into_view_if_needed()
    page.wait_for_selector(".request")
    yield page
    title = page.title()
    tab.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert title == "CacheScope report"


def test_the_timeline_shows_each_call_and_why_a_prefix_broke(browser: Any, report: Path) -> None:
    with opened(browser, report) as page:
        assert "36 calls" in page.inner_text("#facts")
        assert page.locator("#costs tbody tr").count() == 6
        assert "tool changed" in page.inner_text("#breaks")
        for session, breaks in (("calm", 0), ("changed", 1), (MARKUP, 1)):
            bars = page.locator(f"article[aria-label={quoted(f'Session {session}')}] .request")
            bars.first.scroll_into_view_if_needed()
            assert bars.count() == TURNS
            assert bars.and_(page.locator(".break")).count() == breaks
        page.locator("#search").fill("changed")
        page.locator(".request.break").first.click()
        details = page.inner_text("#details")
        assert "The tools changed" in details and "tools[3]" in details
        assert "description" in details and "What to do" in details
        page.keyboard.press("Escape")
        assert page.locator("#details").is_hidden()
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.dataset.index") == "5"


def test_phases_and_stability_of_the_chosen_session(browser: Any, report: Path) -> None:
    with opened(browser, report) as page:
        page.select_option("#which", label="calm, 12 calls")
        assert page.locator("#phases tbody tr").count() >= 1
        canvas = page.locator("#heat canvas").first
        assert f"{TURNS} calls" in canvas.get_attribute("aria-label")
        # Its last column: what has long been the same is darker than what is new.
        colours = canvas.evaluate(
            "(c) => [2, c.height - 4].map((y) => [...c.getContext('2d')"
            ".getImageData(c.width - 5, y, 1, 1).data].join())"
        )
        assert colours[0] != colours[1]


@pytest.mark.parametrize(
    "context",
    [
        {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
        {"color_scheme": "dark"},
    ],
)
def test_on_a_phone_and_in_the_dark(browser: Any, report: Path, context: dict[str, Any]) -> None:
    with opened(browser, report, **context) as page:
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= context.get("viewport", {"width": 1280})["width"]


def test_a_page_has_a_bound(
    browser: Any, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "MOST_CALLS", 20)
    small = tmp_path / "small.html"
    traffic = report.with_name("traffic.jsonl")
    assert main(["report", str(traffic), "--html", str(small)]) == 0
    with opened(browser, small) as page:
        assert "16 calls of 36 are counted, and not drawn" in page.inner_text("#banner")
        assert page.locator("article.session").count() == 2
