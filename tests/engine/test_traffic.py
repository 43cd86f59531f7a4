"""Whatever befalls random traffic, tokens that were not read have a cause, and all counts agree."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.engine import BLOCK_BYTES
from tests.engine.kinds import KINDS, Kind
from tests.engine.server import OPERATOR_TOKEN, SMALL, Api, breaks, serve_scoped
from tests.engine.tier_trouble import TierTrouble
from tests.engine.traffic import Traffic
from tests.redis.servers import REDIS_SERVER

pytestmark = pytest.mark.engine

SLOW = pytest.mark.slow
HOUR_S = 3600

SERVED = tuple(kind for kind in KINDS if kind.name != "sliding-experts")
"""The kinds of which a server runs with any tokenizer; that of gpt-oss wants one of its own."""

ESTIMATED = ("linear",)
"""The kinds of which vLLM's own count of what was created is too low where a prompt takes several
steps: it looks for the states of linear attention that the request has let go of."""


@dataclass(frozen=True, slots=True)
class Place:
    """A server for traffic.

    Attributes:
        api: the server.
        kind: its kind of model; None for the tests' usual one.
        trouble: what befalls its Redis; None if it has none.
    """

    api: Api
    kind: Kind | None = None
    trouble: TierTrouble | None = None


def options_of(kind: Kind, tokenizer: Path) -> tuple[str, ...]:
    """Return the options of a server of a kind of model, which has no tokenizer of its own."""
    return (
        *("--tokenizer", str(tokenizer), "--num-gpu-blocks-override", "90"),
        *("--dtype", kind.options.get("dtype", "float32")),
    )


def small_server(
    tiny_model: Path, scratch: Path, kind: Kind | None, trouble: TierTrouble | None
) -> Iterator[Place]:
    """Serve with little room, and many steps for a prompt."""
    options = (*SMALL, "--max-num-batched-tokens", "300", "--enable-prompt-tokens-details")
    config = {"cpu_bytes": 24 * (kind.block_bytes if kind else BLOCK_BYTES)}
    if trouble is not None:
        config["tiers"] = trouble.tiers
    model = tiny_model
    if kind is not None:
        options = (*options, *options_of(kind, tiny_model))
        model = kind.build()
    with serve_scoped(model, scratch, *options, **config) as api:
        yield Place(api, kind, trouble)


@pytest.fixture(scope="module")
def tiny_place(tiny_model, tmp_path_factory) -> Iterator[Place]:
    yield from small_server(tiny_model, tmp_path_factory.mktemp("traffic"), None, None)


@pytest.fixture(scope="module", params=SERVED, ids=lambda kind: kind.name)
def place(request, tiny_model, tmp_path_factory) -> Iterator[Place]:
    """A server of a kind of model, with a Redis to which things happen."""
    if REDIS_SERVER is None:
        pytest.skip("needs redis-server")
    kind = request.param
    if not kind.runs:
        pytest.skip("vLLM does not cache prefixes of this kind on this machine")
    trouble = TierTrouble(tmp_path_factory.mktemp("redis"))
    try:
        yield from small_server(tiny_model, tmp_path_factory.mktemp(kind.name), kind, trouble)
    finally:
        trouble.close()


def explain(place: Place, seed: int, requests: int) -> None:
    draw = place.trouble.draw if place.trouble else None
    traffic = Traffic(place.api, seed, draw)
    traffic.send(requests)
    time.sleep(1)  # What was put off is diagnosed once the engine has told of it.
    latest = breaks(place.api, OPERATOR_TOKEN)
    assert [seen for seen in latest if "unknown" in seen["uncached"]] == []
    assert sum(place.api.metrics("cachescope_unexplained_tokens_total").values()) == 0
    assert traffic.served["200"] > traffic.served["hung up"] > requests // 50


def add_up(place: Place, seed: int, requests: int) -> None:
    """Check that an hour's answers, our metrics and vLLM count the same tokens."""
    api = place.api

    def counted() -> tuple[int, ...]:
        own = api.metrics("cachescope_prompt_tokens_total", "outcome")
        read = sum(tokens for (outcome,), tokens in own.items() if outcome.startswith("read"))
        vllms = sum(api.metrics("vllm:prompt_tokens_total").values())
        return sum(own.values()), read, own["created",], vllms

    before = counted()
    many, alone = (Traffic(api, seed + i / 10, patient=True) for i in range(2))
    many.send(requests, within_s=HOUR_S)
    alone.send(requests // 3, clients=1)
    told = [many.told, alone.told]
    expected = tuple(
        sum(getattr(one, name) for one in told)
        for name in ("prompt", "read", "created", "sequences")
    )
    found = await_equal(lambda: difference(counted(), before), expected)
    assert found == expected
    assert many.told.read and many.told.created
    assert sum(api.metrics("cachescope_unexplained_tokens_total").values()) == 0
    if place.kind is None or place.kind.name not in ESTIMATED:
        assert many.told.alike and alone.told.alike
        assert alone.told.unlike == []
        # Of two that compute the same block at once vLLM says that both have created it.
        assert all(vllms > own for vllms, own in many.told.unlike)


def difference(after: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(after, before, strict=True))


def await_equal(ask: Callable[[], tuple[int, ...]], expected: tuple[int, ...]) -> tuple[int, ...]:
    """Return what ``ask`` returns once it is as ``expected``, or after some seconds: the engine
    tells the API process of its counts a step later."""
    deadline = time.monotonic() + 10
    while (found := ask()) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@pytest.mark.parametrize(("seed", "requests"), [(1, 300), pytest.param(2, 10_000, marks=SLOW)])
def test_nothing_is_unexplained(tiny_place: Place, seed: int, requests: int) -> None:
    explain(tiny_place, seed, requests)


@pytest.mark.parametrize(("seed", "requests"), [(5, 90), pytest.param(6, 1000, marks=SLOW)])
def test_the_counts_of_an_hour_agree(tiny_place: Place, seed: int, requests: int) -> None:
    add_up(tiny_place, seed, requests)


@SLOW
def test_nothing_is_unexplained_whatever_befalls_a_tier(place: Place) -> None:
    explain(place, 3, 500 if place.kind and place.kind.name == "latent" else 4000)
    assert place.trouble is not None and place.trouble.stored()
    assert place.api.metrics("cachescope_prompt_tokens_total", "outcome")["read_redis",]


@SLOW
def test_the_counts_of_an_hour_agree_for_each_kind(place: Place) -> None:
    add_up(place, 7, 300)
