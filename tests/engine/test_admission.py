"""What the engine client is given for prompts that the API side tells nobody about."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from vllm import PoolingParams, SamplingParams

from tests.engine.engine import KEYS, OWNERS, SECRET, org_plan
from vllm_cachescope.api.request_context import RequestContext, current_request
from vllm_cachescope.api.services import directory_of
from vllm_cachescope.config import load
from vllm_cachescope.connectors.vllm.api_server.admission import Admission
from vllm_cachescope.connectors.vllm.plan_transport import with_plan
from vllm_cachescope.prompt.plan import PLAN_KEY, Span, unseal
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.owner_tags import is_unlisted
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.wire import READERS

ACME = Caller("name:acme")


class Client:
    """An engine client that notes the parameters it is given."""

    vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=16))
    renderer = MagicMock()

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.sessions: list[str | None] = []

    async def generate(
        self,
        prompt: Any,
        params: Any,
        request_id: str,
        session_id: str | None = None,
        **options: Any,
    ):
        self.given.append(params)
        self.sessions.append(session_id)
        yield SimpleNamespace(
            finished=True, kv_transfer_params=None, num_cached_tokens=0, outputs=[]
        )

    encode = generate

    async def notify_kv_transfer_request_rejected(
        self, request_id: str, kv_transfer_params: dict[str, Any], **options: Any
    ) -> None:
        self.given.append(kv_transfer_params)


@pytest.fixture
def client() -> Client:
    state = MagicMock(engine_client=Client())
    config = load({"secret": SECRET})
    Admission(state, config, SECRET.encode(), directory_of(config, api_keys=()))
    return state.engine_client


def assert_is_acmes(sealed: Any, tokens: int) -> None:
    plan = unseal(sealed, SECRET.encode())
    assert plan is not None and plan.owner == OWNERS.of(ACME)
    assert plan.spans == (Span(tokens, Scope.ORG, KEYS.key(Scope.ORG, ACME, ""), 300),)


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ({"type": "token", "prompt_token_ids": [1] * 40}, 40),
        ({"type": "embeds", "prompt_embeds": [[0.5]] * 30}, 30),
        ({"type": "enc_dec", "decoder_prompt": {"prompt_token_ids": [1] * 4}}, 4),
    ],
    ids=["tokens", "embeddings", "encoder and decoder"],
)
async def test_pooling_and_embeddings_belong_to_the_callers_organisation(
    client: Client, prompt: dict[str, Any], tokens: int
) -> None:
    token = current_request.set(RequestContext(ACME))
    pooling = PoolingParams(extra_kwargs={"other": 1})
    sampling = SamplingParams(extra_args={"kv_transfer_params": {PLAN_KEY: "forged", "other": 1}})
    try:
        _ = [output async for output in client.encode(prompt, pooling, request_id="1")]
        if prompt["type"] != "token":
            _ = [output async for output in client.generate(prompt, sampling, request_id="2")]
    finally:
        current_request.reset(token)
    pooled, *generated = client.given
    assert pooled.extra_kwargs["other"] == 1
    assert_is_acmes(pooled.extra_kwargs[PLAN_KEY], tokens)
    assert pooling.extra_kwargs == {"other": 1}, "what the caller has is not changed"
    for params in generated:
        sent = params.extra_args["kv_transfer_params"]
        assert sent["other"] == 1
        assert_is_acmes(sent[PLAN_KEY], tokens)


async def test_outside_of_a_request_no_plan_is_sent(client: Client) -> None:
    prompt = {"prompt_token_ids": [1] * 40}
    pooling = PoolingParams()
    _ = [output async for output in client.encode(prompt, pooling, "1")]
    _ = [output async for output in client.generate(prompt, SamplingParams(), "2")]
    assert client.given[0].extra_kwargs is None and client.given[1].extra_args is None


@pytest.mark.parametrize("odd", ["cachescope", ["cachescope"], 5, {PLAN_KEY: "forged"}])
async def test_nothing_of_a_clients_stands_where_a_plan_would(client: Client, odd: Any) -> None:
    prompt = {"prompt_token_ids": [1] * 40}
    sampling = SamplingParams(extra_args={"kv_transfer_params": odd, "other": 1})
    pooling = PoolingParams(extra_kwargs={PLAN_KEY: odd, "other": 1})
    _ = [output async for output in client.generate(prompt, sampling, "1")]
    _ = [output async for output in client.encode(prompt, pooling, "2")]
    await client.notify_kv_transfer_request_rejected("3", {PLAN_KEY: odd, "other": 1})
    generated, pooled, rejected = client.given
    assert generated.extra_args == {"other": 1, "kv_transfer_params": {}}
    assert pooled.extra_kwargs == rejected == {"other": 1}


def test_a_plan_stands_alone_whatever_a_client_has_sent() -> None:
    plan = org_plan("acme", [1] * 40)
    for odd in ("cachescope", ["cachescope"], 5, {PLAN_KEY: "forged"}):
        given = SamplingParams(extra_args={"kv_transfer_params": odd})
        sent = with_plan(given, plan, SECRET.encode()).extra_args["kv_transfer_params"]
        assert list(sent) == [PLAN_KEY] and unseal(sent[PLAN_KEY], SECRET.encode()) == plan


@pytest.mark.parametrize("given", [None, "vLLM's"])
async def test_the_engine_learns_of_the_session(client: Client, given: str | None) -> None:
    prompt = {"type": "embeds", "prompt_embeds": [[0.5]] * 30}
    token = current_request.set(RequestContext(Caller("name:acme", "s1")))
    try:
        _ = [
            output
            async for output in client.generate(prompt, SamplingParams(), "1", session_id=given)
        ]
    finally:
        current_request.reset(token)
    assert client.sessions == [given or "s1"]


@pytest.mark.parametrize("org", ["key:8f3a", "name:acme"])
async def test_quotas_tell_unlisted_organisations_by_their_plans(client: Client, org: str) -> None:
    """Also by those of prompts with marks, which are made in another way than the others."""
    body = {"model": "toy", "messages": [{"role": "user", "content": "Hello."}]}
    request = READERS[Protocol.CHAT](body, (300, 3600))
    context = RequestContext(Caller(org), request, body)
    token = current_request.set(context)
    prompt = {"type": "token", "prompt_token_ids": [1] * 40}
    try:
        _ = [output async for output in client.generate(prompt, SamplingParams(), "1")]
    finally:
        current_request.reset(token)
    sent = client.given[0].extra_args["kv_transfer_params"][PLAN_KEY]
    plan = unseal(sent, SECRET.encode())
    assert plan is not None
    assert is_unlisted(plan.owner) == org.startswith("key:")
