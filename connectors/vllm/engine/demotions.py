"""Demotions: what the device evicts goes to the CPU tier, where a block takes room once.

Each is a store for a request that does not exist, made when a step has been scheduled. The blocks
are to be filled anew by that very step, so vLLM's worker copies them before it computes.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
    TransferJob,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)
from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadKey, ReqContext

from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.connectors.vllm.engine.block_layout import BlockLayout
from vllm_cachescope.connectors.vllm.engine.local_tiers import LocalTiers
from vllm_cachescope.connectors.vllm.engine.tiers.base import Ahead
from vllm_cachescope.logs import logger_of

logger = logger_of(__name__)


@dataclass(slots=True)
class _Demotion:
    """One under way.

    Attributes:
        context: the request that it stands for.
        keys: what it stores.
        workers: how many workers have not told that they have copied it.
        is_void: whether the tiers were emptied meanwhile, and know nothing of it.
    """

    context: ReqContext
    keys: Sequence[OffloadKey]
    workers: int
    is_void: bool = False


class Demotions:
    """The demotions of one engine. All methods are called on the scheduler's thread.

    Args:
        scheduler: vLLM's side of offloading.
        local: the device and the CPU tier.
    """

    def __init__(self, scheduler: OffloadingConnectorScheduler, local: LocalTiers) -> None:
        self._scheduler = scheduler
        self._local = local
        self._numbers = itertools.count()
        self._jobs: dict[int, _Demotion] = {}

    @property
    def is_active(self) -> bool:
        """Whether any are under way, for which the engine has to take steps."""
        return bool(self._jobs)

    def add_to(self, meta: OffloadingConnectorMetadata) -> None:
        """Store what the device has evicted for the step that ``meta`` belongs to."""
        if not self._local.has_evicted:
            return
        context = ReqContext(f"cachescope demotion {next(self._numbers)}")
        context.set_state(Ahead())
        manager = self._scheduler.manager
        manager.on_new_request(context)
        stored = self._local.store_evicted(context)
        manager.on_request_finished(context)
        self._local.end_step()
        if stored is None:
            return
        blocks, output = stored
        job_id = self._scheduler._generate_job_id()
        source = GPULoadStoreSpec(blocks, group_sizes=(len(blocks),), block_indices=(0,))
        meta.store_jobs[job_id] = TransferJob(context.req_id, source, output.store_spec)
        meta.jobs_to_flush = {*(meta.jobs_to_flush or ()), job_id}
        workers = self._scheduler.config.num_workers
        self._jobs[job_id] = _Demotion(context, list(output.keys_to_store), workers)

    def take_completed(self, meta: OffloadingWorkerMetadata) -> None:
        """Take those out of what workers have completed that are ours: vLLM does not know them."""
        for job_id in self._jobs.keys() & meta.completed_jobs.keys():
            demotion = self._jobs[job_id]
            demotion.workers -= meta.completed_jobs.pop(job_id)
            if demotion.workers > 0:
                continue
            del self._jobs[job_id]
            if not demotion.is_void:
                self._scheduler.manager.complete_store(demotion.keys, demotion.context)

    def on_reset(self) -> None:
        """The tiers were emptied."""
        for demotion in self._jobs.values():
            demotion.is_void = True


def can_demote(settings: EvictionSettings, layout: BlockLayout, has_events: bool) -> bool:
    """Whether an engine makes demotions.

    Events of blocks that no request stores would come without tokens, and routers pass over these.
    Of several groups, and of chunks of several blocks, the device evicts the parts one by one; of
    windows it keeps the last blocks alone.

    Args:
        settings: what the operator has set.
        layout: how prompts are cut into blocks.
        has_events: whether the engine publishes KV events.
    """
    if settings.hierarchy == "inclusive":
        return False
    if has_events or not layout.is_plain or layout.blocks_per_chunk > 1:
        logger.warning(
            "eviction.hierarchy: not exclusive with KV events, other attention than full, or "
            "chunks of several blocks; it stays inclusive"
        )
        return False
    return True
