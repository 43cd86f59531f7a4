"""The memory that adapters write from and read into; never the engine's own.

An adapter cannot be told to stop. One that is late, or hangs, may go on to write to the memory it
was given when the request has long computed what did not come. So values pass through memory of
ours, and an adapter's late work ends there. What that costs is a copy, 0.1 ms a MiB.
"""

import mmap
import threading
from dataclasses import dataclass

import torch
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

from vllm_cachescope.tiers.envelope import HEADER_BYTES
from vllm_cachescope.tiers.store import StoreFailed

ALIGNMENT = 4096
"""Bytes that devices write and read at once. The end of an object is padded to them."""

BATCH_BYTES = 4 << 20
"""Bytes that one thread has under way at once: enough to keep an adapter's own threads busy, of
which `fs_native` has four."""

AT_ONCE = 64
"""Records that one thread has under way at once."""

_kept: list["Staging"] = []


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """A place for an object.

    Attributes:
        pool: where it belongs.
        view: its bytes.
        object: the same bytes, as LMCache wants them.
    """

    pool: "Pool"
    view: memoryview
    object: TensorMemoryObj


class Pool:
    """Buffers of one size. Safe to use from several threads."""

    def __init__(self, memory: memoryview, size: int) -> None:
        self._lock = threading.Lock()
        self._free = [
            Buffer(self, memory[start : start + size], _object(memory[start : start + size]))
            for start in range(0, memory.nbytes, size)
        ]

    def take(self, count: int) -> list[Buffer]:
        """Return ``count`` buffers.

        Raises:
            StoreFailed: if an adapter has too many of them, and does not release them.
        """
        with self._lock:
            if count > len(self._free):
                raise StoreFailed("the adapter has too much under way that does not end")
            return [self._free.pop() for _ in range(count)]

    def release(self, buffer: Buffer) -> None:
        """Nobody uses ``buffer`` any more."""
        with self._lock:
            self._free.append(buffer)


class Staging:
    """One stretch of memory, with buffers for values and for records.

    Attributes:
        batch: how many values one thread should have under way at once.
        values, records: the buffers. There are enough of them for all threads, and as many again
            for what was abandoned and has not ended.
        desc: where they are, for adapters that register memory.

    Args:
        slot_bytes: bytes per block.
        threads: how many threads move values.
    """

    def __init__(self, slot_bytes: int, threads: int) -> None:
        size = -(-(HEADER_BYTES + slot_bytes) // ALIGNMENT) * ALIGNMENT
        self.batch = max(1, BATCH_BYTES // slot_bytes)
        end = 2 * threads * self.batch * size
        # Three more threads than those have to do with records only.
        records = 2 * (threads + 3) * AT_ONCE * ALIGNMENT
        self._memory = memoryview(mmap.mmap(-1, end + records))
        self.values = Pool(self._memory[:end], size)
        self.records = Pool(self._memory[end:], ALIGNMENT)
        address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        self.desc = L1MemoryDesc(address, self._memory.nbytes, ALIGNMENT)

    def keep(self) -> None:
        """Never unmap this memory: something that does not end may still write to it."""
        if self not in _kept:
            _kept.append(self)


def _object(memory: memoryview) -> TensorMemoryObj:
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    metadata = MemoryObjMetadata(
        shape=tensor.shape,
        dtype=tensor.dtype,
        address=tensor.data_ptr(),
        phy_size=tensor.nbytes,
        ref_count=1,
        fmt=MemoryFormat.BINARY_BUFFER,
        shapes=[tensor.shape],
        dtypes=[tensor.dtype],
    )
    return TensorMemoryObj(tensor, metadata, parent_allocator=None)
