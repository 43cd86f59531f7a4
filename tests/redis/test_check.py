"""What can be told of a Redis before an engine starts: it answers, and of whose secret it is."""

import pytest

from tests.redis.engine_side import SECRET
from vllm_cachescope.config import load
from vllm_cachescope.connectors.vllm import remote_stores
from vllm_cachescope.connectors.vllm.findings import Finding, Status


def found(url: str, secret: bytes = SECRET) -> Finding:
    """Return what a check of a tier at ``url`` finds."""
    config = load({"secret": secret.decode(), "tiers": [{"type": "redis", "url": url}]})
    return remote_stores.check(config.tiers[0], config)


def test_engines_with_another_secret_are_found(server, start_engine_side) -> None:
    assert found(server.url).found == f"{server.url} answers; no engine uses it now"
    start_engine_side(server.url, identity="a model", secret=b"another secret, as long")
    alone = found(server.url)
    assert alone.status is Status.FAILURE and "engines with another secret" in alone.found
    assert found(server.url, b"another secret, as long").status is Status.OK
    # Engines of another model may have it.
    start_engine_side(server.url, identity="another model")
    both = found(server.url)
    assert both.status is Status.OK and "engines with this secret use it" in both.found


def test_a_check_leaves_nothing_there(server) -> None:
    found(server.url)
    assert server.client.keys() == []


def test_a_store_that_may_not_be_looked_through(server) -> None:
    server.client.execute_command("ACL SETUSER kv on >sesame ~cachescope:* +get +info")
    told = found(f"redis://kv:sesame@127.0.0.1:{server.port}")
    assert told.status is Status.OK and "cannot be told" in told.found
    server.client.execute_command("ACL SETUSER kv >open resetpass >changed")
    refused = found(f"redis://kv:sesame@127.0.0.1:{server.port}")
    assert refused.status is Status.FAILURE and "does not answer" in refused.found
    assert "sesame" not in str(told) + str(refused)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:9", "redis+sentinel://127.0.0.1:9/cache"])
def test_a_store_that_does_not_answer(url: str) -> None:
    told = found(url)
    assert told.status is Status.FAILURE and told.found.startswith(f"{url} does not answer: ")
