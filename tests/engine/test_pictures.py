"""A picture counts by its content: the same text about another picture is another prompt."""

from collections.abc import Iterator

import pytest

from tests.engine.engine import BLOCK, BLOCK_BYTES, Answer, plan
from tests.engine.kinds import build_seeing
from tests.redis.replica import Replica
from vllm_cachescope.connectors.vllm import shm_regions
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

TEXT = "tide " * 300
READABLE = 4 * BLOCK
ONE, OTHER = 1, 2


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    config = {"cpu_bytes": 128 * BLOCK_BYTES}
    engine = Replica(build_seeing(), tmp_path_factory.mktemp("seeing"), config)
    yield engine
    engine.stop()
    shm_regions.remove_stale()


def ask(engine: Replica, org: str, picture: int, scope: Scope) -> Answer:
    return engine.call("ask_about", picture, TEXT, plan(Caller(org), (4000, scope, 300)))


def test_the_same_picture_is_shared_and_no_other(engine: Replica) -> None:
    assert ask(engine, "acme", ONE, Scope.GLOBAL).created == READABLE
    assert ask(engine, "zeta", ONE, Scope.GLOBAL).read == READABLE
    assert ask(engine, "zeta", OTHER, Scope.GLOBAL).read == 0
    engine.call("empty_device")
    for picture in (ONE, OTHER):
        assert ask(engine, "third", picture, Scope.GLOBAL).outcome("read_cpu") == READABLE


def test_an_organisations_picture_stays_its_own(engine: Replica) -> None:
    assert ask(engine, "acme", ONE, Scope.ORG).read == 0
    assert ask(engine, "zeta", ONE, Scope.ORG).read == 0
    assert ask(engine, "acme", ONE, Scope.ORG).read == READABLE
    engine.call("advance", 300)
    assert ask(engine, "acme", ONE, Scope.ORG).read == 0
