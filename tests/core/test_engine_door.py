"""What an engine answers at a port of its own, with the scheduler's thread in a thread here."""

import json
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import msgspec
import pytest

from vllm_cachescope.connectors.vllm.engine import door as door_module
from vllm_cachescope.connectors.vllm.engine.connector import CacheScopeConnector
from vllm_cachescope.connectors.vllm.engine.desk import WAITING, Busy, Desk
from vllm_cachescope.connectors.vllm.engine.door import EngineDoor
from vllm_cachescope.connectors.vllm.engine_command import (
    COMMANDS,
    GOOD_FOR_S,
    MAX_BYTES,
    CommandReader,
    Refused,
    sealed,
)

SECRET = b"a secret of the tests"
TIERS = [
    {"name": "cpu", "up": True, "used_bytes": 1, "address": "/dev/shm/x", "orgs": {"00": 1}},
    {"name": "redis", "up": True, "readable": True, "writable": False, "reason": "it is full"},
]


class Engine:
    """Answers at its desk whenever it is woken, on one thread, unless it is `stuck`."""

    def __init__(self) -> None:
        self.desk = Desk(self._wake)
        self.stuck = False
        self.threads: set[int] = set()
        self._work = threading.Semaphore(0)
        self._over = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _wake(self) -> None:
        if not self.stuck:
            self._work.release()

    def _run(self) -> None:
        while not self._over:
            self._work.acquire()
            self.desk.answer()

    def command(self, name: str, args: Any) -> Any:
        self.threads.add(threading.get_ident())
        return TIERS if name == "health" else [name, list(args)]

    def close(self) -> None:
        self._over = True
        self._work.release()
        self.thread.join()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture
def door(engine) -> EngineDoor:
    return EngineDoor(engine.desk, engine.command, SECRET, rank=1)


def ask(door: EngineDoor, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    environ = {
        "PATH_INFO": path,
        "REQUEST_METHOD": method,
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": BytesIO(body),
    }
    said: list[str] = []
    answer = b"".join(door(environ, lambda status, headers: said.append(status)))  # type: ignore[arg-type]
    return int(said[0].split()[0]), answer


def test_health_shows_anyone_what_the_api_side_shows(door, engine):
    status, answer = ask(door, "GET", "/health")
    assert status == 200
    assert json.loads(answer) == {
        "status": "degraded",
        "tiers": [
            {"engine": 1, "name": "cpu", "up": True, "used_bytes": 1},
            {"engine": 1, "name": "redis", "up": True, "readable": True, "writable": False},
        ],
    }
    assert engine.threads == {engine.thread.ident}


def test_an_engine_that_does_not_answer_is_degraded(door, engine, monkeypatch):
    engine.stuck = True
    monkeypatch.setattr(door_module, "ANSWER_S", 0.01)
    status, answer = ask(door, "GET", "/health")
    assert status == 200
    assert json.loads(answer) == {"status": "degraded", "reason": "the engine does not answer"}
    assert ask(door, "POST", "/command", sealed("sweep", [], SECRET))[0] == 503
    # What nobody waits for any more is not done.
    engine.desk.answer()
    assert engine.threads == set()


def test_a_command_is_carried_out_on_the_schedulers_thread(door, engine):
    args = [b"\x00prefix", "id", None]
    status, answer = ask(door, "POST", "/command", sealed("purge", args, SECRET))
    assert (status, msgspec.msgpack.decode(answer)) == (200, ["purge", args])
    assert engine.threads == {engine.thread.ident}


def test_nobody_without_the_secret_commands(door, engine):
    good = sealed("purge", [b""], SECRET)
    bad = [
        b"",
        b"x",
        good[:-1],
        good[1:],
        bytes(32) + good[32:],
        sealed("purge", [b""], b"another secret of the tests"),
        sealed("load_adapter", [], SECRET),
        sealed("sweep", [], SECRET, lambda: time.time() - GOOD_FOR_S - 1),
        sealed("sweep", [], SECRET, lambda: time.time() + GOOD_FOR_S + 1),
        b"x" * (MAX_BYTES + 1),
    ]
    assert [ask(door, "POST", "/command", body)[0] for body in bad] == [403] * len(bad)
    assert ask(door, "GET", "/command")[0] == 405
    assert engine.threads == set()


def test_a_command_counts_once():
    now = [1000.0]
    reader = CommandReader(SECRET, lambda: now[0])
    data = sealed("sweep", [], SECRET, lambda: now[0])
    assert reader.open(data).name == "sweep"
    for later in (0.0, GOOD_FOR_S, GOOD_FOR_S + 1, 1e6):
        now[0] = 1000.0 + later
        with pytest.raises(Refused):
            reader.open(data)


def test_a_command_that_fails_is_said(door, engine, monkeypatch):
    monkeypatch.setattr(door, "_command", lambda name, args: 1 / 0)
    assert ask(door, "POST", "/command", sealed("sweep", [], SECRET))[0] == 500


def test_a_desk_has_an_end():
    desk = Desk(lambda: None)
    for _ in range(WAITING):
        with pytest.raises(Busy):
            desk.ask(lambda: 1, 0)
    with pytest.raises(Busy):
        desk.ask(lambda: 1, 60)
    desk.answer()
    with pytest.raises(Busy):
        desk.ask(lambda: 1, 0)


def test_whatever_the_connector_does_may_be_asked_for_this_way() -> None:
    """What an API process can have done a gateway can as well."""
    done = [name for name in vars(CacheScopeConnector) if name.startswith("command_")]
    assert {name.removeprefix("command_") for name in done} == COMMANDS
