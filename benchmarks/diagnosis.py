"""What it costs to diagnose a large request, next to tokenising it, and to remember it.

The request is an agent's: 400 KB, 24 tools, 60 messages. It is diagnosed in a session that has
already seen 64 requests of a main agent, three subagents and a title call. No engine is needed.
"""

import copy
import gc
import json
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from transformers.integrations.mistral import convert_tekken_tokenizer

from benchmarks.harness import Result, arguments, finish, pairs
from demo.session import agent_session, marked
from vllm_cachescope.cache.report import EngineId
from vllm_cachescope.diagnosis.attribution import EngineReport
from vllm_cachescope.diagnosis.computed_prompt import ComputedPrompt, prefix_source
from vllm_cachescope.diagnosis.diagnosis import conclude, diagnose
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.lineage_store import LineageStore
from vllm_cachescope.diagnosis.outcome import DiagnosisKind
from vllm_cachescope.diagnosis.token_fingerprint import fingerprint_tokens
from vllm_cachescope.prompt.request import PromptRequest
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.wire import anthropic

_MESSAGES = 60
_BYTES = 400_000
_KEPT = 64
_ROUNDS = 15
_TTLS = (300, 3600)
_CALLER = Caller("org", "session")
_SECRET = b"secret of the benchmark"
_BLOCK = 16
_ENGINE = EngineId(0, "epoch")


def conversation(seed: int, tools: int = 24) -> list[dict[str, Any]]:
    """Return the bodies of an agent's session, the last of `_MESSAGES` messages and `_BYTES`."""
    session = agent_session(seed, turns=_MESSAGES // 2 + 1, tools=tools)
    last = session.body(session.turns - 1)
    messages = last["messages"][:_MESSAGES]
    # Tool results are what makes a conversation long: each gets its share of what is missing.
    results = messages[2::2]
    missing = _BYTES - len(json.dumps({**last, "messages": messages}))
    vocabulary = last["system"][0]["text"].split()
    words = random.Random(seed)
    for message in results:
        padding = ""
        while len(padding) < missing / len(results):
            padding += words.choice(vocabulary) + " "
        message["content"] = [*_blocks(message["content"]), {"type": "text", "text": padding}]
    base = {"model": "m", "tools": last["tools"], "system": last["system"]}
    return [
        marked(copy.deepcopy({**base, "messages": messages[:end]}))
        for end in [*range(1, _MESSAGES, 2), _MESSAGES]
    ]


def _blocks(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def production_tokenizer() -> Any:
    """Return a tokenizer as large models have it: that of the demo's model, with its 2,048 entries,
    would cut a text into far more tokens. Mistral's Tekken comes with vLLM."""
    vocabulary = resources.files("mistral_common") / "data" / "tekken_240911.json"
    with resources.as_file(vocabulary) as path:
        return convert_tekken_tokenizer(str(path), chat_template="")


def title(number: int) -> dict[str, Any]:
    """Return the side call that names a conversation."""
    ask = {"role": "user", "content": f"Name conversation {number}."}
    return {"model": "m", "system": "You name conversations.", "messages": [ask]}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A request to diagnose, and what kind of diagnosis must come out."""

    name: str
    body: dict[str, Any]
    kind: DiagnosisKind


def scenarios(bodies: list[dict[str, Any]]) -> list[Scenario]:
    """Return the requests to measure: the conversation goes on, unchanged and changed."""
    last = bodies[-1]
    schema, history = copy.deepcopy(last), copy.deepcopy(last)
    schema["tools"][7]["description"] += " Now with more detail."
    history["messages"][4]["content"] = "cleared"
    return [
        Scenario("the conversation goes on", last, DiagnosisKind.CONTINUATION),
        Scenario("a tool's description changed", schema, DiagnosisKind.TOOLS_CHANGED),
        Scenario("a message was edited", history, DiagnosisKind.MESSAGES_CHANGED),
    ]


def background(made: Fingerprinter, bodies: list[dict[str, Any]]) -> list[Fingerprint]:
    """Return what the session has seen: all but the last turn, among subagents and titles."""
    others = [*(conversation(seed, tools=17) for seed in (1, 2, 3)), [title(i) for i in range(9)]]
    queues = [list(body) for body in (bodies[:-1], *others)]
    seen: list[dict[str, Any]] = []
    turn = 0
    while queues[0] or len(seen) < _KEPT:
        # The main agent makes every other request.
        queue = queues[0 if turn % 2 == 0 else 1 + turn // 2 % 4]
        turn += 1
        if queue:
            seen.append(queue.pop(0))
    return [made(parsed(body)) for body in seen]


def parsed(body: dict[str, Any]) -> PromptRequest:
    """Return the request of new objects, as a server gets it."""
    return anthropic.read(json.loads(json.dumps(body)), _TTLS)


def milliseconds(work: Callable[[], object]) -> float:
    """Return how long ``work`` takes on this thread's core, without what others take of it."""
    start = time.thread_time()
    work()
    return 1000 * (time.thread_time() - start)


def computed(tokens: list[int]) -> ComputedPrompt:
    """Return what is kept of a prompt of ``tokens`` that the engine computed."""
    hashed = fingerprint_tokens(tokens, _BLOCK, _SECRET)
    # As many hashes of blocks, which are compared as those of tokens are.
    length = len(tokens)
    return ComputedPrompt(hashed, length, hashed, length, length, 300, _ENGINE, 1.0, 0.0, 0.0)


def diagnosing(
    scenario: Scenario, made: Fingerprinter, seen: list[Fingerprint], tokens: list[int]
) -> float:
    """Return the median milliseconds of fingerprint, lineage and diagnosis of a request, of whose
    ``tokens`` the engine has read nothing."""
    times = []
    earlier = [computed(tokens[: fingerprint.tokens]) for fingerprint in seen]
    for _ in range(_ROUNDS):
        store = LineageStore(time.monotonic, requests=_KEPT + 1)
        for fingerprint, prompt in zip(seen, earlier, strict=True):
            node = store.observe(_CALLER, fingerprint).node
            store.answered(_CALLER, node, prompt_tokens=fingerprint.tokens, computed=(prompt,))
        request = parsed(scenario.body)
        gc.collect()
        start = time.thread_time()
        placement = store.observe(_CALLER, made(request))
        prompt = computed(tokens)
        source = prefix_source(prompt, store.earlier_prompts(_CALLER, placement.node))
        report = EngineReport(len(tokens), 0, _BLOCK, source=source, engine=_ENGINE)
        found = conclude(diagnose(placement), report, placement.ancestor)
        store.answered(_CALLER, placement.node, "id", len(tokens), (prompt,))
        times.append(1000 * (time.thread_time() - start))
        assert found.kind is scenario.kind, found
    return statistics.median(times)


def kept_bytes(bodies: list[dict[str, Any]], tokens: list[int]) -> float:
    """Return the bytes per request that a session of large requests takes."""
    made = Fingerprinter(_SECRET)
    requests = [parsed(body) for body in bodies for _ in range(2)]
    store = LineageStore(time.monotonic)
    gc.collect()
    tracemalloc.start()
    for request in requests:
        node = store.observe(_CALLER, made(request)).node
        store.answered(_CALLER, node, prompt_tokens=len(tokens), computed=(computed(tokens),))
    gc.collect()
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return taken / len(store)


def main() -> int:
    """ComputedPrompt the benchmark and return its exit status."""
    options = arguments(__doc__ or "")
    result = Result("diagnosis", options.quick)
    bodies = conversation(0)
    size = len(json.dumps(bodies[-1])) / 1000
    assert len(bodies[-1]["tools"]) == 24 and 380 < size < 420
    assert len(bodies[-1]["messages"]) == _MESSAGES
    made = Fingerprinter(_SECRET)
    seen = background(made, bodies)
    tokenizer = production_tokenizer()
    text = json.dumps(bodies[-1], ensure_ascii=False)
    tokens = tokenizer(text)["input_ids"]
    measured = scenarios(bodies)

    def tokenising(_: int) -> float:
        return milliseconds(lambda: tokenizer(text))

    result.add("request", [size], "KB")
    result.add("its prompt", [len(tokens)], "tokens")
    for scenario in measured:
        found = pairs(
            options.pairs,
            lambda _, scenario=scenario: diagnosing(scenario, made, seen, tokens),
            tokenising,
        )
        result.add(
            scenario.name, [one for one, _ in found], "ms", "at most 5 ms", lambda ms: ms <= 5
        )
        result.add(
            f"{scenario.name}: over tokenising",
            [100 * one / other for one, other in found],
            "%",
            "at most 3 %",
            lambda share: share <= 3,
        )
    result.add("tokenising it", [tokenising(i) for i in range(options.pairs)], "ms")
    first = parsed(bodies[-1])
    fresh = [
        milliseconds(lambda: Fingerprinter(b"another secret")(first)) for _ in range(options.pairs)
    ]
    result.add("fingerprint, all tools new", fresh, "ms")
    long = bodies[-8:]
    result.add(
        "memory per request kept",
        [kept_bytes(long, tokens) / 1000 for _ in range(options.pairs)],
        "KB",
        "at most 20 KB",
        lambda kilobytes: kilobytes <= 20,
    )
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
