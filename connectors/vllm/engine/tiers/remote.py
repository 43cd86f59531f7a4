"""The managers of remote tiers, as vLLM's tiering framework wants secondary tiers to be."""

import os
import random
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.request import Request

from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.cache.quotas import read_quotas
from vllm_cachescope.config import Config, Tier
from vllm_cachescope.connectors.vllm.engine.block_layout import BlockLayout
from vllm_cachescope.connectors.vllm.engine.kv_identity import kv_identity
from vllm_cachescope.connectors.vllm.engine.tiers.base import TierParent
from vllm_cachescope.connectors.vllm.store_factory import (
    counts_usage,
    is_on_disk,
    limits_of,
    stores,
)
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tiers.envelope import EncryptedEnvelopes, Envelopes
from vllm_cachescope.tiers.expiry import expiry
from vllm_cachescope.tiers.inquiries import Lookup
from vllm_cachescope.tiers.inventory import Inventory
from vllm_cachescope.tiers.jobs import Outgoing
from vllm_cachescope.tiers.keyspace import Keyspace, qualified, secret_digest, split
from vllm_cachescope.tiers.leases import Leases
from vllm_cachescope.tiers.local_usage import LocalUsage
from vllm_cachescope.tiers.purge_notices import PurgeNotices
from vllm_cachescope.tiers.remote import RemoteTier

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec

_RESULTS = {
    Lookup.HIT: LookupResult.HIT,
    Lookup.MISS: LookupResult.MISS,
    Lookup.RETRY: LookupResult.RETRY,
}


UNKNOWN_WORTH_S = 4.0
"""How many seconds of computing a load counts for while it is not known how fast the engine
computes. After a start many come back at once: as long as blocks keep coming, a second of waiting
(with the default `load_share`) loses less than a prompt cut short."""


@dataclass(slots=True)
class _Use:
    """A request's use of its prompt; kept while the request may store chunks, even after its end.

    Attributes:
        at: when the request last used its prompt, in seconds on the tier's clock.
        plan: the request's plan; None if the scheduler side knows of none.
    """

    at: float
    plan: Plan | None


class RemoteTierManager(SecondaryTierManager):
    """A `RemoteTier` as one of the offloading framework's secondary tiers. vLLM makes it before
    there is a scheduler side, so `bind` comes after.

    Args:
        offloading_spec: vLLM's, with the layout of blocks.
        primary_kv_view: memory of the CPU tier, of shape (chunks, bytes per chunk).
        tier_type: the framework's name of the type; metrics show the tier's own name instead.
        settings: the tier's part of the configuration.
        config: the configuration.
        model: see `kv_identity.model_identity`.
        framework_options: passed on to vLLM's class.
    """

    medium: ClassVar[Medium | None] = Medium.STORAGE
    _parent: TierParent

    def __init__(
        self,
        offloading_spec: "OffloadingSpec",
        primary_kv_view: memoryview,
        tier_type: str,
        settings: Tier,
        config: Config,
        model: dict[str, Any],
        **framework_options: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, settings.name, **framework_options)
        self.name = settings.name
        # Other engines can read it as well.
        self.locality = Locality.REMOTE
        # In the words of vLLM's `CacheHitSource`, which 0.31 does not have yet.
        self.cache_hit_source = "disk" if is_on_disk(settings) else "external_unspecified"  # type: ignore[assignment, misc]
        self._memory = primary_kv_view.cast("B")
        identity = kv_identity(model, offloading_spec.config)
        keyspace = Keyspace({**identity, "encrypted": settings.encrypt})
        secret = config.secret_bytes()
        self._quotas = quotas = read_quotas(config, settings.name, self._block_size_bytes)
        self.tier = RemoteTier(
            settings.name,
            stores(
                settings,
                self._block_size_bytes,
                keyspace,
                secret_digest(secret),
                Leases(secret),
                time.monotonic,
                quotas,
            ),
            self._block_size_bytes,
            EncryptedEnvelopes(secret, keyspace.namespace, self._block_size_bytes)
            if settings.encrypt
            else Envelopes(secret, keyspace.namespace),
            limits_of(settings),
            time.monotonic,
            random.random,
            None if quotas is None or counts_usage(settings) else LocalUsage(quotas),
            Inventory(time.monotonic)
            if offloading_spec.kv_events_config.enable_kv_cache_events
            else None,
            PurgeNotices(secret),
            f"{socket.gethostname()}:{os.getpid()}",
        )
        self._uses: dict[str, _Use] = {}
        self.tier.start()

    def bind(self, parent: TierParent) -> None:
        """Connect the tier to the scheduler side. To be called before the first request."""
        self._parent = parent

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._uses[req_context.req_id] = self._new_use(req_context)
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return _RESULTS[self.tier.lookup(req_context.req_id, self._qualified(key, req_context))]

    def peek(self, key: OffloadKey, req_context: ReqContext) -> Lookup:
        """Return whether the store holds ``key``, as far as is known; promise no load."""
        return self.tier.peek(req_context.req_id, self._qualified(key, req_context))

    def submit_load(self, job_metadata: TransferJob) -> None:
        job = job_metadata
        keys = [self._qualified(key, job.req_context) for key in job.keys]
        slots = [self._slot(chunk) for chunk in job.chunk_ids]
        self._parent.on_promoting(job.req_context.req_id, job.keys)
        worth_s = self._parent.prefill_seconds(job.keys) or UNKNOWN_WORTH_S
        self.tier.load(job.job_id, job.req_context.req_id, keys, slots, worth_s)

    def used(self, request_id: str, keys: Iterable[tuple[bytes, int, int]]) -> None:
        """Note that a request uses its prompt now.

        Args:
            request_id: the request.
            keys: ``(qualified key, ttl_s, end)`` of chunks that the tier may hold, where ``end``
                is the position in the prompt at which the chunk ends, in tokens.
        """
        now = time.monotonic()
        if (use := self._uses.get(request_id)) is not None:
            use.at = now
        self.tier.touch((key, expiry(now, ttl_s, end)) for key, ttl_s, end in keys)

    def submit_store(self, job_metadata: TransferJob) -> None:
        job = job_metadata
        use = self._uses.get(job.req_context.req_id) or self._new_use(job.req_context)
        blocks: list[Outgoing] = []
        beyond: list[bytes] = []
        for key, chunk in zip(job.keys, job.chunk_ids, strict=True):
            if (entry := self._parent.live_entry(key)) is None:
                continue
            name = qualified(entry.owner, key)
            end = job.req_context.get_offload_key_position(key) or 0
            if self._is_beyond_quota(use.plan, name, end):
                beyond.append(name)
            else:
                expires_at = expiry(use.at, entry.ttl_s, end)
                blocks.append(Outgoing(name, self._slot(chunk), entry.ttl_s, expires_at))
        self.tier.note_over_quota(beyond)
        self.tier.store(job.job_id, blocks, len(blocks) + len(beyond) == len(job.keys))

    def _new_use(self, context: ReqContext) -> _Use:
        return _Use(time.monotonic(), self._parent.plan_of(context.req_id))

    def _is_beyond_quota(self, plan: Plan | None, name: bytes, end: int) -> bool:
        """Whether the chunk that ends at ``end`` (tokens) would be evicted first, were it stored:
        the prompt up to there exceeds the quota of its organisation by itself."""
        if self._quotas is None or plan is None:
            return False
        account = self._quotas.account_of(name)
        return self._quotas.over(account, self._parent.quota_chunks(plan, end)) > 0

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        for job in self.tier.finished():
            loaded = [(OffloadKey(split(key)[1]), ttl_s) for key, ttl_s in job.loaded]
            if loaded and job.request_id is not None:
                self._parent.on_promoted(self.name, job.request_id, loaded)
            results.append(
                JobResult(
                    job.job_id,
                    job.complete,
                    [key for key, _ in loaded] or None,
                    job.seconds,
                    job.nbytes,
                )
            )
        return results

    @property
    def has_changes(self) -> bool:
        """Whether `take_events` returns anything."""
        return self.tier.has_changes

    def take_events(self) -> Iterable[OffloadingEvent]:
        return [self._event(*change) for change in self.tier.take_changes()]

    def inventory(self) -> OffloadingEvent:
        """Return the event that announces all entries anew, and drop those that wait."""
        self.tier.take_changes()
        return self._event(self.tier.held(), removed=False)

    def _event(self, keys: Iterable[bytes], removed: bool) -> OffloadingEvent:
        return OffloadingEvent(
            keys=[OffloadKey(split(key)[1]) for key in keys],
            medium=Medium.STORAGE,
            removed=removed,
            locality=self.locality,
            ownership=self.name,
            removal_expected=True,
        )

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._uses.pop(req_context.req_id, None)
        self.tier.end_request(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        for request_id in context.preempted_req_ids:
            self.tier.end_request(request_id)
        self.tier.flush()

    def drain_jobs(self) -> None:
        self.tier.drain()

    def shutdown(self) -> None:
        self.tier.close()
        self._memory.release()

    def _qualified(self, key: OffloadKey, req_context: ReqContext) -> bytes:
        return qualified(self._parent.ttl_and_owner(key, req_context)[1], key)

    def _slot(self, chunk: int) -> memoryview:
        start = int(chunk) * self._block_size_bytes
        return self._memory[start : start + self._block_size_bytes]


def refresh(
    remotes: Sequence[RemoteTierManager],
    plan: Plan,
    request: Request,
    tokens: int,
    layout: BlockLayout,
    ledger: Ledger,
) -> None:
    """Have the copies that remote tiers may hold of a prompt's first ``tokens`` tokens live on:
    the request uses them now."""
    if not remotes:
        return
    used: list[tuple[bytes, int, int]] = []
    for _, end, key in layout.chunks(request, min(tokens, plan.covered_tokens)):
        entry, span = ledger.get(key), plan.span_of(end)
        name = qualified(plan.owner_in(span), key)
        used.append((name, max(span.ttl_s, entry.ttl_s) if entry else span.ttl_s, end))
    for remote in remotes:
        remote.used(request.request_id, used)


def remote_tiers(manager: TieringOffloadingManager) -> list[RemoteTierManager]:
    """Return the tiers of ours that ``manager`` has behind its primary one."""
    return [tier for tier in manager.secondary_tiers if isinstance(tier, RemoteTierManager)]
