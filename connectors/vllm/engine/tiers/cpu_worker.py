"""The worker that copies KV between device blocks and the CPU tier on the CPU platform.

On CUDA vLLM's own worker copies. That worker needs streams, which the CPU platform lacks.
"""

import time

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion


class CpuCopyWorker(OffloadingWorker):
    """Copies at once, on the caller's thread: memory to memory, there is nothing to wait for.

    Args:
        kv_caches: the device's KV tensors, each of shape (blocks, bytes per block).
        blocks_per_chunk: device blocks in one chunk of the CPU tier.
        region: the CPU tier's memory; the worker owns it from here on.
    """

    def __init__(
        self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion
    ) -> None:
        self._mmap_region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._groups = kv_caches.group_data_refs
        self._device = [
            cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes).numpy()
            for cache in kv_caches.tensors
        ]
        # A view of shape (chunks, blocks per chunk, bytes per block). One of shape (chunks * blocks
        # per chunk, bytes per block) is impossible: in the region, chunks are not contiguous.
        self._cpu = [
            region.create_next_worker_view(cache.page_size_bytes * blocks_per_chunk)
            .view(-1, blocks_per_chunk, cache.page_size_bytes)
            .numpy()
            for cache in kv_caches.tensors
        ]
        self._finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        assert isinstance(dst_spec, CPULoadStoreSpec)
        return self._copy(job_id, src_spec, dst_spec, store=True)

    def submit_load(
        self,
        job_id: int,
        src_spec: LoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        assert isinstance(src_spec, CPULoadStoreSpec)
        return self._copy(job_id, dst_spec, src_spec, store=False)

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        return

    def shutdown(self) -> None:
        self._cpu.clear()
        self._mmap_region.cleanup()

    def _copy(
        self, job_id: int, device: GPULoadStoreSpec, cpu: CPULoadStoreSpec, store: bool
    ) -> bool:
        start = time.perf_counter()
        copied = 0
        block_at = chunk_at = 0
        for refs, size, first in zip(
            self._groups, device.group_sizes, device.block_indices, strict=True
        ):
            if size == 0:
                continue
            # The first block may lie inside its chunk: `first` counts from the prompt's start.
            skip = first % self._blocks_per_chunk
            chunks = -(-(skip + size) // self._blocks_per_chunk)
            blocks = device.block_ids[block_at : block_at + size].tolist()
            chunk_ids = cpu.chunk_ids[chunk_at : chunk_at + chunks].tolist()
            places = [divmod(slot, self._blocks_per_chunk) for slot in range(skip, skip + size)]
            for tensor in {ref.tensor_idx for ref in refs}:
                on_device, in_memory = self._device[tensor], self._cpu[tensor]
                # Row by row, each a memcpy: indexing with arrays moves single bytes, and takes
                # 50 times as long.
                for block, (chunk, slot) in zip(blocks, places, strict=True):
                    if store:
                        in_memory[chunk_ids[chunk], slot] = on_device[block]
                    else:
                        on_device[block] = in_memory[chunk_ids[chunk], slot]
                copied += size * on_device.shape[1]
            block_at += size
            chunk_at += chunks
        self._finished.append(TransferResult(job_id, True, copied, time.perf_counter() - start))
        return True
