"""Whatever clients send: the server answers as plain vLLM does, nobody reads what is another's, and
the counts add up."""

import json
from collections import Counter
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.core.wire_bodies import PATHS, bodies, broken_bodies
from tests.engine.bodies import text
from tests.engine.server import MODEL
from tests.engine.usages import counts
from vllm_cachescope.prompt.request import Protocol

pytestmark = pytest.mark.engine

REQUESTS_EACH = 4
"""How many requests one example makes: one of plain vLLM, three of the plugin's server."""

HEAD = text("fuzz", 600)
"""The beginning of each prompt, the same for all: what is isolated badly is found here."""

well_formed = st.sampled_from(list(bodies)).flatmap(
    lambda protocol: st.tuples(st.just(protocol), bodies[protocol])
)


def with_head(protocol: Protocol, body: dict[str, Any]) -> dict[str, Any]:
    """Return a body of the served model that begins with `HEAD` and asks for few tokens."""
    body = {**body, "model": MODEL, "max_tokens": 3, "temperature": 0}
    if protocol is Protocol.MESSAGES:
        block = {"type": "text", "text": HEAD}
        system = body.get("system", [])
        body["system"] = [block, *(system if isinstance(system, list) else [])]
    elif protocol is Protocol.CHAT:
        messages = body.get("messages")
        head = {"role": "system", "content": HEAD}
        body["messages"] = [head, *messages] if isinstance(messages, list) else messages
    else:
        del body["max_tokens"]
        body |= {"instructions": HEAD, "max_output_tokens": 3}
    return body


class Fuzzing:
    """Sends the same bodies to plain vLLM and, for two organisations, to the plugin's server."""

    def __init__(self, api: Any, plain_url: str) -> None:
        json_body = {"content-type": "application/json"}
        self._plain = httpx.Client(base_url=plain_url, headers=json_body, timeout=60)
        self._scoped = httpx.Client(base_url=api.url, headers=json_body, timeout=60)
        self._examples = 0
        self.statuses: Counter[int] = Counter()
        self.read_again = 0

    def check(self, protocol: Protocol, body: dict[str, Any]) -> None:
        """Send ``body``, and check each answer."""
        path, sent = PATHS[protocol], json.dumps(with_head(protocol, body)).encode()
        plain = self._plain.post(path, content=sent)
        self._examples += 1
        own, other = f"fuzz {self._examples} own", f"fuzz {self._examples} other"
        answers = [
            self._scoped.post(path, content=sent, headers={"x-api-key": key})
            for key in (own, own, other)
        ]
        for answer in answers:
            self.statuses[answer.status_code] += 1
            assert answer.status_code < 500 or plain.status_code >= 500, answer.text
            if plain.status_code == 200 and protocol is not Protocol.MESSAGES:
                assert answer.status_code == 200, answer.text
            if answer.status_code == 200:
                assert plain.status_code == 200
        if any(answer.status_code != 200 for answer in answers):
            return
        first, again, others = (counts(protocol, answer.json()["usage"]) for answer in answers)
        # Organisations that have never asked for anything.
        assert first[1] == others[1] == 0
        assert others == first
        assert again[0] == first[0] and again[1] >= first[2] - 128
        self.read_again += again[1] > 0


def metrics(api: Any) -> tuple[int, int]:
    """Return the prompt tokens that the plugin has counted, and those that vLLM has."""
    own = api.metrics("cachescope_prompt_tokens_total")
    return sum(own.values()), sum(api.metrics("vllm:prompt_tokens_total").values())


@pytest.mark.parametrize(
    "examples", [40, pytest.param(10_000 // REQUESTS_EACH, marks=pytest.mark.slow)]
)
def test_random_requests(api: Any, plain_url: str, examples: int) -> None:
    fuzzing = Fuzzing(api, plain_url)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        # An example that fails is told as it is: each try of a smaller one would run the engine.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    # Twice: of what is refused nothing is read, and half of all were too few by chance at times.
    @given(st.one_of(well_formed, well_formed, broken_bodies()))
    def run(case: tuple[Protocol, dict[str, Any]]) -> None:
        fuzzing.check(*case)

    before = metrics(api)
    run()
    assert fuzzing.statuses[200] > examples // 2 and fuzzing.statuses[400] > 0
    assert fuzzing.read_again > examples // 4
    own, vllms = (after - was for after, was in zip(metrics(api), before, strict=True))
    assert own == vllms > 0
