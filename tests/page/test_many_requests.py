"""The page with more requests than one answer holds, and than anybody looks at."""

import json
import random
import time
from collections import Counter
from typing import Any

import pytest

from tests.page.browser import tab
from tests.page.crowd import TOKEN, crowd, keep, request, served, session_records, turns

WATCH = """
new MutationObserver((_, observer) => {
  if (!document.querySelector(".request")) return;
  window.firstRequest = performance.now();
  observer.disconnect();
}).observe(document, { subtree: true, childList: true });
"""


SCROLL = """async () => {
    const times = [];
    let [last, on] = [performance.now(), true];
    const tick = (now) => {
        times.push(now - last);
        last = now;
        if (on) requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
    const frame = () => new Promise(requestAnimationFrame);
    for (let i = 0; i < 60; i += 1) { scrollBy(0, 150); await frame(); }
    scrollTo(0, 0);
    const boxes = [...document.querySelectorAll(".scroller")];
    const box = boxes.sort((a, b) => b.scrollWidth - a.scrollWidth)[0];
    box.scrollIntoView({ block: "center" });
    for (let i = 0; i < 60; i += 1) { box.scrollLeft -= 150; await frame(); }
    on = false;
    times.sort((a, b) => a - b);
    return {
        median: times[times.length >> 1],
        bars: document.querySelectorAll(".request").length, width: box.scrollWidth,
    };
}"""


def tasks_ms(events: list[dict[str, Any]]) -> list[float]:
    """The CPU time in ms of each task of the thread that the page's scripts run on. How long they
    take by the clock says more of what else the machine does."""
    calls = Counter(place(event) for event in events if event["name"] == "FunctionCall")
    ((main, _),) = calls.most_common(1)
    return [
        event.get("tdur", 0) / 1000
        for event in events
        if event["name"].endswith("RunTask") and place(event) == main
    ]


def place(event: dict[str, Any]) -> tuple[int, int]:
    return event["pid"], event["tid"]


def test_more_than_one_answer_holds_comes_in_full(browser):
    with served(turns(3)) as page, tab(browser, page.url) as one:
        one.look(TOKEN)
        one.page.click("#pause")
        page.front.add(*crowd(20, 1300))
        one.page.click("#pause")
        one.page.locator("#counted", has_text="1,303 requests").wait_for()


def test_what_several_processes_tell_is_put_together(browser):
    halves = crowd(30, 3000)[::2], crowd(30, 3000)[1::2]
    with served(*halves) as page, tab(browser, page.url) as one:
        one.look(TOKEN)
        one.page.locator("#counted", has_text="3,000 requests").wait_for()
        assert one.page.locator("#older").is_hidden()


def test_the_ledger_is_read_and_goes_on(browser, tmp_path):
    directory = tmp_path / "ledger"
    keep(directory, turns(5, 2, session="kept"))
    with served([], ledger={"directory": str(directory)}) as page, tab(browser, page.url) as one:
        one.look(TOKEN)
        assert one.bars("kept").count() == 5
        assert one.page.locator(".request.break").count() == 1
        page.front.add(request(time.time(), session="kept"))
        one.bars("kept").nth(5).wait_for()
        page.front.add(*turns(1, session="fresh"))
        one.bars("fresh").first.wait_for()
        assert one.page.inner_text("#counted") == "2 sessions, 7 requests"


@pytest.mark.slow
def test_ten_thousand_requests_do_not_stutter(browser):
    """The limits are loose, for machines that do other things meanwhile; what an idle one needs
    stands in docs/page.md."""
    long = session_records(random.Random(7), "name:a", "long", 4000, time.time())
    with served([*crowd(120, 6000), *long]) as page, tab(browser, page.url) as one:
        one.page.add_init_script(WATCH)
        one.look(TOKEN)
        one.page.locator("#counted", has_text="10K requests").wait_for()
        browser.start_tracing(page=one.page, categories=["devtools.timeline", "toplevel"])
        frames = one.page.evaluate(SCROLL)
        tasks = tasks_ms(json.loads(browser.stop_tracing())["traceEvents"])
        assert frames["median"] < 34, frames
        assert len(tasks) > 120 and max(tasks) < 100, sorted(tasks)[-10:]
        # However many there are, only what is in view is in the document.
        assert frames["bars"] < 3000 and frames["width"] > 40_000


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["in the ledger", "in memory"])
def test_it_paints_at_once_however_much_there_is(browser, tmp_path, kept: str):
    records, config = crowd(1000, 50_000), {}
    if kept == "in the ledger":
        config["ledger"] = {"directory": str(tmp_path / "ledger")}
        keep(tmp_path / "ledger", records)
        records = []
    with served(records, **config) as page, tab(browser, page.url) as one:
        one.page.add_init_script(WATCH)
        one.look(TOKEN)
        one.page.reload()
        one.page.wait_for_selector(".request")
        paint, drawn = one.page.evaluate(
            """() => [performance.getEntriesByName("first-contentful-paint")[0].startTime,
                      window.firstRequest]"""
        )
        assert paint < 1000 and drawn < 3000, (paint, drawn)
        loaded = one.page.locator("#counted")
        loaded.filter(has_text="10K requests").wait_for(timeout=60_000)
        one.page.click("#older")
        loaded.filter(has_text="20K requests").wait_for(timeout=60_000)
