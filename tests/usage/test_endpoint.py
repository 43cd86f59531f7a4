"""Who may ask for whose usage, and what wrong questions are told."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import make_url, text
from starlette.responses import Response

from tests.usage.ledgers import MONDAY, Books, record
from vllm_cachescope.api.answers import Refused
from vllm_cachescope.api.ledger_service import LedgerService
from vllm_cachescope.api.usage_endpoint import UsageEndpoint
from vllm_cachescope.config import LedgerSettings
from vllm_cachescope.tenancy.caller import CallerDirectory
from vllm_cachescope.usage.database import address
from vllm_cachescope.usage.prices import ModelPrice, Prices
from vllm_cachescope.usage.tables import METADATA
from vllm_cachescope.usage.usage_ledger import UsageLedger

DIRECTORY = CallerDirectory(b"x" * 16, {sha256(b"k").hexdigest(): "acme"}, "x-org")
PERIOD = {"since": "2026-11-01", "until": "2026-12-01"}


class Asking:
    def __init__(self, path: Path) -> None:
        settings = LedgerSettings(directory=path)
        self.ledger = UsageLedger(
            settings, Prices({"toy": ModelPrice(3.0)}), lambda *_: None, DIRECTORY.account
        )
        self._endpoint = UsageEndpoint(self.ledger, DIRECTORY, lambda: MONDAY + 60.0)
        path.mkdir(exist_ok=True)
        self.books = Books(address(settings))

    async def raw(self, caller_org: str | None, **fields: str) -> Response:
        return await self._endpoint.answer(PERIOD | fields, caller_org)

    async def __call__(self, caller_org: str | None, **fields: str) -> dict[str, Any]:
        return json.loads(bytes((await self.raw(caller_org, **fields)).body))


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Asking]:
    asking = Asking(tmp_path / "ledger")
    yield asking
    asking.ledger.close()
    asking.books.close()


async def test_the_operator_sees_all_and_others_their_own(ask: Asking) -> None:
    ask.books.write(record(), record(org="header:b", session="\ud800"), record(org="anonymous"))
    orgs = [row["org"] for row in (await ask(None, by="org"))["rows"]]
    assert orgs == ["anonymous", "header:b", "name:acme"]
    for org in orgs:
        own = await ask(org, by="org,session")
        assert [row["org"] for row in own["rows"]] == [org]
        assert own["total"]["requests"] == 1
    assert (await ask("key:0123"))["total"]["requests"] == 0
    named = await ask(None, by="org", org="acme")
    assert [row["org"] for row in named["rows"]] == ["name:acme"]
    assert (await ask("name:acme", org="acme"))["total"]["requests"] == 1
    phases = await ask("name:acme", phases="true")
    assert phases["models"][0]["phases"][0]["requests"] == 1


async def test_others_are_none_of_an_organisations_business(ask: Asking) -> None:
    # The same answer, whether there is such an organisation or not.
    for name in ("name:b", "b", "nobody", "key:0123456789abcdef"):
        with pytest.raises(Refused) as refused:
            await ask("name:acme", org=name)
        assert refused.value.status == 403


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sinse": "1d"}, "sinse: there is no such field"),
        ({"since": "yesterday"}, "since: 'yesterday' is no time"),
        ({"since": "2026-12-02"}, "ends before it begins"),
        ({"by": "tenant"}, "'tenant' is nothing to split by"),
        ({"format": "xml"}, "format: 'xml' is not among json, csv"),
        ({"phases": "1"}, "phases: '1' is not among"),
        ({"phases": "true", "format": "csv"}, "JSON only"),
        ({"phases": "true", "by": "org"}, "by: phases are by model"),
    ],
)
async def test_wrong_questions(ask: Asking, fields: dict[str, str], says: str) -> None:
    with pytest.raises(Refused, match=says) as refused:
        await ask("name:acme", **fields)
    assert refused.value.status == 400


async def test_csv(ask: Asking) -> None:
    ask.books.write(record())
    answer = await ask.raw(None, by="org,model", format="csv")
    assert answer.media_type == "text/csv; charset=utf-8"
    head, row = bytes(answer.body).decode().splitlines()
    assert head.startswith("org,model,requests,prompt_tokens,uncached,created_5m,")
    assert row.startswith("name:acme,toy,1,125,5,20,")


async def test_too_many_rows(ask: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_cachescope.usage.usage_ledger.usage_of.__defaults__", (1,))
    ask.books.write(record(session="a"), record(session="b"))
    with pytest.raises(Refused, match="more than 1 rows") as refused:
        await ask(None, by="session")
    assert refused.value.status == 400


async def test_a_database_that_hangs_is_not_waited_for(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_cachescope.api.usage_endpoint.ANSWER_S", 0.3)
    books = Books(make_url(postgres_url))
    settings = LedgerSettings(url=postgres_url)
    service = LedgerService(settings, Prices(), DIRECTORY, CollectorRegistry(), "toy")
    with books.engine.connect() as connection:
        connection.execute(text("LOCK TABLE cachescope_tokens IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(Refused, match="in time") as refused:
            await service.answer(PERIOD, None)
    assert refused.value.status == 503
    monkeypatch.undo()
    assert (await service.answer(PERIOD, None)).status_code == 200
    service.close()
    METADATA.drop_all(books.engine)
    books.close()


async def test_a_broken_database_is_told_without_its_address(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = LedgerSettings(url="postgresql+psycopg://u:sesame@127.0.0.1:1/x")
    registry = CollectorRegistry()
    service = LedgerService(settings, Prices(), DIRECTORY, registry, "toy")
    service.put(record(), None)
    with pytest.raises(Refused) as refused:
        await service.answer(PERIOD, None)
    assert refused.value.status == 503
    assert "sesame" not in str(refused.value) + caplog.text
    value = registry.get_sample_value
    service.close()
    labels = {"model_name": "toy", "engine": "none", "outcome": "written"}
    assert value("cachescope_ledger_records_total", labels) == 0
