"""What one block takes of a Redis: bytes beside its own, and commands by what is done."""

import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.redis_clients import Ours, pages
from tests.redis.servers import RedisServer
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller

_BLOCK_BYTES = 64
_SESSION_BLOCKS = 40
_UPKEEP = frozenset({"info", "command", "scan", "ping", "hello", "client", "config", "time"})


def redis_load(sessions: int) -> dict[tuple[str, str], float]:
    """Measure a Redis in which so many sessions, of ten organisations, store 40 blocks each: those
    of one session in one job."""
    tags, count = OwnerTags(b"secret of the benchmark"), sessions * _SESSION_BLOCKS
    found: dict[tuple[str, str], float] = {}

    def owner_of(number: int) -> bytes:
        session = number // _SESSION_BLOCKS
        return tags.of(Caller(f"org {session % 10}", f"session {session}"))

    with tempfile.TemporaryDirectory() as directory, closing(RedisServer(Path(directory))) as redis:
        ours = Ours(redis.url, count, _BLOCK_BYTES, owner_of=owner_of)
        try:
            began: Any = redis.client.info("memory")
            before = _commands(redis)
            ours.store(pages(count, _BLOCK_BYTES))
            stored = _commands(redis) - before
            held: Any = redis.client.info("memory")
            grown = held["used_memory_dataset"] - began["used_memory_dataset"]
            found["Redis, a block beside its own bytes", "bytes"] = grown / count - _BLOCK_BYTES
            index = sum(
                redis.client.memory_usage(name) or 0
                for name in redis.client.scan_iter(_type="zset")
            )
            found["Redis, a block in the index of owners", "bytes"] = index / count
            before = _commands(redis)
            ours.load()
            for what, made in (("stored", stored), ("loaded", _commands(redis) - before)):
                for name, calls in sorted(made.items()):
                    if calls / count >= 0.005:
                        found[f"Redis, a block {what}: {name}", "commands"] = calls / count
        finally:
            ours.close()
    return found


def _commands(redis: RedisServer) -> Counter[str]:
    stats: Any = redis.client.info("commandstats")
    named = ((name.removeprefix("cmdstat_"), one["calls"]) for name, one in stats.items())
    return Counter({name: calls for name, calls in named if name.split("|")[0] not in _UPKEEP})
