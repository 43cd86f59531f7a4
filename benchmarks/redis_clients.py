"""The remote tier and the fastest public clients of Redis, moving the same blocks."""

import mmap
import os
import random
import select
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import redis

from vllm_cachescope.config import RedisTier
from vllm_cachescope.connectors.redis import stores
from vllm_cachescope.connectors.redis.store import FRONT_BYTES
from vllm_cachescope.connectors.vllm.store_factory import limits_of
from vllm_cachescope.tenancy.owner_tags import NOBODY
from vllm_cachescope.tiers.envelope import Envelopes
from vllm_cachescope.tiers.jobs import Finished, Outgoing
from vllm_cachescope.tiers.keyspace import Keyspace, qualified, secret_digest
from vllm_cachescope.tiers.leases import Leases
from vllm_cachescope.tiers.remote import RemoteTier

SECRET = b"the secret of the benchmarks"
TTL_S = 300
PATIENCE_S = 60.0


def pages(count: int, slot_bytes: int) -> list[memoryview]:
    """Return slots that begin where a page of memory does, as those of a cache do."""
    stride = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = memoryview(mmap.mmap(-1, count * stride))
    return [memory[i : i + slot_bytes] for i in range(0, count * stride, stride)]


class Client(ABC):
    """Something that stores blocks in Redis and loads them from there."""

    name: str

    @abstractmethod
    def store(self, blocks: Sequence[memoryview]) -> None:
        """Store the blocks."""

    @abstractmethod
    def load(self) -> None:
        """Load the blocks that the tier has stored."""

    @abstractmethod
    def loaded(self) -> Iterable[memoryview]:
        """Return the blocks loaded last, in their order."""

    @abstractmethod
    def close(self) -> None:
        """Hang up."""


class Ours(Client):
    """The remote tier as an engine uses it: with lookups, MACs and lifetimes, on threads of its
    own, and with its default number of connections.

    Args:
        url: the Redis.
        count: how many blocks there are.
        block_bytes: bytes per block.
        name: what the result calls it.
        envelopes: what seals the blocks; by default as a tier does that is not told to encrypt.
        owner_of: returns whose a block is, by its number.
    """

    def __init__(
        self,
        url: str,
        count: int,
        block_bytes: int,
        name: str = "remote tier",
        envelopes: Envelopes | None = None,
        owner_of: Callable[[int], bytes] = lambda number: NOBODY,
    ) -> None:
        self.name = name
        settings = RedisTier(
            type="redis",
            url=url,
            load_deadline=PATIENCE_S,
            timeout=PATIENCE_S,
            max_inflight_bytes=count * block_bytes,
        )
        keyspace = Keyspace({"benchmark": block_bytes, "name": name})
        chance = random.Random(0)
        self._keys = [qualified(owner_of(n), chance.randbytes(32) + bytes(4)) for n in range(count)]
        self.names = [keyspace.name(key) for key in self._keys]
        self._tier = RemoteTier(
            "redis",
            stores(
                url,
                PATIENCE_S,
                keyspace,
                secret_digest(SECRET),
                Leases(SECRET),
                time.monotonic,
                time.time,
            ),
            block_bytes,
            envelopes or Envelopes(SECRET, keyspace.namespace),
            limits_of(settings),
            time.monotonic,
            random.random,
        )
        self._tier.start()
        self._jobs = 0
        self._slots = pages(count, block_bytes)

    def store(self, blocks: Sequence[memoryview]) -> None:
        expires_at = time.monotonic() + TTL_S
        outgoing = [
            Outgoing(key, block, TTL_S, expires_at)
            for key, block in zip(self._keys, blocks, strict=True)
        ]
        self._jobs += 1
        self._tier.store(self._jobs, outgoing)
        self._wait()

    def load(self) -> None:
        self._jobs += 1
        self._tier.load(self._jobs, "benchmark", self._keys, self._slots)
        self._wait()

    def loaded(self) -> Iterable[memoryview]:
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


class RedisPy(Client):
    """redis-py with hiredis, one value at a time: several threads and MGET are slower.

    Args:
        port: the Redis.
        names: of the values to load.
    """

    name = "redis-py"

    def __init__(self, port: int, names: Sequence[bytes]) -> None:
        self._client = redis.Redis(port=port)
        self._names = names
        self._values: list[bytes] = []

    def store(self, blocks: Sequence[memoryview]) -> None:
        for number, block in enumerate(blocks):
            self._client.set(f"redis-py:{number}", block)

    def load(self) -> None:
        self._values = [self._client.get(name) for name in self._names]

    def loaded(self) -> Iterable[memoryview]:
        return (memoryview(value)[FRONT_BYTES:] for value in self._values)

    def close(self) -> None:
        self._client.close()


class Native(Client):
    """LMCache's client in C++, as its server uses it.

    Args:
        port: the Redis.
        names: of the values to load.
        block_bytes: bytes per block.
    """

    name = "LMCache's client"
    workers = 4
    batch = 32

    def __init__(self, port: int, names: Sequence[bytes], block_bytes: int) -> None:
        os.environ["LMCACHE_TRACK_USAGE"] = "false"
        from lmcache.lmcache_redis import LMCacheRedisClient

        self._client = LMCacheRedisClient("127.0.0.1", port, self.workers)
        self._names = [name.decode() for name in names]
        self._slots = pages(len(names), FRONT_BYTES + block_bytes)

    def store(self, blocks: Sequence[memoryview]) -> None:
        names = [f"native:{number}" for number in range(len(blocks))]
        self._submit(self._client.submit_batch_set, names, blocks)

    def load(self) -> None:
        self._submit(self._client.submit_batch_get, self._names, self._slots)

    def loaded(self) -> Iterable[memoryview]:
        return (slot[FRONT_BYTES:] for slot in self._slots)

    def close(self) -> None:
        self._client.close()

    def _submit(self, submit, names: Sequence[str], views: Sequence[memoryview]) -> None:
        pending = {
            submit(names[start : start + self.batch], list(views[start : start + self.batch]))
            for start in range(0, len(names), self.batch)
        }
        while pending:
            select.select([self._client.event_fd()], [], [])
            for number, succeeded, error, _ in self._client.drain_completions():
                if not succeeded:
                    raise RuntimeError(f"LMCache's client: {error}")
                pending.discard(number)
