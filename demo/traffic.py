"""Traffic for the page: agents of two organisations, some of which break their own prefixes."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from demo.session import AgentSession, agent_session, marked

TURNS = 14
SIZES = {"tools": 8, "rules": 24}

_Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One request.

    Attributes:
        client: ``anthropic`` or ``openai``.
        org: whose it is.
        session: the session's name.
        body: its body, as of the Messages API.
    """

    client: str
    org: str
    session: str
    body: _Body


def steps(rounds: Iterator[int] | None = None) -> Iterator[Step]:
    """Yield requests, one agent's after another's.

    Args:
        rounds: numbers of rounds, in each of which the agents have conversations of their own; None
            for rounds without end.
    """
    for number in itertools.count() if rounds is None else rounds:
        agents = [
            ("anthropic", "north", "planner", _with_helper),
            ("openai", "north", "night-desk", _tool_edited),
            ("anthropic", "south", "pilot-office", _with_the_time),
            ("anthropic", "south", "customs", _compacted),
        ]
        sessions = [
            agent_session(10 * number + seed, TURNS, org=org, **SIZES)
            for seed, (_, org, _, _) in enumerate(agents)
        ]
        for turn in range(TURNS):
            for (client, org, name, habit), session in zip(agents, sessions, strict=True):
                for body in habit(session, turn):
                    yield Step(client, org, f"{name}-{number + 1}", marked(body))


def _with_helper(session: AgentSession, turn: int) -> Iterator[_Body]:
    """An agent that never changes what it has sent, and asks a subagent now and then."""
    yield session.body(turn)
    if turn % 4 == 2:
        helper = agent_session(1000 + turn, 3, tools=3, rules=6, org="helpers")
        for own in range(3):
            yield helper.body(own)


def _tool_edited(session: AgentSession, turn: int) -> Iterator[_Body]:
    """Somebody edits a tool in the middle of the conversation."""
    body = session.body(turn)
    if turn >= 6:
        body["tools"][5]["description"] += " Ask twice before you do."
    yield body


def _with_the_time(session: AgentSession, turn: int) -> Iterator[_Body]:
    """The system prompt has the time of the watch, which changes."""
    body = session.body(turn)
    body["system"][1]["text"] += f"\nThe watch began at {6 + 4 * (turn // 5):02d}:00."
    yield body


def _compacted(session: AgentSession, turn: int) -> Iterator[_Body]:
    """The agent sums its conversation up when that has become long."""
    body = session.body(turn)
    if turn >= 10:
        summary = (
            "This session is being continued from a previous conversation that ran out of context. "
            "The conversation is summarized below:\nAnalysis: the office asked about berths and "
            "cargo, and the records were looked up. " + "One question was answered. " * 40
        )
        opening = {"role": "user", "content": [{"type": "text", "text": summary}]}
        body["messages"] = [opening, *body["messages"][21:]]
    yield body


Habit = Callable[[AgentSession, int], Iterator[_Body]]
"""Yields what an agent sends in a turn of its conversation."""
