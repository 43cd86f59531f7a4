"""Our remote tiers, as vLLM's tiering framework wants a secondary tier to be."""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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

from vllm_cachescope.cache.ledger import Entry
from vllm_cachescope.cache.prefill_rate import PrefillRate
from vllm_cachescope.cache.quotas import read_quotas
from vllm_cachescope.config import Config, Tier
from vllm_cachescope.connectors.vllm.engine.kv_identity import kv_identity
from vllm_cachescope.connectors.vllm.store_factory import keeps_accounts, limits_of, stores
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tenancy.owner_tags import NOBODY, org_of
from vllm_cachescope.tiers.keyspace import Keyspace, qualified, secret_mark, split
from vllm_cachescope.tiers.local_usage import LocalUsage
from vllm_cachescope.tiers.remote import Found, Outgoing, RemoteTier, expiry

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec

_RESULTS = {
    Found.HIT: LookupResult.HIT,
    Found.MISS: LookupResult.MISS,
    Found.RETRY: LookupResult.RETRY,
}


@dataclass(slots=True)
class _Use:
    """A request that may still store something.

    Attributes:
        at: when it used its prompt last, on the tier's clock, in seconds.
        plan: its plan; None if it has none.
    """

    at: float
    plan: Plan | None


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
        self._shares = shares = read_quotas(config, settings.name, self._block_size_bytes)
        self.tier = RemoteTier(
            settings.name,
            stores(
                settings,
                self._block_size_bytes,
                keyspace,
                secret_mark(config.secret_bytes()),
                time.monotonic,
                shares,
            ),
            self._block_size_bytes,
            limits_of(settings),
            time.monotonic,
            random.random,
            None if shares is None or keeps_accounts(settings) else LocalUsage(shares),
        )
        self._pace, self._tokens_per_key = PrefillRate(), 0.0
        self._uses: dict[str, _Use] = {}
        self._own_chunks: Callable[[Plan, int], int] = lambda plan, end: 0
        self._plan_of: Callable[[str], Plan | None] = lambda request_id: None
        self._entry_of: Callable[[bytes], Entry | None] = lambda key: None
        self._owner_of: Callable[[OffloadKey, ReqContext], bytes] = lambda key, context: NOBODY
        self._on_loaded: Callable[[str, str, Iterable[tuple[bytes, int]]], None] = (
            lambda name, request_id, loaded: None
        )
        self.tier.start()

    def bind(
        self,
        own_chunks: Callable[[Plan, int], int],
        plan_of: Callable[[str], Plan | None],
        entry_of: Callable[[bytes], Entry | None],
        owner_of: Callable[[OffloadKey, ReqContext], bytes],
        on_loaded: Callable[[str, str, Iterable[tuple[bytes, int]]], None],
    ) -> None:
        """Connect the tier to what the engine knows of its blocks.

        Args:
            own_chunks: returns how many of a prompt's chunks count towards the organisation of the
                one that ends at a place (tokens), up to there.
            plan_of: returns the plan of a request that has come in; None if it has none.
            entry_of: returns the entry of a key; None if it must not be stored (any more).
            owner_of: returns whose a key is that a request asks for.
            on_loaded: called with the tier's name, a request's id and the keys that were loaded
                for it, each with its TTL class in seconds.
        """
        self._own_chunks, self._plan_of, self._entry_of = own_chunks, plan_of, entry_of
        self._owner_of, self._on_loaded = owner_of, on_loaded

    def follow(self, pace: PrefillRate, tokens_per_key: float) -> None:
        """Let a request wait the longer, the longer computing would take.

        Args:
            pace: how fast the engine computes.
            tokens_per_key: tokens behind one key; less where several groups have keys for them.
        """
        self._pace, self._tokens_per_key = pace, tokens_per_key

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._uses[req_context.req_id] = self._begun(req_context)
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return _RESULTS[self.tier.seek(req_context.req_id, self._qualified(key, req_context))]

    def submit_load(self, job_metadata: TransferJob) -> None:
        job = job_metadata
        keys = [self._qualified(key, job.req_context) for key in job.keys]
        slots = [self._slot(chunk) for chunk in job.chunk_ids]
        worth_s = self._pace.seconds_for(int(len(keys) * self._tokens_per_key))
        self.tier.load(job.job_id, job.req_context.req_id, keys, slots, worth_s)

    def used(self, request_id: str, keys: Iterable[tuple[bytes, int, int]]) -> None:
        """A request uses its prompt now.

        Args:
            request_id: the request.
            keys: keys the tier may hold, each with its lifetime in seconds and where its chunk
                ends in the prompt, in tokens.
        """
        now = time.monotonic()
        if (use := self._uses.get(request_id)) is not None:
            use.at = now
        self.tier.used((key, expiry(now, ttl_s, end)) for key, ttl_s, end in keys)

    def submit_store(self, job_metadata: TransferJob) -> None:
        job = job_metadata
        use = self._uses.get(job.req_context.req_id) or self._begun(job.req_context)
        blocks: list[Outgoing] = []
        beyond: list[bytes] = []
        for key, chunk in zip(job.keys, job.chunk_ids, strict=True):
            if (entry := self._entry_of(key)) is None:
                continue
            name = qualified(entry.owner, key)
            end = job.req_context.get_offload_key_position(key) or 0
            if self._is_beyond_quota(use.plan, name, end):
                beyond.append(name)
            else:
                expires_at = expiry(use.at, entry.ttl_s, end)
                blocks.append(Outgoing(name, self._slot(chunk), entry.ttl_s, expires_at))
        self.tier.left_out(beyond)
        self.tier.store(job.job_id, blocks, len(blocks) + len(beyond) == len(job.keys))

    def _begun(self, context: ReqContext) -> _Use:
        return _Use(time.monotonic(), self._plan_of(context.req_id))

    def _is_beyond_quota(self, plan: Plan | None, name: bytes, end: int) -> bool:
        """Whether a chunk that ends there would be the first to go, were it stored: what counts
        towards its organisation in the prompt up to there is more than that may hold."""
        if self._shares is None or plan is None:
            return False
        return self._shares.over(org_of(name), self._own_chunks(plan, end)) > 0

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        for job in self.tier.finished():
            loaded = [(OffloadKey(split(key)[1]), ttl_s) for key, ttl_s in job.loaded]
            if loaded and job.request_id is not None:
                self._on_loaded(self.name, job.request_id, loaded)
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

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._uses.pop(req_context.req_id, None)
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

    def _qualified(self, key: OffloadKey, req_context: ReqContext) -> bytes:
        return qualified(self._owner_of(key, req_context), key)

    def _slot(self, chunk: int) -> memoryview:
        start = int(chunk) * self._block_size_bytes
        return self._memory[start : start + self._block_size_bytes]


def remote_tiers(manager: TieringOffloadingManager) -> list[RemoteTierManager]:
    """Return the tiers of ours that ``manager`` has behind its primary one."""
    return [tier for tier in manager.secondary_tiers if isinstance(tier, RemoteTierManager)]
