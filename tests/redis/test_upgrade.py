"""A rolling upgrade: replicas of this version and of an earlier one on one Redis. What one cannot
read of the other's is a miss, and nothing else."""

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.redis.earlier import ROOT, earlier_tree
from tests.redis.engine_side import SECRET, keys
from tests.redis.servers import RedisServer, entries, wait_until
from vllm_cachescope.tiers.keyspace import KINDS
from vllm_cachescope.tiers.purge_notices import Progress, PurgeNotice, PurgeNotices

KEYS = 6

LANDED = ("57c1f18", "8e6960d")
"""The last version, and the last one that did not note sessions; their entries are what this one's
are."""
# Both versions run this, each with its own code.
_SIDE = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
from tests.redis.engine_side import EngineSide, keys
side = EngineSide(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    what, count, seed = json.loads(line)
    if what == "put":
        side.put(keys(count, seed))
    else:
        count = len(side.get_exact(keys(count, seed)).keys)
    print(json.dumps([count, side.tier.health()["up"]]), flush=True)
"""


class Side:
    """An engine's side of a tier, in a process of its own that runs the code in a directory."""

    def __init__(self, tree: Path, url: str, log: Path) -> None:
        self._log = log
        with open(log, "w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SIDE, url],
                cwd=tree,
                env={"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ready(self) -> "Side":
        """Wait until it runs."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", self._log.read_text()
        return self

    def do(self, what: str, seed: str) -> list[Any]:
        """Have it put keys, or get them; return how many, and whether the tier is up."""
        pipes = self._process.stdin, self._process.stdout
        assert pipes[0] is not None and pipes[1] is not None
        pipes[0].write(json.dumps([what, KEYS, seed]) + "\n")
        pipes[0].flush()
        answer = pipes[1].readline()
        assert answer, self._log.read_text()
        found: list[Any] = json.loads(answer)
        return found

    def close(self) -> str:
        """End it; return what it has logged."""
        self._process.kill()
        self._process.communicate()
        return self._log.read_text()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Callable[[str], Path]:
    """Returns a directory with the code of an earlier version."""
    return partial(earlier_tree, tmp_path_factory.mktemp)


@pytest.fixture
def start(server, tmp_path) -> Iterator[Callable[[Path], Side]]:
    sides: list[Side] = []

    def starting(tree: Path) -> Side:
        sides.append(Side(tree, server.url, tmp_path / f"{len(sides)}.log"))
        return sides[-1]

    yield starting
    for side in sides:
        said = side.close()
        assert "Traceback" not in said and "ERROR" not in said, said


@pytest.mark.parametrize("commit", LANDED)
def test_versions_share_a_redis(start, tree, commit):
    ours, theirs = start(ROOT), start(tree(commit))
    ours.ready(), theirs.ready()
    assert ours.do("put", "ours") == [KEYS, True]
    assert theirs.do("put", "theirs") == [KEYS, True]
    # `get_exact` sees to it that whatever is read is what was stored.
    assert ours.do("get", "theirs") == [KEYS, True]
    assert theirs.do("get", "ours") == [KEYS, True]
    for side in (ours, theirs):
        assert side.do("put", "both") == [KEYS, True]
    for side in (ours, theirs):
        assert side.do("get", "both") == [KEYS, True]


def of_format_2(server: RedisServer) -> dict[bytes, bytes]:
    """Put into a server what version 2 of the layout of entries has left there: three blocks of
    `keys` with the seed "earlier", and the digest of the secret of `EngineSide`."""
    sample = json.loads((Path(__file__).parent / "samples" / "format-2.json").read_text())
    held = {name.encode(): base64.b64decode(value) for name, value in sample}
    for name, value in held.items():
        server.client.set(name, value, px=3_600_000)
    return held


def test_entries_of_an_earlier_layout_are_left_alone(server, start_engine_side):
    held = of_format_2(server)
    side = start_engine_side(server.url)
    assert not side.get(keys(3, "earlier")).keys
    side.put(keys(3, "earlier"))
    assert len(side.get_exact(keys(3, "earlier")).keys) == 3
    side.tier.purge(b"")
    wait_until(lambda: not entries(server))
    assert {name: server.client.get(name) for name in held} == held
    assert side.tier.health()["up"]


def test_a_value_of_an_earlier_layout_is_a_miss_under_our_names_too(server, start_engine_side):
    earlier = [value for name, value in of_format_2(server).items() if len(value) > 100]
    side = start_engine_side(server.url)
    for key, value in zip(keys(3, "ours"), earlier, strict=True):
        server.client.set(side.name(key), value, px=3_600_000)
    assert not side.get(keys(3, "ours")).keys
    assert side.tier.health()["up"]


def test_what_a_later_version_says_of_purges_is_read_as_far_as_it_is_known():
    notices = PurgeNotices(SECRET)
    notice = PurgeNotice("p", b"prefix", "acme", "s")
    seal = notices._seal  # noqa: SLF001
    said = seal(b"notice", ["p", b"prefix".hex(), "acme", "s", "and more"])
    assert notices.open(said) == notice == notices.open(notices.seal(notice))
    claim = seal(b"progress of a", ["name", 7, {"more": 1}])
    assert notices.progress(b"a", claim) == Progress("name", 7)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"identity": "another model"}, "model"),
        ({"identity": "another model", "encrypt": True}, "encrypted, model"),
        ({"identity": "another model", "secret": b"another secret, long"}, "the secret, model"),
        ({}, None),
    ],
)
def test_engines_that_share_nothing_are_told_so(
    server, start_engine_side, caplog, other, difference
):
    first = start_engine_side(server.url)
    wait_until(lambda: first.tier.health()["up"])
    # What somebody else writes there is passed over.
    server.client.hset(KINDS, "made up", b"nonsense")
    server.client.hset(KINDS, "unread", b"%d x [1]" % time.time())
    second = start_engine_side(server.url, **other)
    wait_until(lambda: second.tier.health()["up"])
    first.put(keys(2, "a"))

    def said() -> list[str]:
        messages = [one.message for one in caplog.records]
        return [m.partition("one. ")[2] for m in messages if "share nothing with this one" in m]

    if difference is not None:
        wait_until(said)
    assert said() == ([] if difference is None else [f"They differ in: {difference}"])
    if difference is not None:
        assert not second.get(keys(2, "a")).keys
