"""Our remote tiers, as vLLM's tiering framework wants a secondary tier to be."""

import random
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager

from vllm_cachescope.config import Config, Tier
from vllm_cachescope.connectors.vllm.identity import kv_identity
from vllm_cachescope.tiers.keyspace import Keyspace, secret_mark
from vllm_cachescope.tiers.remote import Found, Limits, Outgoing, RemoteTier
from vllm_cachescope.tiers.store import Store

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec

_RESULTS = {
    Found.HIT: LookupResult.HIT,
    Found.MISS: LookupResult.MISS,
    Found.RETRY: LookupResult.RETRY,
}


class RemoteTierManager(SecondaryTierManager):
    """Runs on the scheduler's thread. `bind` connects it with the engine's lifetimes.

    Args:
        settings: the tier's part of the configuration.
        config: the configuration.
        model: see `identity.model_identity`.
    """

    medium: ClassVar[Medium | None] = None

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
        self._memory = primary_kv_view.cast("B")
        keyspace = Keyspace(kv_identity(model, offloading_spec.config))
        self.tier = RemoteTier(
            settings.name,
            _stores(settings, keyspace, secret_mark(config.secret_bytes()), time.monotonic),
            self._block_size_bytes,
            Limits(
                settings.load_deadline,
                settings.timeout,
                int(settings.max_inflight_bytes),
                settings.connections,
                settings.failures,
                settings.first_probe,
                settings.longest_probe,
            ),
            time.monotonic,
            random.random,
        )
        self._lifetime_of: Callable[[bytes], tuple[int, float] | None] = lambda key: None
        self._on_loaded: Callable[[str, str, Iterable[tuple[bytes, int]]], None] = (
            lambda name, request_id, loaded: None
        )
        self.tier.start()

    def bind(
        self,
        lifetime_of: Callable[[bytes], tuple[int, float] | None],
        on_loaded: Callable[[str, str, Iterable[tuple[bytes, int]]], None],
    ) -> None:
        """Connect the tier to the engine's lifetimes.

        Args:
            lifetime_of: returns the TTL class of a key in seconds and the seconds it has left
                unless it is used; None if it must not be stored (any more).
            on_loaded: called with the tier's name, a request's id and the keys that were loaded
                for it, each with its TTL class in seconds.
        """
        self._lifetime_of, self._on_loaded = lifetime_of, on_loaded

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return _RESULTS[self.tier.seek(req_context.req_id, key)]

    def submit_load(self, job_metadata: TransferJob) -> None:
        job = job_metadata
        slots = [self._slot(chunk) for chunk in job.chunk_ids]
        self.tier.load(job.job_id, job.req_context.req_id, list(job.keys), slots)

    def submit_store(self, job_metadata: TransferJob) -> None:
        job = job_metadata
        now = time.monotonic()
        blocks = []
        for key, chunk in zip(job.keys, job.chunk_ids, strict=True):
            if (lifetime := self._lifetime_of(key)) is not None:
                ttl_s, left_s = lifetime
                blocks.append(Outgoing(key, self._slot(chunk), ttl_s, now + left_s))
        self.tier.store(job.job_id, blocks, len(blocks) == len(job.keys))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        for job in self.tier.finished():
            if job.loaded and job.request_id is not None:
                self._on_loaded(self.name, job.request_id, job.loaded)
            results.append(
                JobResult(
                    job.job_id,
                    job.complete,
                    [OffloadKey(key) for key, _ in job.loaded] or None,
                    job.seconds,
                    job.nbytes,
                )
            )
        return results

    def on_request_finished(self, req_context: ReqContext) -> None:
        self.tier.forget(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        for request_id in context.preempted_req_ids:
            self.tier.forget(request_id)
        self.tier.flush()

    def drain_jobs(self) -> None:
        self.tier.drain()

    def shutdown(self) -> None:
        self.tier.close()
        self._memory.release()

    def _slot(self, chunk: int) -> memoryview:
        start = int(chunk) * self._block_size_bytes
        return self._memory[start : start + self._block_size_bytes]


def remote_tiers(manager: TieringOffloadingManager) -> list[RemoteTierManager]:
    """Return the tiers of ours that ``manager`` has behind its primary one."""
    return [tier for tier in manager.secondary_tiers if isinstance(tier, RemoteTierManager)]


def _stores(
    settings: Tier, keyspace: Keyspace, mark: bytes, clock: Callable[[], float]
) -> Callable[[], Store]:
    from vllm_cachescope.connectors import redis

    return redis.stores(settings.url.get_secret_value(), settings.timeout, keyspace, mark, clock)
