from collections.abc import Iterable
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming
from pydantic import TypeAdapter

from tests.core.wire_bodies import EPHEMERAL, PATHS, TTLS
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.request import Mark, Part, PromptRequest, Protocol, Region
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.wire import READERS, protocol_of, reader_for
from vllm_cachescope.wire.openai_chat import read as read_chat
from vllm_cachescope.wire.openai_completions import read as read_completions
from vllm_cachescope.wire.openai_responses import read as read_responses

TOOLS, SYSTEM, MESSAGES = Region.TOOLS, Region.SYSTEM, Region.MESSAGES
EXPLICIT = {"mode": "explicit"}
CALLS = [{"id": "c", "type": "function", "function": {"name": "a", "arguments": "{}"}}]


def text(words: str = "words", **marker: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **marker}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages), **fields}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def shape(request: PromptRequest) -> list[tuple[Region, str]]:
    return [(part.region, part.path) for part in request.parts]


def marks(request: PromptRequest) -> list[tuple[str, str]]:
    return [(part.path, part.mark.path) for part in request.parts if part.mark]


def refusal(read: Any, body: dict[str, Any]) -> BadRequest:
    with pytest.raises(BadRequest) as refused:
        read(body, TTLS, strict=True)
    return refused.value


class TestChat:
    def test_every_kind_of_part(self) -> None:
        function = {"name": "a", "parameters": {}}
        request = read_chat(
            chat(
                {"role": "system", "content": "s"},
                {"role": "developer", "content": [text("d", cache_control=EPHEMERAL)]},
                {"role": "user", "content": "u", "name": "kim"},
                {"role": "assistant", "content": None, "tool_calls": CALLS, "refusal": None},
                {"role": "tool", "tool_call_id": "c", "content": "r", "cache_control": EPHEMERAL},
                {"role": "system", "content": "late"},
                tools=[{"type": "function", "function": function, "cache_control": EPHEMERAL}],
                documents=[{"text": "x"}],
                reasoning_effort="low",
            ),
            TTLS,
        )
        assert request.parts == (
            Part(
                TOOLS,
                "tools[0]",
                {"type": "function", "function": function},
                mark=Mark("tools[0].cache_control"),
            ),
            Part(SYSTEM, "messages[0].content", "s", "system"),
            Part(
                SYSTEM,
                "messages[1].content[0]",
                text("d"),
                "developer",
                Mark("messages[1].content[0].cache_control"),
            ),
            Part(MESSAGES, "documents", [{"text": "x"}]),
            Part(MESSAGES, "messages[2]", {"name": "kim"}, "user"),
            Part(MESSAGES, "messages[2].content", "u", "user"),
            Part(MESSAGES, "messages[3].content", None, "assistant"),
            Part(MESSAGES, "messages[3].tool_calls", CALLS, "assistant"),
            Part(MESSAGES, "messages[4]", {"tool_call_id": "c"}, "tool"),
            Part(MESSAGES, "messages[4].content", "r", "tool", Mark("messages[4].cache_control")),
            Part(MESSAGES, "messages[5].content", "late", "system"),
        )
        assert not request.automatic
        assert request.params == {"reasoning_effort": "low"}

    def test_a_marker_on_a_message_ends_the_message(self) -> None:
        message = {"role": "assistant", "content": "x", "tool_calls": CALLS}
        request = read_chat(chat({**message, "cache_control": EPHEMERAL}), TTLS)
        assert marks(request) == [("messages[0].tool_calls", "messages[0].cache_control")]

    @pytest.mark.parametrize(
        ("message", "path"),
        [
            ({**user(text()), "cache_control": EPHEMERAL}, "messages[0].cache_control"),
            (
                {"role": "user", "content": "", "cache_control": EPHEMERAL},
                "messages[0].cache_contr",
            ),
            (
                {"role": "user", "content": "x", "prompt_cache_breakpoint": EXPLICIT},
                "messages[0].prompt_cache_breakpoint",
            ),
            (
                {"role": "assistant", "tool_calls": [{**CALLS[0], "cache_control": EPHEMERAL}]},
                "messages[0].tool_calls[0].cache_control",
            ),
            (
                user(text("", prompt_cache_breakpoint=EXPLICIT)),
                "messages[0].content[0].prompt_cache_breakpoint",
            ),
        ],
    )
    def test_misplaced_markers(self, message: dict[str, Any], path: str) -> None:
        assert refusal(read_chat, chat(message)).path.startswith(path)

    @pytest.mark.parametrize(
        ("tool", "path"),
        [
            ({"function": {"cache_control": EPHEMERAL}}, "tools[0].function.cache_control"),
            ({"prompt_cache_breakpoint": EXPLICIT}, "tools[0].prompt_cache_breakpoint"),
        ],
    )
    def test_misplaced_markers_on_tools(self, tool: dict[str, Any], path: str) -> None:
        assert refusal(read_chat, chat(tools=[tool])).path == path

    def test_four_cache_controls_at_most(self) -> None:
        """The same rule as in Messages, order included."""
        blocks = [text(cache_control=EPHEMERAL)] * 5
        assert refusal(read_chat, chat(user(*blocks))).path.startswith("messages[0].content[4]")
        hour = text(cache_control={**EPHEMERAL, "ttl": "1h"})
        late = refusal(read_chat, chat(user(text(cache_control=EPHEMERAL), hour)))
        assert late.path == "messages[0].content[1].cache_control.ttl"

    def test_the_request_lifetime_is_the_default_of_the_order_rule(self) -> None:
        hour = text(cache_control={**EPHEMERAL, "ttl": "1h"})
        bare = text(cache_control=EPHEMERAL)
        options = {"prompt_cache_options": {"ttl": "12h"}}
        assert len(marks(read_chat(chat(user(bare, hour), **options), TTLS))) == 2
        assert refusal(read_chat, chat(user(hour, bare), **options)).path.endswith("ttl")

    def test_the_client_package_allows_breakpoints_where_we_read_them(self) -> None:
        given: dict[str, Any] = chat(
            user(
                text(prompt_cache_breakpoint={**EXPLICIT, "ttl": "12h"}),
                {
                    "type": "image_url",
                    "image_url": {"url": "u"},
                    "prompt_cache_breakpoint": EXPLICIT,
                },
            ),
            prompt_cache_options={"mode": "explicit", "ttl": "30m"},
            prompt_cache_key="k",
            prompt_cache_retention="24h",
        )
        # Kept in a variable: what it leaves to be validated lazily needs it alive.
        adapter = TypeAdapter(CompletionCreateParamsNonStreaming)
        parsed: Any = adapter.validate_python(given)
        blocks = list(next(iter(parsed["messages"]))["content"])
        assert all(block["prompt_cache_breakpoint"]["mode"] == "explicit" for block in blocks)
        request = read_chat(given, TTLS)
        at = "messages[0].content"
        assert marks(request) == [
            (f"{at}[{i}]", f"{at}[{i}].prompt_cache_breakpoint") for i in (0, 1)
        ]
        assert request.parts[0].mark == Mark(f"{at}[0].prompt_cache_breakpoint", 43200)
        assert (request.automatic, request.ttl_s, request.session) == (False, 1800, "k")


class TestBreakpoints:
    """OpenAI's own, which leave the implicit breakpoint in place unless told otherwise."""

    def request(self, count: int, mode: str | None) -> PromptRequest:
        blocks = [text(prompt_cache_breakpoint=EXPLICIT)] * count
        options = {} if mode is None else {"prompt_cache_options": {"mode": mode}}
        return read_chat(chat(user(*blocks, text()), **options), TTLS)

    @pytest.mark.parametrize(
        ("mode", "count", "automatic", "kept"),
        [
            (None, 0, True, []),
            (None, 2, True, [0, 1]),
            ("implicit", 6, True, [3, 4, 5]),
            ("explicit", 6, False, [2, 3, 4, 5]),
            ("explicit", 0, False, []),
        ],
    )
    def test_the_latest_count(
        self, mode: str | None, count: int, automatic: bool, kept: list[int]
    ) -> None:
        request = self.request(count, mode)
        assert request.automatic is automatic
        assert [i for i, part in enumerate(request.parts) if part.mark] == kept

    def test_lifetimes_in_any_order(self) -> None:
        half, long = ({**EXPLICIT, "ttl": ttl} for ttl in ("30m", "12h"))
        blocks = [text(prompt_cache_breakpoint=half), text(prompt_cache_breakpoint=long)]
        request = read_chat(chat(user(*blocks)), TTLS)
        assert [part.mark.ttl_s for part in request.parts if part.mark] == [1800, 43200]

    @pytest.mark.parametrize("fields", [{}, {"cache_control": EPHEMERAL}])
    def test_not_mixed_with_cache_control(self, fields: dict[str, Any]) -> None:
        first = text() if fields else text(cache_control=EPHEMERAL)
        given = chat(user(first, text(prompt_cache_breakpoint=EXPLICIT)), **fields)
        refused = refusal(read_chat, given)
        assert refused.path == "messages[0].content[1].prompt_cache_breakpoint"

    @pytest.mark.parametrize(
        ("marker", "field"),
        [
            ({}, ".mode"),
            ({"mode": "implicit"}, ".mode"),
            ({**EXPLICIT, "ttl": "7h"}, ".ttl"),
            ({**EXPLICIT, "scope": "org"}, ".scope"),
            ("explicit", ""),
        ],
    )
    def test_refused(self, marker: object, field: str) -> None:
        refused = refusal(read_chat, chat(user(text(prompt_cache_breakpoint=marker))))
        assert refused.path == f"messages[0].content[0].prompt_cache_breakpoint{field}"


def minimal(protocol: Protocol, **fields: Any) -> dict[str, Any]:
    prompt: dict[Protocol, dict[str, Any]] = {
        Protocol.CHAT: {"messages": [{"role": "user", "content": "x"}]},
        Protocol.RESPONSES: {"input": "x"},
        Protocol.COMPLETIONS: {"prompt": "x"},
    }
    return {"model": "m", **prompt[protocol], **fields}


OPENAI = [Protocol.CHAT, Protocol.RESPONSES, Protocol.COMPLETIONS]


@pytest.mark.parametrize("protocol", OPENAI)
class TestOptions:
    def read(self, protocol: Protocol, **fields: Any) -> PromptRequest:
        return READERS[protocol](minimal(protocol, **fields), TTLS)

    def test_nothing_asked_for(self, protocol: Protocol) -> None:
        request = self.read(protocol)
        assert (request.protocol, request.model) == (protocol, "m")
        assert (request.automatic, request.ttl_s, request.session) == (True, None, None)
        assert (request.diagnose, request.previous_id, request.prewarm) == (False, None, False)

    @pytest.mark.parametrize(
        ("fields", "ttl_s"),
        [
            ({"prompt_cache_options": {"ttl": "30m"}}, 1800),
            ({"prompt_cache_options": {}}, None),
            ({"prompt_cache_retention": "24h"}, 86400),
            ({"prompt_cache_retention": "in_memory"}, None),
            ({"prompt_cache_retention": "in-memory"}, None),
            ({"prompt_cache_retention": None}, None),
            ({"prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "12h"}}, 43200),
        ],
    )
    def test_lifetime(self, protocol: Protocol, fields: dict[str, Any], ttl_s: int | None) -> None:
        request = self.read(protocol, **fields)
        assert (request.ttl_s, request.automatic) == (ttl_s, True)

    @pytest.mark.parametrize(
        ("fields", "session"),
        [
            ({"prompt_cache_key": "k"}, "k"),
            ({"prompt_cache_key": ""}, None),
            ({"prompt_cache_key": "k", "session_id": "s"}, "s"),
            ({"prompt_cache_key": "k", "session_id": 7}, "k"),
            ({"session_id": "\ud800"}, None),
        ],
    )
    def test_session(self, protocol: Protocol, fields: dict[str, Any], session: str | None) -> None:
        assert self.read(protocol, **fields).session == session

    def test_comparison(self, protocol: Protocol) -> None:
        request = self.read(protocol, prompt_cache_options={"comparison_response_id": "r"})
        assert (request.diagnose, request.previous_id) == (True, "r")
        request = self.read(protocol, prompt_cache_options={"comparison_response_id": None})
        assert (request.diagnose, request.previous_id) == (False, None)

    def test_cache_control_at_the_top_level(self, protocol: Protocol) -> None:
        marker = {**EPHEMERAL, "ttl": "1h", "scope": "org"}
        request = self.read(protocol, cache_control=marker)
        assert not request.automatic
        assert request.parts[-1].mark == Mark("cache_control", 3600, Scope.ORG)

    @pytest.mark.parametrize(
        ("fields", "path"),
        [
            ({"prompt_cache_key": 7}, "prompt_cache_key"),
            ({"prompt_cache_key": "\ud800"}, "prompt_cache_key"),
            ({"prompt_cache_retention": "1h"}, "prompt_cache_retention"),
            ({"prompt_cache_options": "explicit"}, "prompt_cache_options"),
            ({"prompt_cache_options": {"mode": "auto"}}, "prompt_cache_options.mode"),
            ({"prompt_cache_options": {"ttl": "2m"}}, "prompt_cache_options.ttl"),
            ({"prompt_cache_options": {"tll": "30m"}}, "prompt_cache_options.tll"),
            (
                {"prompt_cache_options": {"comparison_response_id": 1}},
                "prompt_cache_options.comparison_response_id",
            ),
            ({"prompt_cache_options": {"prewarm": 1}}, "prompt_cache_options.prewarm"),
            ({"cache_control": {"type": "x"}}, "cache_control.type"),
        ],
    )
    def test_refused(self, protocol: Protocol, fields: dict[str, Any], path: str) -> None:
        assert refusal(READERS[protocol], minimal(protocol, **fields)).path == path


def test_a_retention_the_operator_does_not_allow() -> None:
    with pytest.raises(BadRequest) as refused:
        given = minimal(Protocol.COMPLETIONS, prompt_cache_retention="24h")
        read_completions(given, (300, 3600), strict=True)
    assert "24h" not in refused.value.allowed


class TestResponses:
    def test_every_kind_of_part(self) -> None:
        reasoning = {"type": "reasoning", "summary": [], "content": [text("hm")]}
        call = {"type": "function_call", "call_id": "c", "name": "a", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "c"}
        items = [
            {"role": "developer", "content": "d"},
            user({"type": "input_text", "text": "u", "cache_control": EPHEMERAL}),
            reasoning,
            call,
            {**output, "output": [{"type": "input_text", "text": "o", "cache_control": EPHEMERAL}]},
            {**output, "output": "plain", "cache_control": EPHEMERAL},
            {"role": "user", "content": "last", "cache_control": EPHEMERAL},
        ]
        request = read_responses(
            {"model": "m", "instructions": "i", "tools": [{"name": "a"}], "input": items}, TTLS
        )
        assert shape(request) == [
            (TOOLS, "tools[0]"),
            (SYSTEM, "instructions"),
            (SYSTEM, "input[0].content"),
            (MESSAGES, "input[1].content[0]"),
            (MESSAGES, "input[2]"),
            (MESSAGES, "input[3]"),
            (MESSAGES, "input[4]"),
            (MESSAGES, "input[5]"),
            (MESSAGES, "input[6].content"),
        ]
        assert marks(request) == [
            ("input[1].content[0]", "input[1].content[0].cache_control"),
            ("input[4]", "input[4].output[0].cache_control"),
            ("input[5]", "input[5].cache_control"),
            ("input[6].content", "input[6].cache_control"),
        ]
        assert [part.content for part in request.parts[4:6]] == [reasoning, call]

    def test_earlier_turns_come_before_the_input(self) -> None:
        given = {"previous_response_id": "r", "input": [{"role": "system", "content": "s"}]}
        request = read_responses(given, TTLS)
        assert shape(request) == [
            (MESSAGES, "previous_response_id"),
            (MESSAGES, "input[0].content"),
        ]

    def test_string_input(self) -> None:
        assert read_responses({"input": "x"}, TTLS).parts == (Part(MESSAGES, "input", "x"),)

    def test_prewarm(self) -> None:
        given = minimal(Protocol.RESPONSES, prompt_cache_options={"prewarm": True})
        assert read_responses(given, TTLS).prewarm

    @pytest.mark.parametrize(
        ("item", "path"),
        [
            (
                {"type": "reasoning", "summary": [], "cache_control": EPHEMERAL},
                "input[0].cache_control",
            ),
            ({**user(text()), "cache_control": EPHEMERAL}, "input[0].cache_control"),
            (
                {"type": "function_call_output", "prompt_cache_breakpoint": EXPLICIT},
                "input[0].prompt_cache_breakpoint",
            ),
        ],
    )
    def test_misplaced_markers(self, item: dict[str, Any], path: str) -> None:
        assert refusal(read_responses, {"input": [item]}).path == path

    def test_the_client_package_allows_breakpoints_where_we_read_them(self) -> None:
        block = {"type": "input_text", "text": "o", "prompt_cache_breakpoint": EXPLICIT}
        given: dict[str, Any] = {
            "model": "m",
            "input": [
                user(block),
                {"type": "function_call_output", "call_id": "c", "output": [block]},
            ],
            "prompt_cache_options": {
                "mode": "implicit",
                "ttl": "12h",
                "comparison_response_id": "r",
                "prewarm": False,
            },
        }
        parsed: Any = TypeAdapter(ResponseCreateParamsNonStreaming).validate_python(given)
        assert parsed["prompt_cache_options"] == given["prompt_cache_options"]
        assert [path for _, path in marks(read_responses(given, TTLS))] == [
            "input[0].content[0].prompt_cache_breakpoint",
            "input[1].output[0].prompt_cache_breakpoint",
        ]


@pytest.mark.parametrize("prompt", ["x", [1, 2], ["x", "y"], [[1], [2]]])
def test_completions_are_one_part(prompt: object) -> None:
    request = read_completions({"model": "m", "prompt": prompt, "suffix": "s"}, TTLS)
    assert request.parts == (Part(MESSAGES, "prompt", prompt),)
    assert request.params == {"suffix": "s"}


@pytest.mark.parametrize(("protocol", "path"), PATHS.items())
def test_paths(protocol: Protocol, path: str) -> None:
    for prefix in ("", "/gateway/eu"):
        assert protocol_of(prefix + path) is protocol
        assert reader_for(prefix + path) is READERS[protocol]


@pytest.mark.parametrize(
    "path", ["", "/", "/v1/messages/count_tokens", "/v1/models", "/v1/responses/r", "/completions"]
)
def test_other_paths(path: str) -> None:
    assert protocol_of(path) is None
    assert reader_for(path) is None


def test_protocols_all_have_a_reader() -> None:
    readers: Iterable[Protocol] = READERS
    assert set(readers) == set(Protocol)
