"""The load of many agents: tenants, their agents, subagents, and the pauses between calls."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.harness import BLOCK
from demo.client import Answer
from demo.session import AgentSession, agent_session, marked, to_chat


@dataclass(frozen=True, slots=True)
class Pace:
    """How long agents pause before they make another call.

    Attributes:
        tool_s: how long a tool takes on average, in seconds.
        human_s: how long a human takes.
        human_share: how many turns wait for a human instead of a tool; None for those whose answers
            call no tool.
    """

    tool_s: float = 0.4
    human_s: float = 4.0
    human_share: float | None = 0.2

    def pause_s(self, chance: random.Random, calls: bool) -> float:
        """Draw a pause after a turn; ``calls`` says whether its answer calls a tool."""
        is_human = not calls if self.human_share is None else chance.random() < self.human_share
        return chance.expovariate(1 / (self.human_s if is_human else self.tool_s))


HURRIED = Pace()
"""A tenth of what agents' traces show, and less for humans."""

SUBAGENT_SHARE = 0.15
"""How many turns have a subagent do a part."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an agent.

    Attributes:
        tenant: whose it is.
        session: the agent's; a subagent shares it.
        body: the prompt, with breakpoints, as of the Messages API.
        pause_s: how long after the answer to the call before it comes, in seconds.
        tool: the tool that the answer calls; None if it calls none.
        ends_session: whether it is the session's last.
    """

    tenant: str
    session: str
    body: dict[str, Any]
    pause_s: float
    tool: str | None = None
    ends_session: bool = False


@dataclass(frozen=True, slots=True)
class AgentShape:
    """What agents' sessions are like.

    Attributes:
        turns: the most calls of a session, without those of its subagents; half of it the fewest.
        sessions: how many an agent has, one after the other.
        tools: tool definitions.
        rules: rules in the handbook, of some 90 tokens each.
        pace: how long agents pause.
    """

    turns: int = 8
    sessions: int = 1
    tools: int = 8
    rules: int = 20
    pace: Pace = HURRIED


def agents(
    seed: int, tenants: int = 8, agents_each: int = 3, shape: AgentShape = AgentShape()
) -> list[list[Call]]:
    """Return the calls of each agent, in order.

    Tools and handbook are the same for all, the standing orders for a tenant. A subagent has half
    of the tools, and prompts of its own.

    Args:
        seed: of all that is drawn.
        tenants: how many.
        agents_each: agents of each.
        shape: what their sessions are like.
    """
    chance = random.Random(seed)
    return [
        list(_calls(chance, f"tenant {tenant}", tenant * agents_each + agent, seed, shape))
        for tenant in range(tenants)
        for agent in range(agents_each)
    ]


def _calls(
    chance: random.Random, tenant: str, agent: int, seed: int, shape: AgentShape
) -> Iterator[Call]:
    pace = shape.pace
    for number in range(shape.sessions):
        # Some have just begun when others end.
        turns = chance.randint(shape.turns // 2, shape.turns)
        pause_s = chance.uniform(0, 2 * pace.human_s)
        name = f"{tenant}, agent {agent}" + (f", session {number}" if number else "")
        draw = 1000 * seed + agent + 10_000 * number
        session = agent_session(draw, turns, shape.tools, shape.rules, tenant)
        calls: list[Call] = []
        for turn in range(turns):
            tool = _called(session, turn)
            calls.append(Call(tenant, name, marked(session.body(turn)), pause_s, tool))
            if chance.random() < SUBAGENT_SHARE:
                helper = agent_session(
                    draw + 500, 2, shape.tools // 2, max(1, shape.rules // 2 - 2), tenant
                )
                for step in range(helper.turns):
                    pause_s = chance.expovariate(1 / pace.tool_s)
                    body = marked(helper.body(step))
                    calls.append(Call(tenant, name, body, pause_s, _called(helper, step)))
            pause_s = pace.pause_s(chance, tool is not None)
        calls[-1] = replace(calls[-1], ends_session=True)
        yield from calls


def _called(session: AgentSession, turn: int) -> str | None:
    """Return the first tool that the answer of a turn calls; None if it calls none."""
    answer = session.messages[2 * turn + 1]["content"]
    names = (block["name"] for block in answer if block["type"] == "tool_use")
    return next(names, None)


Blocks = tuple[int, ...]
"""The blocks of a prompt, each by all that it and those before it hold."""


def tokens_of(chat: dict[str, Any], tokenizer: Any) -> list[int]:
    """Return the tokens of a prompt of Chat Completions.

    Args:
        chat: its ``messages`` and ``tools``.
        tokenizer: the model's, from transformers.
    """
    found: list[int] = tokenizer.apply_chat_template(
        chat["messages"],
        tools=chat.get("tools"),
        add_generation_prompt=True,
        return_dict=False,
    )
    return found


def blocks_of(body: dict[str, Any], tokenizer: Any) -> tuple[Blocks, int]:
    """Return the whole blocks of a prompt, and its tokens.

    Args:
        body: the prompt, as of the Messages API.
        tokenizer: the model's, from transformers.
    """
    tokens = tokens_of(to_chat(body), tokenizer)
    blocks, prefix = [], 0
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        prefix = hash((prefix, tuple(tokens[end - BLOCK : end])))
        blocks.append(prefix)
    return tuple(blocks), len(tokens)


def working_set(load: Sequence[Sequence[Blocks]]) -> int:
    """Return how many different blocks the prompts have together that agents are at, at one time;
    on average over the load, were everything shared.

    Args:
        load: the blocks of each agent's prompts, in order.
    """
    longest = max(len(prompts) for prompts in load)
    at_once = [
        len({block for prompts in load for block in prompts[min(turn, len(prompts) - 1)]})
        for turn in range(longest)
    ]
    return sum(at_once) // longest


@dataclass(slots=True)
class Outcome:
    """What a server made of the load.

    Attributes:
        seconds: from the first call to the last answer.
        computed: prompt tokens that were not read from a cache.
        prompts: prompt tokens in all.
        ttft_s: of each call, the time to its first token, in seconds.
    """

    seconds: float = 0.0
    computed: int = 0
    prompts: int = 0
    ttft_s: list[float] = field(default_factory=list)


def replay(load: list[list[Call]], ask: Callable[[Call], Answer]) -> Outcome:
    """Have all agents make their calls, each one after the answer to the one before."""
    outcome = Outcome()

    def run(calls: list[Call]) -> list[Answer]:
        answers = []
        for call in calls:
            time.sleep(call.pause_s)
            answers.append(ask(call))
        return answers

    start = time.perf_counter()
    with ThreadPoolExecutor(len(load)) as pool:
        answered = [answer for answers in pool.map(run, load) for answer in answers]
    outcome.seconds = time.perf_counter() - start
    outcome.prompts = sum(answer.prompt_tokens for answer in answered)
    outcome.computed = outcome.prompts - sum(answer.read for answer in answered)
    outcome.ttft_s = [answer.ttft_s for answer in answered]
    return outcome
