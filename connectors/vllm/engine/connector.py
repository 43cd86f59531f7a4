"""The KV connector: vLLM's OffloadingConnector with scopes, lifetimes and reports."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import vllm
from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.distributed.kv_events import KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from vllm_cachescope.cache.quotas import read_quotas
from vllm_cachescope.config import Config
from vllm_cachescope.connectors.vllm import config_check, engine_rpc
from vllm_cachescope.connectors.vllm.engine import adapters, exporter, hashing, idle_sweep
from vllm_cachescope.connectors.vllm.engine.adapters import Adapters
from vllm_cachescope.connectors.vllm.engine.block_layout import read_layout
from vllm_cachescope.connectors.vllm.engine.demotions import Demotions
from vllm_cachescope.connectors.vllm.engine.desk import Desk
from vllm_cachescope.connectors.vllm.engine.door import EngineDoor
from vllm_cachescope.connectors.vllm.engine.engine_settings import EngineSettings
from vllm_cachescope.connectors.vllm.engine.gauges import Gauges
from vllm_cachescope.connectors.vllm.engine.health import TierInfo
from vllm_cachescope.connectors.vllm.engine.held_stats import HeldStats
from vllm_cachescope.connectors.vllm.engine.idle_sweep import IdleSweep
from vllm_cachescope.connectors.vllm.engine.offloading import (
    for_offloading,
    region_path,
    release_region,
)
from vllm_cachescope.connectors.vllm.engine.promotions import Promotions
from vllm_cachescope.connectors.vllm.engine.prompt_plans import PlanRules
from vllm_cachescope.connectors.vllm.engine.purges import EnginePurges, News
from vllm_cachescope.connectors.vllm.engine.scheduler import CacheScopeConnectorScheduler
from vllm_cachescope.connectors.vllm.engine.stats import (
    ScopePromMetrics,
    TransferStats,
    add_copies,
    move_observations,
    move_remote_counts,
)
from vllm_cachescope.connectors.vllm.engine.streams import Streams
from vllm_cachescope.connectors.vllm.engine.tier_events import TierEvents
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_policy import CPU
from vllm_cachescope.connectors.vllm.engine.tiers.device import DEVICE
from vllm_cachescope.connectors.vllm.versions import warn_if_untried
from vllm_cachescope.logs import logger_of
from vllm_cachescope.metrics import PROMOTION_WAIT_SECONDS
from vllm_cachescope.prompt.plan import PLAN_KEY
from vllm_cachescope.registration import TotalCounter, TotalHistogram
from vllm_cachescope.tenancy.org_labels import OrgLabels
from vllm_cachescope.tiers.promotion_queue import PromotionQueue
from vllm_cachescope.usage.prices import Multipliers, read_prices

logger = logger_of(__name__)


class CacheScopeConnector(OffloadingConnector):
    """Named in ``--kv-transfer-config``; vLLM makes one in the scheduler and one in each worker.

    Attributes:
        idle_sweep: says when the engine sweeps by itself; only in the scheduler.
        desk: where other threads ask the scheduler's thread; only in the scheduler.
        cachescope: our side in the scheduler, as ``connector_scheduler`` is vLLM's. It is there
            from `bind_kv_cache_manager` on, and only in the scheduler.
    """

    cachescope: CacheScopeConnectorScheduler

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        config = config_check.read(vllm_config.kv_transfer_config)
        with config_check.ended_by_mistakes():
            super().__init__(for_offloading(vllm_config, config), role, kv_cache_config)
        if role is not KVConnectorRole.SCHEDULER:
            return
        warn_if_untried(vllm.__version__)
        self._adapters = Adapters()
        secret = config.secret_bytes()
        hashing.enforce(secret, PlanRules.of(config, secret), self._adapters)
        engine_rpc.install()
        adapters.install()
        idle_sweep.install(config.sweep_interval)
        self.idle_sweep = IdleSweep(
            config.sweep_interval, is_wanted=lambda: self._purges.has_errands
        )
        self.desk = Desk(self.idle_sweep.wake)
        assert self.connector_scheduler is not None
        offload = self.connector_scheduler.config
        strides = self._offloading.primary_tier.get_kv_memoryview().strides
        assert strides is not None
        chunk_bytes = strides[0]
        # A block belongs to one group, and takes as much of the device as one of any other group.
        self._entry_bytes = {CPU: chunk_bytes, DEVICE: chunk_bytes // offload.blocks_per_chunk}
        self._settings = EngineSettings(
            rank=vllm_config.parallel_config.data_parallel_index,
            layout=read_layout(offload),
            hash_settings={
                "algorithm": vllm_config.cache_config.prefix_caching_hash_algo,
                "tokens": offload.tokens_per_hash,
            },
            quotas={
                tier: quotas
                for tier, entry_bytes in self._entry_bytes.items()
                if (quotas := read_quotas(config, tier, entry_bytes)) is not None
            },
            eviction=config.eviction,
            org_labels=OrgLabels(config.labelled_orgs(), config.secret_bytes()),
            multipliers=_multipliers(config, str(vllm_config.model_config.served_model_name)),
        )
        self._queue = PromotionQueue(config.cpu_wait, config.cpu_wait_share)
        self._stats = HeldStats(time.monotonic)
        port = config.front_end.metrics_port
        self._exporter = port and exporter.start(
            config.front_end.metrics_host,
            port,
            str(vllm_config.model_config.served_model_name),
            self._settings.rank,
            self._settings.org_labels.are_wanted,
            EngineDoor(self.desk, self.command, secret, self._settings.rank),
        )
        # Whether the metrics do not show yet what an idle engine has dropped, or noticed.
        self._has_news = False

    @property
    def _offloading(self) -> TieringOffloadingManager:
        assert self.connector_scheduler is not None
        manager = self.connector_scheduler.manager
        assert isinstance(manager, TieringOffloadingManager)
        return manager

    def clock(self) -> float:
        """Return the time in seconds that lifetimes run on; it never runs backwards."""
        return time.monotonic()

    def shutdown(self) -> None:
        super().shutdown()
        if self.connector_scheduler is not None:
            if self._exporter:
                self._exporter.close()
            release_region(self.connector_scheduler.manager)
        if self.connector_worker is not None:
            release_region(self.connector_worker.worker)

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        assert self.connector_scheduler is not None
        self._events = TierEvents(self.connector_scheduler, kv_cache_manager.block_pool)
        self.cachescope = CacheScopeConnectorScheduler(
            self._settings, kv_cache_manager, self._offloading, self.clock, self._events
        )
        self._purges = EnginePurges(self.cachescope)
        self._streams = Streams(kv_cache_manager)
        self._demotions: Demotions | None = None
        if self.cachescope.keeps_no_copies:
            self._demotions = Demotions(self.connector_scheduler, self.cachescope.local)
        self._promotions = Promotions(
            self.connector_scheduler,
            self.cachescope,
            self.cachescope.remotes,
            self._queue,
            self._streams,
        )
        places = {
            # One of the device's blocks is vLLM's own.
            DEVICE: (
                f"the prefix cache on {current_platform.device_type}",
                kv_cache_manager.block_pool.num_gpu_blocks - 1,
            ),
            CPU: (region_path(self._offloading), self._offloading.primary_tier._num_chunks),
        }
        self._local_tiers = [
            TierInfo(name, address, self._entry_bytes[name], entries * self._entry_bytes[name])
            for name, (address, entries) in places.items()
        ]
        self._gauges = Gauges(self._local_tiers, self.cachescope)
        layout = self._settings.layout
        logger.info(
            "Prompts are cached in blocks of %d tokens: what is shorter is not cached%s",
            layout.tokens_per_step,
            "; this model resumes prompts at their ends and at breakpoints"
            if layout.has_checkpoints
            else "",
        )
        for tier in self._local_tiers:
            logger.info(
                "Tier %s at %s is up: empty, of %.1f MiB",
                tier.name,
                tier.address,
                tier.capacity_bytes / 2**20,
            )

    def on_new_request(self, request: Request) -> None:
        self._purges.carry_out()
        self.desk.answer()
        self.cachescope.on_new_request(request)
        lora, adapter = request.lora_request, hashing.adapter_of(request)
        if lora and adapter and not self._adapters.admit(lora, adapter):
            self.cachescope.on_adapter_replaced(lora.lora_int_id)
        super().on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        self.cachescope.set_local_tokens(request, num_computed_tokens)
        if self._purges.carry_out() or self._purges.is_late:
            # What vLLM has just found on the device may be what another engine has purged.
            return None, False
        if self.cachescope.is_loading(request):
            # vLLM would look up every block of it once more, in each step, and take the
            # interpreter from the threads that load them.
            return None, False
        if not self._promotions.may_look_up(request, num_computed_tokens):
            return None, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self.cachescope.update_state_after_alloc(request, num_external_tokens)
        self._promotions.on_scheduled(request.request_id)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        completed = connector_output.kv_connector_worker_meta
        if self._demotions is not None and isinstance(completed, OffloadingWorkerMetadata):
            self._demotions.take_completed(completed)
        super().update_connector_output(connector_output)
        for request_id in connector_output.finished_recving or ():
            request = self.cachescope.running(request_id)
            if request is not None and self._promotions.has_more(request):
                self._streams.restart(request, partial(self.cachescope.on_part_read, request))

    def reset_cache(self) -> bool | None:
        if self.connector_scheduler is not None and self._demotions is not None:
            self._demotions.on_reset()
        return super().reset_cache()

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        self._purges.carry_out()
        self.desk.answer()
        self.cachescope.on_step_scheduled(scheduler_output)
        self._events.collect()
        meta = super().build_connector_meta(scheduler_output)
        if self._demotions is not None:
            assert isinstance(meta, OffloadingConnectorMetadata)
            self._demotions.add_to(meta)
        self.cachescope.on_schedule_end(scheduler_output)
        self._promotions.end_step(
            scheduler_output.total_num_scheduled_tokens, scheduler_output.preempted_req_ids or ()
        )
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
        waited_s = self._promotions.end(request.request_id)
        report = self.cachescope.request_finished(request)
        if report is None:
            return params
        return {**(params or {}), PLAN_KEY: replace(report, memory_wait_s=waited_s).to_wire()}

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self._events.take()

    def has_pending_push_work(self) -> bool:
        # vLLM asks between two steps, whenever it wants to know whether there is work.
        self.desk.answer()
        if self.idle_sweep.is_due:
            self.command_sweep()
        # One step more, so that the metrics show what an idle engine has dropped or noticed.
        has_news = self._has_news or self._purges.has_news
        prefetches = self.cachescope.prefetches
        is_busy = has_news or (prefetches is not None and prefetches.is_active)
        is_busy |= self._demotions is not None and self._demotions.is_active
        return is_busy or super().has_pending_push_work()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self.connector_scheduler is None:
            return super().get_kv_connector_stats()
        # The scheduler asks for them once at the end of each step.
        self.cachescope.on_step_end()
        copies = self.connector_scheduler._connector_stats
        if copies.is_empty() and not self._stats.are_due(self.cachescope.is_idle):
            # What else there is adds up by itself.
            return None
        stats = super().get_kv_connector_stats()
        self._has_news = self._purges.has_news = False
        if stats is not None:
            assert isinstance(stats, OffloadingConnectorStats)
            add_copies(stats)
            self._stats.add(stats)
        if (stats := self._stats.take(self.cachescope.is_idle)) is None:
            return None
        self.cachescope.counts.move_to(stats)
        move_remote_counts(self.cachescope.remotes, stats)
        move_observations(self._promotions.take_waits(), PROMOTION_WAIT_SECONDS, stats)
        self._gauges.report_to(stats)
        if self._exporter:
            self._exporter.add(stats.data)
        return None if stats.is_empty() else stats

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
        # With several API servers, the engine tells each change of a gauge to one of them. vLLM
        # 0.32 would show what each was last told, side by side.
        gauge: Any = partial(metric_types[Gauge], multiprocess_mode="mostrecent")
        metric_types = {**metric_types, Gauge: gauge}
        if metric_types[Counter] is Counter:  # Ray has types of its own.
            metric_types |= {Counter: TotalCounter, Histogram: TotalHistogram}
        return ScopePromMetrics(translated, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return TransferStats() if data is None else TransferStats(data=data)

    def load_adapter(self, lora: LoRARequest, load: Callable[[], bool]) -> bool:
        """Have vLLM load a LoRA adapter by its own function ``load``, and note what it loaded."""
        loaded = self._adapters.load(lora, load)
        self.cachescope.on_adapter_replaced(lora.lora_int_id)
        return loaded

    # Commands from the API process, see `engine_rpc`, or from the engine's own port.

    def command(self, name: str, args: Sequence[Any]) -> Any:
        """Return the answer to a command by its name."""
        return getattr(self, f"command_{name}")(*args)

    def command_facts(self) -> dict[str, Any]:
        """Return what the API side of another process has to know of the engine."""
        return {"block_tokens": self._settings.layout.tokens_per_step}

    def command_health(self) -> list[dict[str, Any]]:
        """Return the state of each tier, with the bytes that organisations hold there, by their
        tags, where that is known."""
        local = [tier.health(self.cachescope.local.held(tier.name)) for tier in self._local_tiers]
        return [*local, *(remote.tier.health() for remote in self.cachescope.remotes)]

    def command_purge(
        self, prefix: bytes, purge_id: str, org: str | None = None, session: str | None = None
    ) -> dict[str, int]:
        """Do `EnginePurges.begin`."""
        return self._purges.begin(prefix, purge_id, org, session)

    def command_purged(self, purge_id: str) -> dict[str, Any] | None:
        """Return `EnginePurges.outcome`."""
        return self._purges.outcome(purge_id)

    def command_heed(self, name: str, heard: int) -> list[News]:
        """Do `EnginePurges.heed`."""
        return self._purges.heed(name, heard)

    def command_endings(self, endings: list[tuple[str, int]]) -> None:
        """Note how answers ended: ``(nonce, Ended)`` of each."""
        self.cachescope.note_endings(endings)
        self._has_news |= bool(self.cachescope.counts.retired)

    def command_end_session(self, owner: bytes) -> int:
        """Evict the blocks of a session first; return how many there are, copies counted."""
        ended = self.cachescope.end_session(owner)
        self._has_news |= ended > 0
        return ended

    def command_sweep(self) -> int:
        """Drop everything that has expired, and what other engines have purged; return how many
        entries have expired."""
        self.idle_sweep.note()
        self._purges.carry_out()
        expired = self.cachescope.sweep()
        self._has_news |= self._gauges.sweep() or expired > 0 or self._events.waiting
        return expired

    def command_evictions(self) -> list[tuple[str, str, bytes, int]]:
        """Return who suffered and caused evictions since the last time; see `Pressure.take`."""
        return self.cachescope.counts.pressure.take()

    def command_report(self, nonce: str) -> dict[str, Any] | None:
        """Return what has become so far of the prompt with ``nonce``; None if it is not known."""
        report = self.cachescope.report(nonce)
        return None if report is None else report.to_wire()


def _multipliers(config: Config, model_name: str) -> Multipliers:
    """Return what tokens of the engine's model cost that are read or created."""
    price = None if config.prices is None else read_prices(config.prices).of(model_name)
    return Multipliers() if price is None else price.multipliers
