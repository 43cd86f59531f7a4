"""The page in a real browser, with made-up requests behind the real API side."""

import re
import time
from dataclasses import replace
from hashlib import sha256

import pytest

from tests.page.browser import Tab, tab
from tests.page.crowd import TOKEN, request, served, turns
from vllm_cachescope.cache.report import Row
from vllm_cachescope.tenancy.scope import Scope

PHONE = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
MARKUP = '<img src="x" onerror="document.title=1"><script>document.title=2</script>\u202e"\'&amp;'


def overflow(one: Tab) -> int:
    """Return by how many pixels the page is wider than the window."""
    return one.page.evaluate(
        "document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"
    )


def spoken(one: Tab) -> str:
    return one.page.evaluate("document.activeElement.getAttribute('aria-label') ?? ''")


def test_names_with_markup_stay_text(browser):
    hostile = {"session": MARKUP, "org": f"name:{MARKUP}", "model": MARKUP, "request_id": MARKUP}
    records = turns(3, 1, path=f"tools[{MARKUP}]", cause=MARKUP, region=MARKUP, **hostile)
    long_name = turns(2, session="x" * 256, org="name:" + "y" * 5000)
    with served([*records, *long_name]) as page, tab(browser, page.url) as one:
        one.look(TOKEN)
        one.page.locator("article").filter(has_text="<img").locator(".request").nth(1).click()
        one.page.locator("#details .cause").wait_for()
        assert MARKUP in one.page.inner_text("#details")
        assert one.page.locator("article h3").all_inner_texts().count(MARKUP) == 1
        assert one.page.title() == "CacheScope"
        images = one.page.locator("img").evaluate_all("all => all.map(one => one.src)")
        assert set(images) == {f"{page.url}/cachescope/page/icon.svg"}
        assert overflow(one) == 0


def test_the_policy_forbids_markup_and_handlers(browser):
    with served(turns()) as page:
        one = Tab(browser, page.url).look(TOKEN)
        result = one.page.evaluate(
            """async () => {
                const found = {};
                try { document.body.innerHTML = "<b>x</b>"; found.markup = "taken"; }
                catch (error) { found.markup = error.name; }
                const button = document.createElement("button");
                try { button.setAttribute("onclick", "alert(1)"); found.handler = "taken"; }
                catch (error) { found.handler = error.name; }
                try { await fetch("http://127.0.0.1:9/"); found.elsewhere = "asked"; }
                catch (error) { found.elsewhere = error.name; }
                return found;
            }"""
        )
        assert result == {"markup": "TypeError", "handler": "TypeError", "elsewhere": "TypeError"}
        assert any("Content Security Policy" in line for line in one.wrong)
        one.context.close()


def test_the_key_goes_into_a_header_and_nowhere_else(browser):
    sent: list[str | None] = []
    with served(turns()) as page, tab(browser, page.url) as one:
        one.page.on("request", lambda asked: sent.append(asked.headers.get("authorization")))
        one.look(TOKEN)
        assert f"Bearer {TOKEN}" in sent
        assert not any("operator" in url for url in [*one.asked, one.page.url])
        assert one.page.evaluate("localStorage.length + document.cookie.length") == 0
        # A tab that is loaded anew knows it; one that has signed out does not.
        one.page.reload()
        one.page.wait_for_selector("#tiles .value")
        one.page.click("#leave")
        assert one.page.locator("#board").is_hidden() and one.page.locator("#sign-in").is_visible()
        assert one.page.locator(".request").count() == 0
        assert one.page.evaluate("sessionStorage.length") == 0
        one.page.reload()
        assert one.page.locator("#sign-in").is_visible()


@pytest.mark.parametrize("key", ["a wrong key", None, "ключ"])
def test_a_wrong_key_is_told_and_shows_nothing(browser, key: str | None):
    with served(turns(), api_keys=("the one key",)) as page, tab(browser, page.url) as one:
        one.open().enter(key)
        error = one.page.locator("#key-error")
        error.wait_for()
        told = {None: "wants a key", "ключ": "No key has such characters"}
        assert told.get(key, "does not know that key") in error.inner_text()
        assert one.page.locator("#board").is_hidden() and one.page.locator(".request").count() == 0
        one.enter("the one key")
        one.page.wait_for_selector("#state .large")  # It knows the key, and has nothing of it.


def test_an_organisation_sees_its_own(browser):
    tenants = {sha256(b"acme's key").hexdigest(): "acme", sha256(b"b's key").hexdigest(): "b"}
    records = [*turns(session="ours"), *turns(org="name:b", session="theirs")]
    with served(records, tenants=tenants) as page, tab(browser, page.url) as one:
        one.look("acme's key")
        assert one.page.locator("article h3").all_inner_texts() == ["ours"]
        assert "theirs" not in one.page.content()


def test_all_of_it_works_with_the_keyboard(browser):
    with served(turns(12, 4, 8)) as page, tab(browser, page.url) as one:
        one.open()
        one.page.keyboard.type(TOKEN)
        one.page.keyboard.press("Enter")
        one.page.wait_for_selector(".request")
        one.page.keyboard.press("/")
        assert one.page.evaluate("document.activeElement.id") == "search"
        one.page.keyboard.press("Tab")
        one.page.keyboard.press("Tab")
        assert spoken(one).startswith("Request 12 of 12")  # The newest one.
        one.page.keyboard.press("ArrowLeft")
        assert spoken(one).startswith("Request 11 of 12")
        one.page.keyboard.press("Home")
        assert spoken(one).startswith("Request 1 of 12")
        one.page.keyboard.press("b")
        assert spoken(one).startswith("Request 5 of 12") and "The tools changed" in spoken(one)
        one.page.keyboard.press("Enter")
        one.page.locator("#details").wait_for()
        assert one.page.inner_text("#details h2") == "Request 5 of 12"
        one.page.keyboard.press("b")
        one.page.locator("#details h2", has_text="Request 9 of 12").wait_for()
        assert spoken(one).startswith("Request 9 of 12")
        one.page.locator("#spoken", has_text="The tools changed").wait_for(state="attached")
        # Enter once more leads into the details, from where Escape leads back.
        one.page.keyboard.press("Enter")
        assert one.page.evaluate("document.activeElement.id") == "details"
        one.page.keyboard.press("ArrowLeft")
        one.page.locator("#details h2", has_text="Request 8 of 12").wait_for()
        one.page.keyboard.press("ArrowRight")
        one.page.locator("#details h2", has_text="Request 9 of 12").wait_for()
        one.page.keyboard.press("Escape")
        assert one.page.locator("#details").is_hidden()
        assert spoken(one).startswith("Request 9 of 12")
        # What has the focus can be seen to have it.
        ring = "getComputedStyle(document.activeElement.querySelector('.ground')).strokeWidth"
        assert one.page.evaluate(ring) == "2px"


def test_lineages_have_lanes_of_their_own(browser):
    records = [*turns(6), *[replace(one, lineage=2) for one in turns(3, session="one")]]
    with served(records) as page, tab(browser, page.url) as one:
        one.look(TOKEN)
        bottoms = one.bars("one").evaluate_all(
            """all => all.map(one => one.querySelector(".ground"))
                .map(one => Number(one.getAttribute("y")) + Number(one.getAttribute("height")))"""
        )
        assert len(bottoms) == 9 and sorted(map(bottoms.count, set(bottoms))) == [3, 6]
        one.page.locator(".request").first.focus()
        before = one.page.evaluate("document.activeElement.dataset.index")
        one.page.keyboard.press("ArrowDown")
        assert one.page.evaluate("document.activeElement.dataset.index") != before


def test_on_a_phone_all_is_within_reach(browser):
    with served(turns(60, 50)) as page, tab(browser, page.url, **PHONE) as one:
        one.look(TOKEN)
        assert overflow(one) == 0
        bar = one.page.locator(".request.break")
        bar.scroll_into_view_if_needed()
        ground = bar.locator(".ground").bounding_box()
        assert ground["width"] >= 20  # A finger is wide.
        one.page.touchscreen.tap(ground["x"] + 10, ground["y"] + ground["height"] - 6)
        details = one.page.locator("#details")
        details.locator(".cause").wait_for()
        sheet = details.bounding_box()
        assert sheet["width"] == 390 and sheet["y"] > 200  # The timeline is still to be seen.
        assert bar.locator(".ground").bounding_box()["y"] < sheet["y"]
        details.get_by_label("Close").click()
        assert details.is_hidden() and overflow(one) == 0


def test_zoomed_in_four_times_nothing_is_cut_off(browser):
    size = {"width": 320, "height": 225}
    with (
        served(turns(60, 58)) as page,
        tab(browser, page.url, viewport=size, device_scale_factor=4) as one,
    ):
        one.look(TOKEN)
        assert overflow(one) == 0
        one.page.locator("article").scroll_into_view_if_needed()
        one.page.locator(".request.break").focus()
        one.page.keyboard.press("Enter")
        one.page.locator("#details .cause").wait_for()
        assert one.page.locator("#details").get_by_label("Close").is_visible()
        assert overflow(one) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_either_colours(browser, scheme: str):
    with served(turns(12, 4)) as page, tab(browser, page.url, color_scheme=scheme) as one:
        one.look(TOKEN)
        one.page.locator(".request.break").click()
        one.page.locator("#details .cause").wait_for()
        light = one.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", light))) > 382) == (scheme == "light")
        poor = one.page.evaluate(CONTRAST)
        assert poor == []


CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const parse = (colour, below) => {
        canvas.fillStyle = below; canvas.fillRect(0, 0, 1, 1);
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (rgb) => rgb.map((one) => one / 255)
        .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
        .reduce((sum, one, i) => sum + one * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (element) => {
        const layers = [];
        for (let one = element; one; one = one.parentElement) {
            layers.unshift(getComputedStyle(one).backgroundColor);
        }
        return layers.reduce((below, layer) => `rgb(${parse(layer, below)})`, "white");
    };
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!own || !element.checkVisibility()) continue;
        if (element.closest(":disabled, .unseen, .skip")) continue;
        const style = getComputedStyle(element);
        const behind = ground(element);
        const colour = element instanceof SVGElement ? style.fill : style.color;
        const [a, b] = [light(parse(colour, behind)), light(parse(behind, behind))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) found.push(`${element.textContent}: ${ratio.toFixed(2)}`);
    }
    return found;
}"""


def test_everything_has_a_name(browser):
    with served(turns(12, 4)) as page, tab(browser, page.url) as one:
        one.look(TOKEN)
        one.page.locator(".request.break").click()
        one.page.locator("#details .cause").wait_for()
        session = one.context.new_cdp_session(one.page)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        roles = {"button", "option", "listbox", "searchbox", "textbox", "checkbox", "radio"}
        seen = [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in roles | {"figure", "image", "table"}
        ]
        assert {role for role, _ in seen} >= {"button", "option", "listbox", "searchbox", "radio"}
        assert [role for role, name in seen if role in roles and not name] == []
        assert one.page.locator("html").get_attribute("lang") == "en"


def test_new_requests_come_by_themselves(browser):
    with served(turns(3, session="old")) as page, tab(browser, page.url) as one:
        one.look(TOKEN)
        page.front.add(request(time.time(), session="old"))
        one.bars("old").nth(3).wait_for()
        page.front.add(*turns(2, session="new", org="name:b"))
        one.bars("new").first.wait_for()
        assert one.page.inner_text("#counted") == "2 sessions, 6 requests"
        one.page.click("#pause")
        page.front.add(request(time.time(), session="old"))
        one.page.wait_for_timeout(2600)
        assert one.bars("old").count() == 4
        one.page.click("#pause")
        one.bars("old").nth(4).wait_for()


def test_costs_are_in_money_where_prices_are_known(browser, tmp_path):
    (tmp_path / "prices.yaml").write_text("models: {small: {input: 3}}")
    rows = (
        Row("read_device", Scope.ORG, 300, 1_840_000),
        Row("created", Scope.ORG, 300, 160_000),
    )
    records = [request(time.time(), rows=rows)]
    with (
        served(records, prices=str(tmp_path / "prices.yaml")) as page,
        tab(browser, page.url) as one,
    ):
        one.look(TOKEN)
        cost = one.page.inner_text(".tile.cost")
        assert "−80.8 %" in cost and "2M tokens cost what 384K uncached ones would" in cost
        assert "$1.15 instead of $6.00" in cost


def test_a_server_that_goes_away_is_told_of(browser):
    with served(turns()) as page, tab(browser, page.url) as one:
        one.look(TOKEN)
        page.stop()
        banner = one.page.locator("#banner")
        banner.wait_for()
        assert "cannot be reached" in banner.inner_text()
        assert one.page.inner_text("#live") == "Not connected"
        assert one.page.locator(".request").count() == 12
        page.start()
        one.page.click("text=Try again now")
        banner.wait_for(state="hidden")
        assert one.page.inner_text("#live") == "Live"


def test_before_there_are_requests_it_says_so(browser):
    with served([]) as page, tab(browser, page.url) as one:
        one.open().enter(TOKEN)
        one.page.wait_for_selector("#state .large")
        assert f"ANTHROPIC_BASE_URL={page.url}" in one.page.inner_text("#state")
        page.front.add(*turns())
        one.page.wait_for_selector(".request")


def test_what_is_searched_for_is_shown(browser):
    records = [*turns(session="alpha"), *turns(12, 3, session="beta")]
    with served(records) as page, tab(browser, page.url) as one:
        one.look(TOKEN)
        names = one.page.locator("article h3")
        one.page.fill("#search", "ALPH")
        assert names.all_inner_texts() == ["alpha"]
        one.page.fill("#search", "")
        one.page.click("text=Show their sessions")
        assert names.all_inner_texts() == ["beta"]
        one.page.fill("#search", "gamma")
        one.page.click("text=Show all sessions")
        assert sorted(names.all_inner_texts()) == ["alpha", "beta"]
