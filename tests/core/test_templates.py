"""The demo's chat templates: what each makes of a conversation, and that none breaks on one."""

from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from demo.session import agent_session, to_chat

TEMPLATES = Path(__file__).parents[2] / "demo" / "templates"
NAMES = ["chatml", "inst", "headers"]

TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
SYSTEM = {"role": "system", "content": "SYS"}
CONVERSATION = [
    SYSTEM,
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "R1"},
    {"role": "user", "content": "Q2"},
]


def render(name, messages, tools=None, generate=True):
    source = (TEMPLATES / f"{name}.jinja").read_text()
    rendered, _ = render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=generate
    )
    return rendered[0]


def test_chatml_puts_the_tools_after_the_system_text():
    assert render("chatml", CONVERSATION, [TOOL]) == (
        "<|im_start|>system\nSYS\n\n"
        "# Tools\nEach line inside <tools> describes one function as JSON.\n<tools>\n"
        '{"type": "function", "function": {"name": "look", "description": "Looks.", '
        '"parameters": {}}}\n</tools>\n'
        'A call is one JSON object with "name" and "arguments" inside <tool_call>.<|im_end|>\n'
        "<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\nA1\n<tool_call>\n"
        '{"name": "look", "arguments": {"at": "sea"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nR1\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_inst_moves_the_system_text_down_and_the_tools_to_the_last_user_turn():
    assert render("inst", CONVERSATION, [TOOL]) == (
        "<s>[INST]SYS\n\nQ1[/INST]"
        'A1[TOOL_CALLS]look {"at": "sea"}</s>'
        "[TOOL_RESULTS]R1[/TOOL_RESULTS]"
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "look", '
        '"description": "Looks.", "parameters": {}}}][/AVAILABLE_TOOLS]'
        "[INST]Q2[/INST]"
    )


def test_headers_puts_the_tools_first_and_a_reminder_last():
    assert render("headers", CONVERSATION, [TOOL]) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Functions, one per line:\n"
        '{"type": "function", "function": {"name": "look", "description": "Looks.", '
        '"parameters": {}}}\n\nSYS<|eot_id|>'
        "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\nA1\nlook({"at": "sea"})<|eot_id|>'
        "<|start_header_id|>tool<|end_header_id|>\n\nR1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>system<|end_header_id|>\n\n"
        "Answer the user. Call a function where facts are missing.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_headers_reminder_follows_the_last_role():
    after_result = render("headers", CONVERSATION[:4], [TOOL])
    assert "Weigh the result" in after_result
    assert "Answer the user" not in after_result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tools", [None, [], [TOOL]])
@pytest.mark.parametrize(
    ("roles", "texts"),
    [
        ([], []),
        (["system"], ["S0"]),
        (["user"], ["U0"]),
        (["system", "system", "user"], ["S0", "S1", "U2"]),
        (["system", "user", "system", "user"], ["S0", "U1", "S2", "U3"]),
        (["user", "user", "assistant", "assistant", "user"], ["U0", "U1", "A2", "A3", "U4"]),
        (["user", "assistant", "system"], ["U0", "A1", "S2"]),
        (["system", "assistant"], ["S0", "A1"]),
        (["user", "tool", "tool"], ["U0", "T1", "T2"]),
    ],
)
def test_everything_is_rendered_once_whatever_the_roles(name, tools, roles, texts):
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    rendered = render(name, messages, tools)
    assert [rendered.count(text) for text in texts] == [1] * len(texts)
    assert rendered.count('"look"') == (1 if tools else 0)


@pytest.mark.parametrize("name", NAMES)
def test_parts_read_as_the_text_they_hold(name):
    in_parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in CONVERSATION
    ]
    assert render(name, in_parts, [TOOL]) == render(name, CONVERSATION, [TOOL])


@pytest.mark.parametrize("name", NAMES)
def test_arguments_may_be_an_object_and_content_may_be_missing(name):
    call = {**CALL, "function": {"name": "look", "arguments": {"at": "sea"}}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    rendered = render(name, messages)
    assert '{"at": "sea"}' in rendered
    assert "None" not in rendered


@pytest.mark.parametrize("name", ["chatml", "headers"])
def test_only_the_generation_prompt_is_added_for_generation(name):
    without, with_it = (render(name, CONVERSATION, [TOOL], generate=g) for g in (False, True))
    assert with_it.startswith(without)
    assert "assistant" in with_it.removeprefix(without)


@pytest.mark.parametrize(("name", "grows_in_place"), [("chatml", True), ("inst", False)])
def test_whether_a_longer_conversation_extends_the_rendered_prompt(name, grows_in_place):
    session = agent_session(0)
    closed = next(
        turn
        for turn in range(1, session.turns)
        if session.body(turn)["messages"][-1]["content"][0]["type"] == "text"
    )
    before, now = (to_chat(session.body(turn)) for turn in (closed - 1, closed))
    shorter = render(name, before["messages"], before["tools"], generate=False)
    longer = render(name, now["messages"], now["tools"], generate=False)
    assert longer.startswith(shorter) is grows_in_place
