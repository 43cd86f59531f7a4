"""vLLM's own tiering with the worker of ours that copies on the CPU platform: vLLM's needs CUDA."""

from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from vllm_cachescope.connectors.vllm.engine.offloading import cpu_worker


class CpuTieringSpec(TieringOffloadingSpec):
    """What a peer's tier stands behind. Nothing else of ours is in its engine."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return cpu_worker(self, kv_caches)
