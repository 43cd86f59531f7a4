"""Requests to a server of the tests: texts that are like no other, and bodies made of them."""

import random

from tests.engine.server import MODEL

EPHEMERAL = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}

_WORDS = ("anchor", "ballast", "capstan", "davit", "ensign", "fender", "gangway", "hawser")


def text(seed: object, words: int = 400) -> str:
    """Return a text that is the same for the same seed and, from its start on, like no other."""
    chance = random.Random(str(seed))
    return f"{seed}: " + " ".join(chance.choices(_WORDS, k=words))


def block(seed: object, words: int = 400, **marks: object) -> dict:
    return {"type": "text", "text": text(seed, words), **marks}


def agent_body(name: str, tool: str = "Weighs things.", question: str = "first", **fields) -> dict:
    """Return an agent's request: a tool, a long system prompt and one question."""
    return {
        "model": MODEL,
        "max_tokens": 3,
        "tools": [{"name": "weigh", "description": tool, "input_schema": {"type": "object"}}],
        "system": [block(f"diagnosed {name}", 500)],
        "messages": [
            {
                "role": "user",
                "content": [block(f"{name} {question}", 200, cache_control=EPHEMERAL)],
            }
        ],
        **fields,
    }


def conversation(name: str, turns: int = 1, words: int = 300, **mark: object) -> dict:
    """Return a conversation of ``turns`` questions, the last of them marked as ``mark`` says."""
    messages: list[dict] = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": [block(f"{name} question {turn}", words)]},
            {"role": "assistant", "content": f"Answer {turn} to {name}."},
        ]
    messages[-2]["content"][0] |= mark
    system = [block(f"{name} system", words, cache_control=EPHEMERAL)]
    return {"model": MODEL, "max_tokens": 2, "system": system, "messages": messages[:-1]}


def session(name: str) -> dict[str, str]:
    return {"X-CacheScope-Session": name}
