"""The diagnosis and the record of each request: beside it where the reply tells of them, and
otherwise once the request is over.

A mistake in a diagnosis costs the diagnosis, and never the request.
"""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from functools import partial

from vllm_cachescope.api.mending import Mending
from vllm_cachescope.api.opening import Opening
from vllm_cachescope.api.pending_diagnosis import PendingDiagnosis
from vllm_cachescope.api.replies import Reply
from vllm_cachescope.api.request_context import RequestContext
from vllm_cachescope.api.services import Services
from vllm_cachescope.api.session_queue import SessionQueue
from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tenancy.scope import Caller

logger = logger_of(__name__)

_PUT_OFF_S = 0.02


class RequestDiagnoses:
    """Diagnoses and records the requests of one server.

    Args:
        services: what the server's requests are served with.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._queue = SessionQueue(services.count_queued)
        # How many requests of a session wait for what other replicas know of it.
        self._recalling: Counter[Caller] = Counter()

    def over(
        self,
        context: RequestContext,
        reply: Reply,
        opening: Opening | None,
        mending: Mending,
        headers: Mapping[str, str],
    ) -> None:
        """Diagnose and record a request whose prompts are over."""
        # A prompt that comes later yet, in the background, goes on from one that was diagnosed.
        context.on_over = partial(self.record, context)
        if reply.ended is not None and self._services.endings is not None:
            self._services.endings.note(context.plans, reply.ended)
        if context.ends_session and self._services.endings is not None:
            self._services.endings.end_session(context.caller)
        try:
            self._diagnose(context, reply, opening, mending, headers)
        except Exception:
            logger.exception("The request could not be diagnosed")

    def _diagnose(
        self,
        context: RequestContext,
        reply: Reply,
        opening: Opening | None,
        mending: Mending,
        headers: Mapping[str, str],
    ) -> None:
        """Diagnose and record a request that is over, at once where that is quick; ``opening`` is
        None if its diagnosis was put off until now."""
        pending = None if opening is None else opening.pending
        to_open = pending is None and bool(context.reports or context.fetching)
        waits = context.fetching is not None or not self._queue.is_empty(context.caller)
        fingerprint, lacks = None, False
        if to_open and not waits and not mending.body.is_large:
            fingerprint = self._small_fingerprint(context, mending, headers)
            lacks = self._services.diagnoser.lacks(context.caller, fingerprint)
        if waits or lacks or (to_open and mending.body.is_large):
            later = self._diagnose_later(context, reply, opening, mending, headers, fingerprint)
            self._put_off(context.caller, later, lacks)
            return
        if to_open:
            pending = self._opened(context, mending, headers, fingerprint)
        self._close(pending, context, reply)

    async def _diagnose_later(
        self,
        context: RequestContext,
        reply: Reply,
        opening: Opening | None,
        mending: Mending,
        headers: Mapping[str, str],
        fingerprint: Fingerprint | None,
    ) -> None:
        if context.fetching is not None:
            await asyncio.wait([context.fetching])
        pending = None if opening is None else opening.pending
        if pending is None and context.reports:
            pending = await self._open(context, mending, headers, fingerprint)
        self._close(pending, context, reply)

    async def begin(
        self, context: RequestContext, mending: Mending, headers: Mapping[str, str]
    ) -> Opening:
        """Open a diagnosis that the reply is to tell of, before the request runs. Where other
        replicas are to be asked first, the request does not wait for that."""
        opening, caller = Opening(), context.caller
        if caller not in self._recalling:
            # A client that hears only what was repaired is not kept waiting for what is put off.
            await self._queue.done(caller, None if mending.body.request.diagnose else _PUT_OFF_S)
            try:
                fingerprint, mending = await self._fingerprinted(context, mending, headers)
            except Exception:
                logger.exception("The request could not be diagnosed")
                opening.is_over = True
                return opening
            if caller not in self._recalling and not self._services.diagnoser.lacks(
                caller, fingerprint
            ):
                opening.pending = self._opened(context, mending, headers, fingerprint)
                opening.is_over = True
                return opening
        else:
            fingerprint = None

        async def later() -> None:
            opening.pending = await self._open(context, mending, headers, fingerprint)
            opening.is_over = True

        self._put_off(caller, later(), recalls=True)
        return opening

    def _put_off(self, caller: Caller, work: Coroutine[None, None, None], recalls: bool) -> None:
        """Put work off; ``recalls`` says whether other replicas are asked in it, or before it."""
        self._recalling[caller] += recalls
        self._queue.put_off(caller, work, partial(self._recalled, caller, recalls))

    def _recalled(self, caller: Caller, recalls: bool) -> None:
        self._recalling[caller] -= recalls
        if not self._recalling[caller]:
            del self._recalling[caller]

    async def _open(
        self,
        context: RequestContext,
        mending: Mending,
        headers: Mapping[str, str],
        fingerprint: Fingerprint | None,
    ) -> PendingDiagnosis | None:
        """Open a diagnosis, once it is known what other replicas know of the session."""
        try:
            if fingerprint is None:
                fingerprint, mending = await self._fingerprinted(context, mending, headers)
            await self._services.diagnoser.recall(context.caller, fingerprint)
        except Exception:
            logger.exception("The request could not be diagnosed")
            return None
        return self._opened(context, mending, headers, fingerprint)

    async def _fingerprinted(
        self, context: RequestContext, mending: Mending, headers: Mapping[str, str]
    ) -> tuple[Fingerprint, Mending]:
        """Return the fingerprint of a body, which of a large one is made on a thread of its own;
        and ``mending`` with that of what the client sent, if that is large and was repaired."""
        if not mending.body.is_large:
            return self._fingerprint(context, mending, headers), mending
        fingerprint = await asyncio.to_thread(self._fingerprint, context, mending, headers)
        return fingerprint, await asyncio.to_thread(self._with_clients, context, mending, headers)

    def _small_fingerprint(
        self, context: RequestContext, mending: Mending, headers: Mapping[str, str]
    ) -> Fingerprint | None:
        try:
            return self._fingerprint(context, mending, headers)
        except Exception:
            return None  # Opening the diagnosis fails by the same, and says so.

    def _fingerprint(
        self, context: RequestContext, mending: Mending, headers: Mapping[str, str]
    ) -> Fingerprint:
        body = mending.body
        with context.stage("diagnosis"):
            return self._services.diagnoser.fingerprint(
                context.caller, body.request, body.fields, headers
            )

    def _with_clients(
        self, context: RequestContext, mending: Mending, headers: Mapping[str, str]
    ) -> Mending:
        """Return ``mending`` with the fingerprint of what the client sent, if it was repaired."""
        client = mending.client
        if client is None or not client.repairs:
            return mending
        fingerprint = self._services.diagnoser.fingerprint(
            context.caller, client.request, client.body, headers
        )
        return replace(mending, client=replace(client, fingerprint=fingerprint))

    def _opened(
        self,
        context: RequestContext,
        mending: Mending,
        headers: Mapping[str, str],
        fingerprint: Fingerprint | None,
    ) -> PendingDiagnosis | None:
        body = mending.body
        try:
            with context.stage("diagnosis"):
                return self._services.diagnoser.open(
                    context.caller,
                    body.request,
                    body.fields,
                    headers,
                    context.reports,
                    fingerprint,
                    mending.client,
                )
        except Exception:
            logger.exception("The request could not be diagnosed")
            return None

    def _close(
        self, pending: PendingDiagnosis | None, context: RequestContext, reply: Reply
    ) -> None:
        if pending is not None:
            try:
                timings = [context.timings[nonce] for nonce in context.reports]
                with context.stage("diagnosis"):
                    reports = context.reports.values()
                    answer = ""
                    if reply.ended is Ended.ANSWER:
                        answer = next(iter(context.answers.values()), "")
                    self._services.diagnoser.close(pending, reports, reply.id, timings, answer)
            except Exception:
                logger.exception("The request could not be diagnosed")
        assert context.request is not None
        self._services.ignored_markers.count(context.request, context.engine)
        self._account(context, None if pending is None else pending.diagnosis, reply.id)

    def _account(
        self, context: RequestContext, diagnosis: Diagnosis | None, response_id: str | None
    ) -> None:
        """Count and record what is over of a request, and was not yet."""
        self._services.stage_times.count(context)
        self._services.tokenized.count(context)
        self._services.recorder.record(context, diagnosis, response_id)

    def record(self, context: RequestContext) -> None:
        """Record what is over of a request, and is not diagnosed."""
        if context.fetching is None:
            self._account(context, None, None)
        else:
            self._queue.put_off(context.caller, self._record_later(context, context.fetching))

    async def _record_later(self, context: RequestContext, fetching: asyncio.Task[None]) -> None:
        await asyncio.wait([fetching])
        self._account(context, None, None)
