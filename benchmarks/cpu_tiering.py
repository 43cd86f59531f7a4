"""vLLM's own tiering with the worker of ours that copies on the CPU platform: vLLM's needs CUDA."""

from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from vllm_cachescope.connectors.vllm.engine.tiers.cpu_worker import CpuCopyWorker


class CpuTieringSpec(TieringOffloadingSpec):
    """What a peer's tier stands behind. Nothing else of ours is in its engine."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=0 if self.replicated_layout else self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CpuCopyWorker(kv_caches, self.blocks_per_chunk, region)
