from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lmcache.side import LMCacheSide
from tests.redis.servers import REDIS_SERVER, RedisServer
from tests.redis.wall import Wall
from vllm_cachescope.connectors.lmcache import upkeep


@pytest.fixture(autouse=True)
def busy_upkeep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody wants to wait for it here."""
    monkeypatch.setattr(upkeep, "UPKEEP_S", 0.1)


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def server(tmp_path) -> Iterator[RedisServer]:
    if REDIS_SERVER is None:
        pytest.skip("needs redis-server")
    server = RedisServer(tmp_path)
    yield server
    server.close()


@dataclass
class Place:
    """Where an adapter keeps things, seen from behind.

    Attributes:
        adapter: its configuration.
        names: returns the names of the objects in it; they end with a namespace.
        get, put: read and write an object by its name.
    """

    adapter: dict[str, Any]
    names: Callable[[], list[str]]
    get: Callable[[str], bytes]
    put: Callable[[str, bytes], object]
    remove: Callable[[str], object]

    def values(self) -> list[str]:
        """Return the names of the values."""
        return self._of_kind("v")

    def records(self) -> list[str]:
        """Return the names of the records of when they expire."""
        return self._of_kind("e")

    def _of_kind(self, kind: str) -> list[str]:
        ending = kind.encode().hex()
        fields = ((name, name.split("@")[3]) for name in self.names())
        return sorted(name for name, key in fields if key.endswith(ending) and len(key) > 2)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty one, of the type that the test says."""
    kind: str = request.param
    if kind == "resp":
        server = request.getfixturevalue("server")
        client = server.client
        return Place(
            {"type": "resp", "host": "127.0.0.1", "port": server.port, "num_workers": 3},
            lambda: [name.decode() for name in client.keys("*")],
            client.get,
            client.set,
            client.delete,
        )
    path = tmp_path / "store"
    return Place(
        {"type": kind, "base_path": str(path)},
        lambda: [file.name for file in path.glob("*.data")],
        lambda name: (path / name).read_bytes(),
        lambda name, content: (path / name).write_bytes(content),
        lambda name: (path / name).unlink(),
    )


anywhere = pytest.mark.parametrize("place", ["fs", "fs_native", "resp"], indirect=True)
everywhere = pytest.mark.parametrize("place", ["fs", "resp"], indirect=True)
"""With an adapter in Python and one in C++."""

in_files = pytest.mark.parametrize("place", ["fs", "fs_native"], indirect=True)


@pytest.fixture
def start_side(wall: Wall) -> Iterator[Callable[..., LMCacheSide]]:
    sides: list[LMCacheSide] = []

    def start(adapter: dict[str, Any], **options: Any) -> LMCacheSide:
        sides.append(LMCacheSide(adapter, wall, **options))
        return sides[-1]

    yield start
    for side in sides:
        side.close()
