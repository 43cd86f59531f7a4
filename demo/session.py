"""Conversations of a made-up agent that runs a harbour, composed from word lists.

The same arguments give the same bytes on every machine. Prompts have three layers, each shared
more narrowly than the one before: tools and the handbook are the same for everyone, the standing
orders depend on the organisation, and the messages on the seed.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

_PLACES = "north quay|south quay|ferry ramp|coal pier|fish dock|timber basin|tank farm|dry dock"
_CARGO = "frozen mackerel|steel coils|spruce logs|fertiliser|cement|wind turbine blades|paper reels"
_VESSELS = "Alba Reed|Corvo Bay|Dunlin|Estrela|Fjordhest|Grey Heron|Halcyon|Ivory Gull|Jade Tern"
_ROLES = (
    "harbour master|duty pilot|crane foreman|customs clerk|berth planner|fire watch|tally clerk"
)
_EVENTS = "a gale warning|a late arrival|a torn sling|a fuel spill|a short crew|fog|a power cut"
_ACTIONS = (
    "move the vessel to the next free berth|hold the discharge until the wind drops|"
    "call the duty pilot and log the time|weigh every lift twice|close the gate to road traffic|"
    "ask the agent for a fresh manifest|photograph the seals before breaking them|"
    "split the gang between two hatches|send the draught survey to the owner"
)
_REASONS = (
    "the tide leaves no second try|the insurer asks for it|the crane cannot slew under load|"
    "two shifts share one radio channel|the scale drifts after rain|a past claim turned on it|"
    "the apron floods at springs|the lamps on that side are weak"
)
_NOUNS = "berth|crane|manifest|pilot|tug|gang|permit|seal|scale|gate|tide|invoice"
_VERBS = {
    "list": "Lists every {noun} that matches, oldest entry first, a page at a time.",
    "inspect": "Returns all that is on record about one {noun}, with its last ten changes.",
    "reserve": "Reserves a {noun} for a vessel and a span of time; fails where one overlaps.",
    "release": "Gives a {noun} back before its time is up and tells those who wait for it.",
    "amend": "Changes fields of a {noun}; whatever is not named stays as it is.",
}
_QUESTIONS = (
    "The {vessel} reports {event} with {cargo} aboard. What should we do at the {place}?",
    "Can the {vessel} come alongside the {place} tonight, and who has to know?",
    "Somebody moved {cargo} to the {place} without a permit. Find out who, and put it right.",
    "Plan tomorrow's lifts at the {place}: {cargo} first, then whatever the {vessel} carries.",
)


@dataclass(frozen=True, slots=True)
class AgentSession:
    """One agent's conversation, in the shape of the Messages API.

    Attributes:
        tools: the tool definitions.
        system: two text blocks: the handbook and the organisation's standing orders.
        messages: user and assistant messages in turn. A turn is one of each: the user's message
            is a question or the results of the tools that the assistant called before.
    """

    tools: list[dict[str, Any]]
    system: list[dict[str, Any]]
    messages: list[dict[str, Any]]

    @property
    def turns(self) -> int:
        """The number of requests the agent makes."""
        return len(self.messages) // 2

    def body(self, turn: int) -> dict[str, Any]:
        """Return what the agent's request number ``turn`` (from 0) holds: its whole prompt.

        The result has the fields ``tools``, ``system`` and ``messages``, ends with a user
        message, and is the caller's to change.

        Raises:
            IndexError: if there is no such turn.
        """
        if not 0 <= turn < self.turns:
            raise IndexError(f"turn {turn} of a session of {self.turns}")
        return copy.deepcopy(
            {
                "tools": self.tools,
                "system": self.system,
                "messages": self.messages[: 2 * turn + 1],
            }
        )


def agent_session(
    seed: int, turns: int = 20, tools: int = 24, rules: int = 36, org: str = "harbour"
) -> AgentSession:
    """Return the conversation number ``seed`` of an agent.

    With the defaults and the tokenizer of the demo's SMALL model, the first prompt has about
    13,000 tokens and the last about 20,000.

    Args:
        seed: picks the messages. Tools and system do not depend on it.
        turns: requests the agent makes.
        tools: tool definitions, at most 60.
        rules: rules in the handbook; each is about 90 tokens.
        org: whose standing orders the second system block holds.

    Raises:
        ValueError: if more tools are asked for than there are.
    """
    definitions = _tools()
    if tools > len(definitions):
        raise ValueError(f"{tools} tools asked for, {len(definitions)} exist")
    definitions = definitions[:tools]
    return AgentSession(
        tools=definitions,
        system=[_text(_handbook(rules)), _text(_standing_orders(org))],
        messages=list(_conversation(Random(f"conversation {seed}"), turns, definitions)),
    )


def marked(body: dict[str, Any], ttl: str = "5m") -> dict[str, Any]:
    """Return ``body`` with three breakpoints: handbook, standing orders, end of the messages.

    The handbook is marked ``global`` and the orders ``org``, both for an hour; the messages, for
    ``ttl``, carry no scope and get the operator's default.
    """
    handbook, orders = body["system"]
    handbook["cache_control"] = {"type": "ephemeral", "scope": "global", "ttl": "1h"}
    orders["cache_control"] = {"type": "ephemeral", "scope": "org", "ttl": "1h"}
    body["messages"][-1]["content"][-1]["cache_control"] = {"type": "ephemeral", "ttl": ttl}
    return body


def to_chat(body: dict[str, Any]) -> dict[str, Any]:
    """Return a Messages API prompt as one for Chat Completions: ``messages`` and ``tools``.

    ``cache_control`` stays on whatever carried it: a tool, a text part, or a tool's result.
    """
    messages: list[dict[str, Any]] = []
    if body.get("system"):
        messages.append({"role": "system", "content": body["system"]})
    for message in body["messages"]:
        messages.extend(_to_chat_messages(message))
    chat: dict[str, Any] = {"messages": copy.deepcopy(messages)}
    if body.get("tools"):
        chat["tools"] = [_to_chat_tool(tool) for tool in body["tools"]]
    return chat


def _to_chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {
        "name": tool["name"],
        "description": tool["description"],
        "parameters": copy.deepcopy(tool["input_schema"]),
    }
    return {"type": "function", "function": function, **_marker(tool)}


def _to_chat_messages(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if isinstance(message["content"], str):
        yield message
        return
    by_type: dict[str, list[dict[str, Any]]] = {"text": [], "tool_use": [], "tool_result": []}
    for block in message["content"]:
        by_type[block["type"]].append(block)
    for block in by_type["tool_result"]:
        part = {**_text(block["content"]), **_marker(block)}
        yield {"role": "tool", "tool_call_id": block["tool_use_id"], "content": [part]}
    if by_type["text"] or by_type["tool_use"]:
        converted = {"role": message["role"], "content": by_type["text"]}
        if by_type["tool_use"]:
            converted["tool_calls"] = [_to_chat_call(block) for block in by_type["tool_use"]]
        yield converted


def _to_chat_call(block: dict[str, Any]) -> dict[str, Any]:
    function = {"name": block["name"], "arguments": json.dumps(block["input"])}
    return {"id": block["id"], "type": "function", "function": function}


def _marker(block: dict[str, Any]) -> dict[str, Any]:
    return {"cache_control": block["cache_control"]} if "cache_control" in block else {}


def _tools() -> list[dict[str, Any]]:
    """Every tool there is; each verb is given to all nouns before the next verb starts."""
    random = Random("tools")
    return [
        _tool(random, verb, noun, purpose.format(noun=noun))
        for verb, purpose in _VERBS.items()
        for noun in _NOUNS.split("|")
    ]


def _tool(random: Random, verb: str, noun: str, purpose: str) -> dict[str, Any]:
    properties: dict[str, Any] = {
        f"{noun}_id": {
            "type": "string",
            "pattern": f"^{noun[:2].upper()}-[0-9]{{4}}$",
            "description": f"Which {noun}, by the number painted on it or printed on its papers.",
        },
        "place": {
            "type": "string",
            "enum": _PLACES.split("|"),
            "description": "Where in the harbour to look or to act.",
        },
    }
    extras: dict[str, Any] = {
        "vessel": {"type": "string", "description": "Name of the vessel, as on its papers."},
        "hours": {
            "type": "integer",
            "minimum": 1,
            "maximum": random.choice((12, 24, 72)),
            "description": "Length of the span in whole hours, from the start of the next one.",
        },
        "window": {
            "type": "object",
            "description": "Only what falls between the two times counts.",
            "properties": {
                "start": {"type": "string", "format": "date-time"},
                "end": {"type": "string", "format": "date-time"},
            },
            "required": ["start"],
        },
        "tags": {
            "type": "array",
            "items": {"type": "string", "enum": random.sample(_CARGO.split("|"), 3)},
            "description": "Kinds of cargo to restrict it to; any of them will do.",
        },
        "dry_run": {
            "type": "boolean",
            "default": False,
            "description": "Say what would happen, and change nothing.",
        },
    }
    for name in random.sample(sorted(extras), 2):
        properties[name] = extras[name]
    caution = f"Ask the {_pick(random, _ROLES)} first if there is {_pick(random, _EVENTS)}."
    return {
        "name": f"{verb}_{noun}",
        "description": f"{purpose} {caution}",
        "input_schema": {
            "type": "object",
            "properties": properties,
            "required": ["place"] if verb == "list" else [f"{noun}_id", "place"],
        },
    }


def _handbook(rules: int) -> str:
    random = Random("handbook")
    lines = [
        "You are the assistant of a harbour office. You answer the people on duty, look things up"
        " with your tools before you claim them, and follow the handbook below to the letter.",
    ]
    for number in range(rules):
        if number % 12 == 0:
            lines.append(f"\n# Chapter {number // 12 + 1}: {_pick(random, _PLACES)}")
        lines.append(f"{number // 12 + 1}.{number % 12 + 1} {_rule(random)}")
    return "\n".join(lines)


def _standing_orders(org: str) -> str:
    random = Random(f"standing orders {org}")
    orders = (f"- {_rule(random)}" for _ in range(16))
    return "\n".join([f"Standing orders of {org}. Where they differ, they go first.", *orders])


def _rule(random: Random) -> str:
    role, deputy = random.sample(_ROLES.split("|"), 2)
    first, second = random.sample(_ACTIONS.split("|"), 2)
    return (
        f"When there is {_pick(random, _EVENTS)} at the {_pick(random, _PLACES)} and "
        f"{_pick(random, _CARGO)} is on the apron, the {role} shall {first}, because "
        f"{_pick(random, _REASONS)}. If {random.randint(2, 9) * 5} minutes pass without an "
        f"answer, the {deputy} shall {second}."
    )


def _conversation(
    random: Random, turns: int, tools: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for turn in range(turns):
        if calls:
            content = [_result(random, call) for call in calls]
        else:
            content = [_text(_question(random))]
        yield {"role": "user", "content": content}

        # About every fourth answer closes a question; so does the last.
        closes = turn == turns - 1 or (calls and random.random() < 0.3)
        calls = (
            []
            if closes or not tools
            else [
                _call(random, f"toolu_{turn:03d}{index}", tool)
                for index, tool in enumerate(random.sample(tools, min(len(tools), 2)))
                if index == 0 or random.random() < 0.3
            ]
        )
        answer = _text(_advice(random) if not calls else _plan(random))
        yield {"role": "assistant", "content": [answer, *calls]}


def _question(random: Random) -> str:
    return random.choice(_QUESTIONS).format(
        vessel=_pick(random, _VESSELS),
        event=_pick(random, _EVENTS),
        cargo=_pick(random, _CARGO),
        place=_pick(random, _PLACES),
    )


def _plan(random: Random) -> str:
    return (
        f"The handbook lets the {_pick(random, _ROLES)} decide, but {_pick(random, _REASONS)}. "
        "I will look at the records first."
    )


def _advice(random: Random) -> str:
    steps = random.sample(_ACTIONS.split("|"), 3)
    listed = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    return f"This is what the records support:\n{listed}\nMind that {_pick(random, _REASONS)}."


def _call(random: Random, call_id: str, tool: dict[str, Any]) -> dict[str, Any]:
    noun = tool["name"].partition("_")[2]
    arguments = {"place": _pick(random, _PLACES)}
    if not tool["name"].startswith("list_"):
        arguments[f"{noun}_id"] = _identifier(random, noun)
    return {"type": "tool_use", "id": call_id, "name": tool["name"], "input": arguments}


def _result(random: Random, call: dict[str, Any]) -> dict[str, Any]:
    noun = call["name"].partition("_")[2]
    records = [
        {
            f"{noun}_id": _identifier(random, noun),
            "place": call["input"]["place"],
            "vessel": _pick(random, _VESSELS),
            "cargo": _pick(random, _CARGO),
            "tonnes": random.randint(20, 4000),
            "since": f"2031-{random.randint(1, 12):02d}-{random.randint(1, 28):02d}",
            "note": f"{_pick(random, _ROLES)}: {_pick(random, _ACTIONS)}",
        }
        for _ in range(random.randint(2, 4))
    ]
    return {"type": "tool_result", "tool_use_id": call["id"], "content": json.dumps(records)}


def _identifier(random: Random, noun: str) -> str:
    return f"{noun[:2].upper()}-{random.randint(0, 9999):04d}"


def _pick(random: Random, words: str) -> str:
    return random.choice(words.split("|"))


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
