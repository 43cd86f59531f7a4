"""What a running engine learns of the returns of blocks, next to a replay of its prompts."""

import random

import pytest

from tests.core.learned_kinds import kind_of
from tests.engine.engine import BLOCK, Engine, draw_tokens, plan
from tests.engine.test_ends import cpu_order, keys_of, step_on
from vllm_cachescope.cache.learned_order import LearnedOrder
from vllm_cachescope.cache.runs import Group, RequestSignals
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

ANSWER = 8


@pytest.mark.parametrize("tools_ttl_s", [300, 3600])
def test_agents_of_the_same_tools_are_learned_as_in_a_replay(engine: Engine, tools_ttl_s) -> None:
    chance, replayed = random.Random(tools_ttl_s), LearnedOrder()
    tools = draw_tokens(chance, 6 * BLOCK)
    asked = {name: list(tools) for name in ("main", "second", "third")}
    # Each one's tools are used by another before they are used by it again.
    for name in ["main", "second", "third"] * 3:
        engine.clock.advance(7.3)
        tokens = asked[name] = asked[name] + draw_tokens(chance, chance.choice([1, 2]) * BLOCK)
        cuts = (len(tools), Scope.ORG, tools_ttl_s), (len(tokens), Scope.ORG, 300)
        told = plan(Caller("acme", name), *cuts)
        engine.ask(tokens, told, ANSWER)
        step_on(engine)
        keys = keys_of(engine, tokens, told)
        assert len(keys) == len(tokens) // BLOCK
        own = 0 if tools_ttl_s == 300 else 6
        pieces = [(keys[:own], tools_ttl_s, b""), (keys[own:], 300, b"")]
        replayed.use_request(pieces, engine.clock(), RequestSignals(ANSWER))
        assert [kind_of(cpu_order(engine), key) for key in keys] == [
            kind_of(replayed, key) for key in keys
        ]
    assert {kind_of(replayed, key)[0] for key in keys[:6]} == {Group.SHARED}
    assert {kind_of(replayed, key)[0] for key in keys[6:]} == {Group.CONVERSATION}
