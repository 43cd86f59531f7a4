"""A session that moves takes along how often its fields have changed, and what came first in it."""

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from tests.redis.test_session_notes import ACME, Conversation, Replica, keys, start
from vllm_cachescope.api import mending, session_exchange
from vllm_cachescope.api.incoming_body import incoming_of
from vllm_cachescope.api.mending import Mender
from vllm_cachescope.config import Config
from vllm_cachescope.diagnosis.changes import Change, ChangeKind
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.flapping import TOLD_FIELDS, FieldChanges, FlappingFields
from vllm_cachescope.diagnosis.forest import LineageNode
from vllm_cachescope.diagnosis.session_note import SessionNote, pack, unpack
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.repair.repairer import Repairer
from vllm_cachescope.repair.session_firsts import MAX_NAMES, MAX_VALUES, told_firsts
from vllm_cachescope.repair.spelling import packed
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.wire import READERS

__all__ = ["start"]

TOOLS = ["weigh", "measure", "count", "sort"]
SCHEMA = {"type": "object", "properties": {}}


async def test_what_keeps_changing_is_counted_across_replicas(server, start):
    """Each change is made on the other replica than the one before it."""
    replicas = [start(server, name) for name in "abc"]
    said, last = Conversation().turn(), None
    for number in range(6):
        at = replicas[number % len(replicas)]
        said = replace(said, tool=("Weighs things.", "Weighs any thing.")[number % 2])
        last = await at.ask(said.turn())
        at.wrote(number // len(replicas) + 1)
    assert last is not None and last.flapping is not None
    assert (last.flapping.flips, last.flapping.returns) == (5, True)
    assert last.flapping.tokens_lost >= 5 * 100


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_one_server_whatever_moved(seed):
    """Whoever gets a request has the newest notes; what is told is the sum of all before."""
    chance = random.Random(seed)
    alone, there = FlappingFields(), [FlappingFields() for _ in range(3)]
    told: dict[int, tuple[FieldChanges, ...]] = {}
    for _ in range(60):
        lineage, name = chance.randint(1, 2), chance.choice("ab")
        change = _change(name, chance.randrange(3))
        here = chance.choice(there)
        here.merge(lineage, told.get(lineage, ()))
        tokens = chance.randrange(1000)
        assert here.note(lineage, change, tokens) == alone.note(lineage, change, tokens)
        told[lineage] = here.of(lineage)


def test_what_is_told_of_fields_is_bounded():
    fields = FlappingFields()
    for number in range(100):
        fields.note(1, _change(f"field {number}", 1), 1)
    fields.note(1, _change("x" * 5000, 1), 1)
    assert len(fields.of(1)) == TOLD_FIELDS
    assert max(len(one.field) for one in fields.of(1)) < 300
    for _ in range(50):
        fields.note(1, _change("field 99", 1), 1)
    assert fields.of(1)[0].field == "field 99" and len(fields.of(1)[0].values) <= 8
    assert fields.of(2) == ()


@pytest.fixture
def patient(monkeypatch):
    """Notes are waited for, however busy the machine is."""
    monkeypatch.setattr(mending, "RECALL_S", 5.0)


class Mending:
    """A replica that repairs what it serves."""

    def __init__(self, server, start: Callable[..., Replica], name: str) -> None:
        settings: dict[str, Any] = {
            "tools_order": True,
            "latched_field": True,
            "json_form": True,
            "latched_params": ["chat_template_kwargs.think", "chat_template_kwargs.style"],
        }
        self._config = Config.model_validate({"repair": settings})
        repairer = Repairer(self._config.repair, {}, lambda: 0.0)
        self.memory = repairer.memory
        self.replica = start(server, name, firsts=repairer.memory.told)
        exchange = self.replica.exchange
        self._mender = Mender(repairer, self._config, CollectorRegistry(), "m", exchange)

    async def serve(
        self,
        said: Conversation,
        tools: list[str],
        caller: Caller = ACME,
        schema: dict[str, Any] = SCHEMA,
        **params: Any,
    ) -> dict[str, Any]:
        """Return the body that is served."""
        body = said.body | {"chat_template_kwargs": params}
        body["tools"] = [
            {"type": "function", "function": {"name": name, "parameters": schema}} for name in tools
        ]
        incoming = incoming_of(body, Protocol.CHAT, self._config, False)
        mended = await self._mender.mend(caller, incoming, {}, False)
        self._mender.learn(mended)
        await self.replica.ask(said, caller)
        fields: dict[str, Any] = mended.body.fields
        return fields


def _names(body: dict[str, Any]) -> list[str]:
    return [tool["function"]["name"] for tool in body["tools"]]


async def test_tools_and_parameters_keep_their_first_places_and_values(server, start, patient):
    a, b = Mending(server, start, "a"), Mending(server, start, "b")
    said = Conversation(Protocol.CHAT).turn()
    await a.serve(said, TOOLS, think=True, style="terse")
    a.replica.wrote(1)
    served = await b.serve(said.turn(), TOOLS[::-1], think=False, style="kind")
    assert _names(served) == TOOLS
    # What is text was not told, and is what it was first here.
    assert served["chat_template_kwargs"] == {"think": True, "style": "kind"}
    # Nor is anything told to others.
    other = Caller("name:other", "s")
    assert _names(await b.serve(said, TOOLS[::-1], other)) == TOOLS[::-1]
    assert _names(await b.serve(said, TOOLS[::-1], replace(ACME, session="t"))) == TOOLS[::-1]
    assert a.replica.counted("damaged") == b.replica.counted("damaged") == 0


async def test_spellings_are_those_of_the_replica_before(server, start, patient):
    a, b = Mending(server, start, "a"), Mending(server, start, "b")
    said = Conversation(Protocol.CHAT).turn()
    first = await a.serve(said, TOOLS)
    a.replica.wrote(1)
    schema = {"properties": {}, "type": "object"}  # The other way round.
    served = await b.serve(said.turn(), TOOLS, schema=schema)
    assert json.dumps(served["tools"]) == json.dumps(first["tools"])


async def test_that_a_repair_was_refused_is_known_elsewhere(server, start, patient):
    a, b = Mending(server, start, "a"), Mending(server, start, "b")
    said = Conversation(Protocol.CHAT).turn()
    lessons = a.memory.lessons(ACME)
    lessons.refuse()
    a.memory.learn(lessons)
    await a.serve(said, TOOLS)
    a.replica.wrote(1)
    await b.serve(said.turn(), TOOLS)
    assert _names(await b.serve(said, TOOLS[::-1])) == TOOLS[::-1]


async def test_a_store_that_hangs_keeps_no_request_waiting(server, start, monkeypatch):
    a = Mending(server, start, "a")
    said = Conversation(Protocol.CHAT).turn()
    recalled: list[float] = []

    async def late(key, within_s=None):
        if within_s is not None:
            recalled.append(within_s)
        return ()

    monkeypatch.setattr(a.replica.exchange, "recall", late)
    assert _names(await a.serve(said, TOOLS[::-1])) == TOOLS[::-1]
    assert recalled == [0.01]
    # A session that is known here is not asked for.
    await a.serve(said, TOOLS)
    assert recalled == [0.01]


def test_what_is_told_of_firsts_is_bounded_and_no_text():
    names = [f"{number} " + "x" * 200 for number in range(1000)]
    values = {f"chat_template_kwargs.{n}": packed(n) for n in range(1000)}
    told = told_firsts(names, values)
    assert sum(map(len, told.tools)) <= MAX_NAMES and list(told.tools) == names[: len(told.tools)]
    assert len(told_firsts([], values).values) == MAX_VALUES
    kinds: list[Any] = [True, None, 3, 0.5, "text", ["text"], {"a": 1}]
    found = told_firsts([], {str(n): packed(kind) for n, kind in enumerate(kinds)} | {"no": b""})
    assert list(found.values) == ["0", "1", "2", "3", "no"]


async def test_no_text_of_a_prompt_is_in_what_is_stored(server, start, monkeypatch):
    """The notes before they are sealed: what is said of a session holds nothing that it said."""
    written: list[bytes] = []

    def noted(*arguments: Any) -> bytes:
        written.append(data := pack(*arguments))
        return data

    monkeypatch.setattr(session_exchange, "pack", noted)
    a = Mending(server, start, "a")
    said = Conversation(Protocol.CHAT).turn()
    for number in range(3):
        said = replace(said, tool=f"Weighs {number} things.", system=f"You are kind {number}. " * 9)
        await a.serve(said, TOOLS, style="a secret style")
        a.replica.wrote(number + 1)
    for data in written:
        plain = zlib.decompress(data)
        assert b"weigh" in plain
        for text in (b"kind", b"question", b"secret", b"things"):
            assert text not in plain
    assert keys(server)


def test_versions_read_each_others_notes():
    """Who does not know of counts and firsts passes over them, and does without them."""
    body = Conversation().turn().body
    request = READERS[Protocol.MESSAGES](body, (300, 3600))
    fingerprint = Fingerprinter(b"x" * 16)(request, {}, "acme")
    node = LineageNode(fingerprint, 1, 0.0, name=b"n")
    changes = FieldChanges("tools.weigh", (b"1", b"2"), 1, 100, False)
    values = {"chat_template_kwargs.think": packed(True)}
    firsts = told_firsts(TOOLS, values, {b"k" * 16: b"\x90"}, {"head 0 0": b"n" * 17})
    note = SessionNote(node, flapping=(changes,), firsts=firsts)
    data = pack(note, "a", 0.0)
    found = unpack(data, "b", 0.0)
    assert found is not None and (found.flapping, found.firsts) == ((changes,), firsts)
    fields = msgspec.msgpack.decode(zlib.decompress(data))
    for cut, told in ((-4, ((), None)), (-2, ((changes,), told_firsts(TOOLS, values)))):
        earlier = zlib.compress(msgspec.msgpack.encode(fields[:cut]))
        found = unpack(earlier, "b", 0.0)
        assert found is not None and (found.flapping, found.firsts) == told
    later = zlib.compress(msgspec.msgpack.encode([*fields, {"more": 1}]))
    assert unpack(later, "b", 0.0) is not None


def _change(name: str, value: int) -> Change:
    kind = ChangeKind.SYSTEM_CHANGED
    return Change(kind, name, 0, value=b"%d" % value, old_value=b"old")
