"""Random traffic of many clients, of all that can happen to a prompt and its cache."""

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.engine.bodies import text
from tests.engine.server import MODEL, OPERATOR_TOKEN, Api

_SCOPES = (None, "org", "session", "global")
_LATEST_TURN = 4  # of five of the longest questions a prompt may be too long


@dataclass(slots=True)
class Conversation:
    """What one conversation has said so far; several clients go on with it at once.

    Attributes:
        name: unlike that of any other.
        system: its system prompt.
        headers: whose it is, in most requests.
        turns: its questions.
    """

    name: str
    system: str
    headers: dict[str, str]
    turns: list[str] = field(default_factory=list)


class Traffic:
    """Requests of organisations and sessions that share heads, go on, fork, retry, change scopes
    and formats, and hang up; while lifetimes run out, memory is short and operators purge.

    Args:
        api: the server.
        seed: of everything that is drawn. How requests meet in the engine differs all the same.
    """

    def __init__(self, api: Api, seed: int) -> None:
        self._api = api
        self._chance = random.Random(seed)
        self._heads = [text(f"head {seed} {i}", words) for i, words in enumerate((40, 110, 300))]
        self._conversations = [self._begin(f"{seed} {i}") for i in range(12)]
        self.served: Counter[str] = Counter()

    def send(self, requests: int, clients: int = 6) -> None:
        """Send ``requests`` requests, of at most ``clients`` clients at once."""
        with ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(self._draw()) for _ in range(requests)]:
                done.result()

    def _draw(self) -> Callable[[], None]:
        """Draw one request, or something else that happens."""
        chance = self._chance
        if chance.random() < 0.06:
            return chance.choice([self._wait, self._purge, self._api.empty_device, self._reset])
        if chance.random() < 0.05:
            at = chance.randrange(len(self._conversations))
            name = self._conversations[at].name + "'"
            self._conversations[at] = self._begin(name)
        conversation = chance.choice(self._conversations)
        if len(conversation.turns) >= _LATEST_TURN:
            del conversation.turns[chance.randrange(_LATEST_TURN) :]
        if not conversation.turns or chance.random() < 0.5:
            words = chance.choice([5, 60, 200])
            conversation.turns.append(text(f"{conversation.name} {chance.random()}", words))
        path, body = chance.choice([self._messages, self._chat, self._responses, self._raw])(
            conversation
        )
        headers = conversation.headers if chance.random() < 0.9 else self._headers()
        if chance.random() < 0.1:
            body["cache_salt"] = chance.choice("ab")
        body["stream"] = "prompt_logprobs" not in body and chance.random() < 0.6
        # Some hang up while the prompt is queued or computed, some while the answer comes.
        patience = chance.choice([None, None, chance.expovariate(20)])
        lines = chance.choice([None, 1, 3])
        return lambda: self._ask(path, body, headers, patience, lines)

    def _ask(
        self,
        path: str,
        body: dict[str, Any],
        headers: dict[str, str],
        patience: float | None,
        lines: int | None,
    ) -> None:
        url, timeout = f"{self._api.url}{path}", httpx.Timeout(60, read=patience or 60)
        try:
            with httpx.stream("POST", url, json=body, headers=headers, timeout=timeout) as answer:
                last = ""
                for at, line in enumerate(answer.iter_lines()):
                    if body["stream"] and at == lines:
                        break
                    last = line
            self.served[f"{answer.status_code}"] += 1
            assert answer.status_code == 200, (path, last)
        except httpx.TimeoutException:
            self.served["hung up"] += 1

    def _begin(self, name: str) -> Conversation:
        return Conversation(name, self._chance.choice(self._heads), self._headers())

    def _headers(self) -> dict[str, str]:
        """Return the key of an organisation, and mostly the name of a session."""
        headers = {"x-api-key": f"key {self._chance.randrange(2)} of the traffic"}
        if self._chance.random() < 0.8:
            headers["X-CacheScope-Session"] = f"session {self._chance.randrange(2)}"
        return headers

    def _marked(self, content: str) -> dict[str, Any]:
        """Return a block of text, often with a breakpoint of any scope."""
        block: dict[str, Any] = {"type": "text", "text": content}
        if self._chance.random() < 0.6:
            block["cache_control"] = {"type": "ephemeral"}
            if (scope := self._chance.choice(_SCOPES)) is not None:
                block["cache_control"]["scope"] = scope
        return block

    def _turns(self, conversation: Conversation) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = []
        for question in conversation.turns:
            turns += [
                {"role": "user", "content": [{"type": "text", "text": question}]},
                {"role": "assistant", "content": "I see."},
            ]
        turns[-2]["content"] = [self._marked(conversation.turns[-1])]
        return turns[:-1]

    def _messages(self, conversation: Conversation) -> tuple[str, dict[str, Any]]:
        system = [self._marked(conversation.system)]
        turns = self._turns(conversation)
        if "cache_control" in system[0] and "cache_control" in turns[-1]["content"][0]:
            _narrow(system[0], turns[-1]["content"][0])
        return "/v1/messages", {
            **{"model": MODEL, "max_tokens": self._chance.choice([1, 3, 30])},
            **{"system": system, "messages": turns},
        }

    def _chat(self, conversation: Conversation) -> tuple[str, dict[str, Any]]:
        _, body = self._messages(conversation)
        system = {"role": "system", "content": body.pop("system")}
        body["messages"] = [system, *body["messages"]]
        if self._chance.random() < 0.1:
            body["n"] = 2
        return "/v1/chat/completions", body

    def _responses(self, conversation: Conversation) -> tuple[str, dict[str, Any]]:
        return "/v1/responses", {
            **{"model": MODEL, "max_output_tokens": self._chance.choice([1, 3, 30])},
            **{"instructions": conversation.system, "input": " ".join(conversation.turns)},
        }

    def _raw(self, conversation: Conversation) -> tuple[str, dict[str, Any]]:
        whole = " ".join([conversation.system, *conversation.turns])
        prompts = [whole, conversation.system + conversation.turns[0]]
        body: dict[str, Any] = {
            **{"model": MODEL, "max_tokens": self._chance.choice([1, 3, 30])},
            "prompt": self._chance.choice([whole, prompts, prompts * 2]),
        }
        if self._chance.random() < 0.05:
            body |= {"prompt": whole, "prompt_logprobs": 1}
        return "/v1/completions", body

    def _wait(self) -> None:
        self._api.clock.advance(self._chance.choice([1, 100, 299, 400]))

    def _purge(self) -> None:
        if self._chance.random() < 0.5:
            key, what = OPERATOR_TOKEN, {"all": True}
        else:
            key, what = "key 0 of the traffic", {"session": "session 0"}
        assert self._api.post("/cachescope/purge", what, key).status_code == 200

    def _reset(self) -> None:
        url, whole = f"{self._api.url}/reset_prefix_cache", {"reset_external": True}
        httpx.post(url, params=whole, timeout=60)


def _narrow(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Have the second of two breakpoints ask for no wider scope than the first."""
    order = ["global", "org", "session"]
    wide, narrow = (mark["cache_control"].get("scope", "org") for mark in (first, second))
    if order.index(narrow) < order.index(wide):
        second["cache_control"]["scope"] = wide
