"""The peer: vLLM's own tiering with its own policies, over the plugin's copies on a CPU.

vLLM's worker copies with CUDA streams only. Everything else is as vLLM has it.
"""

import json

from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from benchmarks import harness
from demo.server import Server
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_worker import CpuCopyWorker


class PlainOffloadingSpec(TieringOffloadingSpec):
    """vLLM's tiering with a worker that copies on a CPU."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=0 if self.replicated_layout else self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CpuCopyWorker(kv_caches, self.blocks_per_chunk, region)


def engine(policy: str, cpu_bytes: int, *arguments: str) -> Server:
    """Return a plain vLLM that offloads to memory.

    Args:
        policy: vLLM's eviction policy, ``lru`` or ``arc``.
        cpu_bytes: the memory.
        arguments: further ones for vLLM.
    """
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": PlainOffloadingSpec.__name__,
            "spec_module_path": __name__,
            "cpu_bytes_to_use": cpu_bytes,
            "eviction_policy": policy,
        },
    }
    return harness.server(False, "--kv-transfer-config", json.dumps(transfer), *arguments)
