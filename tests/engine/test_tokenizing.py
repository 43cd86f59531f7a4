"""The tokenising of prompts in vLLM's own hands: the same tokens, of what is new alone."""

import logging
from typing import Any

import pytest

from demo.session import agent_session, marked
from tests.engine.rendered import Rendering
from vllm_cachescope.connectors.vllm.api_server import tokenizing
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Caller

ACME = Caller("acme", "s")
TURNS = 14


@pytest.fixture(scope="module", params=["chatml", "inst", "headers"])
def template(request) -> str:
    name: str = request.param
    return name


@pytest.fixture
def rendering(tiny_model, template) -> Rendering:
    return Rendering(str(tiny_model), template)


def bodies(seed: int = 0) -> list[dict[str, Any]]:
    session = agent_session(seed, turns=TURNS, tools=4, rules=6)
    return [{"model": "m", "max_tokens": 4, **session.body(turn)} for turn in range(TURNS)]


async def prompt(rendering: Rendering, body: dict[str, Any], caller: Caller | None = ACME) -> str:
    """Render a prompt, and see that its tokens are those of its text; return the text."""
    rendering.readers = caller
    tokens, text = await rendering.prompt(Protocol.MESSAGES, body)
    assert tokens == rendering.tokenizer(text, add_special_tokens=False)["input_ids"]
    return text


async def test_only_what_is_new_is_tokenised(rendering) -> None:
    before = ""
    for turn, body in enumerate(bodies()):
        rendering.tokenized.clear()
        text = await prompt(rendering, body)
        if 0 < turn <= tokenizing.FIRST_CHECKS:
            # As a whole as well, to see that both agree.
            assert len(rendering.tokenized) == 3 and rendering.tokenized[1] == text
        elif turn:
            tail, whole = rendering.tokenized
            # What is whole comes with its tokens, and is not tokenised.
            assert whole == text and text.endswith(tail) and len(tail) < len(text) / 2
            assert len(text) - len(tail) <= len(before)
        before = text


async def test_nobody_elses_prompt_tells_what_was_tokenised(rendering) -> None:
    body = bodies()[-1]
    text = await prompt(rendering, body)
    for caller in (Caller("acme", "t"), Caller("zeta", "s"), Caller("acme"), None, None):
        rendering.tokenized.clear()
        assert await prompt(rendering, body, caller) == text
        assert rendering.tokenized == [text]
    rendering.boundaries.purge("acme", "s")
    rendering.tokenized.clear()
    await prompt(rendering, body)
    assert rendering.tokenized == [text]


async def test_beginnings_that_are_rendered_for_boundaries_are_no_prompts(rendering) -> None:
    body = marked(agent_session(1, turns=2, tools=4, rules=6).body(1))
    rendering.readers = ACME
    await rendering.rendered(Protocol.MESSAGES, {"model": "m", "max_tokens": 4, **body})
    assert rendering.boundaries._rendering._tokenizing._known.nbytes == 0  # noqa: SLF001


async def test_a_tokenizer_whose_parts_differ_is_found_out_before_it_is_relied_on(
    rendering, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = bodies()[-3:]
    await prompt(rendering, first)
    known = rendering.boundaries._rendering._tokenizing._known  # noqa: SLF001
    find = known.find

    def wrong(caller: Caller, cuts: Any) -> Any:
        found = find(caller, cuts)
        found.tokens[0] += 1
        return found

    monkeypatch.setattr(known, "find", wrong)
    with caplog.at_level(logging.WARNING):
        await prompt(rendering, second)
        await prompt(rendering, third)
    (message,) = [r.message for r in caplog.records if "cachescope" in r.name]
    assert "tokenised as a whole" in message


async def test_a_mistake_in_what_is_known_costs_nothing(
    rendering, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = rendering.boundaries._rendering._tokenizing._known  # noqa: SLF001
    monkeypatch.setattr(known, "find", lambda *_: 1 / 0)
    await prompt(rendering, bodies()[0])
    assert "could not be used" in caplog.text


async def test_a_prompt_that_is_too_long_is_refused_in_vllms_own_words(rendering) -> None:
    longest = rendering.renderer.model_config.max_model_len
    body = bodies()[-1]
    messages = body["messages"]
    found = []
    for caller in (ACME, Caller("acme", "t")):
        if caller is ACME:
            await prompt(rendering, body)
        text = "tide " * longest
        longer = {**body, "messages": [*messages, {"role": "assistant", "content": "Yes."}]}
        longer["messages"] += [{"role": "user", "content": text}]
        rendering.readers = caller
        with pytest.raises(Exception, match="context length") as refused:
            await rendering.prompt(Protocol.MESSAGES, longer)
        found.append(str(refused.value))
    assert found[0] == found[1]
