"""What MACs, leases and encryption cost a tier in Redis, next to a tier that has none of them."""

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from benchmarks.harness import Result, arguments, console, finish, pairs
from benchmarks.redis_clients import SECRET, Ours, pages
from tests.redis.servers import RedisServer
from vllm_cachescope.connectors.redis import parse, stores
from vllm_cachescope.connectors.redis.channel import command
from vllm_cachescope.connectors.redis.connections import Connections
from vllm_cachescope.connectors.redis.topology import Topology
from vllm_cachescope.tenancy.owner_tags import NOBODY
from vllm_cachescope.tiers.envelope import HEADER_BYTES, EncryptedEnvelopes, Envelopes
from vllm_cachescope.tiers.jobs import Outgoing
from vllm_cachescope.tiers.keyspace import Keyspace, qualified, secret_digest
from vllm_cachescope.tiers.leases import Leases
from vllm_cachescope.tiers.store import Value

TURNS = 15
"""Measurements per round and side; the fastest counts, since whatever else runs only ever adds."""

MOVED_BYTES = 32 << 20
TTL_S = 300
RENEWED = 1_250
"""Entries renewed at once: a prompt of 20,000 tokens in blocks of 16."""


class Unsealed(Envelopes):
    """Envelopes that say nothing and believe everything."""

    @contextmanager
    def sealing(self, blocks: Sequence[Outgoing]) -> Iterator[list[Value]]:
        yield [Value(b.key, bytes(HEADER_BYTES), b.slot, b.expires_at) for b in blocks]

    def open(self, key: bytes, head: bytes, payload: memoryview, slot: memoryview) -> int:
        return TTL_S


def seal_blocks(result: Result, count: int, block_bytes: int) -> None:
    """Add how fast one thread seals and opens blocks that lie in memory."""
    size = f"{block_bytes >> 10} KiB"
    console.print(f"envelopes: blocks of {size} in memory")
    slots = pages(MOVED_BYTES // block_bytes, block_bytes)
    for slot in slots:
        slot[:] = os.urandom(block_bytes)
    blocks = [Outgoing(b"key", slot, TTL_S, 0.0) for slot in slots]
    kinds = {
        "MAC": Envelopes(SECRET, "benchmark"),
        "encryption": EncryptedEnvelopes(SECRET, "benchmark", block_bytes),
    }
    for name, envelopes in kinds.items():

        def seal(envelopes: Envelopes = envelopes) -> None:
            for block in blocks:
                with envelopes.sealing([block]):
                    pass

        result.add(f"{size}, seal, {name}", [_rate(seal) for _ in range(count)], "GB/s")
        with envelopes.sealing(blocks[:1]) as (value,), envelopes.landing(slots) as landings:
            payload = bytes(value.payload)
            for landing in landings:
                landing[:] = payload

            def open_all(
                envelopes: Envelopes = envelopes,
                head: bytes = value.head,
                landings: Sequence[memoryview] = landings,
            ) -> None:
                for landing, slot in zip(landings, slots, strict=True):
                    envelopes.open(b"key", head, landing, slot)

            result.add(f"{size}, open, {name}", [_rate(open_all) for _ in range(count)], "GB/s")


def move_blocks(result: Result, count: int, directory: Path, block_bytes: int) -> None:
    """Add how fast blocks go to Redis and come back, next to a tier without envelopes."""
    size = f"{block_bytes >> 10} KiB"
    console.print(f"envelopes: blocks of {size} to Redis and back")
    number = MOVED_BYTES // block_bytes
    chance = random.Random(0)
    blocks = [memoryview(bytearray(chance.randbytes(block_bytes))) for _ in range(number)]
    with closing(RedisServer(directory)) as redis:
        kinds = {
            "neither": Unsealed(SECRET, "n"),
            "MAC": Envelopes(SECRET, "n"),
            "encryption": EncryptedEnvelopes(SECRET, "n", block_bytes),
        }
        tiers = [Ours(redis.url, number, block_bytes, *kind) for kind in kinds.items()]
        rates: dict[str, dict[str, list[float]]] = {"store": {}, "load": {}}
        # One round more, in which memory is touched for the first time.
        for round_ in range(-1, count):
            turns: dict[tuple[str, str], list[float]] = {}
            for turn in range(TURNS):
                for tier in tiers if (round_ + turn) % 2 == 0 else tiers[::-1]:
                    redis.client.flushall()
                    _timed(turns, ("store", tier.name), lambda tier=tier: tier.store(blocks))
                    _timed(turns, ("load", tier.name), tier.load)
                    loaded = zip(tier.loaded(), blocks, strict=True) if round_ < 0 else ()
                    if any(bytes(a) != bytes(b) for a, b in loaded):
                        raise RuntimeError(f"{tier.name} has not loaded what was stored")
            for (what, name), measured in turns.items():
                if round_ >= 0:
                    rates[what].setdefault(name, []).append(max(measured))
        for tier in tiers:
            tier.close()
    for what, by_kind in rates.items():
        for name, values in by_kind.items():
            result.add(f"{size}, {what}, {name}", values, "GB/s")
        for name in ("MAC", "encryption"):
            ratios = [a / b for a, b in zip(by_kind[name], by_kind["neither"], strict=True)]
            target = ("at least 0.8", lambda ratio: ratio >= 0.8) if name == "MAC" else ()
            result.add(f"{size}, {what}, {name} over neither", ratios, "×", *target)


def renew(result: Result, count: int, directory: Path) -> None:
    """Add how long it takes to let a long prompt's entries live on, next to moving only the
    expiry that Redis itself keeps."""
    console.print("envelopes: entries that live on")
    with closing(RedisServer(directory)) as redis:
        keyspace = Keyspace({"benchmark": "renewal"})
        digest, leases = secret_digest(SECRET), Leases(SECRET)
        store = stores(redis.url, 5.0, keyspace, digest, leases, time.monotonic, time.time)()
        address = parse(redis.url)
        connections = Connections(address, Topology(address), 5.0, time.monotonic)
        chance = random.Random(0)
        keys = [qualified(NOBODY, chance.randbytes(32) + bytes(4)) for _ in range(RENEWED)]
        for key in keys:
            redis.client.set(keyspace.name(key), bytes(1 << 16), ex=TTL_S)
        lifetime_s = TTL_S

        def expire() -> None:
            ms = b"%d" % (lifetime_s * 1000)
            names = [keyspace.name(key) for key in keys]
            commands = {name: command(b"PEXPIRE", name, ms, b"GT") for name in names}
            connections.ask_each(commands, time.monotonic() + 5)

        def touch() -> None:
            now = time.monotonic()
            store.touch([(key, now + lifetime_s) for key in keys], now + 5)

        def best(move: Callable[[], None]) -> float:
            nonlocal lifetime_s
            seconds = []
            for _ in range(TURNS):
                lifetime_s += 60
                start = time.perf_counter()
                move()
                seconds.append(time.perf_counter() - start)
            return 1e6 * min(seconds) / RENEWED

        best(touch), best(expire)
        measured = pairs(count, lambda _: best(touch), lambda _: best(expire))
        result.add("renewed with its lease, an entry", [a for a, _ in measured], "µs")
        result.add("only its expiry moved, an entry", [b for _, b in measured], "µs")
        store.close()
        connections.close()


def _timed(
    turns: dict[tuple[str, str], list[float]], what: tuple[str, str], move: Callable[[], None]
) -> None:
    start = time.perf_counter()
    move()
    turns.setdefault(what, []).append(MOVED_BYTES / (time.perf_counter() - start) / 1e9)


def _rate(move: Callable[[], None]) -> float:
    turns: dict[tuple[str, str], list[float]] = {}
    for _ in range(TURNS):
        _timed(turns, ("", ""), move)
    return max(turns["", ""])


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "", pairs=7)
    result = Result("envelopes", options.quick)
    for block_bytes in (64 << 10, 1 << 20):
        seal_blocks(result, options.pairs, block_bytes)
    with tempfile.TemporaryDirectory(prefix="cachescope-") as directory:
        for block_bytes in (256 << 10, 1 << 20):
            move_blocks(result, options.pairs, Path(directory), block_bytes)
        renew(result, options.pairs, Path(directory))
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
