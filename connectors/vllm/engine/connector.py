"""The KV connector: vLLM's OffloadingConnector with scopes, lifetimes and accounts."""

import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from vllm_cachescope.cache.prefill_rate import PrefillRate
from vllm_cachescope.cache.quotas import SHOWN_ORGS, read_quotas
from vllm_cachescope.cache.report import EngineId
from vllm_cachescope.connectors.vllm import config_check, engine_rpc, shm_regions
from vllm_cachescope.connectors.vllm.engine import hashing
from vllm_cachescope.connectors.vllm.engine.offloading import for_offloading
from vllm_cachescope.connectors.vllm.engine.scheduler import (
    BlockLayout,
    CacheScopeConnectorScheduler,
)
from vllm_cachescope.connectors.vllm.engine.tiers.cpu import CPU
from vllm_cachescope.connectors.vllm.engine.tiers.device import DEVICE
from vllm_cachescope.connectors.vllm.engine.tiers.remote import remote_tiers
from vllm_cachescope.durations import format_duration
from vllm_cachescope.logs import logger_of
from vllm_cachescope.metrics import (
    EVICTIONS,
    PROMPT_TOKENS,
    REFUSED_PLANS,
    RESIDENT_BYTES,
    RESIDENT_ENTRIES,
    TIER_CAPACITY_BYTES,
    TIER_INFLIGHT_BYTES,
    TIER_KEYS,
    TIER_UP,
    TIER_USED_BYTES,
)
from vllm_cachescope.tiers.remote import Purge

REMEMBERED_PURGES = 64
"""How many purges can still be asked about."""

logger = logger_of(__name__)


class CacheScopeConnector(OffloadingConnector):
    """Named in ``--kv-transfer-config``; made once in the scheduler and once in each worker."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        config = config_check.read(vllm_config.kv_transfer_config)
        with config_check.ended_by_mistakes():
            super().__init__(for_offloading(vllm_config, config), role, kv_cache_config)
        if role is not KVConnectorRole.SCHEDULER:
            return
        hashing.enforce(config.secret_bytes())
        engine_rpc.install()
        assert self.connector_scheduler is not None
        offload = self.connector_scheduler.config
        manager = self.connector_scheduler.manager
        groups = tuple((g.group_idx, g.tokens_per_block) for g in offload.kv_group_configs)
        chunk_bytes: int = manager.primary_tier.get_kv_memoryview().strides[0]
        self._entry_bytes = {
            CPU: chunk_bytes,
            DEVICE: chunk_bytes // offload.blocks_per_chunk // len(groups),
        }
        self._keeper = CacheScopeConnectorScheduler(
            BlockLayout(
                offload.tokens_per_hash,
                groups,
                offload.blocks_per_chunk,
                self._entry_bytes[DEVICE],
            ),
            manager,
            self.clock,
            lambda: self._identity,
            {
                tier: shares
                for tier, entry_bytes in self._entry_bytes.items()
                if (shares := read_quotas(config, tier, entry_bytes)) is not None
            },
        )
        self._remotes = remote_tiers(manager)
        self._pace = PrefillRate()
        tokens_per_block = min(tokens for _, tokens in groups)
        for remote in self._remotes:
            remote.follow(self._pace, tokens_per_block * offload.blocks_per_chunk / len(groups))
        self._rank: int = vllm_config.parallel_config.data_parallel_index
        self._epoch = secrets.token_hex(8)
        self._hash_settings = {
            "algorithm": vllm_config.cache_config.prefix_caching_hash_algo,
            "tokens": offload.tokens_per_hash,
        }
        self._unreported_sweep = False
        self._gauges: dict[tuple[str, tuple[str, ...]], float] = {}
        self._purges: OrderedDict[str, dict[str, Purge]] = OrderedDict()

    def clock(self) -> float:
        """Return the time in seconds that lifetimes run on; it never runs backwards."""
        return time.monotonic()

    def shutdown(self) -> None:
        super().shutdown()
        scheduler, worker = self.connector_scheduler, self.connector_worker
        for user in (scheduler and scheduler.manager, worker and worker.worker):
            if user is not None:
                shm_regions.release(user.claimed_region)

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._keeper.bind(kv_cache_manager)
        assert self.connector_scheduler is not None
        entries = {
            # One block is vLLM's own.
            DEVICE: kv_cache_manager.block_pool.num_gpu_blocks - 1,
            CPU: self.connector_scheduler.manager.primary_tier._num_chunks,
        }
        self._capacity_bytes = {tier: n * self._entry_bytes[tier] for tier, n in entries.items()}
        for tier in self._local_health():
            capacity = tier["capacity_bytes"] / 2**20
            logger.info(
                "Tier %s at %s is up: empty, of %.1f MiB", tier["name"], tier["address"], capacity
            )

    def on_new_request(self, request: Request) -> None:
        self._keeper.start(request)
        super().on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        self._keeper.found_local(request, num_computed_tokens)
        if any(remote.tier.is_loading(request.request_id) for remote in self._remotes):
            # vLLM would look up every block of it once more, in each step, on the interpreter
            # that the threads need which load them.
            return None, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self._keeper.admit(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        self._pace.began(time.monotonic(), scheduler_output.total_num_scheduled_tokens)
        # First, since storing a chunk asks for its lifetime.
        self._keeper.computed(scheduler_output)
        meta = super().build_connector_meta(scheduler_output)
        self._keeper.stored()
        return meta

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        delayed, params = super().request_finished(request, block_ids)
        return delayed, self._with_report(request, params)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        delayed, params = super().request_finished_all_groups(request, block_ids)
        return delayed, self._with_report(request, params)

    def _with_report(
        self, request: Request, params: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        report = self._keeper.finish(request)
        if report is None:
            return params
        return {**(params or {}), hashing.PLAN_KEY: report.to_wire()}

    def has_pending_push_work(self) -> bool:
        # One step more, so that the metrics show what an idle engine has dropped.
        return self._unreported_sweep or super().has_pending_push_work()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        stats = super().get_kv_connector_stats()
        if self.connector_scheduler is None:
            return stats
        # The scheduler asks for them once at the end of each step.
        self._pace.ended(time.monotonic())
        self._unreported_sweep = False
        stats = stats or OffloadingConnectorStats()
        assert isinstance(stats, OffloadingConnectorStats)
        keeper = self._keeper
        for (outcome, scope, ttl_s), tokens in keeper.tokens.items():
            ttl = format_duration(ttl_s) if ttl_s else "none"
            stats.increase_counter(PROMPT_TOKENS.name, tokens, (outcome, scope, ttl))
        for (tier, reason), entries in keeper.evictions.items():
            stats.increase_counter(EVICTIONS.name, entries, (tier, str(reason)))
        if keeper.refused_plans:
            stats.increase_counter(REFUSED_PLANS.name, keeper.refused_plans)
        keeper.tokens.clear()
        keeper.evictions.clear()
        keeper.refused_plans = 0
        for remote in self._remotes:
            for (operation, outcome), keys in remote.tier.take_counts().items():
                if operation == "evict":
                    stats.increase_counter(EVICTIONS.name, keys, (remote.name, outcome))
                    continue
                stats.increase_counter(TIER_KEYS.name, keys, (remote.name, operation, outcome))
        for metric, labels, value in self._levels():
            # A gauge stays at what it was set to; only what has changed is worth sending.
            if self._gauges.get((metric, labels)) != value:
                self._gauges[metric, labels] = value
                stats.set_gauge(metric, value, labels)
        return None if stats.is_empty() else stats

    def _levels(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        """Yield each gauge's name, labels and value."""
        used: Counter[str] = Counter()
        for tier, ttl_s, entries in self._keeper.resident():
            labels = (tier, format_duration(ttl_s))
            yield RESIDENT_ENTRIES.name, labels, entries
            yield RESIDENT_BYTES.name, labels, entries * self._entry_bytes[tier]
            used[tier] += entries * self._entry_bytes[tier]
        for tier, capacity in self._capacity_bytes.items():
            yield TIER_UP.name, (tier,), 1
            yield TIER_USED_BYTES.name, (tier,), used[tier]
            yield TIER_CAPACITY_BYTES.name, (tier,), capacity
        for remote in self._remotes:
            health = remote.tier.health()
            yield TIER_UP.name, (remote.name,), int(health["up"])
            for direction in ("loading", "storing"):
                queued = health[f"{direction}_bytes"]
                yield TIER_INFLIGHT_BYTES.name, (remote.name, direction), queued
            for metric, key in (
                (TIER_USED_BYTES, "used_bytes"),
                (TIER_CAPACITY_BYTES, "capacity_bytes"),
            ):
                # Of a tier that never answered neither is known.
                if key in health:
                    yield metric.name, (remote.name,), health[key]

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        config = config_check.read(vllm_config.kv_transfer_config)
        translated = for_offloading(vllm_config, config)
        return super().build_prom_metrics(
            translated, metric_types, labelnames, per_engine_labelvalues
        )

    def _local_health(self) -> Iterator[dict[str, Any]]:
        assert self.connector_scheduler is not None
        region = self.connector_scheduler.manager.claimed_region.name.replace(".lock", ".mmap")
        addresses = {DEVICE: f"the prefix cache on {current_platform.device_type}", CPU: region}
        for tier, address in addresses.items():
            held, entry_bytes = self._keeper.held(tier), self._entry_bytes[tier]
            yield {
                "name": tier,
                "address": address,
                "up": True,
                "reason": None,
                "used_bytes": sum(held.values()) * entry_bytes,
                "capacity_bytes": self._capacity_bytes[tier],
                "orgs": {
                    org.hex(): entries * entry_bytes
                    for org, entries in Counter(held).most_common(SHOWN_ORGS)
                },
            }

    @cached_property
    def _identity(self) -> EngineId:
        # The digest is known once vLLM has begun to hash: when the first request is there.
        tiers = tuple(remote.name for remote in self._remotes)
        return EngineId(self._rank, self._epoch, hashing.digest(self._hash_settings), tiers)

    # Commands from the API process; see `commands`.

    def command_health(self) -> list[dict[str, Any]]:
        """Return the state of each tier, and what each organisation's tag holds where that is
        known."""
        return [*self._local_health(), *(remote.tier.health() for remote in self._remotes)]

    def command_purge(self, prefix: bytes, purge_id: str) -> dict[str, int]:
        """Forget all entries whose owner begins with ``prefix``; return how many the device and
        the CPU tier held. `command_purged` tells of the others under ``purge_id``."""
        entries = self._keeper.purge(prefix)
        self._unreported_sweep = self._unreported_sweep or any(entries.values())
        self._purges[purge_id] = {r.name: r.tier.purge(prefix) for r in self._remotes}
        while len(self._purges) > REMEMBERED_PURGES:
            self._purges.popitem(last=False)
        return entries

    def command_purged(self, purge_id: str) -> dict[str, tuple[int, str | None]] | None:
        """Return for each remote tier how many entries a purge has deleted there, and why perhaps
        not all; None while it is under way."""
        purges = self._purges.get(purge_id, {})
        if not all(purge.over for purge in purges.values()):
            return None
        return {name: (purge.entries, purge.reason) for name, purge in purges.items()}

    def command_sweep(self) -> int:
        """Drop everything that has expired; return how many entries."""
        expired = self._keeper.tidy()
        self._unreported_sweep = self._unreported_sweep or expired > 0
        return expired

    def command_report(self, nonce: str) -> dict[str, Any] | None:
        """Return what has become so far of the prompt with ``nonce``."""
        report = self._keeper.report(nonce)
        return None if report is None else report.to_wire()
