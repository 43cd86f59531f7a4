"""A server under watch: with a Redis behind it, a Prometheus that scrapes it, an Alertmanager, and
an operator who is called."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml

from demo.prometheus import Prometheus
from monitoring.documents import ROOT, documents
from monitoring.limits import Timing
from tests.engine.bodies import EPHEMERAL, conversation, session
from tests.engine.clock import VARIABLE, Clock
from tests.engine.engine import BLOCK_BYTES
from tests.engine.server import MODEL, SMALL, Api, plugin, serve
from tests.monitoring import faults
from tests.monitoring.alertmanager import Alertmanager, Operator
from tests.redis.servers import Proxy, RedisServer, wait_until

FAST = Timing(
    evaluation="1s",
    window="6s",
    ratio_window="4s",
    day=6,
    unit="s",
    days=3,
    least_days=2,
    hold="1s",
    short_hold="1s",
)
"""The shipped rules with seconds in place of minutes and days."""

RULES = ("configs/prometheus/rules.yaml", "configs/prometheus/alerts.yaml")

CPU_CHUNKS = 24
QUOTA_CHUNKS = 12
"""Of the one organisation that has a quota."""

PATIENCE_S = 60.0


@dataclass(slots=True)
class Station:
    """What is running.

    Attributes:
        api: the server.
        redis: the Redis behind it.
        proxy: stands in front of that Redis.
        prometheus: scrapes the server.
        operator: is called by Alertmanager.
        faults: the directory in which a file brings a fault about.
        began: when the first scrape was, on the monotonic clock, in seconds.
    """

    api: Api
    redis: RedisServer
    proxy: Proxy
    prometheus: Prometheus
    operator: Operator
    faults: Path
    began: float = field(default_factory=time.monotonic)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def send(self, body: dict, name: str, key: str = "key of acme") -> None:
        """Send a request of the session ``name``."""
        answer = self.api.post("/v1/messages", body, key, **session(name))
        assert answer.status_code == 200, answer.text

    def new(self, key: str = "key of acme", words: int = 300) -> str:
        """Begin a conversation like no other; return its name."""
        name = f"conversation {next(self._numbers)}"
        self.send(conversation(name, 1, words, cache_control=EPHEMERAL), name, key)
        return name

    def go_on(self, name: str, turns: int = 2, key: str = "key of acme", **fields) -> None:
        """Go on with a conversation that `new` began; with 1 turn ask the same again."""
        self.send(conversation(name, turns, cache_control=EPHEMERAL) | fields, name, key)

    def chat(self, content: str, **fields: object) -> None:
        """Send a request of OpenAI's, of a conversation of its own."""
        messages = [{"role": "user", "content": content}]
        body = {"model": MODEL, "max_tokens": 1, "messages": messages, **fields}
        answer = self.api.post("/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text

    def until(
        self, status: str, alert: str, meanwhile: Callable[[], object] = lambda: None, **labels: str
    ) -> dict:
        """Do ``meanwhile`` over and over until the operator hears of ``alert`` that it is
        ``firing`` or ``resolved``; return what was heard."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            heard = self.operator.last(alert, **labels)
            if heard is not None and heard["status"] == status:
                return heard
            meanwhile()
            time.sleep(0.1)
        raise TimeoutError(f"{alert} is not {status}; heard: {dict(self.operator.heard)}")

    def reset(self, external: bool = True) -> None:
        """Empty the device; and the CPU tier, unless it is not ``external``."""
        params = {"reset_external": external}
        answer = httpx.post(f"{self.api.url}/reset_prefix_cache", params=params, timeout=60)
        answer.raise_for_status()

    @property
    def seconds(self) -> float:
        """How long everything has been running."""
        return time.monotonic() - self.began


@contextmanager
def watched(model: Path, scratch: Path) -> Iterator[Station]:
    """Start everything; stop it afterwards."""
    brought_about = scratch / "faults"
    brought_about.mkdir()
    made = documents(timing=FAST)
    for path in RULES:
        (scratch / Path(path).name).write_text(made[path])
    with ExitStack() as stack:
        redis = RedisServer(scratch)
        stack.callback(redis.close)
        proxy = Proxy(redis.port)
        stack.callback(proxy.close)
        operator = Operator()
        stack.callback(operator.close)
        shipped = yaml.safe_load((ROOT / "configs/prometheus/alertmanager.yaml").read_text())
        manager = Alertmanager(scratch / "alertmanager", operator.url, shipped)
        stack.callback(manager.close)
        config = {
            "cpu_bytes": CPU_CHUNKS * BLOCK_BYTES,
            "quotas": {
                "cpu": {
                    "quota": 2 * CPU_CHUNKS * BLOCK_BYTES,
                    "orgs": {"named": {"quota": QUOTA_CHUNKS * BLOCK_BYTES}},
                }
            },
            "org_label": True,
            "ledger": {"directory": str(scratch / "ledger")},
            "tiers": [{"type": "redis", "url": proxy.url, "load_deadline": "1s"}],
        }
        option, value = plugin(**config)
        transfer = json.loads(value) | {
            "kv_connector": faults.FaultyConnector.__name__,
            "kv_connector_module_path": faults.__name__,
        }
        environment = {VARIABLE: str(scratch / "clock"), faults.DIRECTORY: str(brought_about)}
        clock = Clock(scratch / "clock")
        url = stack.enter_context(serve(model, [option, json.dumps(transfer), *SMALL], environment))
        prometheus = stack.enter_context(
            Prometheus(
                [url.removeprefix("http://")],
                [scratch / Path(path).name for path in RULES],
                manager.address,
            )
        )
        station = Station(Api(url, clock), redis, proxy, prometheus, operator, brought_about)
        wait_until(lambda: prometheus.query("cachescope_tier_up"), PATIENCE_S)
        yield station
