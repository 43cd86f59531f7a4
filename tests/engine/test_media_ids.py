"""What ids that clients give to images become, and prompts given as embeddings, before vLLM trusts
them."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.renderers.base import BaseRenderer
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from tests.engine.engine import BLOCK, SECRET, draw_tokens, org_plan, sealed
from vllm_cachescope.api.request_context import RequestContext, current_request
from vllm_cachescope.connectors.vllm.api_server.media_ids import confine
from vllm_cachescope.tenancy.scope import Caller

pytestmark = pytest.mark.engine

ONE_ORG, OTHER_ORG = Caller("name:one", "s"), Caller("name:other", "s")


async def trusted(caller: Caller | None, ids: Any) -> Any:
    """Return the ids that vLLM's renderer goes by for a prompt of ``caller`` with ``ids``."""
    taken: list[Any] = []

    async def process(*args: Any, mm_uuids: Any, **options: Any) -> dict[str, Any]:
        taken.append(mm_uuids)
        return {"type": "multimodal"}

    renderer = SimpleNamespace(_process_multimodal_async=process)
    confine(renderer, SECRET.encode())
    prompt = {"prompt_token_ids": [1], "multi_modal_data": {"image": [None]}}
    prompt |= {"multi_modal_uuids": ids} if ids is not None else {}
    token = current_request.set(RequestContext(caller) if caller else None)
    try:
        await BaseRenderer._process_tokens_async(renderer, prompt)  # noqa: SLF001 — vLLM's own
    finally:
        current_request.reset(token)
    return taken[0]


async def test_an_id_counts_inside_its_organisation_only() -> None:
    ids = {"image": ["cat", None, "dog"], "audio": "cat"}
    one = await trusted(ONE_ORG, ids)
    assert one == await trusted(Caller(ONE_ORG.org, "another session"), ids)
    assert one["image"][1] is None and one["audio"] == one["image"][0] != one["image"][2]
    other, nobodys = await trusted(OTHER_ORG, ids), await trusted(None, ids)
    seen = [{*it["image"], it["audio"]} - {None} for it in (one, other, nobodys)]
    assert len(set.union(*seen)) == 6 and not set.union(*seen) & {"cat", "dog"}


async def test_what_has_no_id_goes_by_its_content() -> None:
    assert await trusted(ONE_ORG, None) is None
    assert await trusted(ONE_ORG, {"image": [None]}) == {"image": [None]}


def test_prompts_given_as_embeddings_go_by_their_numbers(engine) -> None:
    """Their token ids are all zero."""
    chance = random.Random(1)
    tokens = draw_tokens(chance, 2 * BLOCK)
    params = sealed(org_plan("acme", tokens))

    def hashes(embeddings: torch.Tensor) -> list[bytes]:
        return list(
            Request(
                request_id="r",
                prompt_token_ids=None,
                prompt_embeds=embeddings,
                sampling_params=SamplingParams(extra_args={"kv_transfer_params": params}),
                pooling_params=None,
                block_hasher=kv_cache_utils.get_request_block_hasher(BLOCK, sha256),
            ).block_hashes
        )

    one = torch.rand(2 * BLOCK, 4)
    other = one.clone()
    other[BLOCK + 1, 0] += 1
    assert hashes(one) == hashes(one.clone())
    assert hashes(one)[0] == hashes(other)[0] and hashes(one)[1] != hashes(other)[1]
