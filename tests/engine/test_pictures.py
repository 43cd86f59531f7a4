"""A picture counts by its content: the same text about another picture is another prompt."""

import asyncio
import base64
import io
from collections.abc import Iterator
from unittest.mock import AsyncMock, MagicMock

import numpy as np
import pytest
from PIL import Image
from vllm import SamplingParams

from tests.engine.engine import BLOCK, BLOCK_BYTES, SECRET, Answer, plan
from tests.engine.kinds import build_seeing
from tests.engine.rendered import Rendering
from tests.redis.replica import Replica
from vllm_cachescope.api.request_context import RequestContext, current_request
from vllm_cachescope.api.services import directory_of
from vllm_cachescope.config import load
from vllm_cachescope.connectors.vllm import shm_regions
from vllm_cachescope.connectors.vllm.api_server.admission import Admission
from vllm_cachescope.connectors.vllm.api_server.planning import Planner
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

TEXT = "tide " * 300
READABLE = 4 * BLOCK
ONE, OTHER = 1, 2
CONFIG = load({"secret": SECRET})
GO_ON = {"role": "user", "content": "Go on."}


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


def drawn(seed: int) -> dict[str, object]:
    """A picture as a client sends it."""
    pixels = np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


async def test_an_engine_gets_what_was_rendered_to_find_boundaries() -> None:
    """To vLLM a picture that was rendered is one that the engine has. It only names it from then
    on, and a request fails that names one which the engine does not have."""
    rendering = Rendering(str(build_seeing()), "inst")
    marker = {"cache_control": {"type": "ephemeral"}}
    text = {"type": "text", "text": "Look."}
    for seed, role in ((ONE, "system"), (OTHER, "user")):
        content = [text, drawn(seed) | marker]
        body = {"model": "m", "messages": [{"role": role, "content": content}, GO_ON]}
        _, (prefix, _) = await rendering.rendered(Protocol.CHAT, body)
        assert prefix is not None and (prefix.tokens or prefix.text)
        assert [await rendering.sent(body) for _ in range(2)] == [[True], [False]]


async def test_a_picture_of_a_request_that_was_given_up_is_sent_with_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its client disconnects after the rendering, while the plan is made."""
    rendering = Rendering(str(build_seeing()), "chatml")
    body = {"model": "m", "messages": [{"role": "user", "content": [drawn(ONE)]}]}
    assert await rendering.sent(body) == [True]
    state = MagicMock()
    state.engine_client.renderer = rendering.renderer
    admission = Admission(state, CONFIG, SECRET.encode(), directory_of(CONFIG, ()))
    monkeypatch.setattr(Planner, "plan", AsyncMock(side_effect=asyncio.CancelledError))
    token = current_request.set(RequestContext(Caller("name:acme")))
    try:
        with pytest.raises(asyncio.CancelledError):
            await anext(admission.generate(rendering.last_sent, SamplingParams(), "1"))
    finally:
        current_request.reset(token)
    assert await rendering.sent(body) == [True]
