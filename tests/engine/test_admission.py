"""What the engine client is given for prompts that the API side tells nobody about."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from vllm import PoolingParams, SamplingParams

from tests.engine.engine import KEYS, OWNERS, SECRET
from vllm_cachescope.api.request_context import RequestContext, current_request
from vllm_cachescope.api.services import directory_of
from vllm_cachescope.config import load
from vllm_cachescope.connectors.vllm.api_server.admission import Admission
from vllm_cachescope.prompt.plan import PLAN_KEY, Span, unseal
from vllm_cachescope.tenancy.scope import Caller, Scope

ACME = Caller("name:acme")


class Client:
    """An engine client that notes the parameters it is given."""

    vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=16))
    renderer = MagicMock()

    def __init__(self) -> None:
        self.given: list[Any] = []

    async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any):
        self.given.append(params)
        yield SimpleNamespace(finished=True, kv_transfer_params=None)

    encode = generate


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
