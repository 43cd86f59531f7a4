"""The page, in a real browser, of a real engine that real clients have used."""

import re
from dataclasses import dataclass
from hashlib import sha256

import httpx
import pytest

from tests.engine.bodies import EPHEMERAL, block, session
from tests.engine.server import MODEL, OPERATOR_TOKEN, SMALL, Api, breaks, serve_scoped
from tests.page.browser import chromium, tab

pytestmark = pytest.mark.engine

KEY, OTHER = "key of the looked at", "key of the others"
AGENT = "agent <1>"
LABEL = re.compile(
    r"Request (\d+) of (\d+), [\d:]+, ([\d,]+) tokens, (none read|.*), ([\d,]+) created, "
    r"([\d,]+) uncached(?:, (.*))?"
)


@dataclass(frozen=True)
class Counts:
    read: int
    created: int
    uncached: int


def counted(text: str) -> int:
    return int(text.replace(",", ""))


def body(turns: int, tool: str) -> dict:
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": [block(f"page question {turn}", 150)]},
            {"role": "assistant", "content": f"Answer {turn}."},
        ]
    messages[-2]["content"][0]["cache_control"] = EPHEMERAL
    return {
        "model": MODEL,
        "max_tokens": 2,
        "tools": [{"name": "weigh", "description": tool, "input_schema": {"type": "object"}}],
        "system": [block("page system", 400)],
        "messages": messages[:-1],
    }


@pytest.fixture(scope="module")
def api(tiny_model, tmp_path_factory):
    """A server with the page and diffs."""
    diffs = {"directory": str(tmp_path_factory.mktemp("diffs") / "of the page")}
    tenants = {sha256(key.encode()).hexdigest(): name for key, name in NAMES.items()}
    scratch = tmp_path_factory.mktemp("server")
    config = {"page": True, "diffs": diffs, "tenants": tenants}
    with serve_scoped(tiny_model, scratch, *SMALL, **config) as api:
        yield api


NAMES = {KEY: "looked at", OTHER: "others"}


@pytest.fixture(scope="module")
def usages(api: Api) -> list[Counts]:
    """An agent's session whose fourth request changes a tool, through Anthropic's client, and a
    request of another organisation through OpenAI's; the usages of the former."""
    client, found = api.anthropic(KEY), []
    for turns, tool in [(1, "Weighs."), (2, "Weighs."), (3, "Weighs."), (4, "Weighs now.")]:
        message = client.messages.create(**body(turns, tool), extra_headers=session(AGENT))
        usage = message.usage
        found.append(
            Counts(
                usage.cache_read_input_tokens,
                usage.cache_creation_input_tokens,
                usage.input_tokens,
            )
        )
    api.openai(OTHER).chat.completions.create(
        model=MODEL,
        max_tokens=2,
        messages=[{"role": "user", "content": block("of the others", 200)["text"]}],
        prompt_cache_key="theirs",
    )
    return found


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def test_the_timeline_is_right_to_the_token(api, usages, browser):
    with tab(browser, api.url) as one:
        one.look(KEY)
        bars = one.bars(AGENT)
        labels = [bars.nth(i).get_attribute("aria-label") for i in range(bars.count())]
        shown = [LABEL.fullmatch(label).groups() for label in labels]
        assert [
            Counts(
                sum(map(counted, re.findall(r"([\d,]+) read from", read))),
                counted(created),
                counted(uncached),
            )
            for _, _, _, read, created, uncached, _ in shown
        ] == usages
        assert usages[1].read > 0 < usages[2].read
        # What is drawn says the same: a pixel is as many tokens in each bar.
        drawn = bars.evaluate_all(
            """groups => groups.map((group) => Object.fromEntries(
                [...group.querySelectorAll("rect:not(.ground):not(.lost)")].map((rect) =>
                    [rect.getAttribute("class"), Number(rect.getAttribute("height"))])))"""
        )
        tallest = max(counts.read + counts.created + counts.uncached for counts in usages)
        scale = 58 / tallest
        for heights, counts in zip(drawn, usages, strict=True):
            read = sum(height for name, height in heights.items() if re.fullmatch(r"t\d", name))
            assert read == pytest.approx(counts.read * scale, abs=0.01)
            assert heights.get("created", 0) == pytest.approx(counts.created * scale, abs=0.01)
        # And so does the overview.
        total = sum(counts.read + counts.created + counts.uncached for counts in usages)
        read = sum(counts.read for counts in usages)
        assert one.page.inner_text(".tile.rate .value") == f"{100 * read / total:.1f} %"


def test_a_break_stands_out_and_is_explained(api, usages, browser):
    (seen,) = breaks(api, KEY)
    with tab(browser, api.url) as one:
        one.look(KEY)
        bars = one.bars(AGENT)
        kinds = [bars.nth(i).get_attribute("class") for i in range(bars.count())]
        assert kinds == ["request", "request", "request", "request break"]
        broken = bars.nth(3)
        assert broken.locator(".mark").count() == broken.locator("rect.lost").count() == 1
        fill = broken.locator(".mark").evaluate("mark => getComputedStyle(mark).fill")
        assert fill == "rgb(201, 40, 31)"
        assert one.page.inner_text(".tile.breaks .value") == "1"

        broken.click()
        details = one.page.locator("#details")
        details.get_by_text("What to do").wait_for()
        text = details.inner_text()
        assert "The tools changed" in text and seen["where"]["path"] in text
        assert f"{seen['missed_tokens']:,} tokens could have been read" in text
        assert seen["suggestion"] in text
        counts = usages[3]
        assert f"Created, 5m\t{counts.created:,}" in text and f"Uncached\t{counts.uncached}" in text
        for cause_tokens in seen["uncached"].values():
            assert f"{cause_tokens:,}" in text
        # A tenant is not told of the diff, and cannot have it.
        assert details.get_by_text("Show the diff").count() == 0
        assert "Weighs now." not in one.page.content()

        one.page.keyboard.press("Escape")
        assert details.is_hidden()
        focused = one.page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert focused == broken.get_attribute("aria-label")


def test_the_diff_is_for_the_operator(api, usages, browser):
    with tab(browser, api.url) as one:
        one.look(OPERATOR_TOKEN)
        one.bars(AGENT).nth(3).click()
        one.page.click("text=Show the diff")
        diff = one.page.locator("pre.diff")
        diff.wait_for()
        assert [line.strip() for line in diff.locator(".minus").all_inner_texts()] == [
            '-  "description": "Weighs.",'
        ]
        assert "Weighs now." in diff.locator(".plus").inner_text()
    listed = httpx.get(
        f"{api.url}/cachescope/breaks", headers={"x-api-key": OPERATOR_TOKEN}, timeout=60
    ).json()["breaks"]
    (name,) = (b["diff"] for b in listed if b["org"] == "name:looked at")
    for key, status in ((KEY, 403), (OTHER, 403), (OPERATOR_TOKEN, 200)):
        answer = httpx.get(
            f"{api.url}/cachescope/diff", params={"name": name}, headers={"x-api-key": key}
        )
        assert answer.status_code == status
        assert ("Weighs now." in answer.text) == (status == 200)


def test_a_tenant_sees_its_own_sessions_only(api, usages, browser):
    def sessions(key: str | None) -> set[str]:
        with tab(browser, api.url) as one:
            one.open().enter(key)
            one.page.wait_for_selector("#list article, #state .large")
            return set(one.page.locator("#list article h3").all_inner_texts())

    assert sessions(KEY) == {AGENT}
    assert sessions(OTHER) == {"theirs"}
    assert sessions("another key altogether") == set() == sessions(None)
    assert sessions(OPERATOR_TOKEN) == {AGENT, "theirs"}


def test_a_new_request_appears_by_itself_and_a_purge_forgets(api, usages, browser):
    key, name = "key of the live", "live one"
    client = api.anthropic(key)
    client.messages.create(**body(1, "Weighs."), extra_headers=session(name))
    with tab(browser, api.url) as one:
        one.look(key)
        assert one.bars(name).count() == 1
        client.messages.create(**body(2, "Weighs."), extra_headers=session(name))
        one.bars(name).nth(1).wait_for()
        api.post("/cachescope/purge", {"session": name}, key=key).raise_for_status()
        one.page.reload()
        one.page.wait_for_selector("#state .large")
        assert one.page.inner_text("#state .large") == "No requests yet"
