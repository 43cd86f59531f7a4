"""What a client sends where a plan would stand, on any way to the engine, counts as no plan."""

from collections.abc import Iterator
from itertools import product

import httpx
import pytest

from tests.engine.bodies import text
from tests.engine.server import MODEL, SMALL, Api, serve_scoped

pytestmark = pytest.mark.engine

KEY = "key of the server"

FORGED = {"cachescope": {"spans": [[64, 0, "00", 300, True]], "nonce": "n", "mac": "0" * 32}}
ODD = [
    {"kv_transfer_params": FORGED},
    {"kv_transfer_params": {"cachescope": None, "do_remote_prefill": True}},
    {"kv_transfer_params": {"cachescope": "x", "max_offload_tokens": "many"}},
    {"kv_transfer_params": FORGED, "cache_salt": "s"},
    {"kv_transfer_params": FORGED, "n": 2},
    {"vllm_xargs": {"kv_transfer_params": "cachescope"}},
    {"vllm_xargs": {"kv_transfer_params": ["cachescope"]}},
    {"vllm_xargs": {"kv_transfer_params": 5, "cachescope": 1}},
]
"""Fields of a body that are no plan of ours, or stand where one would."""

PROMPTS = {
    "/v1/completions": {"prompt": text("refused", 100), "max_tokens": 1},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": text("refused", 100)}],
        "max_tokens": 1,
    },
    "/v1/messages": {
        "messages": [{"role": "user", "content": text("refused", 100)}],
        "max_tokens": 1,
    },
    "/v1/responses": {"input": text("refused", 100), "max_output_tokens": 1},
}
PROMPTS["/invocations"] = PROMPTS["/v1/completions"]

QUICK = (("/v1/completions", KEY), ("/invocations", None))


@pytest.fixture(scope="module")
def locked(tiny_model, tmp_path_factory) -> Iterator[Api]:
    """A server with a key of its own, which vLLM asks for on some paths only."""
    scratch = tmp_path_factory.mktemp("locked")
    options = (*SMALL, "--api-key", KEY)
    with serve_scoped(tiny_model, scratch, *options, cpu_bytes="8MiB") as api:
        yield api


@pytest.mark.parametrize(
    ("path", "key"),
    [
        pytest.param(path, key, marks=() if (path, key) in QUICK else pytest.mark.slow)
        for path, key in product(PROMPTS, (KEY, None))
    ],
)
def test_no_client_raises_the_count_of_refused_plans(
    locked: Api, path: str, key: str | None
) -> None:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    for odd in ODD:
        # The second is refused: its prompt is too long.
        for body in (PROMPTS[path], {**PROMPTS[path], **_too_long(path)}):
            sent = {"model": MODEL, **body, **odd}
            answer = httpx.post(f"{locked.url}{path}", json=sent, headers=headers, timeout=60)
            assert answer.status_code < 500, (odd, answer.text)
            assert key or path == "/invocations" or answer.status_code == 401
    sound = {"model": MODEL, **PROMPTS["/v1/completions"]}
    known = {"authorization": f"Bearer {KEY}"}
    httpx.post(
        f"{locked.url}/v1/completions", json=sound, headers=known, timeout=60
    ).raise_for_status()
    assert sum(locked.metrics("cachescope_refused_plans_total").values()) == 0


def _too_long(path: str) -> dict[str, object]:
    long = text("too long", 4100)
    if path in ("/v1/completions", "/invocations"):
        return {"prompt": long}
    if path == "/v1/responses":
        return {"input": long}
    return {"messages": [{"role": "user", "content": long}]}
