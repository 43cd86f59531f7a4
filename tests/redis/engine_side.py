"""Drives a remote tier as an engine's scheduler does, step by step."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.connectors import redis
from vllm_cachescope.tenancy.owner_tags import NOBODY
from vllm_cachescope.tiers.envelope import EncryptedEnvelopes, Envelopes
from vllm_cachescope.tiers.expiry import expiry
from vllm_cachescope.tiers.inquiries import Lookup
from vllm_cachescope.tiers.inventory import Inventory
from vllm_cachescope.tiers.jobs import Finished, Outgoing
from vllm_cachescope.tiers.keyspace import Keyspace, qualified, secret_digest
from vllm_cachescope.tiers.leases import Leases
from vllm_cachescope.tiers.limits import Limits
from vllm_cachescope.tiers.local_usage import LocalUsage
from vllm_cachescope.tiers.purge_notices import PurgeNotices
from vllm_cachescope.tiers.remote import RemoteTier
from vllm_cachescope.tiers.store import Store

SLOT = 256 << 10
LIMITS = Limits(
    load_deadline_s=0.5,
    load_share=0.25,
    timeout_s=0.5,
    inflight_bytes=64 * SLOT,
    connections=2,
    failures=2,
    first_probe_s=0.05,
    longest_probe_s=0.2,
)
TOKENS = 16
"""Tokens per block."""
SECRET = b"a secret of the tests"
SLACK_S = 0.25
"""What the machine may add to a deadline while others use it."""


def keys(count: int, seed: str = "k", owner: bytes = NOBODY) -> list[bytes]:
    """Return keys as an engine makes them: an owner, and vLLM's block hash of 32 bytes and group
    of four."""
    rng = random.Random(seed)
    return [qualified(owner, rng.randbytes(32) + bytes(4)) for _ in range(count)]


def content(key: bytes, slot_bytes: int = SLOT) -> bytes:
    """Return the bytes that a test stores under ``key``."""
    return random.Random(key).randbytes(slot_bytes)


@dataclass
class Loaded:
    """What one request got.

    Attributes:
        keys: the keys that were loaded, each with its TTL in seconds.
        seconds: how long the request waited in all.
        slots: the content of the memory it gave, by key, as it was when the load was over.
    """

    keys: dict[bytes, int]
    seconds: float
    slots: dict[bytes, bytes]


class EngineSide:
    """A tier with memory in front of it, as one engine has them."""

    def __init__(
        self,
        url: str,
        identity: str = "model",
        secret: bytes = SECRET,
        quotas: Quotas | None = None,
        local_usage: LocalUsage | None = None,
        wall: Callable[[], float] = time.time,
        encrypt: bool = False,
        inventory: Inventory | None = None,
        name: str = "",
        **limits: object,
    ) -> None:
        self.wall = wall
        self.quotas = quotas
        self.keyspace = Keyspace({"model": identity, "encrypted": encrypt})
        namespace = self.keyspace.namespace
        self.envelopes = (
            EncryptedEnvelopes(secret, namespace, SLOT) if encrypt else Envelopes(secret, namespace)
        )
        self.limits = replace(LIMITS, **limits)
        self.memory = memoryview(bytearray(self.limits.inflight_bytes * 2))
        self.tier = RemoteTier(
            "redis",
            self._stores(url, secret),
            SLOT,
            self.envelopes,
            self.limits,
            time.monotonic,
            random.random,
            local_usage,
            inventory,
            PurgeNotices(secret),
            name,
        )
        self.tier.start()
        self._requests = 0
        self._jobs = 0
        self.finished: dict[int, Finished] = {}

    def _stores(self, url: str, secret: bytes) -> Callable[[], Store]:
        return redis.stores(
            url,
            self.limits.timeout_s,
            self.keyspace,
            secret_digest(secret),
            Leases(secret),
            time.monotonic,
            self.wall,
            self.quotas,
        )

    def slot(self, index: int) -> memoryview:
        """Return the memory of a block."""
        return self.memory[index * SLOT : (index + 1) * SLOT]

    def name(self, key: bytes) -> bytes:
        """Return the name of a key in the store."""
        return self.keyspace.name(key)

    def put(
        self,
        keys: list[bytes],
        ttl_s: int = 300,
        wait: bool = True,
        used_at: float | None = None,
        behind: int = 0,
    ) -> int:
        """Store `content` under each key; return the job's number.

        Args:
            keys: blocks of one prompt, in order.
            ttl_s: their lifetime, in seconds.
            wait: whether to wait until they are stored.
            used_at: since when the prompt is used, on the tier's clock; None for now.
            behind: how many blocks of the prompt come before them.
        """
        for i, key in enumerate(keys):
            self.slot(i)[:] = content(key)
        untils = self._untils(len(keys), ttl_s, used_at, behind)
        blocks = [
            Outgoing(key, self.slot(i), ttl_s, until)
            for i, (key, until) in enumerate(zip(keys, untils, strict=True))
        ]
        self._jobs += 1
        self.tier.store(self._jobs, blocks)
        if wait:
            self.step_until(self._jobs)
        return self._jobs

    def use(self, keys: list[bytes], ttl_s: int = 300) -> None:
        """Use the blocks of a prompt, which begins with them."""
        self.tier.touch(zip(keys, self._untils(len(keys), ttl_s), strict=True))

    @staticmethod
    def _untils(
        count: int, ttl_s: int, used_at: float | None = None, behind: int = 0
    ) -> list[float]:
        since = time.monotonic() if used_at is None else used_at
        return [expiry(since, ttl_s, (behind + i + 1) * TOKENS) for i in range(count)]

    def find(self, keys: list[bytes]) -> tuple[str, list[bytes], float]:
        """Ask for keys as the scheduler does; return the request, the hits and the seconds."""
        self._requests += 1
        request = f"r{self._requests}"
        started = time.monotonic()
        while True:
            found = [self.tier.lookup(request, key) for key in keys]
            self.tier.flush()
            if Lookup.RETRY not in found:
                break
            time.sleep(0.001)
        hits = [key for key, f in zip(keys, found, strict=True) if f is Lookup.HIT]
        return request, hits, time.monotonic() - started

    def get(self, keys: list[bytes], worth_s: float = 0.0) -> Loaded:
        """Look keys up and load those that are there, as one request does.

        Args:
            keys: the keys.
            worth_s: how long computing them would take, in seconds.
        """
        started = time.monotonic()
        request, hits, _ = self.find(keys)
        for i in range(len(hits)):
            self.slot(i)[:] = b"\xee" * SLOT
        loaded: dict[bytes, int] = {}
        if hits:
            self._jobs += 1
            slots = [self.slot(i) for i in range(len(hits))]
            self.tier.load(self._jobs, request, hits, slots, worth_s)
            loaded = dict(self.step_until(self._jobs).loaded)
        seconds = time.monotonic() - started
        self.tier.end_request(request)
        slots = {key: bytes(self.slot(i)) for i, key in enumerate(hits)}
        return Loaded(loaded, seconds, slots)

    def get_exact(self, keys: list[bytes]) -> Loaded:
        """Do `get`, and make sure that whatever is said to be loaded is what was stored."""
        loaded = self.get(keys)
        for key in loaded.keys:
            assert loaded.slots[key] == content(key)
        return loaded

    def step_until(self, job: int) -> Finished:
        """Step until a job is over."""
        end = time.monotonic() + 10
        while job not in self.finished:
            assert time.monotonic() < end, "the job does not end"
            self.finished.update({f.job_id: f for f in self.tier.finished()})
            time.sleep(0.001)
        return self.finished[job]

    def close(self) -> None:
        """End the tier."""
        self.tier.close()


def assert_in_time(side: EngineSide, seconds: float) -> None:
    """Assert that waiting for ``seconds`` is no more than a load's deadline allows."""
    assert seconds < side.limits.load_deadline_s + SLACK_S


def ask_until_left_alone(side: EngineSide) -> None:
    """Ask for the first ten `keys`, in time, until the tier is not asked any more."""
    for _ in range(side.limits.failures + 3):
        loaded = side.get_exact(keys(10))
        assert_in_time(side, loaded.seconds)
        if not side.tier.health()["readable"]:
            return
    raise AssertionError("the tier goes on asking")


def random_bytes(count: int) -> bytes:
    """Return bytes that nothing expects."""
    return os.urandom(count)
