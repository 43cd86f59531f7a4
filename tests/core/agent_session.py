"""Requests as a coding agent makes them, and a client that sends them to the diagnosis."""

import copy
import json
import random
from typing import Any

from vllm_cachescope.diagnosis.diagnosis import diagnose
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.forest import LineageNode
from vllm_cachescope.diagnosis.lineage_store import LineageStore
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.diagnosis.placement import LineagePlacement
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.wire import anthropic, openai_chat, openai_completions, openai_responses
from vllm_cachescope.wire.extras import extra_fields

TTLS = (300, 1800, 3600, 43200, 86400)
READERS = {
    Protocol.MESSAGES: anthropic.read,
    Protocol.CHAT: openai_chat.read,
    Protocol.RESPONSES: openai_responses.read,
    Protocol.COMPLETIONS: openai_completions.read,
}
Body = dict[str, Any]

_WORDS = tuple(
    word
    for line in (
        "branch build cache change check commit config count error event field file filter flag",
        "format handler index input item layer limit list lock loop merge model module name node",
        "option order output parser patch path plan queue range record result retry route schema",
        "score server shard signal sort stack state step store stream table task test token trace",
        "tree type update value vector version view window worker",
    )
    for word in line.split()
)


def parsed_anew(value: Any) -> Any:
    """Return the JSON value made of new objects, as every request's body is."""
    return json.loads(json.dumps(value))


def words(rng: random.Random, characters: int) -> str:
    """Return text of about so many characters."""
    out: list[str] = []
    size = 0
    while size < characters:
        out.append(rng.choice(_WORDS))
        size += len(out[-1]) + 1
    return " ".join(out)


def tool(rng: random.Random, name: str, size: int = 600) -> Body:
    """Return a tool whose description has about ``size`` characters."""
    return {
        "name": name,
        "description": words(rng, size),
        "input_schema": {
            "type": "object",
            "properties": {
                "path": {"type": "string", "description": words(rng, 60)},
                "pattern": {"type": "string", "description": words(rng, 60)},
                "limit": {"type": "integer", "minimum": 1},
            },
            "required": ["path"],
        },
    }


TOOL_NAMES = [
    *("Bash", "BashOutput", "Edit", "Explore", "Fetch", "Glob", "Grep", "KillShell", "List"),
    *("Move", "MultiEdit", "Notebook", "Open", "Plan", "Question", "Read", "Rename", "Search"),
    *("Skill", "Task", "Todo", "Undo", "WebSearch", "Write"),
]


class Agent:
    """One conversation: its tools, system prompt and messages so far.

    Args:
        seed: decides all its text.
        tools: names of its tools.
        scale: multiplies the length of every text.
    """

    def __init__(self, seed: object, tools: list[str] = TOOL_NAMES, scale: float = 1.0) -> None:
        self.rng = random.Random(str(seed))
        self.scale = scale
        self.model = "main-model"
        self.tools = [tool(self.rng, name, int(600 * scale)) for name in tools]
        self.system: list[Body] = [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=0a1b2;"},
            {"type": "text", "text": "You are an agent that changes code. " + self.text(200)},
            {"type": "text", "text": self.text(8000)},
        ]
        self.messages: list[Body] = []
        self.params: Body = {}
        self.ask(self.text(500), reminder=self.text(300))

    def text(self, characters: int) -> str:
        return words(self.rng, max(12, int(characters * self.scale)))

    def fresh(self) -> str:
        """Return an id that no other block has."""
        return f"toolu_{self.rng.getrandbits(64):016x}"

    def ask(self, text: str, reminder: str | None = None) -> "Agent":
        """Add a message of the user."""
        blocks = [{"type": "text", "text": f"<reminder>{reminder}</reminder>"}] if reminder else []
        self.messages.append({"role": "user", "content": [*blocks, {"type": "text", "text": text}]})
        return self

    def turn(self, calls: int = 1) -> "Agent":
        """Add an answer of the model that calls tools, and their results."""
        ids = [self.fresh() for _ in range(calls)]
        self.messages.append(
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": self.text(160)},
                    *(
                        {
                            "type": "tool_use",
                            "id": id_,
                            "name": "Read",
                            "input": {"path": self.text(30), "limit": self.rng.randrange(500)},
                        }
                        for id_ in ids
                    ),
                ],
            }
        )
        self.messages.append(
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": id_, "content": self.text(1500)}
                    for id_ in ids
                ],
            }
        )
        return self

    def copy(self, seed: object) -> "Agent":
        """Return an agent that goes on from here in its own way."""
        other = copy.copy(self)
        other.rng = random.Random(f"{seed} of {self.rng.random()}")
        for name in ("tools", "system", "messages", "params"):
            setattr(other, name, parsed_anew(getattr(self, name)))
        return other

    def body(self) -> Body:
        """Return the request, with breakpoints where Claude Code sets them."""
        body = parsed_anew(
            {
                "model": self.model,
                "max_tokens": 4096,
                "tools": self.tools,
                "system": self.system,
                "messages": self.messages,
                **self.params,
            }
        )
        marker = {"type": "ephemeral"}
        for block in body["system"][1:][-2:]:
            block["cache_control"] = dict(marker)
        body["messages"][-1]["content"][-1]["cache_control"] = dict(marker)
        return body


class Client:
    """Sends bodies as one caller; each is parsed anew, as a server does."""

    def __init__(self, session: str | None = "s", org: str = "org", **bounds: Any) -> None:
        self.now = 1000.0
        self.caller = Caller(org, session)
        self.fingerprinter = Fingerprinter(b"a secret of the operator")
        self.store = LineageStore(lambda: self.now, **bounds)
        self.placement: LineagePlacement | None = None

    def fingerprint(
        self,
        body: Body,
        protocol: Protocol = Protocol.MESSAGES,
        headers: dict[str, str] | None = None,
    ) -> Fingerprint:
        parsed = parsed_anew(body)
        request = READERS[protocol](parsed, TTLS)
        return self.fingerprinter(request, extra_fields(parsed, headers or {}))

    def send(
        self,
        body: Body,
        protocol: Protocol = Protocol.MESSAGES,
        headers: dict[str, str] | None = None,
        response_id: str | None = None,
    ) -> Diagnosis:
        self.now += 1.0
        self.placement = self.store.observe(self.caller, self.fingerprint(body, protocol, headers))
        self.store.answered(self.caller, self.placement.node, response_id)
        return diagnose(self.placement)

    @property
    def node(self) -> LineageNode:
        """The request that was sent last."""
        assert self.placement is not None
        return self.placement.node
