"""A crowd of made-up sessions behind the real API side, for what no engine can be asked in a test:
the page with tens of thousands of requests."""

import itertools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from demo.server import free_port
from vllm_cachescope.api.engines import Engines, Purged
from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.api.services import Server
from vllm_cachescope.cache.report import Row
from vllm_cachescope.config import LedgerSettings, load
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.tenancy.shares import own_account
from vllm_cachescope.usage.batch import Batch
from vllm_cachescope.usage.database import address, connect, make_private
from vllm_cachescope.usage.name_limits import NameLimits
from vllm_cachescope.usage.record import RequestRecord
from vllm_cachescope.usage.store import Store
from vllm_cachescope.usage.usage_ledger import retention_of

TOKEN = "the operator of the crowd"
BLOCK = 16
BREAKS = [
    ("tools_changed", "tools", "tools[7].description"),
    ("system_changed", "system", "system[1].text"),
    ("messages_changed", "messages", "messages[12].content[0]"),
    ("params_changed", "params", "tool_choice"),
]


def request(at: float, **fields: Any) -> RequestRecord:
    rows = (Row("read_device", Scope.ORG, 300, 1024), Row("created", Scope.ORG, 300, 512))
    own = {"org": "name:acme", "session": "one", "model": "small", "replica": "", "engine": 0}
    own |= {"request_id": f"chatcmpl-{at}", "rows": rows, "lineage": 1, "cause": "continuation"}
    return RequestRecord(at=at, **own | fields)


def broken(at: float, **fields: Any) -> RequestRecord:
    own = {"cause": "tools_changed", "region": "tools", "path": "tools[0]", "expected": False}
    rows = (Row("read_device", Scope.ORG, 300, 64), Row("created", Scope.ORG, 300, 1472))
    return request(at, **own | {"rows": rows, "missed_tokens": 960} | fields)


def turns(count: int = 12, *breaks: int, **fields: Any) -> list[RequestRecord]:
    """Return a session's requests, those of the numbers in ``breaks`` with a break."""
    now = time.time()
    makers = [broken if number in breaks else request for number in range(count)]
    return [make(now - 60 + number, **fields) for number, make in enumerate(makers)]


def session_records(
    chance: random.Random, org: str, session: str | None, turns: int, end: float
) -> list[RequestRecord]:
    """Return the records of an agent's session, the last of them over at ``end``."""
    records: list[RequestRecord] = []
    prompts = {1: chance.randrange(6_000, 16_000)}
    cached = {1: 0}
    at = 0.0
    for _ in range(turns):
        at += chance.expovariate(1 / 9) + 1.5
        if chance.random() < 0.05:
            at += chance.uniform(60, 900)
        lineage = 1
        if chance.random() < 0.25:
            lineage = chance.choice(list(prompts))
        elif chance.random() < 0.06:
            lineage = len(prompts) + 1
            prompts[lineage], cached[lineage] = chance.randrange(2_000, 5_000), 0
        prompts[lineage] += chance.randrange(120, 1_400)
        prompt, was = prompts[lineage], cached[lineage]
        whole = prompt // BLOCK * BLOCK
        read, found = was, {}
        first = was == 0
        if not first and chance.random() < 0.06:
            cause, region, path = chance.choice(BREAKS)
            read = int(was * chance.uniform(0.02, 0.3)) // BLOCK * BLOCK
            found = {"cause": cause, "region": region, "path": path, "expected": False}
        elif not first and chance.random() < 0.02:
            read, found = 0, {"cause": "expired", "expected": False}
        elif not first and chance.random() < 0.03:
            prompts[lineage] = prompt = max(1_500, prompt // 4)
            whole, read = prompt // BLOCK * BLOCK, 1_024
            found = {"cause": "context_compacted", "region": "messages", "path": "messages[0]"}
        cached[lineage] = whole
        tier = chance.choices(["read_device", "read_cpu", "read_redis"], [8, 2, 1])[0]
        near = read if tier == "read_device" else read // 3 // BLOCK * BLOCK
        rows = [
            Row("read_device", Scope.ORG, 300, near),
            Row(tier, Scope.SESSION, 300, read - near),
            Row("created", Scope.SESSION, chance.choice([300, 300, 300, 3600]), whole - read),
            Row("uncached", Scope.SESSION, 0, prompt - whole),
        ]
        records.append(
            RequestRecord(
                at=at,
                org=org,
                session=session,
                model="small",
                replica="one",
                engine=0,
                request_id=f"chatcmpl-{chance.randrange(2**64):016x}",
                rows=tuple(row for row in rows if row.tokens),
                output_tokens=chance.randrange(20, 900),
                prefill_seconds_saved=read / 9_000,
                ttft_s=0.03 + (prompt - read) / 9_000,
                lineage=lineage,
                missed_tokens=max(0, was - read) if found else 0,
                **{"cause": "first_request" if first else "continuation", "expected": True} | found,
            )
        )
    shift = end - records[-1].at
    return [moved(record, record.at + shift) for record in records]


def moved(record: RequestRecord, at: float) -> RequestRecord:
    fields = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return RequestRecord(**fields | {"at": at})


def crowd(sessions: int, requests: int, orgs: int = 3, seed: int = 1) -> list[RequestRecord]:
    """Return the records of many sessions in the order in which the requests were over."""
    chance = random.Random(seed)
    now = time.time()
    each = requests // sessions
    records = [
        record
        for number in range(sessions)
        for record in session_records(
            chance,
            f"name:org-{number % orgs}",
            f"session-{number:04d}" if number % 29 else None,
            each,
            now - chance.uniform(0, 6 * 3600) * (number / sessions),
        )
    ]
    return sorted(records, key=lambda record: record.at)


def keep(directory: Path, records: list[RequestRecord]) -> None:
    """Write records into the ledger that a server with ``directory`` will find there."""
    settings = LedgerSettings(directory=directory)
    url = address(settings)
    make_private(url)
    engine = connect(url)
    store = Store(engine, retention_of(settings))
    store.create()
    for start in range(0, len(records), 2000):
        store.write(Batch.of(records[start : start + 2000], NameLimits(own_account)))
    engine.dispose()


class NoEngines(Engines):
    async def health(self) -> list[list[dict[str, Any]]]:
        return []

    async def end_session(self, owners) -> int:
        return 0

    async def purge(
        self, prefix: bytes, org: str | None = None, session: str | None = None
    ) -> Purged:
        return Purged()


class Front(CacheScopeMiddleware):
    """The API side, in front of a server that has nothing else.

    Args:
        app: the server.
        api_keys: the keys that it insists on.
        config: further keys of the configuration.
    """

    def __init__(self, app: Any, api_keys: tuple[str, ...], config: dict[str, Any]) -> None:
        super().__init__(app)
        own = {"secret": "the secret of the crowd", "operator_token": TOKEN, "page": True}
        self._config = load(own | config)
        self._api_keys = api_keys
        self.services = self.connected({"app": Starlette()}).services

    def connect(self, state: Any) -> Server:
        return Server(
            self._config,
            model_name="small",
            block_tokens=BLOCK,
            api_keys=self._api_keys,
            engines=NoEngines(),
            purge_renderings=lambda org, session: None,
            registry=CollectorRegistry(),
        )

    def add(self, *records: RequestRecord) -> None:
        """Have requests been over."""
        for record in records:
            self.services.recorder.hand_on(record, None)


class Processes:
    """Several API processes behind one address, which answer in turn."""

    def __init__(self, *fronts: Front) -> None:
        self._next = itertools.cycle(fronts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await next(self._next)(scope, receive, send)


class Served:
    """The page with whatever requests a test has, on a port of its own.

    Args:
        records: requests that are over, by API process.
        api_keys: the keys that the server insists on; none if it lets anyone in.
        config: further keys of the configuration.

    Attributes:
        front: the first API process.
        url: the server's address.
    """

    def __init__(
        self, *records: list[RequestRecord], api_keys: tuple[str, ...] = (), **config: Any
    ) -> None:
        fronts = [Front(Starlette(), api_keys, config) for _ in records]
        for front, own in zip(fronts, records, strict=True):
            front.add(*own)
        self.front, *_ = fronts
        self._app = Processes(*fronts)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Serve, until `stop`."""
        config = uvicorn.Config(self._app, port=self.port, log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Serve no more."""
        self._server.should_exit = True
        # Open connections are of no use to anyone by now.
        self._server.force_exit = True
        self._thread.join(10)


@contextmanager
def served(*records: list[RequestRecord], **options: Any) -> Iterator[Served]:
    """Serve the page with ``records``; see `Served`."""
    one = Served(*records, **options)
    one.start()
    try:
        yield one
    finally:
        one.stop()
