"""A session that moves to another replica keeps its diagnosis: what the replicas of one Redis tell
each other of their sessions, and what they do not."""

import asyncio
import random
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.redis.servers import Proxy, RedisServer, wait_until
from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.api.request_context import PromptTiming
from vllm_cachescope.api.session_exchange import READ_S, TTL_S, SessionExchange
from vllm_cachescope.cache.report import EngineId, Report, Row
from vllm_cachescope.connectors import redis
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.diagnosis.session_note import FORMAT
from vllm_cachescope.metrics import SESSION_NOTES
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.repair.session_firsts import SessionFirsts
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.tiers.keyspace import secret_digest
from vllm_cachescope.tiers.note_seals import NoteSeals
from vllm_cachescope.tiers.note_store import BOUNDS, NoteBounds, NoteStore
from vllm_cachescope.wire import READERS

SECRET = b"a secret of the tests of sessions"
BLOCK = 16
ACME = Caller("name:acme", "s")


@dataclass
class Conversation:
    """A client's conversation, in one of the wire formats."""

    protocol: Protocol = Protocol.MESSAGES
    system: str = "You are kind. " * 40
    tool: str = "Weighs things."
    name: str = "one"
    turns: int = 0
    tokens: list[int] = field(default_factory=list)

    def turn(self) -> "Conversation":
        """Let it grow by an answer and a question, 400 tokens long together."""
        self.turns += 1
        chance = random.Random(f"{self.name} {self.turns}")
        self.tokens = self.tokens + chance.choices(range(1000), k=400)
        return self

    @property
    def body(self) -> dict[str, Any]:
        said: list[dict[str, Any]] = []
        for turn in range(self.turns):
            if turn:
                said.append({"role": "assistant", "content": f"answer {turn} " * 10})
            said.append({"role": "user", "content": f"{self.name} question {turn} " * 400})
        schema = {"type": "object"}
        function = {"name": "weigh", "description": self.tool, "parameters": schema}
        system = {"role": "system", "content": self.system}
        tool = {"name": "weigh", "description": self.tool, "input_schema": schema}
        of_protocol: dict[Protocol, dict[str, Any]] = {
            Protocol.MESSAGES: {"system": self.system, "messages": said, "tools": [tool]},
            Protocol.CHAT: {
                "messages": [system, *said],
                "tools": [{"type": "function", "function": function}],
            },
            Protocol.RESPONSES: {
                "instructions": self.system,
                "input": said,
                "tools": [{"type": "function", **function}],
            },
            Protocol.COMPLETIONS: {
                "prompt": self.system + self.tool + "".join(one["content"] for one in said)
            },
        }
        return {"model": "m", **of_protocol[self.protocol]}


class Replica:
    """A server's side of conversations: what its engines report is made up, the rest is real."""

    def __init__(
        self,
        url: str,
        name: str,
        secret: bytes = SECRET,
        model: str = "m",
        block_tokens: int = BLOCK,
        account_of: Callable[[str], str] = lambda org: org,
        bounds: NoteBounds = BOUNDS,
        stores: Callable[[], NoteStore] | None = None,
        firsts: Callable[[Caller], SessionFirsts | None] = lambda _: None,
    ) -> None:
        self.registry = CollectorRegistry()
        digest = secret_digest(secret)
        if stores is None:
            stores = redis.note_stores(url, 0.5, digest, time.monotonic, bounds=bounds)
        self.exchange = SessionExchange(
            stores, secret, model, name, account_of, registry=self.registry
        )
        self.block_tokens = block_tokens
        self.diagnoser = Diagnoser(
            secret,
            block_tokens,
            registry=self.registry,
            account_of=account_of,
            exchange=self.exchange,
            firsts=firsts,
        )
        self.engine = EngineId(0, name, "h", ("redis",))
        self._ids = count()

    async def ask(self, said: Conversation, caller: Caller = ACME, read: int = 0) -> Diagnosis:
        """Serve a conversation as it is; the engine has read ``read`` tokens of it."""
        body, began = said.body, time.monotonic()
        request = READERS[said.protocol](body, (300, 3600))
        fingerprint = self.diagnoser.fingerprint(caller, request, body, {})
        if self.diagnoser.lacks(caller, fingerprint):
            await self.diagnoser.recall(caller, fingerprint)
        pending = self.diagnoser.open(caller, request, body, {}, fingerprint=fingerprint)
        length = len(said.tokens)
        rows = (
            Row("read_device", Scope.ORG, 300, read),
            Row("created", Scope.ORG, 300, length - read),
        )
        timing = PromptTiming(list(said.tokens), length, length, began, time.monotonic())
        name = f"{self.engine.epoch} {next(self._ids)}"
        self.diagnoser.close(pending, [Report(rows, engine=self.engine)], name, [timing])
        return pending.diagnosis

    def counted(self, outcome: str) -> int:
        """Return how many notes, or questions for them, had an outcome."""
        labels = {"model_name": "m", "engine": "none", "outcome": outcome}
        return int(self.registry.get_sample_value(SESSION_NOTES.shown, labels) or 0)

    def wrote(self, notes: int) -> None:
        """Wait until so many notes are written."""
        wait_until(lambda: self.counted("written") >= notes)


@pytest.fixture
def start() -> Iterator[Callable[..., Replica]]:
    replicas: list[Replica] = []

    def starting(server: RedisServer | str, name: str, **options: Any) -> Replica:
        url = server if isinstance(server, str) else server.url
        replicas.append(Replica(url, name, **options))
        return replicas[-1]

    yield starting
    for one in replicas:
        one.exchange.close()


def keys(server: RedisServer, kind: str = "notes:") -> list[bytes]:
    return [name for name in server.client.keys("cachescope:sessions:*") if kind.encode() in name]


@pytest.mark.parametrize("protocol", Protocol)
async def test_a_session_that_moves_goes_on(server, start, protocol):
    a, b = start(server, "a.example:8000"), start(server, "b.example:8000")
    said = Conversation(protocol).turn()
    assert (await a.ask(said)).kind == "first_request"
    a.wrote(1)
    seen = await b.ask(said.turn())
    assert (seen.kind, seen.cause) == ("continuation", "other_replica")
    (miss,) = (miss for miss in seen.engine if miss.cause == "other_replica")
    assert miss.tokens == 400 and miss.replica == "a.example:8000"
    assert miss.detail == "it was on replica a.example:8000, and redis had no copy of it"
    assert seen.suggestion.startswith("Route a session to one replica")
    # Whoever is not the operator is not told its name.
    shown = str(seen.anonymous().to_dict())
    assert "replica a.example" not in shown and "it was on another replica" in shown
    # What was read is no loss.
    b.wrote(1)
    assert (await a.ask(said.turn(), read=800)).cause == "continuation"
    a.wrote(2)
    assert (await b.ask(said.turn(), read=1200)).expected
    assert a.counted("damaged") == b.counted("damaged") == 0


@pytest.mark.parametrize("change", ["tool", "system"])
async def test_a_break_is_named_on_the_other_replica(server, start, change):
    a, b = start(server, "a"), start(server, "b")
    said = Conversation().turn()
    await a.ask(said)
    a.wrote(1)
    seen = await b.ask(replace(said, **{change: "another one. " * 40}).turn())
    assert seen.kind == {"tool": "tools_changed", "system": "system_changed"}[change]
    assert seen.where is not None and not seen.expected and seen.ancestor_id == "a 0"


async def test_what_a_client_names_is_found_on_the_other_replica(server, start):
    a, b = start(server, "a"), start(server, "b")
    said = Conversation().turn()
    await a.ask(said)
    a.wrote(1)
    body = replace(said, tool="Weighs anything.").body | {
        "diagnostics": {"previous_message_id": "a 0"}
    }
    request = READERS[Protocol.MESSAGES](body, (300, 3600))
    fingerprint = b.diagnoser.fingerprint(ACME, request, body, {})
    await b.diagnoser.recall(ACME, fingerprint)
    answer = b.diagnoser.open(ACME, request, body, {}, fingerprint=fingerprint).answer()
    assert answer["cache_miss_reason"]["type"] == "tools_changed"


async def test_traffic_without_sessions_is_known_by_its_conversations(server, start):
    a, b = start(server, "a"), start(server, "b")
    nobody = replace(ACME, session=None)
    first, second = Conversation(name="first").turn(), Conversation(name="second").turn()
    for said in (first, second):
        await a.ask(said, nobody)
    a.wrote(2)
    assert len(keys(server)) == 2
    assert (await b.ask(second.turn(), nobody, read=400)).kind == "continuation"
    assert (await b.ask(first.turn(), nobody, read=400)).kind == "continuation"


async def test_only_what_is_not_known_is_asked_for(server, start):
    a = start(server, "a")
    said = Conversation().turn()
    for _ in range(4):
        await a.ask(said)
        said.turn()
    assert (a.counted("none"), a.counted("found")) == (1, 0)


async def test_another_organisation_learns_nothing(server, start):
    a, b = start(server, "a"), start(server, "b")
    said = Conversation().turn()
    await a.ask(said)
    a.wrote(1)
    other = Caller("name:other", "s")
    assert (await b.ask(said.turn(), other)).kind == "first_request"
    # Not even where somebody has put the notes of the one into the place of the other.
    b.wrote(1)
    of_acme, of_other = sorted(keys(server), key=lambda name: server.client.hlen(name))[:2]
    client = server.client
    held = {name: client.hgetall(name) for name in (of_acme, of_other)}
    for source, target in ((of_acme, of_other), (of_other, of_acme)):
        client.delete(target)
        client.hset(target, mapping=held[source])
    c = start(server, "c")
    for caller in (ACME, other):
        assert (await c.ask(said, caller)).kind == "first_request"
    assert c.counted("damaged") == 2 and c.counted("none") == 2


@pytest.mark.parametrize("where", [0, 5, 40, -1])
async def test_what_was_altered_is_passed_over_and_counted(server, start, where):
    a, b = start(server, "a"), start(server, "b")
    said = Conversation().turn()
    await a.ask(said)
    a.wrote(1)
    (name,) = keys(server)
    ((note, sealed),) = server.client.hgetall(name).items()
    altered = bytearray(sealed)
    altered[where] ^= 1
    server.client.hset(name, note, bytes(altered))
    server.client.hset(name, b"made up", b"by somebody")
    # What has the right seal, and was written by a version that this one does not know.
    seals = NoteSeals(SECRET, f"{FORMAT} m")
    place = seals.name(ACME.org, ACME.org, b"named s").session + b"later"
    server.client.hset(name, b"later", seals.seal(ACME.org, place, zlib.compress(b"\x81")))
    assert (await b.ask(said.turn())).kind == "first_request"
    assert b.counted("damaged") == 3


@pytest.mark.parametrize("fault", ["dead", "hangs", "cut", "denied", "another type"])
async def test_a_store_in_trouble_costs_the_diagnosis_alone(server, start, fault):
    proxy = Proxy(server.port)
    a, b = start(server, "a"), start(proxy.url, "b")
    said = Conversation().turn()
    await a.ask(said)
    a.wrote(1)
    if fault == "dead":
        server.kill()
    elif fault == "hangs":
        server.stop()
    elif fault == "cut":
        proxy.cut_after = 3
    elif fault == "denied":
        server.client.execute_command("ACL SETUSER default resetkeys")
    else:
        (name,) = keys(server)
        server.client.delete(name)
        server.client.set(name, "no hash")
    began = time.monotonic()
    assert (await b.ask(said.turn())).kind == "first_request"
    assert time.monotonic() - began < READ_S + 0.5
    # Before long nothing is asked of it, and what is waiting to be written is bounded.
    for i in range(3):
        await b.ask(Conversation(name=f"{i}").turn(), Caller("name:acme", f"{i}"))
    if fault != "another type":
        began = time.monotonic()
        await b.ask(Conversation(name="last").turn(), Caller("name:acme", "last"))
        assert time.monotonic() - began < READ_S
    proxy.close()


async def test_a_session_that_cannot_be_written_is_in_nobodys_way(server, start):
    a = start(server, "a")
    said = Conversation().turn()
    await a.ask(said)
    a.wrote(1)
    (name,) = keys(server)
    server.client.delete(name)
    server.client.set(name, "no hash")
    await a.ask(said.turn())
    for i in range(5):
        await a.ask(Conversation(name=f"{i}").turn(), Caller("name:acme", f"{i}"))
    a.wrote(6)
    assert await start(server, "b").ask(Conversation(name="4").turn(), Caller("name:acme", "4"))


async def test_a_note_lives_as_long_as_sessions_and_no_longer(server, start):
    a = start(server, "a")
    await a.ask(Conversation().turn())
    a.wrote(1)
    for name in server.client.keys("cachescope:sessions:*"):
        assert (TTL_S - 60) * 1000 < server.client.pttl(name) <= TTL_S * 1000


async def test_of_a_session_the_latest_notes_are_kept(server, start):
    a, b = start(server, "a"), start(server, "b")
    talks = [Conversation(name=f"{i}").turn() for i in range(BOUNDS.notes + 4)]
    for i, said in enumerate(talks):
        await a.ask(said)
        a.wrote(i + 1)
    (name,) = keys(server)
    assert server.client.hlen(name) == BOUNDS.notes
    assert (await b.ask(talks[-1].turn(), read=400)).kind == "continuation"
    assert (await b.ask(talks[0].turn())).kind != "continuation"


async def test_of_a_long_conversation_few_notes_are_kept(server, start):
    a = start(server, "a")
    said = Conversation()
    for i in range(8):
        await a.ask(said.turn(), read=400 * i)
        a.wrote(i + 1)
    (name,) = keys(server)
    assert server.client.hlen(name) <= 3


async def test_an_account_keeps_its_bounds_and_nobody_elses(server, start):
    def account_of(org: str) -> str:
        return "unlisted" if org.startswith("key:") else org

    a = start(server, "a", account_of=account_of, bounds=NoteBounds(sessions=3))
    await a.ask(Conversation().turn())
    # Whoever makes organisations up has one account for all of them.
    for i in range(6):
        await a.ask(Conversation(name=f"{i}").turn(), Caller(f"key:{i}", "s"))
        a.wrote(i + 2)
    assert len(keys(server)) == 1 + 3
    b = start(server, "b", account_of=account_of)
    assert (await b.ask(Conversation().turn(), ACME)).kind == "retry"
    assert (await b.ask(Conversation(name="0").turn(), Caller("key:0", "s"))).kind != "retry"
    assert (await b.ask(Conversation(name="5").turn(), Caller("key:5", "s"))).kind == "retry"


async def test_bytes_are_bounded_too(server, start):
    a = start(server, "a", bounds=NoteBounds(nbytes=5000))
    for i in range(12):
        await a.ask(Conversation(name=f"{i}").turn(), Caller("name:acme", f"{i}"))
        a.wrote(i + 1)
    (sizes,) = keys(server, "sizes")
    held = {name: int(size) for name, size in server.client.hgetall(sizes).items()}
    assert held.pop(b"total") == sum(held.values()) <= 5000
    assert 0 < len(keys(server)) == len(held) < 12


@pytest.mark.parametrize("what", ["session", "organisation", "everything"])
async def test_a_purge_deletes_the_notes(server, start, what):
    a, b = start(server, "a"), start(server, "b")
    callers = [ACME, Caller("name:acme", "t"), Caller("name:other", "s")]
    for caller in callers:
        await a.ask(Conversation().turn(), caller)
    a.wrote(3)
    org = None if what == "everything" else "name:acme"
    b.diagnoser.purge(org, "s" if what == "session" else None)
    assert await b.diagnoser.purged() is None
    left = {"session": 2, "organisation": 1, "everything": 0}[what]
    assert len(keys(server)) == left
    known = [(await b.ask(Conversation().turn(), one)).kind == "retry" for one in callers]
    assert known == [False, what == "session", what != "everything"]
    if left:
        for sizes in keys(server, "sizes"):
            held = {name: int(size) for name, size in server.client.hgetall(sizes).items()}
            assert held.pop(b"total") == sum(held.values())


async def test_a_purge_that_cannot_be_carried_out_says_so_and_is_later(server, start):
    a = start(server, "a")
    await a.ask(Conversation().turn())
    a.wrote(1)
    server.stop()
    a.diagnoser.purge("name:acme", None)
    assert await a.diagnoser.purged()
    # Nothing of it is told meanwhile.
    assert (await a.ask(Conversation().turn())).kind == "first_request"
    server.resume()
    while await a.diagnoser.purged():
        await asyncio.sleep(0.05)
    b = start(server, "b")
    a.wrote(2)
    (name,) = keys(server)
    assert server.client.hlen(name) == 1
    assert (await b.ask(Conversation().turn())).ancestor_id == "a 1"


@pytest.mark.parametrize("other", [{"secret": b"another secret, which is long"}, {"model": "n"}])
async def test_who_has_another_secret_or_model_shares_nothing(server, start, other):
    a, b = start(server, "a"), start(server, "b", **other)
    said = Conversation().turn()
    await a.ask(said)
    a.wrote(1)
    assert (await b.ask(said.turn())).kind == "first_request"
    assert b.counted("damaged") == 0


async def test_another_block_length_makes_no_wrong_answer(server, start):
    a, b = start(server, "a"), start(server, "b", block_tokens=24)
    said = Conversation().turn()
    await a.ask(said)
    a.wrote(1)
    seen = await b.ask(said.turn(), read=384)
    assert seen.kind == "continuation" and seen.unknown_tokens == 0


async def test_a_server_that_was_started_anew_knows_its_own(server, start):
    a = start(server, "a")
    said = Conversation().turn()
    await a.ask(said)
    a.wrote(1)
    again = start(server, "a")
    again.engine = replace(again.engine, epoch="later")
    seen = await again.ask(said.turn())
    assert seen.cause == "engine_restarted"


RIGHTS = """~cachescope:* +set +get +exists +pexpire +pttl +unlink +eval +setrange +info +time +zadd
+zrange +zrem +zremrangebyscore +pexpireat +scan +hset +hgetall +hdel +zscore +zrevrange +zcard
+zremrangebyrank +hget +hkeys +hstrlen +hincrby"""
"""Those that docs/tiers.md lists."""


async def test_the_rights_that_are_listed_suffice(server, start):
    server.client.execute_command(f"ACL SETUSER narrow on >pass {RIGHTS}")
    url = f"redis://narrow:pass@127.0.0.1:{server.port}"
    a, b = start(url, "a"), start(url, "b")
    said = Conversation().turn()
    await a.ask(said)
    a.wrote(1)
    assert (await b.ask(said.turn(), read=400)).kind == "continuation"
    for org in ("name:acme", None):
        a.diagnoser.purge(org)
        assert await a.diagnoser.purged() is None
    assert not keys(server)


async def test_a_cluster_serves_as_well(nodes, start):
    url = f"redis+cluster://127.0.0.1:{nodes[0].port}"
    a, b = start(url, "a"), start(url, "b")
    said = Conversation().turn()
    await a.ask(said)
    a.wrote(1)
    assert (await b.ask(said.turn(), read=400)).kind == "continuation"
    a.diagnoser.purge(None)
    assert await a.diagnoser.purged() is None
    assert not any(node.client.keys("cachescope:sessions:*notes*") for node in nodes)


async def test_random_moves_are_diagnosed_as_if_there_were_one_server(server, start):
    """Sessions of two organisations go from replica to replica, with breaks in between."""
    replicas = [start(server, name) for name in "abc"]
    (alone,) = [start("redis://127.0.0.1:1", "alone")]
    chance = random.Random(5)
    talks = {
        Caller(org, session): Conversation(name=session)
        for org in ("name:x", "name:y")
        for session in "st"
    }
    for i in range(40):
        caller = chance.choice(list(talks))
        said = talks[caller].turn()
        if chance.random() < 0.2:
            said.tool = f"tool {i}"
        replica = chance.choice(replicas)
        written = replica.counted("written")
        seen, expected = await replica.ask(said, caller), await alone.ask(said, caller)
        replica.wrote(written + 1)
        assert (seen.kind, seen.lineage) == (expected.kind, expected.lineage), i
        assert [change.path for change in seen.changes] == [c.path for c in expected.changes]
    assert sum(replica.counted("found") for replica in replicas) > 10
