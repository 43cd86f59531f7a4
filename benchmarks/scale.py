"""What one engine and one API process keep, at 10,000 to 1,000,000 blocks and 1,000 to 100,000
sessions: memory of each block and session, and whether any step grows with how many there are.

The CPU tier's metadata are vLLM's own manager with the production policy, quotas and ledger; only
the bytes of the blocks are left out. Each size runs in a process of its own. The model of a fleet
that `docs/scale.md` tells of is checked at the end.
"""

import gc
import math
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ByteSize
from sqlalchemy import URL
from vllm.v1.kv_offload.base import OffloadKey, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from benchmarks import fleet_model
from benchmarks.harness import Result, arguments, finish
from benchmarks.ledger import REPORT
from benchmarks.redis_load import redis_load
from vllm_cachescope.cache.eviction_history import EvictionHistory, EvictionReason, EvictionRecord
from vllm_cachescope.cache.learned_order import LearnedOrder
from vllm_cachescope.cache.ledger import Entry, Ledger
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.cache.runs import RequestSignals
from vllm_cachescope.config import LedgerSettings, OrgQuota
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.connectors.vllm.engine.tiers import cpu_policy
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_order import make_order
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.lineage_store import LineageStore
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.usage.batch import Batch
from vllm_cachescope.usage.database import connect
from vllm_cachescope.usage.name_limits import NameLimits
from vllm_cachescope.usage.record import RequestRecord
from vllm_cachescope.usage.store import Store
from vllm_cachescope.usage.usage_ledger import retention_of
from vllm_cachescope.wire import anthropic

SIZES = (10_000, 100_000, 1_000_000)
BLOCKS = 10
"""Blocks of a session's first prompt; each further one adds a block."""

TENANTS = 100
STEPS = 2000

Name = tuple[str, str]
"""What was measured, and its unit."""

_QUICK = (2000, 20_000)
_POLICY_BYTES = 200
_LOG = 3.0
"""How much longer a step may take with a hundred times as many blocks: log n grows by half, and the
caches of the processor hold less."""


class CpuTier:
    """The CPU tier's metadata, and the scheduler side as far as the policy asks it, on a driven
    clock."""

    def __init__(self, chunks: int) -> None:
        self.ledger, self.time = Ledger(), 0.0
        self.history = EvictionHistory()
        self.tags = OwnerTags(b"secret of the benchmark")
        self.owner, self.used = b"", list[bytes]()
        self.manager = CPUOffloadingManager(
            chunks, cpu_policy.ScopePolicy.__name__, cpu_policy.__name__
        )
        quotas = Quotas(
            1, OrgQuota(quota=ByteSize(chunks), reserve=ByteSize(chunks // (2 * TENANTS))), {}
        )
        self.order = make_order(EvictionSettings(), quotas, chunks)
        self.manager._policy.bind(self, quotas, self.order)  # type: ignore[attr-defined]
        self.requests = 0

    def now(self) -> float:
        return self.time

    def ttl_and_owner(self, key: OffloadKey, context: ReqContext) -> tuple[int, bytes]:
        return 3600, self.owner

    def finished(self, context: ReqContext) -> tuple[list[bytes], RequestSignals, str]:
        return self.used, RequestSignals(len(self.used) * 16), context.req_id

    def on_evicted(
        self, key: bytes, entry: Entry, reason: EvictionReason, by: bytes | None
    ) -> None:
        self.history.record(key, EvictionRecord(reason, entry.ttl_s, self.time, "cpu"))

    def ask(self, session: int, blocks: int) -> None:
        """Run a request of a session: look up, load, store, end."""
        self.requests += 1
        context = ReqContext(str(self.requests))
        self.owner = self.tags.of(Caller(f"org {session % TENANTS}", f"session {session}"))
        keys = [make_offload_key(b"%016d%016d" % (session, i), 0) for i in range(blocks)]
        for i, key in enumerate(keys):
            context.set_offload_key_position(key, 16 * (i + 1))
        self.manager.on_new_request(context)
        read = 0
        while read < blocks and self.manager.lookup(keys[read], context).name == "HIT":
            read += 1
        if read:
            self.manager.prepare_load(keys[:read], context)
            self.manager.complete_load(keys[:read], context)
        if read < blocks and (stored := self.manager.prepare_store(keys[read:], context)):
            self.manager.complete_store(stored.keys_to_store, context)
        self.used = list(keys)
        self.manager.on_request_finished(context)


def resident_bytes() -> int:
    """Return how much memory this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def taking(work: Callable[[], object]) -> tuple[float, float]:
    """Return by how many bytes the process grows with ``work``, and its CPU time in seconds."""
    gc.collect()
    before, start = resident_bytes(), time.thread_time()
    work()
    took = time.thread_time() - start
    gc.collect()
    return resident_bytes() - before, took


def stepped(step: Callable[[int], object], steps: int) -> dict[str, float]:
    """Return the median, 99th percentile and longest CPU time of steps, in microseconds."""
    times = []
    for number in range(steps):
        start = time.thread_time()
        step(number)
        times.append(1e6 * (time.thread_time() - start))
    times.sort()
    return {
        "median": times[steps // 2],
        "99 %": times[steps * 99 // 100],
        "longest": times[-1],
    }


def blocks_of(size: int, steps: int) -> dict[Name, float]:
    """Measure what blocks take, with so many of them."""
    sessions, rng = size // BLOCKS, random.Random(size)
    found: dict[Name, float] = {}
    tier = CpuTier(size)

    def fill() -> None:
        for session in range(sessions):
            tier.ask(session, BLOCKS)
            tier.time += 0.001

    nbytes, seconds = taking(fill)
    found["CPU tier with ledger and policy, a block", "bytes"] = nbytes / size
    found["CPU tier with ledger and policy, a block when filling", "µs"] = 1e6 * seconds / size
    lengths = dict[int, int]()
    newest = sessions

    def step(_: int) -> None:
        nonlocal newest
        tier.time += 0.01
        session = rng.randrange(newest)
        if rng.random() < 0.3:
            session = newest
            newest += 1
        lengths[session] = lengths.get(session, BLOCKS - 1) + 1
        tier.ask(session, lengths[session])

    for name, value in stepped(step, steps).items():
        found[f"CPU tier with ledger and policy, full, a request: {name}", "µs"] = value
    assert len(tier.order) <= size
    found |= _parts(size)
    return found


def _parts(size: int) -> dict[Name, float]:
    keys = [b"%036d" % number for number in range(size)]
    order, ledger, history = LearnedOrder(), Ledger(), EvictionHistory()
    tags = OwnerTags(b"secret")
    sessions = size // BLOCKS
    owners = [tags.of(Caller(f"org {n % TENANTS}", f"session {n}")) for n in range(sessions)]

    def learn() -> None:
        for n in range(sessions):
            prompt = keys[n * BLOCKS : (n + 1) * BLOCKS]
            order.use_request([(prompt, 300, owners[n][:8])], n * 0.001, RequestSignals(n % 997))

    def note() -> None:
        for n, key in enumerate(keys):
            ledger.touch(key, 3600, n * 0.001, owners[n // BLOCKS])
            ledger.place(key, "cpu")
            ledger.place(key, "device")

    def forget() -> None:
        for n, key in enumerate(keys[:200_000]):
            history.record(key, EvictionRecord(EvictionReason.CAPACITY, 300, n * 0.001, "cpu"))

    return {
        ("policy, a block", "bytes"): taking(learn)[0] / size,
        ("ledger, a block", "bytes"): taking(note)[0] / size,
        ("history, an evicted block", "bytes"): taking(forget)[0] / min(size, 200_000),
    }


def sessions_of(size: int, steps: int) -> dict[Name, float]:
    """Measure what sessions take, with so many of them; ``size`` counts their blocks."""
    sessions, found = size // BLOCKS, dict[Name, float]()
    now, secret = 0.0, b"secret of the benchmark"
    made = Fingerprinter(secret)
    stores = [
        LineageStore(lambda: now, org_bytes=2**50, max_bytes=2**50),
        LineageStore(lambda: now),
    ]

    def observe(session: int) -> None:
        nonlocal now
        now += 0.001
        caller = Caller(f"org {session % TENANTS}", f"session {session}")
        stores[0].observe(caller, made(anthropic.read(_body(session), (300, 3600)), org=caller.org))

    nbytes, _ = taking(partial(_each, observe, range(sessions)))
    found["lineages, a session of one request", "bytes"] = nbytes / sessions
    for name, value in stepped(lambda n: observe(n * 7919 % sessions), steps).items():
        found[f"lineages, a request: {name}", "µs"] = value
    # From here on within the default bounds.
    del stores[0]
    _each(observe, range(sessions))
    found["lineages, as bounded by default", "MB"] = stores[0].nbytes / 1e6
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        engine = connect(URL.create("sqlite", database=str(path / "usage.db")))
        store = Store(engine, retention_of(LedgerSettings(directory=path)))
        store.create()
        limits = NameLimits()

        def write(first: int) -> None:
            records = (_record(n % sessions) for n in range(first, first + 1000))
            store.write(Batch.of(records, limits))

        nbytes, _ = taking(partial(_each, write, range(0, sessions, 1000)))
        found["usage ledger on disk, a session", "bytes"] = (
            sum(file.stat().st_size for file in path.iterdir()) / sessions
        )
        for name, value in stepped(lambda n: write(n * 1000), max(5, steps // 200)).items():
            found[f"usage ledger, a record: {name}", "µs"] = value / 1000
        start = time.thread_time()
        store.maintain(3600.0, 300)
        found["usage ledger, upkeep", "s"] = time.thread_time() - start
        engine.dispose()
    return found


def _each(work: Callable[[int], None], numbers: Iterable[int]) -> None:
    for number in numbers:
        work(number)


def _body(session: int) -> dict[str, Any]:
    text = f"Session {session} asks. " + "What is to be done, and in which order? " * 20
    tool = {"name": "read", "description": "Reads a file.", "input_schema": {"type": "object"}}
    return {
        "model": "m",
        "tools": [tool],
        "system": [{"type": "text", "text": "You are an agent. " * 40}],
        "messages": [{"role": "user", "content": text}],
    }


def _record(session: int) -> RequestRecord:
    org = f"name:org {session % TENANTS}"
    return RequestRecord(1000.0, org, f"session {session}", "m", "replica", 0, "id", REPORT.rows)


def _add(result: Result, name: str, value: float, unit: str, is_largest: bool) -> None:
    if is_largest and name.endswith("policy, a block") and "tier" not in name:
        target = f"at most {_POLICY_BYTES}"
        result.add(name, [value], unit, target, lambda held: held <= _POLICY_BYTES)
    else:
        result.add(name, [value], unit)


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "")
    result = Result("scale", options.quick)
    sizes, steps = (_QUICK, 400) if options.quick else (SIZES, STEPS)
    found: dict[Name, list[float]] = {}
    for size in sizes:
        for measure in (blocks_of, sessions_of):
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, spawn) as process:
                for (name, unit), value in process.submit(measure, size, steps).result().items():
                    found.setdefault((name, unit), []).append(value)
                    _add(result, f"{size:,} blocks: {name}", value, unit, size == sizes[-1])
    for (name, unit), values in found.items():
        if unit == "µs" and "longest" not in name:
            result.add(
                f"{name}: largest size over smallest",
                [values[-1] / values[0]],
                "×",
                f"at most {_LOG:.0f}",
                lambda ratio: ratio <= _LOG,
            )
    for (name, unit), value in redis_load(20 if options.quick else 500).items():
        result.add(name, [value], unit)
    for capacity, model, simulated in fleet_model.checked(0.1 if options.quick else 1.0):
        result.add(
            f"fleet, room for {capacity:.0%} of an hour: hits, model less replay",
            [model - simulated],
            "",
            "within 0.02",
            lambda off: math.fabs(off) <= 0.02,
        )
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
