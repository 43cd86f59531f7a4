"""How fast blocks go to a disk and come back, and how soon a full directory serves after a start,
next to the file tiers of LMCache and of vLLM."""

import os
import random
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.harness import Result, arguments, console, finish
from benchmarks.redis_clients import SECRET, pages
from vllm_cachescope.config import DiskTier, LMCacheTier, Tier
from vllm_cachescope.connectors import disk
from vllm_cachescope.connectors.vllm.store_factory import limits_of, stores
from vllm_cachescope.tenancy.owner_tags import NOBODY
from vllm_cachescope.tiers.envelope import HEADER_BYTES, Envelopes
from vllm_cachescope.tiers.jobs import Finished, Outgoing
from vllm_cachescope.tiers.keyspace import Keyspace, qualified, secret_digest
from vllm_cachescope.tiers.leases import Leases
from vllm_cachescope.tiers.remote import RemoteTier
from vllm_cachescope.tiers.store import Value

MOVED_BYTES = 128 << 20
TTL_S = 3600
ENTRIES = 100_000
PATIENCE_S = 60.0


class Side(ABC):
    """One way to a directory.

    Attributes:
        name: what the result calls it.
        directory: the directory.
    """

    name: str
    directory: Path

    @abstractmethod
    def store(self, blocks: Sequence[memoryview], round_: int) -> None:
        """Write blocks under names of their own in each round."""

    @abstractmethod
    def load(self, round_: int) -> Sequence[memoryview]:
        """Read what `store` wrote in that round; return it, or what is behind a header of it."""

    @abstractmethod
    def close(self) -> None:
        """End it."""

    def forget(self) -> None:
        """Have the operating system forget what it has read and written of the directory."""
        os.sync()
        for path in self.directory.rglob("*"):
            if path.is_file():
                file = os.open(path, os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)


class OurTier(Side):
    """A remote tier as the engine drives it, with MACs, leases and two threads that read."""

    def __init__(self, name: str, directory: Path, settings: Tier, block_bytes: int) -> None:
        self.name, self.directory = name, directory
        count = MOVED_BYTES // block_bytes
        keyspace = Keyspace({"benchmark": block_bytes, "name": name})
        digest, leases = secret_digest(SECRET), Leases(SECRET)
        self._tier = RemoteTier(
            settings.name,
            stores(settings, block_bytes, keyspace, digest, leases, time.monotonic, None),
            block_bytes,
            Envelopes(SECRET, keyspace.namespace),
            limits_of(settings),
            time.monotonic,
            random.random,
        )
        self._tier.start()
        self._jobs = 0
        self._slots = pages(count, block_bytes)

    def store(self, blocks: Sequence[memoryview], round_: int) -> None:
        expires_at = time.monotonic() + TTL_S
        keys = _keys(len(blocks), round_)
        self._jobs += 1
        self._tier.store(
            self._jobs,
            [Outgoing(k, b, TTL_S, expires_at) for k, b in zip(keys, blocks, strict=True)],
        )
        self._wait()

    def load(self, round_: int) -> Sequence[memoryview]:
        self._jobs += 1
        self._tier.load(self._jobs, "benchmark", _keys(len(self._slots), round_), self._slots)
        self._wait()
        return self._slots

    def close(self) -> None:
        self._tier.close()

    def _wait(self) -> None:
        finished: list[Finished] = []
        while not finished:
            time.sleep(0.0005)
            finished = self._tier.finished()
        if not finished[0].complete:
            raise RuntimeError(f"a transfer was not complete: {self._tier.take_stats()}")


class VllmFiles(Side):
    """What vLLM's own `fs` tier calls, with two threads that read and one that writes. It has
    neither MACs nor lifetimes."""

    name = "vLLM's fs"

    def __init__(self, directory: Path, block_bytes: int) -> None:
        from vllm.v1.kv_offload.tiering.fs import io

        self.directory = directory
        directory.mkdir()
        self._io = io
        self._direct = io.probe_o_direct(str(directory))
        self._bytes = block_bytes
        self._count = MOVED_BYTES // block_bytes
        self._source, self._target = pages(1, MOVED_BYTES)[0], pages(1, MOVED_BYTES)[0]
        self._threads = ThreadPoolExecutor(2)

    def store(self, blocks: Sequence[memoryview], round_: int) -> None:
        for number, block in enumerate(blocks):
            self._source[number * self._bytes : (number + 1) * self._bytes] = block
        self._move(self._io.batch_store_block, self._source, round_, 1)

    def load(self, round_: int) -> Sequence[memoryview]:
        self._move(self._io.batch_load_block, self._target, round_, 2)
        starts = range(0, MOVED_BYTES, self._bytes)
        return [self._target[start : start + self._bytes] for start in starts]

    def close(self) -> None:
        self._threads.shutdown()

    def _move(self, move: Callable[..., None], view: memoryview, round_: int, parts: int) -> None:
        def part(numbers: range) -> None:
            paths = [f"{self.directory}/{n % 256:02x}/{round_}-{n}.bin" for n in numbers]
            move(paths, view, [n * self._bytes for n in numbers], self._bytes, self._direct)

        size = self._count // parts
        batches = [range(first, first + size) for first in range(0, self._count, size)]
        for done in [self._threads.submit(part, batch) for batch in batches]:
            done.result()


def move_blocks(result: Result, count: int, scratch: Path, block_bytes: int) -> None:
    """Add how fast blocks are written, read from memory, and read from the disk."""
    size = f"{block_bytes >> 10} KiB"
    console.print(f"disk_tier: blocks of {size}")
    chance = random.Random(0)
    number = MOVED_BYTES // block_bytes
    blocks = [memoryview(bytearray(chance.randbytes(block_bytes))) for _ in range(number)]
    common = {
        "load_deadline": PATIENCE_S,
        "timeout": PATIENCE_S,
        "max_inflight_bytes": MOVED_BYTES,
    }
    ours, theirs, vllms = (scratch / f"{kind}-{block_bytes}" for kind in ("disk", "lmc", "vllm"))
    adapter = {"type": "fs_native", "base_path": str(theirs)}
    sides: list[Side] = [
        OurTier(
            "disk", ours, DiskTier(type="disk", path=ours, capacity="8GiB", **common), block_bytes
        ),
        OurTier(
            "lmcache fs_native",
            theirs,
            LMCacheTier(type="lmcache", adapter=adapter, **common),
            block_bytes,
        ),
        VllmFiles(vllms, block_bytes),
    ]
    rates: dict[str, dict[str, list[float]]] = {"store": {}, "load, cached": {}, "load, cold": {}}
    for round_ in range(count):
        for side in sides if round_ % 2 == 0 else sides[::-1]:
            start = time.perf_counter()
            side.store(blocks, round_)
            _note(rates["store"], side.name, start)
            for how in ("load, cached", "load, cold"):
                if how == "load, cold":
                    side.forget()
                start = time.perf_counter()
                loaded = side.load(round_)
                _note(rates[how], side.name, start)
                if any(a != b for a, b in zip(loaded, blocks, strict=True)):
                    raise RuntimeError(f"{side.name} has not loaded what was stored")
    for side in sides:
        side.close()
    for what, by_side in rates.items():
        for name, values in by_side.items():
            result.add(f"{size}, {what}, {name}", values, "GB/s")
        ratios = [a / b for a, b in zip(by_side["disk"], by_side["lmcache fs_native"], strict=True)]
        result.add(f"{size}, {what}, disk over lmcache fs_native", ratios, "×")


def recover(result: Result, count: int, scratch: Path, entries: int) -> None:
    """Add how long a new process takes until a full directory serves, and until it is repaired."""
    console.print(f"disk_tier: a start with {entries:,} entries")
    directory = scratch / "full"
    keyspace = Keyspace({"benchmark": "recovery"})

    def new_store() -> disk.DiskStore:
        space = disk.Space(1 << 40, 0)
        digest, leases = secret_digest(SECRET), Leases(SECRET)
        clocks = time.monotonic, time.time
        return disk.stores(directory, space, keyspace, digest, leases, *clocks)()

    keys, payload = _keys(entries, 0), memoryview(bytes(1000))
    store = new_store()
    for first in range(0, entries, 500):
        now = time.monotonic()
        batch = keys[first : first + 500]
        store.write([Value(k, bytes(HEADER_BYTES), payload, now + TTL_S) for k in batch], now + 60)
    store.close()
    served, found, listed = [], [], []
    for _ in range(count):
        start = time.perf_counter()
        store = new_store()
        store.greet(time.monotonic() + 10)
        assert all(store.find(keys[:1000], time.monotonic() + 10))
        served.append(time.perf_counter() - start)
        start = time.perf_counter()
        assert all(store.find(keys, time.monotonic() + 60))
        found.append(time.perf_counter() - start)
        index = store.backend.reopened(None, 5)
        start = time.perf_counter()
        store.backend.upkeep.repair(index)
        listed.append(time.perf_counter() - start)
        index.close()
        store.close()
    name = f"{entries:,} entries"
    within = ("at most 1 s per 100,000", lambda s: s <= entries / ENTRIES)
    result.add(f"{name}, from the start to the first 1,000 found", served, "s", *within)
    result.add(f"{name}, all of them found", found, "s")
    result.add(f"{name}, compared with the files", listed, "s")


def _keys(count: int, round_: int) -> list[bytes]:
    chance = random.Random(round_)
    return [qualified(NOBODY, chance.randbytes(32) + bytes(4)) for _ in range(count)]


def _note(rates: dict[str, list[float]], name: str, start: float) -> None:
    rates.setdefault(name, []).append(MOVED_BYTES / (time.perf_counter() - start) / 1e9)


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "", pairs=7)
    result = Result("disk_tier", options.quick)
    with tempfile.TemporaryDirectory(prefix="cachescope-") as directory:
        for block_bytes in (64 << 10, 1 << 20):
            move_blocks(result, options.pairs, Path(directory), block_bytes)
        recover(result, options.pairs, Path(directory), 10_000 if options.quick else ENTRIES)
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
