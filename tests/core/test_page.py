"""What the page's addresses answer to whom, before any browser looks."""

import json
import logging
import re
from hashlib import sha256
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tests.page.crowd import TOKEN, Front, crowd
from vllm_cachescope.api.break_log import Break
from vllm_cachescope.api.page_files import PageFiles
from vllm_cachescope.api.request_details import RequestDetails
from vllm_cachescope.cache.report import Row
from vllm_cachescope.config import load
from vllm_cachescope.diagnosis.changes import Change, ChangeKind
from vllm_cachescope.diagnosis.outcome import Diagnosis, DiagnosisKind
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.usage.record import RequestRecord
from vllm_cachescope.usage.request_memory import RequestMemory

TENANTS = {sha256(key.encode()).hexdigest(): key[0] for key in ("a's key", "b's key")}


def record(number: int, org: str = "name:a", session: str | None = "s") -> RequestRecord:
    rows = (Row("read_cpu", Scope.ORG, 300, 100 + number), Row("created", Scope.ORG, 3600, 50))
    return RequestRecord(1e9 + number, org, session, "m", "", 0, f"id-{number}", rows, lineage=1)


async def page_not_found(_: Any) -> PlainTextResponse:
    return PlainTextResponse("the server's own", 404)


class Asked:
    """A front with requests of two organisations, and what it answers."""

    def __init__(self, *api_keys: str, **config: Any) -> None:
        app = Starlette(routes=[Route("/{path:path}", page_not_found)])
        self.front = Front(app, api_keys, {"tenants": TENANTS} | config)
        transport = httpx.ASGITransport(self.front)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://server")

    async def get(self, path: str, key: str | None = None, **query: Any) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return await self.client.get(f"/cachescope{path}", headers=headers, params=query)

    async def listed(self, key: str | None, **query: Any) -> list[str]:
        answer = await self.get("/requests", key, **query)
        return [one["request_id"] for one in answer.json()["requests"]]


@pytest.fixture
def asked() -> Asked:
    asked = Asked()
    asked.front.add(record(1), record(2, "name:b"), record(3, session=None), record(4, "anonymous"))
    return asked


async def test_each_sees_its_own_and_the_operator_all(asked):
    assert await asked.listed("a's key") == ["id-3", "id-1"]
    assert await asked.listed("b's key") == ["id-2"]
    assert await asked.listed(None) == ["id-4"]
    assert await asked.listed("a key of nobody") == []
    assert await asked.listed(TOKEN) == ["id-4", "id-3", "id-2", "id-1"]


async def test_whom_the_server_does_not_know_sees_nothing():
    asked = Asked("a's key")
    asked.front.add(record(1))
    for path in ("/requests", "/request", "/diff"):
        for key in (None, "another"):
            answer = await asked.get(path, key)
            assert answer.status_code == 401 and "id-1" not in answer.text
    assert await asked.listed("a's key") == ["id-1"] == await asked.listed(TOKEN)
    # The page itself holds nothing, and is where a key is entered.
    assert (await asked.get("")).status_code == 200


async def test_a_request_is_shown_as_its_record_has_it(asked):
    (shown,) = (await asked.get("/requests", "b's key")).json()["requests"]
    assert shown == {
        "number": 2,
        "at": 1e9 + 2,
        "org": "name:b",
        "session": "s",
        "model": "m",
        "engine": 0,
        "request_id": "id-2",
        "lineage": 1,
        "created": {"5m": 0, "1h": 50, "other": 0},
        "read": {"cpu": 102},
        "equivalents": 102 * 0.1 + 50 * 2.0,
    }


async def test_a_cursor_goes_on_where_the_last_answer_ended(asked):
    first = (await asked.get("/requests", TOKEN, limit=2)).json()
    assert [one["number"] for one in first["requests"]] == [4, 3]
    name = first["list"]
    assert await asked.listed(TOKEN, before=f"{name}.{first['oldest']}") == ["id-2", "id-1"]
    assert await asked.listed(TOKEN, after=f"{name}.{first['newest']}") == []
    asked.front.add(record(5))
    # Cursors of other processes' lists say nothing here.
    others = f"0123456789ab.77,{name}.{first['newest']}"
    assert await asked.listed(TOKEN, after=others) == ["id-5"]
    assert len(await asked.listed(TOKEN, after="0123456789ab.77")) == 5
    between = {"after": f"{name}.1", "before": f"{name}.4"}
    assert await asked.listed(TOKEN, **between) == ["id-3", "id-2"]


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "0"},
        {"limit": "501"},
        {"limit": "-1"},
        {"limit": "²"},
        {"limit": "1e3"},
        {"after": "{list}.x"},
        {"before": "{list}.-1"},
        {"before": "{list}." + "9" * 400},
    ],
)
async def test_a_wrong_query_is_refused(asked, query):
    name = (await asked.get("/requests", TOKEN)).json()["list"]
    given = {key: value.replace("{list}", name) for key, value in query.items()}
    answer = await asked.get("/requests", TOKEN, **given)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_purge_forgets_requests_and_details(asked):
    details = RequestDetails()
    details.add("id-1", Break.of(1e9 + 1, Caller("name:a", "s"), "m", diagnosis(), None))
    details.purge("name:a", "another")
    assert details.find("name:a", "id-1", 1e9 + 1) is not None
    details.purge("name:a", "s")
    assert details.find("name:a", "id-1", 1e9 + 1) is None

    headers = {"authorization": "Bearer a's key"}
    body = {"session": "s"}
    await asked.client.post("/cachescope/purge", headers=headers, json=body)
    assert await asked.listed(TOKEN) == ["id-4", "id-3", "id-2"]


def diagnosis(names: tuple[str, ...] = ("weigh",)) -> Diagnosis:
    change = Change(ChangeKind.TOOL_CHANGED, "tools[0]", 10, names)
    kind = DiagnosisKind.TOOLS_CHANGED
    return Diagnosis(kind, False, None, (change,), 10, 90, 100, (("tools_changed", 90),))


async def test_details_are_those_of_the_one_request(asked):
    details = asked.front.services.page.details
    details.add("id-1", Break.of(1e9 + 1.2, Caller("name:a", "s"), "m", diagnosis(), "a.diff"))

    async def told(key: str, at_s: float, request_id: str = "id-1") -> Any:
        answer = await asked.get("/request", key, id=request_id, at=round(at_s * 1000))
        assert answer.status_code == 200
        return answer.json()["details"]

    assert (await told("a's key", 1e9 + 1))["uncached"] == {"tools_changed": 90}
    # The diff's name is the operator's, and so is another organisation's request.
    assert "diff" not in await told("a's key", 1e9 + 1)
    assert (await told(TOKEN, 1e9 + 1))["diff"] == "a.diff"
    assert await told("b's key", 1e9 + 1) is None
    # A client may name its requests alike.
    assert await told("a's key", 1e9 + 60) is None
    assert await told("a's key", 1e9 + 1, "id-2") is None


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "20260101T000000000000-0123abcd.diff/../x",
        "20260101T000000000000-0123abcd.diff\n",
        "20260101T000000000000-link1234.diff",
        "20260101T000000000000-0000000a.diff",
        "",
    ],
)
async def test_only_diffs_are_read(tmp_path, name):
    directory = tmp_path / "diffs"
    asked = Asked(diffs={"directory": str(directory)})
    (tmp_path / "secret").write_text("a secret")
    (directory / "20260101T000000000000-0000000a.diff").symlink_to(tmp_path / "secret")
    written = directory / "20260101T000000000000-0123abcd.diff"
    written.write_text("# {}\n-old\n+new\n")
    answer = await asked.get("/diff", TOKEN, name=name)
    assert answer.status_code == 404 and "a secret" not in answer.text
    assert (await asked.get("/diff", TOKEN, name=written.name)).json() == {
        "diff": "# {}\n-old\n+new\n"
    }
    assert (await asked.get("/diff", "a's key", name=written.name)).status_code == 403


async def test_where_it_is_off_the_server_answers_for_itself():
    asked = Asked(page=False)
    for path in ("", "/", "/requests", "/page/main.js"):
        answer = await asked.get(path, TOKEN)
        assert (answer.status_code, answer.text) == (404, "the server's own")
    assert load({}).page is False


async def test_nothing_else_may_run_or_be_loaded():
    asked = Asked()
    for path in ("", "/page/main.js", "/requests", "/page/none.js", "/"):
        headers = (await asked.get(path)).headers
        policy = dict(
            part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers
    assert (await asked.get("/requests")).headers["cache-control"] == "no-store"


async def test_the_files_need_no_other_and_no_inline_script():
    asked = Asked()
    html = (await asked.get("")).text
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:|https?://(?!www\.w3\.org)", html)
    assert re.findall(r"<script[^>]*>([^<]*)</script>", html) == [""]
    names = set(re.findall(r'"cachescope/page/([^"]+)"', html))
    for name in list(names):
        answer = await asked.get(f"/page/{name}")
        assert answer.status_code == 200, name
        names |= set(re.findall(r'from "\./([^"]+)"', answer.text))
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text
        )
    assert names == set(PageFiles().names) - {"page.html"}


async def test_files_are_sent_again_only_if_they_have_changed():
    asked = Asked()
    first = await asked.get("/page/main.js")
    again = await asked.client.get(
        "/cachescope/page/main.js", headers={"if-none-match": first.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")


async def test_it_may_be_mounted_anywhere():
    asked = Asked()
    for path in ("/cachescope", "/behind/a/gateway/cachescope"):
        assert (await asked.client.get(path)).status_code == 200
        answer = await asked.client.get(f"{path}/")
        assert answer.status_code == 308
        assert str(answer.url.join(answer.headers["location"])) == f"http://server{path}"
    assert (await asked.client.get("/notcachescope")).status_code == 404
    assert (await asked.client.post("/cachescope/requests")).status_code == 405
    assert (await asked.client.head("/cachescope")).status_code == 200


async def test_strange_names_are_valid_json(asked):
    asked.front.add(record(9, session="half \ud83d of a pair, \0 and \u202e"))
    answer = await asked.get("/requests", "a's key", limit=1)
    assert (
        json.loads(answer.text)["requests"][0]["session"] == "half \ud83d of a pair, \0 and \u202e"
    )


def test_the_memory_is_bounded_and_shared_out():
    def account(org: str) -> str:
        return "unlisted" if org.startswith("key:") else org

    memory = RequestMemory(account, limit=100 * 1000)
    memory.add(record(0, "name:small"))
    for number in range(1000):
        memory.add(record(number, f"key:{number}"))
    assert len(memory.newest(None, 10_000)) < 150
    assert [one.number for one in memory.newest("name:small", 10)] == [1]
    numbers = [one.number for one in memory.newest(None, 50)]
    assert numbers == sorted(numbers, reverse=True) and numbers[0] == 1001

    details = RequestDetails(account, limit=100_000)
    few, many = ("a",), tuple("x" * 100 for _ in range(10))
    details.add("first", Break.of(1.0, Caller("name:small", "s"), "m", diagnosis(few), None))
    for number in range(1000):
        caller = Caller(f"key:{number}", "s")
        details.add(str(number), Break.of(1.0, caller, "m", diagnosis(many), None))
    assert details.find("name:small", "first", 1.0) is not None
    assert details.find("key:999", "999", 1.0) is not None
    assert details.find("key:0", "0", 1.0) is None


def test_the_newest_of_many_are_found_at_once():
    """A poll walks over what is new, and not over all that is kept."""
    memory = RequestMemory()
    for one in crowd(10, 5000):
        memory.add(one)
    walked = 0
    newest = memory.newest(None, 10)[0].number

    class Counted(int):
        def __lt__(self, other: object) -> bool:
            nonlocal walked
            walked += 1
            return int(self) < int(other)  # type: ignore[call-overload]

    assert len(memory.newest(None, 500, after=Counted(newest - 5))) == 5
    assert walked <= 5 + 3


def test_the_polls_of_an_open_page_do_not_fill_the_access_log():
    Asked()
    Asked()
    log = logging.getLogger("uvicorn.access")

    def is_logged(path: str, status: int = 200, method: str = "GET") -> bool:
        args = "127.0.0.1:1", method, path, "1.1", status
        record = logging.LogRecord(log.name, logging.INFO, "", 0, "%s", args, None)
        return bool(log.filter(record))

    assert not is_logged("/cachescope/requests?after=a.1")
    assert not is_logged("/behind/cachescope/requests")
    assert is_logged("/cachescope/requests", status=401)
    assert is_logged("/cachescope") and is_logged("/v1/messages", method="POST")
