"""The load of many agents: tenants, their agents, subagents, and the pauses between calls."""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import BLOCK
from demo.client import Answer
from demo.session import agent_session, marked, to_chat

TOOL_S, HUMAN_S = 0.4, 4.0
"""How long a tool and a human take on average, in seconds: a tenth of what agents' traces show, and
less for humans."""

HUMAN_SHARE = 0.2
"""How many turns wait for a human instead of a tool."""

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
    """

    tenant: str
    session: str
    body: dict[str, Any]
    pause_s: float


def agents(seed: int, tenants: int = 8, agents_each: int = 3, turns: int = 8) -> list[list[Call]]:
    """Return the calls of each agent, in order.

    Tools and handbook are the same for all, the standing orders for a tenant. A subagent has half
    of the tools, and prompts of its own.

    Args:
        seed: of all that is drawn.
        tenants: how many.
        agents_each: agents of each.
        turns: calls of each agent, without those of its subagents.
    """
    chance = random.Random(seed)
    return [
        list(_calls(chance, f"tenant {tenant}", tenant * agents_each + agent, seed, turns))
        for tenant in range(tenants)
        for agent in range(agents_each)
    ]


def _calls(
    chance: random.Random, tenant: str, number: int, seed: int, turns: int
) -> Iterator[Call]:
    # Some have just begun when others end.
    length = chance.randint(turns // 2, turns)
    session = agent_session(1000 * seed + number, turns=length, tools=8, rules=20, org=tenant)
    pause_s = chance.uniform(0, 2 * HUMAN_S)
    name = f"{tenant}, agent {number}"
    for turn in range(length):
        yield Call(tenant, name, marked(session.body(turn)), pause_s)
        if chance.random() < SUBAGENT_SHARE:
            helper = agent_session(
                1000 * seed + 500 + number, turns=2, tools=4, rules=8, org=tenant
            )
            for step in range(helper.turns):
                pause_s = chance.expovariate(1 / TOOL_S)
                yield Call(tenant, name, marked(helper.body(step)), pause_s)
        pause_s = chance.expovariate(1 / (HUMAN_S if chance.random() < HUMAN_SHARE else TOOL_S))


def working_set(load: list[list[Call]], tokenizer: Any) -> int:
    """Return how many different blocks all prompts have together, were everything shared.

    Args:
        load: the agents' calls.
        tokenizer: the model's, from transformers.
    """
    blocks: set[tuple[int, int]] = set()
    for calls in load:
        for call in calls:
            chat = to_chat(call.body)
            tokens = tokenizer.apply_chat_template(
                chat["messages"],
                tools=chat.get("tools"),
                add_generation_prompt=True,
                return_dict=False,
            )
            prefix = 0
            for end in range(BLOCK, len(tokens) + 1, BLOCK):
                prefix = hash((prefix, tuple(tokens[end - BLOCK : end])))
                blocks.add((end, prefix))
    return len(blocks)


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
