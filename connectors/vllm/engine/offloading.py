"""Configures vLLM's tiering offloading framework for CacheScope."""

import copy
import threading
from typing import IO, Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingWorker,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from vllm_cachescope.config import Config, ConfigError
from vllm_cachescope.connectors.vllm import shm_regions
from vllm_cachescope.connectors.vllm.engine.kv_identity import model_identity
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_worker import CpuCopyWorker
from vllm_cachescope.connectors.vllm.engine.tiers.remote import RemoteTierManager
from vllm_cachescope.metrics import ENGINE_METRICS, Metric

_BY_ORG = "cachescope_by_org"


def for_offloading(vllm_config: VllmConfig, config: Config) -> VllmConfig:
    """Return a copy of vLLM's configuration in which the offloading framework finds its own keys
    in place of CacheScope's."""
    translated = copy.copy(vllm_config)
    transfer = copy.copy(vllm_config.kv_transfer_config)
    assert transfer is not None
    transfer.engine_id = shm_regions.PREFIX + str(transfer.engine_id).removeprefix(
        shm_regions.PREFIX
    )
    transfer.kv_connector_extra_config = {
        "spec_name": ScopeOffloadingSpec.__name__,
        "spec_module_path": ScopeOffloadingSpec.__module__,
        # Inert while KV events are off.
        "self_describing_kv_events": config.self_describing_kv_events,
        "cpu_bytes_to_use": int(config.cpu_bytes),
        "eviction_policy": "ScopePolicy",
        _BY_ORG: config.org_label is not False,
        "cache_policy_module_path": "vllm_cachescope.connectors.vllm.engine.tiers.cpu_policy",
        **({"block_size": config.chunk_tokens} if config.chunk_tokens else {}),
        **({"secondary_tiers": _remote_tiers(vllm_config, config)} if config.tiers else {}),
    }
    translated.kv_transfer_config = transfer
    return translated


def _remote_tiers(vllm_config: VllmConfig, config: Config) -> list[dict[str, Any]]:
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        raise ConfigError(
            "tiers: what they hold would outlive the weights that vLLM's weight_transfer_config "
            "replaces in a running engine; allowed: one of the two"
        )
    model = model_identity(vllm_config)
    return [
        {
            "type": RemoteTierManager.__name__,
            "module_path": RemoteTierManager.__module__,
            "settings": settings,
            "config": config,
            "model": model,
        }
        for settings in config.tiers
    ]


_REGION = "cachescope_region"


def _attach_region(user: OffloadingManager | OffloadingWorker, claimed: IO[bytes]) -> None:
    # To the user itself: vLLM drops the spec that made it once the engine has started.
    setattr(user, _REGION, claimed)


def _disown_region(worker: OffloadingWorker) -> None:
    """Keep vLLM from removing the region's file when a worker ends: that is done by then, and would
    end in a traceback in the log."""
    region = getattr(worker, "_mmap_region", None)
    if region is not None:
        region._creator = False


def release_region(user: OffloadingManager | OffloadingWorker | None) -> None:
    """Release the shared memory that the engine's manager or worker has claimed; with None, do
    nothing. To be called when vLLM has shut it down."""
    if user is not None:
        shm_regions.release(getattr(user, _REGION))


def region_path(manager: OffloadingManager) -> str:
    """Return the path of the CPU tier's shared memory."""
    claimed: IO[bytes] = getattr(manager, _REGION)
    return claimed.name.replace(".lock", ".mmap")


def make_lock_reentrant(manager: OffloadingManager) -> None:
    """Let the scheduler's thread enter the manager's lock while it holds the lock already.

    From 0.33 on vLLM holds that lock from a step's first look-up behind the device until the step
    is scheduled. Expired chunks are dropped before each look-up on the device, so also in between.
    Nobody waits for the lock yet: vLLM's poll thread starts only for tiers that ask for it, and
    ours do not.
    """
    if isinstance(getattr(manager, "_lock", None), type(threading.Lock())):
        manager._lock = threading.RLock()  # type: ignore[attr-defined]


def _definition(metric: Metric, by_org: bool) -> OffloadingMetricMetadata:
    labels = metric.labels_by(by_org)
    if metric.kind == "histogram":
        return OffloadingHistogramMetadata(metric.help, labels, metric.buckets)
    if metric.kind == "gauge":
        return OffloadingGaugeMetadata(metric.help, labels)
    return OffloadingCounterMetadata(metric.help, labels)


class ScopeOffloadingSpec(TieringOffloadingSpec):
    """vLLM's tiering, and on the CPU platform a worker that can copy there."""

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        return super().build_metric_definitions(extra_config) | {
            metric.name: _definition(metric, extra_config[_BY_ORG]) for metric in ENGINE_METRICS
        }

    def get_manager(self) -> OffloadingManager:
        if self._manager is not None:
            return self._manager
        shm_regions.remove_stale()
        if self.num_chunks == 0 and self.kv_bytes_per_chunk:
            raise ConfigError(
                f"cpu_bytes: {self.extra_config['cpu_bytes_to_use']} holds not even one chunk; "
                f"allowed: {self.kv_bytes_per_chunk} or more with this model and block size"
            )
        claimed = shm_regions.claim(self._engine_id)
        manager = super().get_manager()
        make_lock_reentrant(manager)
        _attach_region(manager, claimed)
        # vLLM makes its workers first, so all have mapped the region by now.
        shm_regions.unname(claimed)
        return manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        # Without a chunk the engine does not start. vLLM makes its workers before the manager,
        # which then reports the mistake, once.
        self.num_chunks = max(self.num_chunks, 1)
        claimed = shm_regions.claim(self._engine_id)
        cpu = current_platform.is_cpu()
        worker = cpu_worker(self, kv_caches) if cpu else super().get_worker(kv_caches)
        _attach_region(worker, claimed)
        _disown_region(worker)
        return worker


def cpu_worker(spec: TieringOffloadingSpec, kv_caches: CanonicalKVCaches) -> CpuCopyWorker:
    """Return a worker that copies on the CPU platform, with the memory that ``spec`` asks for.

    Args:
        spec: vLLM's tiering.
        kv_caches: the device's KV tensors.
    """
    region = SharedOffloadRegion(
        engine_id=spec._engine_id,
        num_chunks=spec.num_chunks,
        rank=0 if spec.replicated_layout else spec.config.parallel.rank,
        kv_bytes_per_chunk=spec.kv_bytes_per_chunk,
        cpu_page_size=spec.cpu_page_size_per_worker,
    )
    return CpuCopyWorker(kv_caches, spec.blocks_per_chunk, region)
