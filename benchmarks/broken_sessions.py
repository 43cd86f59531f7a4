"""Sessions with one known cause each: what a client does that costs reads from the cache.

Each is a conversation of an agent, of six requests with their times, as a recorder writes them. The
text is made up of words, by a seed.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]
Bodies = list[Body]

TURNS = 6
AT = 3  # the request that breaks, where one does
START = 1_772_442_000
STEP_S = 20
_WORDS = (
    *("apple", "barrel", "basket", "branch", "cellar", "crate", "field", "fence", "gate"),
    *("harvest", "hedge", "ladder", "meadow", "orchard", "pear", "plough", "press", "pump"),
    *("rake", "row", "scale", "shed", "spade", "stable", "sack", "trellis", "tub", "wagon"),
    *("weight", "well"),
)


@dataclass(frozen=True, slots=True)
class Session:
    """A session with one known cause.

    Attributes:
        rule: the name of the rule of `cachescope explain` that it is about; empty for a session in
            which nothing is wrong.
        area: where it is: ``tools``, ``system``, ``messages``, ``cache`` and so on.
        records: the recorded requests, in envelopes with ``timestamp``, ``session_id``, ``body``.
    """

    rule: str
    area: str
    records: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The session's name."""
        return self.rule or self.area


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def _tool(rng: random.Random, name: str) -> Body:
    properties = {"path": {"type": "string"}, "mode": {"type": "string", "enum": ["fast", "full"]}}
    return {
        "name": name,
        "description": _text(rng, 60),
        "input_schema": {"type": "object", "properties": properties, "required": ["path", "mode"]},
    }


def _bodies(rng: random.Random, turns: int = TURNS, model: str = "m") -> Bodies:
    """Return the requests of a conversation that grows by a tool call and its result each turn."""
    tools = [_tool(rng, name) for name in ("Bash", "Edit", "Read", "Write")]
    rules = "\n".join(f"- Rule {i}: {_text(rng, 12)}." for i in range(30))
    system = [
        {"type": "text", "text": f"You keep the books of an orchard.\n\n# Rules\n{rules}"},
        {"type": "text", "text": f"The orchard has {_text(rng, 80)}."},
    ]
    messages: Bodies = [{"role": "user", "content": [{"type": "text", "text": _text(rng, 30)}]}]
    bodies: Bodies = []
    for turn in range(turns):
        body = {"model": model, "max_tokens": 9, "tools": tools, "system": system}
        bodies.append(copy.deepcopy({**body, "messages": messages}))
        call = {"path": f"rows/{turn}.txt", "mode": "full"}
        named = f"toolu_{rng.getrandbits(64):016x}"
        said = {"type": "text", "text": _text(rng, 12)}
        use = {"type": "tool_use", "id": named, "name": "Read", "input": call}
        result = {"type": "tool_result", "tool_use_id": named, "content": _text(rng, 120)}
        messages += [
            {"role": "assistant", "content": [said, use]},
            {"role": "user", "content": [result]},
        ]
    return bodies


def _marked(bodies: Bodies) -> Bodies:
    """Return the requests with breakpoints as agents set them, unless they have their own."""
    for body in bodies:
        if "cache_control" not in str(body):
            _mark(body["system"][-1])
            _mark_last(body)
    return bodies


def _enveloped(bodies: Bodies, session: str = "s1", start: int = START) -> Bodies:
    return [
        {"timestamp": start + STEP_S * i, "session_id": session, "body": body}
        for i, body in enumerate(_marked(bodies))
    ]


def _tools(change: Callable[[list[Body]], object]) -> Callable[[Bodies, random.Random], None]:
    def apply(bodies: Bodies, _: random.Random) -> None:
        for body in bodies[AT:]:
            change(body["tools"])

    return apply


def _system(change: Callable[[list[Body]], object]) -> Callable[[Bodies, random.Random], None]:
    def apply(bodies: Bodies, _: random.Random) -> None:
        for body in bodies[AT:]:
            change(body["system"])

    return apply


def _history(change: Callable[[list[Body]], object]) -> Callable[[Bodies, random.Random], None]:
    def apply(bodies: Bodies, _: random.Random) -> None:
        for body in bodies[AT:]:
            change(body["messages"])

    return apply


def _each(change: Callable[[Body, int], object]) -> Callable[[Bodies, random.Random], None]:
    def apply(bodies: Bodies, _: random.Random) -> None:
        for i, body in enumerate(bodies):
            change(body, i)

    return apply


def _put(block: Body, key: str, old: str, new: str) -> None:
    assert old in block[key]
    block[key] = block[key].replace(old, new, 1)


def _model(bodies: Bodies, _: random.Random) -> None:
    for body in bodies[AT:]:
        body["model"] = "n"


def _thinking(bodies: Bodies, _: random.Random) -> None:
    for body in bodies[AT:]:
        body["tool_choice"] = {"type": "any"}


def _new_ids(body: Body, i: int) -> None:
    for message in body["messages"]:
        for block in message["content"]:
            for key in ("id", "tool_use_id"):
                if key in block:
                    block[key] += f"_{i}"


def _call_keys(messages: list[Body]) -> None:
    use = messages[1]["content"][1]
    use["input"] = dict(reversed(use["input"].items()))


def _compacted(bodies: Bodies, rng: random.Random) -> None:
    summary = {"type": "text", "text": f"Summary of the work so far: {_text(rng, 30)}."}
    for body in bodies[AT:]:
        kept = body["messages"][2 * AT + 1 :]
        body["messages"] = [
            body["messages"][0],
            {"role": "assistant", "content": [summary]},
            {"role": "user", "content": [{"type": "text", "text": "Go on."}]},
            *kept,
        ]


def _mark(block: Body, **fields: str) -> None:
    block["cache_control"] = {"type": "ephemeral", **fields}


def _mark_last(body: Body) -> None:
    _mark(body["messages"][-1]["content"][-1])


def _unmarked(bodies: Bodies, _: random.Random) -> None:
    for i, body in enumerate(bodies):
        _mark(body["system"][-1])
        if i != AT:
            _mark_last(body)


def _rescoped(bodies: Bodies, _: random.Random) -> None:
    for i, body in enumerate(bodies):
        _mark(body["system"][-1], scope="org" if i < AT else "session")
        _mark_last(body)


def _stuck(body: Body, _: int) -> None:
    _mark(body["system"][-1])


_CHANGES: dict[str, tuple[str, Callable[[Bodies, random.Random], None]]] = {
    "model_changed": ("model", _model),
    "param_changed": ("params", _thinking),
    "tools_added": ("tools", _tools(lambda t: t.append(_tool(random.Random(9), "Zip")))),
    "tools_removed": ("tools", _tools(lambda t: t.pop(2))),
    "tools_reordered": ("tools", _tools(lambda t: t.reverse())),
    "tool_changed": (
        "tools",
        _tools(
            lambda t: _put(
                t[1],
                "description",
                " ",
                " not ",
            )
        ),
    ),
    "tool_keys_reordered": (
        "tools",
        _tools(lambda t: t.__setitem__(1, dict(reversed(t[1].items())))),
    ),
    "tool_list_reordered": (
        "tools",
        _tools(lambda t: t[1]["input_schema"]["properties"]["mode"]["enum"].reverse()),
    ),
    "tool_value": (
        "tools",
        _each(lambda b, i: b["tools"][1].update(description=f"Build 4.2.{i}, edits a row.")),
    ),
    "tool_spaces": ("tools", _tools(lambda t: _put(t[1], "description", " ", "  "))),
    "system_added": (
        "system",
        _system(lambda s: s.insert(1, {"type": "text", "text": "Weigh each crate twice."})),
    ),
    "system_removed": ("system", _system(lambda s: s.pop(0))),
    "system_reordered": ("system", _system(lambda s: s.reverse())),
    "system_changed": ("system", _system(lambda s: _put(s[0], "text", "books", "records"))),
    "system_value": (
        "system",
        _each(
            lambda b, i: _put(b["system"][0], "text", "# Rules", f"It is 10:{15 + i}:07.\n# Rules")
        ),
    ),
    "system_spaces": ("system", _system(lambda s: _put(s[0], "text", "# Rules\n", "# Rules \n"))),
    "messages_added": (
        "messages",
        _history(
            lambda m: m.insert(
                1, {"role": "user", "content": [{"type": "text", "text": "Mind the pears."}]}
            )
        ),
    ),
    "messages_removed": ("messages", _history(lambda m: m.__delitem__(slice(1, 3)))),
    "messages_reordered": (
        "messages",
        _history(lambda m: m.__setitem__(slice(1, 5), m[3:5] + m[1:3])),
    ),
    "messages_changed": (
        "messages",
        _history(lambda m: _put(m[1]["content"][0], "text", " ", " surely ")),
    ),
    "message_value": (
        "messages",
        _each(
            lambda b, i: b["messages"][0]["content"][0].update(
                text=f"Bring the log in order. Request 7c1d-{4 * i + 1000}."
            )
        ),
    ),
    "message_spaces": (
        "messages",
        _history(lambda m: m[2]["content"][0].update(content=m[2]["content"][0]["content"] + "\n")),
    ),
    "call_ids_changed": ("messages", _each(_new_ids)),
    "call_keys_reordered": ("messages", _history(_call_keys)),
    "message_cut": (
        "messages",
        _history(lambda m: m[2]["content"][0].update(content="[cleared]")),
    ),
    "context_compacted": ("messages", _compacted),
    "marker_removed": ("markers", _unmarked),
    "scope_changed": ("markers", _rescoped),
    "not_covered": ("markers", _each(_stuck)),
}


def broken_sessions(seed: int = 0) -> list[Session]:
    """Return a session for each cause, and those in which nothing is wrong."""
    sessions: list[Session] = []
    for rule, (area, change) in _CHANGES.items():
        rng = random.Random(f"{rule} {seed}")
        bodies = _bodies(rng)
        change(bodies, rng)
        sessions.append(Session(rule, area, _enveloped(copy.deepcopy(bodies))))
    rng = random.Random(f"cache {seed}")
    late = _enveloped(_bodies(rng))
    for record in late[AT:]:
        record["timestamp"] += 420
    sessions.append(Session("expired", "cache", late))
    unread = _enveloped(_bodies(rng))
    for record in unread:
        record["usage"] = {
            "input_tokens": 3,
            "cache_read_input_tokens": 0,
            "cache_creation_input_tokens": 1900,
        }
    sessions.append(Session("not_read", "cache", unread))
    near: Bodies = []
    for i in range(3):
        bodies = _bodies(random.Random(f"near {seed}"), turns=1)
        _put(bodies[0]["system"][0], "text", "You", f"It is 10:15:0{i}. You")
        bodies[0]["messages"][0]["content"][0]["text"] = _text(rng, 30)
        near += _enveloped(bodies, start=START + 60 * i)
    sessions.append(Session("could_share", "sharing", near))
    sessions.append(Session("", "clean", _enveloped(_bodies(rng))))
    agents = _enveloped(_bodies(rng))
    for k in range(2):
        beside = _bodies(random.Random(f"agent {k} {seed}"), turns=3)
        found = _text(rng, 2)
        for body in beside:
            body["tools"] = body["tools"][k : k + 2]
            body["system"] = [{"type": "text", "text": f"You look for {found} only."}]
        agents += _enveloped(beside, start=START + 5 + 7 * k)
    sessions.append(Session("", "subagents", sorted(agents, key=lambda r: r["timestamp"])))
    return sessions
