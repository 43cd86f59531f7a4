"""Engines that share a directory: each hit has its source, and every answer is exact."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.model import MODELS, TINY, build
from tests.disk.side import files
from tests.engine.engine import BLOCK, Ask, draw_tokens, org_plan, sealed
from tests.redis.replica import Replica
from tests.redis.servers import wait_until
from vllm_cachescope.connectors.vllm import shm_regions

pytestmark = pytest.mark.engine


@dataclass
class Pair:
    """Two engines on one directory.

    Attributes:
        place: the directory.
        a, b: the engines.
    """

    place: Path
    a: Replica
    b: Replica


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[Pair]:
    model = build(MODELS / "tiny", TINY)
    place = tmp_path_factory.mktemp("disk") / "tier"
    tier = {
        "type": "disk",
        "path": str(place),
        "capacity": "64MiB",
        "keep_free": "16MiB",
        # Two engines compute on the same cores: what is late is not what is tested.
        **{"load_deadline": "3s", "timeout": "3s", "first_probe": "50ms"},
    }

    def start() -> Replica:
        return Replica(model, tmp_path_factory.mktemp("engine"), {"tiers": [tier]})

    pair = Pair(place, start(), start())
    pair.a.ready()
    pair.b.ready()
    yield pair
    pair.a.stop()
    pair.b.stop()
    shm_regions.remove_stale()


def ask(tokens: list[int], org: str = "acme") -> Ask:
    return Ask(tokens, sealed(org_plan(org, tokens)))


def left_by(pair: Pair, seed: int, blocks: int = 8) -> tuple[list[int], list[int]]:
    """Have the first engine compute a prompt and store it; return it with the answer."""
    tokens, before = draw_tokens(random.Random(seed), blocks * BLOCK + 7), len(files(pair.place))
    (answer,) = pair.a.run(ask(tokens))
    assert answer.tokens == pair.a.call("uncached", tokens)
    wait_until(lambda: len(files(pair.place)) == before + blocks)
    return tokens, answer.tokens


def test_one_engine_reads_what_another_computed_and_only_its_organisation(pair: Pair):
    tokens, expected = left_by(pair, 1)
    (other,) = pair.b.run(ask(tokens, "other"))
    assert (other.read, other.tokens) == (0, expected)
    (answer,) = pair.b.run(ask(tokens))
    assert answer.outcome("read_disk") == 8 * BLOCK
    assert answer.outcome("uncached") == 7
    assert answer.tokens == expected
    pair.b.call("empty_device")
    (again,) = pair.b.run(ask(tokens))
    assert (again.outcome("read_cpu"), again.tokens) == (8 * BLOCK, expected)


def test_a_damaged_file_is_computed_again(pair: Pair):
    before = set(files(pair.place))
    tokens, expected = left_by(pair, 2)
    new = sorted(set(files(pair.place)) - before)
    for file in new[:2]:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    (answer,) = pair.b.run(ask(tokens))
    assert answer.outcome("read_disk") < 8 * BLOCK
    assert answer.tokens == expected


def test_what_a_killed_engine_left_is_read(pair: Pair):
    """It is killed in the middle of storing a further prompt."""
    tokens, expected = left_by(pair, 3, 12)
    more = draw_tokens(random.Random(4), 24 * BLOCK + 7)
    before = len(files(pair.place))
    pair.a.begin(ask(more))
    wait_until(lambda: len(files(pair.place)) > before)
    pair.a.stop()
    (answer,) = pair.b.run(ask(tokens))
    assert (answer.outcome("read_disk"), answer.tokens) == (12 * BLOCK, expected)
    (answer,) = pair.b.run(ask(more))
    assert answer.tokens == pair.b.call("uncached", more)
