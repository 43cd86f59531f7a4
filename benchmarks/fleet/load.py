"""The load: agents' sessions of some tenants, made up or taken from traces."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import agent_load
from benchmarks.agent_load import AgentShape, Call
from benchmarks.harness import BLOCK
from demo.session import to_chat
from vllm_cachescope.cli.traffic.records import read_records

TENANTS, SESSIONS_EACH = 4, 4

_LONGEST_PAUSE_S = 20.0
"""Of a trace: whoever is away for longer comes back after so long."""

_ANSWER = 64
"""Tokens that are kept free for answers."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A call as Chat Completions have it.

    Attributes:
        call: whose it is, and when it comes.
        session: the session's name, of this run.
        chat: its fields, with breakpoints.
        tokens: the prompt's.
    """

    call: Call
    session: str
    chat: dict[str, Any]
    tokens: tuple[int, ...]


def made_up(seed: int, turns: int) -> list[list[Call]]:
    """Return sessions as `benchmarks.agent_load` makes them up."""
    return agent_load.agents(seed, TENANTS, SESSIONS_EACH, AgentShape(turns))


def from_traces(paths: Sequence[Path], turns: int) -> list[list[Call]]:
    """Return sessions of recorded prompts: JSON lines with ``timestamp`` (microseconds), ``input``
    (the whole prompt as text) and ``session_id``.

    Where there are fewer than are asked for, they begin again; each is a session of its own.

    Args:
        paths: the files.
        turns: the most calls of a session.

    Raises:
        ValueError: if there is no such line.
    """
    recorded: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in paths:
        for _, record in read_records(path, []):
            if isinstance(record, dict) and {"timestamp", "input", "session_id"} <= record.keys():
                recorded[record["session_id"]].append(record)
    if not recorded:
        raise ValueError("the traces have no line with timestamp, input and session_id")
    sessions = list(recorded.values())
    load = []
    for number in range(TENANTS * SESSIONS_EACH):
        records = sorted(sessions[number % len(sessions)], key=lambda record: record["timestamp"])
        tenant = f"tenant {number // SESSIONS_EACH}"
        calls, last = [], records[0]["timestamp"]
        for record in records[:turns]:
            text = f"Session {number}.\n{record['input']}"
            body = {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}
            pause_s = min((record["timestamp"] - last) / 1e6, _LONGEST_PAUSE_S)
            last = record["timestamp"]
            calls.append(Call(tenant, f"{tenant}, session {number}", body, pause_s))
        load.append(calls)
    return load


def prompts(
    load: Sequence[Sequence[Call]], label: str, pace: float, longest: int, tokenizer: Any
) -> list[list[Prompt]]:
    """Return the calls as they are made, without those that are too long.

    Args:
        load: the calls of each session.
        label: stands at the beginning of each prompt, and of its session: what two labels have in
            common is too short for a block.
        pace: what pauses are multiplied with.
        longest: tokens that a prompt and its answer may have.
        tokenizer: the model's, from transformers.
    """
    made = []
    for calls in load:
        session = []
        for call in calls:
            chat = to_chat(call.body)
            first = chat["messages"][0]["content"][0]
            first["text"] = f"Edition {label}.\n{first['text']}"
            tokens = agent_load.tokens_of(chat, tokenizer)
            if len(tokens) <= longest - _ANSWER:
                paced = replace(call, pause_s=pace * call.pause_s)
                # SMG takes no name with spaces for a session's.
                name = f"{label} {call.session}".replace(" ", "-").replace(",", "")
                session.append(Prompt(paced, name, chat, tuple(tokens)))
        made.append(session)
    return made


def first_time(load: Sequence[Sequence[Prompt]], apart: bool) -> int:
    """Return how many tokens have to be computed at least: those of the blocks that are different,
    and what prompts have beyond their whole blocks.

    Args:
        load: the prompts.
        apart: whether tenants share nothing.
    """
    blocks: set[tuple[str, int, int]] = set()
    rest = 0
    for session in load:
        for prompt in session:
            # The last token is always computed.
            whole = (len(prompt.tokens) - 1) // BLOCK * BLOCK
            rest += len(prompt.tokens) - whole
            prefix = 0
            for start in range(0, whole, BLOCK):
                prefix = hash((prefix, prompt.tokens[start : start + BLOCK]))
                blocks.add((prompt.call.tenant if apart else "", start, prefix))
    return rest + BLOCK * len(blocks)
