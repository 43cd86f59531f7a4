"""Prompts that Python code marks: what is wrong is refused with its place, and no token is shared
more widely than the text that it derives from."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config_files import in_file
from vllm_cachescope import Breakpoint, Cached, Prompt
from vllm_cachescope.config import CONNECTOR, ConfigError
from vllm_cachescope.connectors.vllm.offline.planner import OfflinePlanner
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Scope

SECRET = "the secret of the tests"
VOCABULARY = ("aba", "ab", "ba", " a", "a", "b", " ")


def planner(**config: Any) -> OfflinePlanner:
    transfer = SimpleNamespace(
        kv_connector=CONNECTOR, kv_connector_extra_config=in_file({"secret": SECRET, **config})
    )
    cache = SimpleNamespace(block_size=16)
    return OfflinePlanner(SimpleNamespace(kv_transfer_config=transfer, cache_config=cache))


PLANNER = planner()


def tokenize(text: str) -> list[int]:
    """Cut ``text`` into the longest tokens that fit, from its start."""
    tokens: list[int] = []
    while text:
        number = next(i for i, token in enumerate(VOCABULARY) if text.startswith(token))
        tokens.append(number)
        text = text[len(VOCABULARY[number]) :]
    return tokens


def plan(prompt: Prompt, by: OfflinePlanner = PLANNER) -> Plan:
    (checked,) = by.check([prompt])
    return by.plan(checked, {text: tokenize(text) for text in checked.texts}).plan


def spans(prompt: Prompt) -> list[tuple[int, Scope, int, bool]]:
    return [(it.end, it.scope, it.ttl_s, it.covered) for it in plan(prompt).spans]


def test_pieces_become_a_prompt_with_breakpoints() -> None:
    text = Prompt.of("You are", Cached(" good.", "org"), " Answer!", org="acme", session="s")
    assert text == Prompt("You are good. Answer!", [Breakpoint(13, "org")], "acme", "s")
    tokens = Prompt.of(Cached([1, 2], "global", "1h"), [3], Cached((4,)))
    points = [Breakpoint(2, "global", "1h"), Breakpoint(4)]
    assert tokens == Prompt([1, 2, 3, 4], points)
    with pytest.raises(TypeError, match="all texts, or all token ids"):
        Prompt.of("text", [1])


def test_breakpoints_become_spans() -> None:
    tokens = range(100)
    assert spans(Prompt(tokens)) == [(100, Scope.ORG, 300, True)]
    assert spans(Prompt(tokens, [Breakpoint(100, "global", "1h")])) == [
        (100, Scope.GLOBAL, 3600, True)
    ]
    marked = [Breakpoint(30, "global", "1h"), Breakpoint(60), Breakpoint(90, "session", "5m")]
    assert spans(Prompt(tokens, marked, session="s")) == [
        (30, Scope.GLOBAL, 3600, True),
        (60, Scope.ORG, 300, True),
        (90, Scope.SESSION, 300, True),
        (100, Scope.SESSION, 300, False),
    ]


@pytest.mark.parametrize(
    ("prompt", "path", "says"),
    [
        (Prompt([]), "content", "at least one token"),
        (Prompt(""), "content", "at least one token"),
        (Prompt("abc", [Breakpoint(0)]), "breakpoints[0].end", "within the prompt's 3 characters"),
        (Prompt([1, 2], [Breakpoint(3)]), "breakpoints[0].end", "within the prompt's 2 tokens"),
        (
            Prompt("abc", [Breakpoint(2), Breakpoint(2)]),
            "breakpoints[1].end",
            "behind the breakpoint at 2, within the prompt's 3 characters",
        ),
        (Prompt("abc", [Breakpoint(1, ttl="2h")]), "breakpoints[0].ttl", "one of 5m, 30m, 1h"),
        (Prompt("abc", [Breakpoint(1, ttl="soon")]), "breakpoints[0].ttl", "one of 5m, 30m, 1h"),
        (
            Prompt("abc", [Breakpoint(1, "everyone")]),  # type: ignore[arg-type]
            "breakpoints[0].scope",
            "one of global, org, session",
        ),
        (
            Prompt("abc", [Breakpoint(1, "org"), Breakpoint(2, "global")]),
            "breakpoints[1].scope",
            "org, session, as the earlier breakpoints[0] has narrowed it",
        ),
        (
            Prompt("abc", [Breakpoint(1), Breakpoint(2, ttl="1h")]),
            "breakpoints[1].ttl",
            "at most 5m, the lifetime of the earlier breakpoints[0]",
        ),
        (
            Prompt("abcde", [Breakpoint(end) for end in range(1, 6)]),
            "breakpoints[4]",
            "at most 4 breakpoints",
        ),
        (
            Prompt("abc", [Breakpoint(1, "session")]),
            "breakpoints[0].scope",
            "global, org, as there is no session",
        ),
        (Prompt("abc", org=""), "org", "an organisation's name or id"),
        (Prompt("abc", org="global"), "org", "'global' is a scope"),
        (Prompt("abc", session=7), "session", "Unicode text"),  # type: ignore[arg-type]
    ],
)
def test_a_mistake_is_refused_with_its_place(prompt: Prompt, path: str, says: str) -> None:
    with pytest.raises(BadRequest) as refused:
        PLANNER.check([Prompt("fine"), prompt])
    assert refused.value.path == f"prompts[1].{path}"
    assert says in refused.value.allowed


def test_an_organisation_is_the_one_of_that_name_over_http() -> None:
    listed = planner(tenants={"0" * 64: "acme"})
    gateway = planner(tenants={"0" * 64: "acme"}, org_header="X-Org")
    tags = OwnerTags(SECRET.encode())
    for by, name, org in (
        (listed, None, "anonymous"),
        (listed, "acme", "name:acme"),
        (listed, "globex", "name:globex"),
        (gateway, "acme", "name:acme"),
        (gateway, "globex", "header:globex"),
        (gateway, "key:0123456789abcdef", "key:0123456789abcdef"),
    ):
        owner = plan(Prompt([1], org=name), by).owner
        assert owner.startswith(tags.prefix(org)), (name, org)


@given(st.lists(st.text("ab ", min_size=1, max_size=8), min_size=2, max_size=4))
def test_a_token_that_straddles_a_breakpoint_is_the_narrower_spans(pieces: list[str]) -> None:
    scopes = ("global", "org", "session")
    prompt = Prompt.of(
        *(Cached(piece, scope) for piece, scope in zip(pieces, scopes, strict=False)),
        *pieces[3:],
        org="acme",
        session="s",
    )
    tokens = tokenize("".join(pieces))
    ends = {span.scope: span.end for span in plan(prompt).spans}
    for number, scope in enumerate(Scope):
        shared = "".join(VOCABULARY[token] for token in tokens[: ends.get(scope, 0)])
        assert scope is Scope.SESSION or "".join(pieces[: number + 1]).startswith(shared)
    assert max(ends.values()) == len(tokens)


def test_an_engine_without_the_connector_is_refused() -> None:
    for other in (
        None,
        SimpleNamespace(kv_connector="NixlConnector", kv_connector_extra_config={}),
    ):
        with pytest.raises(ConfigError, match=f'"kv_connector": "{CONNECTOR}"'):
            OfflinePlanner(SimpleNamespace(kv_transfer_config=other))
