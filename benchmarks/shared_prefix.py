"""Ten organisations with one system prompt of 4,000 tokens: computed once with a global scope, and
ten times where a `cache_salt` per organisation is what keeps them apart."""

import sys
import time
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.harness import Result, arguments, console, finish, pairs, server
from demo.client import MODEL
from demo.session import agent_session

ORGS = 10


@dataclass(frozen=True, slots=True)
class Round:
    """What it took to answer every organisation once.

    Attributes:
        seconds: from the first request to the last answer, one after the other.
        computed: prompt tokens that were not read from the cache.
        prefixes: organisations for which the shared prefix was computed.
    """

    seconds: float
    computed: int
    prefixes: int


def messages(edition: str, org: int) -> list[dict[str, Any]]:
    """Return a Chat Completions prompt: a handbook of some 4,000 tokens for everyone, and the
    organisation's own question."""
    body = agent_session(org, turns=1, tools=0, rules=44).body(0)
    handbook = {
        **body["system"][0],
        "cache_control": {"type": "ephemeral", "scope": "global", "ttl": "1h"},
    }
    handbook["text"] = f"Edition {edition}.\n{handbook['text']}"
    return [{"role": "system", "content": [handbook]}, *body["messages"]]


def ask_all(url: str, edition: str, salted: bool) -> Round:
    """Ask for every organisation in turn.

    Args:
        url: the server.
        edition: tells this round's handbook from every other round's.
        salted: whether to keep organisations apart by `cache_salt`.
    """
    computed = prefixes = 0
    seconds = 0.0
    for org in range(ORGS):
        body: dict[str, Any] = {
            "model": MODEL,
            "max_tokens": 1,
            "messages": messages(edition, org),
        }
        if salted:
            body["cache_salt"] = f"organisation {org}"
        start = time.perf_counter()
        response = httpx.post(
            f"{url}/v1/chat/completions",
            json=body,
            headers={"authorization": f"Bearer key-{org}"},
            timeout=600,
        )
        seconds += time.perf_counter() - start
        usage = response.raise_for_status().json()["usage"]
        read = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        computed += usage["prompt_tokens"] - read
        # What is not shared is a question of a few dozen tokens.
        prefixes += read < usage["prompt_tokens"] // 2
    return Round(seconds, computed, prefixes)


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "")
    result = Result("shared_prefix", options.quick)
    console.print("shared_prefix: two servers, plain and with the plugin")
    with server(plugin=False) as without, server(plugin=True) as with_plugin:
        for url in (without.url, with_plugin.url):
            ask_all(url, "warm-up", salted=False)
        rounds = pairs(
            options.pairs,
            lambda pair: ask_all(without.url, f"shared prefix {pair}", salted=True),
            lambda pair: ask_all(with_plugin.url, f"shared prefix {pair}", salted=False),
        )
    for name, measured, prefixes in (
        ("plain with cache_salt", [one for one, _ in rounds], ORGS),
        ("plugin, global scope", [other for _, other in rounds], 1),
    ):
        result.add(
            f"{name}: prefix computed",
            [a_round.prefixes for a_round in measured],
            "times",
            f"{prefixes}",
            lambda times, prefixes=prefixes: times == prefixes,
        )
        result.add(f"{name}: tokens computed", [a_round.computed for a_round in measured], "tokens")
        result.add(f"{name}: {ORGS} requests", [a_round.seconds for a_round in measured], "s")
    result.add(
        "time, plain over plugin", [one.seconds / other.seconds for one, other in rounds], "×"
    )
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
