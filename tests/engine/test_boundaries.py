"""Where breakpoints end in the tokens of real chat templates, rendered by vLLM itself."""

import asyncio
import copy
import json
import random

import pytest

from demo.session import agent_session, to_chat
from tests.engine.rendered import Rendering
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Caller

TEMPLATES = ["chatml", "inst", "headers"]
EPHEMERAL = {"type": "ephemeral"}


@pytest.fixture(scope="session")
def renderings(tiny_model):
    return {template: Rendering(str(tiny_model), template) for template in TEMPLATES}


def tool(name, about="things"):
    return {
        "name": name,
        "description": f"Does {about}.",
        "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}},
    }


def text(words):
    return {"type": "text", "text": words}


def golden_body(tools=True):
    body = {
        "model": "m",
        "max_tokens": 4,
        "tools": [tool("alpha"), tool("beta")],
        "system": [text("Be brief."), text("Know the tides.")],
        "messages": [
            {"role": "user", "content": [text("When is high water?"), text("And low?")]},
            {
                "role": "assistant",
                "content": [
                    text("Let me look."),
                    {"type": "tool_use", "id": "c1", "name": "alpha", "input": {"x": 1}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "6 am"}],
            },
            {"role": "assistant", "content": [text("At six.")]},
            {"role": "user", "content": [text("Thanks."), text("Who told you?")]},
        ],
    }
    if not tools:
        del body["tools"]
        del body["messages"][1:3]
    return body


def marked(body, *path):
    """Return ``body`` with a breakpoint on the block at ``path``."""
    body = copy.deepcopy(body)
    block = body
    for step in path:
        block = block[step]
    block["cache_control"] = EPHEMERAL
    return body


def covered_end(cuts, ends):
    """Return where the last segment that a breakpoint covers ends."""
    return max((end for cut, end in zip(cuts, ends, strict=True) if cut.covered), default=0)


# What stands before the end of the covered tokens, and what after it.
GOLDEN = [
    # The tools come after the system text: none of them can be had without it.
    ("chatml", ("tools", 0), "<|im_start|>system\n", "Be brief."),
    ("chatml", ("tools", 1), "<|im_start|>system\n", "Be brief."),
    ("chatml", ("system", 0), "system\nBe brief.", "Know the tides."),
    ("chatml", ("system", 1), '"arguments" inside <tool_call>.<|im_end|>\n', "<|im_start|>user"),
    ("chatml", ("messages", 0, "content", 0), "When is high water?", "\nAnd low?"),
    ("chatml", ("messages", 0, "content", 1), "And low?<|im_end|>\n", "<|im_start|>assistant"),
    ("chatml", ("messages", 1, "content", 0), "Let me look.", "\n<tool_call>"),
    ("chatml", ("messages", 1, "content", 1), "</tool_call><|im_end|>\n", "<|im_start|>user"),
    ("chatml", ("messages", 2, "content", 0), "</tool_response><|im_end|>\n", "<|im_start|>assis"),
    ("chatml", ("messages", 3, "content", 0), "At six.<|im_end|>\n", "<|im_start|>user\nThanks"),
    ("chatml", ("messages", 4, "content", 0), "user\nThanks.", "\nWho told you?"),
    ("chatml", ("messages", 4, "content", 1), "<|im_start|>assistant\n", ""),
    # The tools wander to the last user turn: with them, no earlier end stays where it is.
    ("inst", ("tools", 1), "<s>", "[INST]Be brief."),
    ("inst", ("system", 1), "<s>", "[INST]Be brief."),
    ("inst", ("messages", 0, "content", 1), "<s>", "[INST]Be brief."),
    ("inst", ("messages", 3, "content", 0), "<s>", "[INST]Be brief."),
    ("inst", ("messages", 4, "content", 0), "[/AVAILABLE_TOOLS][INST]Thanks.", "\nWho told you?"),
    ("inst", ("messages", 4, "content", 1), "Who told you?[/INST]", ""),
    # A reminder closes the prompt; what opens it is common to all that may follow.
    ("headers", ("tools", 0), '"integer"}}}}}', '\n{"type": "function"'),
    ("headers", ("tools", 1), '"integer"}}}}}', "\n\nBe brief."),
    ("headers", ("system", 0), "\n\nBe brief.", "Know the tides."),
    ("headers", ("system", 1), "Know the tides.<|eot_id|><|start_header_id|>", "user"),
    ("headers", ("messages", 0, "content", 0), "When is high water?", "\nAnd low?"),
    ("headers", ("messages", 0, "content", 1), "And low?<|eot_id|><|start_header_id|>", "assis"),
    ("headers", ("messages", 1, "content", 0), "Let me look.", "\nalpha("),
    ("headers", ("messages", 1, "content", 1), "<|eot_id|><|start_header_id|>", "tool<|end_header"),
    ("headers", ("messages", 2, "content", 0), "6 am<|eot_id|><|start_header_id|>", "assistant"),
    ("headers", ("messages", 3, "content", 0), "At six.<|eot_id|><|start_header_id|>", "user"),
    ("headers", ("messages", 4, "content", 0), "\n\nThanks.", "\nWho told you?"),
    ("headers", ("messages", 4, "content", 1), "assistant<|end_header_id|>\n\n", ""),
]
GOLDEN_WITHOUT_TOOLS = [
    ("inst", ("system", 0), "<s>[INST]Be brief.", "Know the tides."),
    ("inst", ("system", 1), "<s>[INST]Be brief.Know the tides.", "\n\nWhen"),
    ("inst", ("messages", 0, "content", 0), "When is high water?", "\nAnd low?"),
    ("inst", ("messages", 0, "content", 1), "And low?[/INST]", "At six."),
    ("inst", ("messages", 1, "content", 0), "At six.</s>", "[INST]Thanks."),
    ("inst", ("messages", 2, "content", 0), "[INST]Thanks.", "\nWho told you?"),
    ("chatml", ("system", 1), "Know the tides.<|im_end|>\n", "<|im_start|>user"),
    ("headers", ("system", 1), "Know the tides.<|eot_id|><|start_header_id|>", "user"),
]


@pytest.mark.parametrize(
    ("template", "path", "before", "after", "tools"),
    [(*golden, True) for golden in GOLDEN] + [(*golden, False) for golden in GOLDEN_WITHOUT_TOOLS],
)
async def test_golden_positions(renderings, template, path, before, after, tools):
    rendering = renderings[template]
    body = marked(golden_body(tools), *path)
    tokens, text, cuts, ends = await rendering.cut(Protocol.MESSAGES, body)
    end = covered_end(cuts, ends)
    covered = rendering.tokenizer.decode(tokens[:end])
    assert text.startswith(covered)
    assert covered.endswith(before)
    assert text[len(covered) :].startswith(after)
    assert (end == len(tokens)) == (after == "")


WORDS = "tide|quay|42|  spaced  |\nnew line\n|naïve|☂|<|im_end|>|[INST]|</s>|<|eot_id|>|{}|a|the"


def draw_text(chance):
    words = WORDS.replace("<|", "\0").replace("|>", "\1").split("|")
    words = [word.replace("\0", "<|").replace("\1", "|>") for word in words]
    return "".join(chance.choices([*words, " ", " "], k=chance.randrange(1, 12))).strip() or "x"


def draw_body(chance):
    """Return a random conversation with tools, some of whose texts look like special tokens."""
    body = {
        "model": "m",
        "max_tokens": 4,
        "tools": [tool(f"tool_{i}", draw_text(chance)) for i in range(chance.randrange(1, 4))],
        "system": [text(draw_text(chance)) for _ in range(chance.randrange(1, 4))],
        "messages": [],
    }
    for i in range(chance.choice([1, 3, 5])):
        if i % 2 == 0 and i and chance.random() < 0.5:
            # The assistant's turn before it called a tool.
            call = {"type": "tool_use", "id": f"c{i}", "name": "tool_0", "input": {"x": i}}
            body["messages"][-1]["content"].append(call)
            result = {"type": "tool_result", "tool_use_id": f"c{i}", "content": draw_text(chance)}
            body["messages"].append({"role": "user", "content": [result]})
        else:
            blocks = [text(draw_text(chance)) for _ in range(chance.randrange(1, 3))]
            body["messages"].append({"role": ["user", "assistant"][i % 2], "content": blocks})
    return body


def draw_twins(chance):
    """Return two bodies that have everything in common up to a breakpoint, and the breakpoint on
    a random block; what comes after it is drawn anew."""
    one, other = draw_body(chance), draw_body(chance)
    region = chance.choice(["tools", "system", "messages"])
    if region == "messages":
        at = chance.randrange(len(one["messages"]))
        inside = chance.randrange(len(one["messages"][at]["content"]))
        path = ("messages", at, "content", inside)
        other = {**copy.deepcopy(one), "messages": copy.deepcopy(one["messages"][: at + 1])}
        last = other["messages"][at]
        del last["content"][inside + 1 :]
        if last["role"] == "user" and last["content"][0]["type"] == "text":
            last["content"].append(text(draw_text(chance)))
        for turn in range(chance.randrange(3)):
            role = ["user", "assistant"][(at + 1 + turn) % 2]
            other["messages"].append({"role": role, "content": [text(draw_text(chance))]})
    else:
        at = chance.randrange(len(one[region]))
        path = (region, at)
        other[region] = copy.deepcopy(one[region][: at + 1]) + other[region][:1]
        if region == "system":
            other["tools"] = copy.deepcopy(one["tools"])
    return marked(one, *path), marked(other, *path)


@pytest.mark.parametrize("protocol", [Protocol.MESSAGES, Protocol.CHAT])
@pytest.mark.parametrize("template", TEMPLATES)
async def test_what_comes_after_a_breakpoint_changes_no_token_before_its_end(
    renderings, template, protocol
):
    rendering = renderings[template]
    chance = random.Random(f"{template} {protocol}")
    found = 0
    for _ in range(60):
        cuts = []
        twins = draw_twins(chance)
        if protocol is Protocol.CHAT:
            twins = [{"model": "m", **to_chat(body)} for body in twins]
            if "cache_control" not in json.dumps(twins):
                # It stood on a tool call, which in this format cannot carry it.
                continue
        for body in twins:
            tokens, _, segments, ends = await rendering.cut(protocol, body)
            assert ends == sorted(ends)
            assert ends[-1] == len(tokens)
            cuts.append((tokens, covered_end(segments, ends)))
        (one, end), (other, other_end) = cuts
        both = min(end, other_end)
        assert one[:both] == other[:both]
        found += both
    # Conservative is not the same as useless.
    assert found > (60 if template == "inst" else 600)


async def test_responses_are_cut_where_chats_are(renderings):
    rendering = renderings["chatml"]

    def part(words, **marks):
        return {"type": "input_text", "text": words, **marks}

    def body(*tail, **marks):
        return {
            "model": "m",
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": [part("When is high water?", **marks), *tail]},
            ],
        }

    for tail in ((), (part("And low?"),), (part("And?"), part("Why?"))):
        tokens, _, cuts, ends = await rendering.cut(
            Protocol.RESPONSES, body(*tail, cache_control=EPHEMERAL)
        )
        decoded = rendering.tokenizer.decode(tokens[: covered_end(cuts, ends)])
        if tail:
            assert decoded.endswith("When is high water?")
        else:
            assert covered_end(cuts, ends) == len(tokens)


@pytest.mark.parametrize(
    # The second puts tools before the latest question, wherever the system prompt is.
    ("template", "behind"),
    [("chatml", True), ("inst", None), ("headers", False)],
)
async def test_where_a_template_renders_tools(renderings, template, behind):
    found = await renderings[template].boundaries.renders_tools_behind_system()
    assert found is behind


@pytest.mark.parametrize("template", TEMPLATES)
async def test_a_history_is_not_tokenised_again(renderings, template):
    """Apart from the one time the server itself tokenises the prompt."""
    rendering = renderings[template]
    session = agent_session(seed=1, turns=40, tools=6, rules=6)
    extra = []
    for turn in range(30, 40):
        body = {"model": "m", "max_tokens": 4, **session.body(turn)}
        body = marked(body, "system", 1)
        # The last message, and the last one of the request before.
        for at in (-1, -3):
            body = marked(body, "messages", at, "content", -1)
        rendering.tokenized.clear()
        _, text, _, _ = await rendering.cut(Protocol.MESSAGES, body)
        prompt, *more = rendering.tokenized
        assert prompt == text
        extra.append(sum(map(len, more)))
    tools_and_system = len((await rendering.prompt(Protocol.MESSAGES, session.body(0)
                            | {"model": "m", "max_tokens": 4}))[1])  # fmt: skip
    history = len(text) - tools_and_system
    assert history > 20_000
    # Tools and system once for all; then the last few messages, which with one template the
    # tools wander behind.
    assert extra[0] < 2 * tools_and_system + 0.1 * history
    allowed = 0.1 * history + (tools_and_system if template == "inst" else 0)
    assert max(extra[1:]) < allowed


async def asked(rendering, body, caller):
    """Return how many texts were tokenised to find the boundaries of ``body`` for ``caller``."""
    rendering.tokenized.clear()
    await rendering.cut(Protocol.MESSAGES, body, caller)
    return len(rendering.tokenized) - 1  # without the prompt itself


@pytest.mark.parametrize(
    ("scope", "found_by"),
    [
        ("global", {"other session", "other org", "no session"}),
        ("org", {"other session", "no session"}),
        ("session", set()),
    ],
)
async def test_what_was_rendered_is_found_by_whom_it_is_shared_with(renderings, scope, found_by):
    rendering = renderings["chatml"]
    rendering.boundaries.purge()
    body = golden_body(tools=False)
    body["system"][1]["cache_control"] = EPHEMERAL | {"scope": scope}
    first = await asked(rendering, body, Caller("acme", "one"))
    assert first > 0 == await asked(rendering, body, Caller("acme", "one"))
    others = {
        "other session": Caller("acme", "other"),
        "other org": Caller("globex", "one"),
        "no session": Caller("acme"),
    }
    for other, caller in others.items():
        wanted = 0 if other in found_by else first
        assert await asked(rendering, body, caller) == wanted, other


async def test_what_was_rendered_is_purged_with_its_owner(renderings):
    rendering = renderings["chatml"]
    rendering.boundaries.purge()
    body = marked(golden_body(), "system", 1)
    acme, globex = Caller("acme", "s"), Caller("globex", "s")
    for caller in (acme, globex):
        await rendering.cut(Protocol.MESSAGES, body, caller)
    rendering.boundaries.purge("acme")
    assert await asked(rendering, body, globex) == 0 < await asked(rendering, body, acme)


async def test_parts_are_rendered_while_the_server_tokenises(renderings):
    rendering = renderings["chatml"]
    session = agent_session(seed=2, turns=3, tools=2, rules=2)
    body = marked({"model": "m", **session.body(2), "max_tokens": 4}, "messages", -1, "content", -1)
    expected, rendered = await rendering.cut(Protocol.MESSAGES, body), []

    async def render():
        rendered.append(await rendering.rendered(Protocol.MESSAGES, body))

    rendering.tokenized.clear()
    rendering.meanwhile = render
    try:
        # Would never end if a part had to wait for the tokens of the whole.
        tokens, text = await asyncio.wait_for(rendering.prompt(Protocol.MESSAGES, body), 30)
    finally:
        rendering.meanwhile = None
    assert rendering.tokenized == [text]
    ((planned, prefixes),) = rendered
    ends = await rendering.boundaries.ends(prefixes, Protocol.MESSAGES, tokens, text)
    assert (tokens, text, planned, ends) == expected
