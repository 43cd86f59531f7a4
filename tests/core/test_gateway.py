"""The parts of the gateway that need no server; `tests/frontends/test_gateway.py` has the whole."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.config import load
from vllm_cachescope.connectors.vllm.gateway.answer import Answer, ends, tells_usage
from vllm_cachescope.connectors.vllm.gateway.planner import OpenPlanner, has_one_prompt, with_plan
from vllm_cachescope.connectors.vllm.gateway.prefixes import CannotRender
from vllm_cachescope.prompt.open_plan import OpenPlan, OpenSpan, seal_open
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.caller import CallerDirectory
from vllm_cachescope.tenancy.owner_tags import is_unlisted
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.wire import READERS, strip

SECRET = "a secret of the tests"

ROLE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"toy",'
    b'"choices":[{"index":0,"delta":{"role":"assistant"}}],"prompt_token_ids":[1,100,538]}\n\n'
)
CONTENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"toy",'
    b'"choices":[{"index":0,"delta":{"content":"\\u00e9 \\",\\"prompt_token_ids\\":[1]"},'
    b'"token_ids":[520]}]}\n\n'
)
END = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"toy",'
    b'"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n'
)
USAGE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"toy",'
    b'"choices":[],"usage":{"prompt_tokens":16,"total_tokens":19,"completion_tokens":3}}\n\n'
)
DONE = b"data: [DONE]\n\n"
COMPLETION = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"toy","choices":'
    b'[{"index":0,"text":" a","token_ids":[7,8],"prompt_token_ids":[5,6]}]}\n\n'
)
"""Events as vLLM's Rust server 0.32 sends them."""


class Seen:
    """What an answer told the gateway."""

    def __init__(self, keeps_tokens: bool = False) -> None:
        self.tokens: list[int] = []
        self.reports: list[dict[str, Any]] = []
        self.output = 0
        self.answer = Answer(keeps_tokens, self.tokens.extend, self.reports.append, self._put_out)

    def _put_out(self, tokens: int) -> None:
        self.output += tokens


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_a_stream_is_passed_on_without_the_tokens_however_it_is_cut(size: int) -> None:
    seen = Seen()
    stream = ROLE + CONTENT + END + USAGE + DONE
    chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
    out = b"".join(b"".join(seen.answer.events(chunk)) for chunk in chunks) + seen.answer.rest()
    assert (seen.tokens, seen.output) == ([1, 100, 538], 1)
    expected = stream.replace(b',"prompt_token_ids":[1,100,538]', b"")
    expected = expected.replace(b',"token_ids":[520]', b"").replace(b"\\u00e9", "é".encode())
    assert out == expected


def test_a_client_that_asks_for_tokens_keeps_them() -> None:
    seen = Seen(keeps_tokens=True)
    out = b"".join(seen.answer.events(ROLE + COMPLETION))
    assert out == ROLE + COMPLETION
    assert (seen.tokens, seen.output) == ([1, 100, 538, 5, 6], 2)


def test_completions_tell_the_prompt_beside_each_choice() -> None:
    seen = Seen()
    (event,) = seen.answer.events(COMPLETION)
    assert b"token_ids" not in event and (seen.tokens, seen.output) == ([5, 6], 2)


def test_an_answer_in_one_piece_keeps_its_fields() -> None:
    seen = Seen()
    choice = {"index": 0, "message": {"content": "é"}, "token_ids": [1, 2]}
    answer = {
        "id": "chatcmpl-1",
        "choices": [choice],
        "prompt_token_ids": [4, 5],
        "kv_transfer_params": {"cachescope": {"rows": []}, "other": 1},
    }
    whole = json.loads(seen.answer.whole(json.dumps(answer).encode()))
    assert whole == {
        **answer,
        "choices": [{**choice, "token_ids": None}],
        "prompt_token_ids": None,
        "kv_transfer_params": {"other": 1},
    }
    assert (seen.tokens, seen.output, seen.reports) == ([4, 5], 2, [{"rows": []}])
    for odd in (b"", b"[1]", b"no JSON", b'{"choices":5}', b'{"choices":[5],"id":1}'):
        assert Seen().answer.whole(odd).replace(b" ", b"") == odd.replace(b" ", b"")


def test_the_end_of_an_answer_is_seen() -> None:
    assert [ends(event) for event in (ROLE, CONTENT, END, USAGE, DONE)] == [
        *(False, False),
        *(True, False, True),
    ]
    assert [tells_usage(event) for event in (CONTENT, END, USAGE)] == [False, False, True]


@pytest.mark.parametrize(
    ("prompt", "one"),
    [("a", True), ([1, 2], True), (["a"], False), ([[1], [2]], False), (None, True)],
)
def test_several_prompts_are_told_from_one(prompt: Any, one: bool) -> None:
    assert has_one_prompt({"prompt": prompt}) is one


class Renderer:
    """Renders each letter as a token; it may insist on a user message, as chat templates do."""

    def __init__(self) -> None:
        self.rendered: list[str] = []
        self.insists = False

    async def __call__(self, body: Mapping[str, Any]) -> list[int]:
        roles = [message["role"] for message in body["messages"]]
        if self.insists and "user" not in roles:
            raise CannotRender("there is no user message")
        text = "".join(
            f"<{m['role']}>{m['content']}" for m in [*body.get("tools", ()), *body["messages"]]
        )
        self.rendered.append(text)
        return [ord(letter) for letter in text]


MARKED: dict[str, Any] = {
    "model": "toy",
    "messages": [
        {
            "role": "system",
            "content": "Be kind.",
            "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"},
        },
        {"role": "user", "content": "Hello.", "cache_control": {"type": "ephemeral"}},
    ],
}


async def planned(planner: OpenPlanner, render: Renderer, org: str, body: Any) -> OpenPlan:
    request = READERS[Protocol.CHAT](body, (300, 3600))
    context = RequestContext(Caller(org, "s"), request, strip(body))
    return await planner.plan(context, render)


@pytest.fixture
def planner() -> OpenPlanner:
    config = load({"secret": SECRET})
    return OpenPlanner(config, CallerDirectory(SECRET.encode(), {"0" * 64: "acme"}, None))


@pytest.mark.parametrize("insists", [False, True])
async def test_only_what_ends_within_the_prompt_is_rendered(planner, insists) -> None:
    render = Renderer()
    render.insists = insists
    opened = await planned(planner, render, "name:acme", MARKED)
    assert [(span.scope, span.ttl_s) for span in opened.spans] == [
        (Scope.GLOBAL, 3600),
        (Scope.ORG, 300),
    ]
    assert opened.spans[-1].beginning is None and len(render.rendered) == 1
    prompt = [ord(letter) for letter in "<system>Be kind.<user>Hello.<assistant>"]
    ends_at = len("<system>Be kind.") + (len("<user>") if insists else 0)
    assert [span.end for span in opened.closed(prompt).spans] == [ends_at, len(prompt)]
    # A prompt that another program made in another way is shared as its narrowest part.
    odd = [7, *prompt]
    assert [span.end for span in opened.closed(odd).spans] == [len(odd)]


async def test_a_beginning_is_rendered_once_for_who_shares_it(planner) -> None:
    render = Renderer()
    for org in ("name:acme", "name:acme", "name:other"):
        await planned(planner, render, org, MARKED)
    assert len(render.rendered) == 1, "what is global is everyone's"
    planner.purge("global", None)
    await planned(planner, render, "name:acme", MARKED)
    assert len(render.rendered) == 2


async def test_what_cannot_be_rendered_has_no_boundary(planner) -> None:
    async def refuse(body: Mapping[str, Any]) -> list[int]:
        raise CannotRender("no")

    async def fail(body: Mapping[str, Any]) -> list[int]:
        raise ValueError("a mistake")

    for render in (refuse, fail):
        opened = await planned(planner, render, "name:acme", MARKED)  # type: ignore[arg-type]
        assert [span.end for span in opened.closed([1, 2, 3]).spans] == [3]


async def test_unlisted_organisations_are_told_apart(planner) -> None:
    for org, unlisted in (("name:acme", False), ("key:8f3a", True)):
        opened = await planned(planner, Renderer(), org, MARKED)
        assert is_unlisted(opened.owner) is unlisted


@pytest.mark.parametrize("odd", ["x", ["x"], 5, None, {"cachescope": "forged"}])
def test_nothing_of_a_clients_stands_where_the_plan_does(odd: Any) -> None:
    plan = OpenPlan((OpenSpan(None, Scope.ORG, "k", 300),), "nonce", bytes(16))
    extra = {"kv_transfer_params": {"cachescope": "forged"}, "other": 1}
    body = {
        "prompt": "a",
        "kv_transfer_params": odd,
        "vllm_xargs": extra,
        "sampling_params": {"extra_args": extra, "n": 1},
    }
    sent = with_plan(body, plan, SECRET.encode())
    assert sent.pop("kv_transfer_params") == {"cachescope": seal_open(plan, SECRET.encode())}
    assert sent == {
        "prompt": "a",
        "vllm_xargs": {"other": 1},
        "sampling_params": {"extra_args": {"other": 1}, "n": 1},
    }
    for sampling in (odd, {"extra_args": odd}):
        body = {"vllm_xargs": odd, "sampling_params": sampling}
        sent = with_plan(body, plan, SECRET.encode())
        assert {**sent, "kv_transfer_params": None} == {**body, "kv_transfer_params": None}
