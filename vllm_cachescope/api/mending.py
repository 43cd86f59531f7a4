"""The mending of a request before it is served: off the event loop if it is large, and never in the
way of the client's own request."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry
from starlette.types import Message, Send

from vllm_cachescope.api.client_request import ClientRequest
from vllm_cachescope.api.incoming_body import IncomingBody, incoming_of
from vllm_cachescope.api.session_exchange import SessionExchange
from vllm_cachescope.config import Config
from vllm_cachescope.diagnosis.session_note import NoteKey
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.logs import logger_of
from vllm_cachescope.metrics import NO_ENGINE, REPAIR_FAILURES
from vllm_cachescope.prompt.global_scope import without_global
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.registration import counter
from vllm_cachescope.repair.repairer import Repairer
from vllm_cachescope.repair.session_memory import Lessons
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.wire.body import encode

logger = logger_of(__name__)

REPAIR_HEADER = "x-cachescope-repair"
"""A client that sends ``off`` here has its request served as it is."""

_MANY_PARTS = 200
"""Parts from which on a body is repaired on a thread of its own: spelling 300 calls takes 30 ms."""

_MANY_TEXTS = 50
"""First spellings from which on they are kept on a thread of their own: packing 360 takes 10 ms."""

RECALL_S = 0.01
"""How long the first request of a session waits for what came first in it on another replica, in
seconds: later on, what is put right by that would be put wrong."""

_REFUSALS = (400, 422, 500)
"""Statuses with which a server may answer what it would have taken unrepaired."""


@dataclass(frozen=True, slots=True)
class Mending:
    """A body that is to be served.

    Attributes:
        body: the body, repaired or as it came.
        client: the request as the client sent it; None if it is not to be repaired.
        lessons: what it teaches of its session once the server accepts it; None for nothing.
    """

    body: IncomingBody
    client: ClientRequest | None = None
    lessons: Lessons | None = None

    @property
    def is_repaired(self) -> bool:
        """Whether anything was put right."""
        return self.client is not None and bool(self.client.repairs)


class Mender:
    """Mends requests, where the operator has it so.

    Args:
        repairer: puts bodies right.
        config: the configuration.
        registry: where failures are counted.
        model_name: the model's name in the server's own metrics.
        exchange: exchanges notes on sessions with other replicas; None where there is no store
            to do so.
    """

    def __init__(
        self,
        repairer: Repairer,
        config: Config,
        registry: CollectorRegistry,
        model_name: str,
        exchange: SessionExchange | None = None,
    ) -> None:
        self._exchange = exchange
        self._repairer = repairer
        self._config = config
        failures = counter(REPAIR_FAILURES, registry)
        self._failures = {
            reason: failures.labels(model_name, NO_ENGINE, reason)
            for reason in (("error", "refused") if repairer.is_used else ())
        }

    async def mend(
        self, caller: Caller, body: IncomingBody, headers: Mapping[str, str], is_global: bool
    ) -> Mending:
        """Return what is to be served for a body. Never raises.

        Args:
            caller: whose request it is.
            body: its body.
            headers: its headers, names in lower case.
            is_global: whether the caller may share as global.
        """
        protocol = body.request.protocol
        if not self._repairer.is_on(caller, protocol) or not wants_repair(headers):
            return Mending(body)
        try:
            if self._exchange is not None and self._repairer.memory.lacks(caller):
                await self._recall(self._exchange, caller)
            if body.is_large or len(body.request.parts) > _MANY_PARTS:
                return await asyncio.to_thread(self._mend, caller, protocol, body, is_global)
            return self._mend(caller, protocol, body, is_global)
        except Exception:
            logger.exception("The request could not be repaired")
            self._failures["error"].inc()
            return Mending(body)

    async def _recall(self, exchange: SessionExchange, caller: Caller) -> None:
        """Learn what came first in a session on other replicas."""
        notes = await exchange.recall(NoteKey(caller.org, caller.session), RECALL_S)
        # Names are in the order of their requests: the latest knows what all before it have said.
        latest = max(notes, key=lambda note: note.node.name, default=None)
        if latest is not None and latest.firsts is not None:
            self._repairer.memory.adopt(caller, latest.firsts)

    def _mend(
        self, caller: Caller, protocol: Protocol, body: IncomingBody, is_global: bool
    ) -> Mending:
        mended = self._repairer.mend(caller, protocol, body.fields)
        client = ClientRequest(body.request, body.fields, mended.repairs)
        if not mended.repairs:
            return Mending(body, client, mended.lessons)
        served = incoming_of(mended.fields, protocol, self._config, body.is_large)
        if not is_global:
            served = replace(served, request=without_global(served.request))
        if served.raw is None:  # It is not what came.
            served = replace(served, raw=encode(served.forwarded))
        return Mending(served, client, mended.lessons)

    def unmended(self, mending: Mending, body: IncomingBody) -> Mending:
        """Return what is to be served instead of what the server has refused; if the server accepts
        that, nothing of the session is repaired from then on."""
        self._failures["refused"].inc()
        assert mending.lessons is not None
        mending.lessons.refuse()
        return Mending(body, ClientRequest(body.request, body.fields), mending.lessons)

    def learn(self, mending: Mending) -> None:
        """Remember what an accepted request was the first of its session to say. Never raises."""
        lessons = mending.lessons
        if lessons is None:
            return
        if len(lessons.texts) > _MANY_TEXTS:
            asyncio.get_running_loop().run_in_executor(None, self._learn, lessons)
        else:
            self._learn(lessons)

    def _learn(self, lessons: Lessons) -> None:
        try:
            self._repairer.learn(lessons)
        except Exception:
            logger.exception("What a request teaches of its session could not be kept")
            self._failures["error"].inc()

    def purge(self, org: str | None, session: str | None) -> None:
        """Forget ``org``, or one session of ``org``; with None, everyone."""
        self._repairer.memory.purge(org, session)


class Trial:
    """Passes a server's answer on, unless it refuses what was repaired.

    Args:
        send: sends a message to the client.
        holds_back: whether a refusal is held back.
        on_accepted: called once the server begins to answer with 200.

    Attributes:
        refused: whether the server has refused, and nothing was sent to the client.
        has_begun: whether anything was sent to the client.
    """

    def __init__(self, send: Send, holds_back: bool, on_accepted: Callable[[], object]) -> None:
        self._send, self._holds_back, self._on_accepted = send, holds_back, on_accepted
        self.refused = self.has_begun = False

    async def send(self, message: Message) -> None:
        """Take one ASGI message from the server."""
        if message["type"] == "http.response.start":
            if self._holds_back and message["status"] in _REFUSALS:
                self.refused = True
            elif message["status"] == 200:
                self._on_accepted()
        if not self.refused:
            self.has_begun = True
            await self._send(message)


def wants_repair(headers: Mapping[str, str]) -> bool:
    """Tell whether the client lets its request be repaired.

    Raises:
        BadRequest: if it asks for something else.
    """
    if (value := headers.get(REPAIR_HEADER)) not in (None, "off"):
        raise BadRequest(REPAIR_HEADER, value, "off")
    return value is None
