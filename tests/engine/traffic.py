"""Random traffic of many clients, of all that can happen to a prompt and its cache."""

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import httpx

from tests.engine.bodies import text
from tests.engine.server import MODEL, OPERATOR_TOKEN, Api
from tests.engine.usages import counts, last_usage
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.wire import protocol_of

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


@dataclass(slots=True)
class Told:
    """What the answers' usage adds up to.

    Attributes:
        prompt: tokens of prompts.
        read: those read.
        created: those created.
        sequences: tokens of prompts, each as often as answers to it were asked for: vLLM's metrics
            count it so.
        alike: requests of which vLLM's own count of what was created was seen, too.
        unlike: those of them of which it was another, with both counts.
    """

    prompt: int = 0
    read: int = 0
    created: int = 0
    sequences: int = 0
    alike: int = 0
    unlike: list[tuple[int, int]] = field(default_factory=list)


class Traffic:
    """Requests of organisations and sessions that share heads, go on, fork, retry, change scopes
    and formats, and hang up; while lifetimes run out, memory is short and operators purge.

    Args:
        api: the server.
        seed: of everything that is drawn. How requests meet in the engine differs all the same.
        trouble: draws what befalls a tier besides; None for nothing.
        patient: whether every client waits for its answer to the end. What they are told then adds
            up in ``told``.

    Attributes:
        served: how many requests ended in which way.
        told: what the usage in answers adds up to.
    """

    def __init__(
        self,
        api: Api,
        seed: float,
        trouble: Callable[[random.Random], Callable[[], None]] | None = None,
        patient: bool = False,
    ) -> None:
        self._api = api
        self._chance = random.Random(seed)
        self._trouble = trouble
        self._patient = patient
        self._heads = [text(f"head {seed} {i}", words) for i, words in enumerate((40, 110, 300))]
        self._conversations = [self._begin(f"{seed} {i}") for i in range(12)]
        self._one = Lock()
        self.served: Counter[str] = Counter()
        self.told = Told()

    def send(self, requests: int, clients: int = 6, within_s: float = 0.0) -> None:
        """Send ``requests`` requests, of at most ``clients`` clients at once.

        Args:
            requests: how many.
            clients: how many at once.
            within_s: how much time passes meanwhile besides, in seconds of the server's clock.
        """
        pause_s = within_s / requests
        with ThreadPoolExecutor(clients) as pool:
            drawn = []
            for _ in range(requests):
                after_s = self._chance.expovariate(1 / pause_s) if pause_s else 0.0
                drawn.append(pool.submit(self._after, after_s, self._draw()))
            for done in drawn:
                done.result()

    def _after(self, pause_s: float, happen: Callable[[], None]) -> None:
        with self._one:
            self._api.clock.advance(pause_s)
        happen()

    def _draw(self) -> Callable[[], None]:
        """Draw one request, or something else that happens."""
        chance = self._chance
        if self._trouble is not None and chance.random() < 0.04:
            return self._trouble(chance)
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
        if body["stream"] and path in ("/v1/chat/completions", "/v1/completions"):
            body["stream_options"] = {"include_usage": True}
        # Some hang up while the prompt is queued or computed, some while the answer comes.
        patience = chance.choice([None, None, chance.expovariate(20)])
        lines = chance.choice([None, 1, 3])
        if self._patient:
            patience = lines = None
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
                said: list[str] = []
                for at, line in enumerate(answer.iter_lines()):
                    if body["stream"] and at == lines:
                        break
                    said.append(line)
            self.served[f"{answer.status_code}"] += 1
            assert answer.status_code == 200, (path, said)
        except httpx.TimeoutException:
            self.served["hung up"] += 1
            return
        if self._patient:
            protocol = protocol_of(path)
            assert protocol is not None
            with self._one:
                self._note(protocol, body, last_usage(said))

    def _note(self, protocol: Protocol, body: dict[str, Any], usage: dict[str, Any] | None) -> None:
        assert usage is not None, "an answer without usage"
        told = self.told
        prompt, read, created = counts(protocol, usage)
        told.prompt += prompt
        told.read += read
        told.created += created
        told.sequences += prompt * body.get("n", 1)
        # Of a prompt whose last tokens no breakpoint covers vLLM counts these, too.
        if protocol is Protocol.CHAT and "cache_control" not in repr(body) and "n" not in body:
            vllms = usage["prompt_tokens_details"].get("created_cache_tokens")
            if vllms is not None:
                told.alike += 1
                if vllms != created:
                    told.unlike.append((vllms, created))

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
        # What is wholly unmarked is what vLLM's own counts can be compared of.
        if self._chance.random() < (0.3 if self._patient else 0.6):
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
        with self._one:
            self._api.clock.advance(self._chance.choice([1, 100, 299, 400]))

    def _purge(self) -> None:
        if self._chance.random() < 0.5:
            key, what = OPERATOR_TOKEN, {"all": True}
        else:
            key, what = "key 0 of the traffic", {"session": "session 0"}
        status = self._api.post("/cachescope/purge", what, key).status_code
        # A tier in trouble may be out of its reach.
        assert status == 200 or (self._trouble is not None and status in (502, 503)), status

    def _reset(self) -> None:
        url, whole = f"{self._api.url}/reset_prefix_cache", {"reset_external": True}
        httpx.post(url, params=whole, timeout=60)


def _narrow(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Have the second of two breakpoints ask for no wider scope than the first."""
    order = ["global", "org", "session"]
    wide, narrow = (mark["cache_control"].get("scope", "org") for mark in (first, second))
    if order.index(narrow) < order.index(wide):
        second["cache_control"]["scope"] = wide
