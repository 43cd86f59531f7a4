"""Scope keys, plans, lifetimes and eviction together, against a model that shares none of their
ideas: it knows blocks by whole prefixes and by who may read them, and looks through all it has.
"""

import hashlib
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from vllm_cachescope.cache.eviction import LifetimeShare
from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.prompt.plan import Plan, Span
from vllm_cachescope.tenancy.scope import Caller, Scope, ScopeKeys

MIN_OPERATIONS, MAX_OPERATIONS = 100, 400

DEVICE_BLOCKS = 14
CPU_BLOCKS = 10
BLOCK = 4
TTLS = (300, 1800, 3600)
PAUSES = (0, 1, 10, 100, 299, 300, 301, 4000)
CALLERS = [Caller(org, session) for org in ("acme", "zeta") for session in ("s1", "s2", None)]
KEYS = ScopeKeys(b"the secret of the model's tests")

Identity = tuple[tuple[tuple[int, ...], tuple[str, ...]], ...]


@dataclass(frozen=True)
class Request:
    """What one request asks: its blocks, its plan, and for each block who may read it."""

    blocks: tuple[tuple[int, ...], ...]
    plan: Plan
    owners: tuple[tuple[str, ...], ...]


def request_of(drawn: int, nonce: str) -> Request:
    """Interpret a number as a request; small numbers mean short prompts of the first caller."""
    shape, cut, who = drawn % 256, drawn // 256 % 256, drawn // 65536
    caller = CALLERS[who % len(CALLERS)]
    length = 1 + shape % 6
    blocks = tuple((shape >> (3 + i % 4) & 1,) * BLOCK for i in range(length))
    first, second = sorted((cut % 4, cut // 4 % 4))
    scopes = sorted((Scope(cut // 16 % 3), Scope(cut // 48 % 3)))
    ends = sorted({min(first * BLOCK + cut % 3, length * BLOCK), length * BLOCK} - {0})
    ttls = (TTLS[second % 3], TTLS[cut % 3])
    spans, owners = [], []
    for i, end in enumerate(ends):
        scope = scopes[i] if len(ends) == 2 else scopes[1]
        unreadable = scope is Scope.SESSION and caller.session is None
        key = KEYS.key(scope, caller, nonce)
        spans.append(Span(end, scope, key, ttls[i], covered=not unreadable and cut % 7 != 0))
        if scope is Scope.GLOBAL:
            owners.append(("everyone",))
        elif scope is Scope.ORG:
            owners.append((caller.org,))
        else:
            owners.append((caller.org, caller.session or f"only {nonce}"))
    plan = Plan(tuple(spans), nonce)
    # The narrowest span that any of its tokens is in: the last one that has begun by then.
    of_block = []
    for i in range(length):
        begun = [n for n in range(len(ends)) if n == 0 or ends[n - 1] < (i + 1) * BLOCK]
        of_block.append(owners[begun[-1]])
    return Request(blocks, plan, tuple(of_block))


class Cache:
    """Two tiers built from the core's parts, as the engine's adapter builds them."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.device: OrderedDict[bytes, None] = OrderedDict()
        self.policy = LifetimeShare()

    def keys(self, request: Request) -> list[bytes]:
        keys, parent = [], b""
        for i, block in enumerate(request.blocks):
            scope_key = request.plan.span_of((i + 1) * BLOCK).key
            parent = hashlib.sha256(parent + bytes(block) + scope_key.encode()).digest()
            keys.append(parent)
        return keys

    def sweep(self, now: float) -> set[bytes]:
        expired = self.ledger.pop_expired(now)
        for key, entry in expired:
            if "device" in entry.tiers:
                del self.device[key]
            if "cpu" in entry.tiers:
                self.policy.remove(key)
        return {key for key, _ in expired}

    def use(self, request: Request, now: float) -> tuple[int, list[bytes], list[bytes]]:
        """Run a request; return how many blocks it read, and what left the device and the CPU."""
        keys = self.keys(request)
        read = next((i for i, key in enumerate(keys) if key not in self.ledger), len(keys))
        for i in reversed(range(len(keys))):
            self.ledger.touch(keys[i], request.plan.span_of((i + 1) * BLOCK).ttl_s, now)
        gone: list[bytes] = []
        for key in keys:
            self.ledger.place(key, "device")
            self.device[key] = None
            self.device.move_to_end(key)
        offloaded = keys[: request.plan.covered_tokens // BLOCK]
        missing = [key for key in offloaded if "cpu" not in self._tiers(key)]
        room = CPU_BLOCKS - len(self.policy)
        if len(missing) > room:
            gone = self.policy.victims(len(missing) - room, now, offloaded.__contains__) or []
            for key in gone:
                self.policy.remove(key)
                self.ledger.displace(key, "cpu")
        for key in offloaded:
            self.ledger.place(key, "cpu")
        for key in reversed(keys):
            entry = self.ledger.get(key)
            assert entry is not None
            if "cpu" in entry.tiers:
                self.policy.use(key, entry.ttl_s, now)
        dropped = []
        while len(self.device) > DEVICE_BLOCKS:
            key, _ = self.device.popitem(last=False)
            self.ledger.displace(key, "device")
            dropped.append(key)
        return read, dropped, gone

    def empty_device(self) -> None:
        assert {key for key, _ in self.ledger.clear_tier("device")} == self.device.keys()
        self.device.clear()

    def _tiers(self, key: bytes) -> set[str]:
        entry = self.ledger.get(key)
        return entry.tiers if entry is not None else set()


@dataclass
class Held:
    """A block as the model has it."""

    ttl_s: int
    used_at: float
    tiers: set[str] = field(default_factory=set)

    def share(self, now: float) -> float:
        return (now - self.used_at) / self.ttl_s


class Model:
    """What must be so."""

    def __init__(self) -> None:
        self.held: dict[Identity, Held] = {}
        self.names: dict[bytes, Identity] = {}

    def identities(self, request: Request) -> list[Identity]:
        blocks = list(zip(request.blocks, request.owners, strict=True))
        return [tuple(blocks[: i + 1]) for i in range(len(blocks))]

    def sweep(self, now: float) -> set[Identity]:
        expired = {name for name, held in self.held.items() if now - held.used_at >= held.ttl_s}
        for name in expired:
            del self.held[name]
        return expired

    def use(
        self,
        request: Request,
        keys: list[bytes],
        now: float,
        read: int,
        dropped: list[bytes],
        gone: list[bytes],
    ) -> None:
        names = self.identities(request)
        allowed = next((i for i, name in enumerate(names) if name not in self.held), len(names))
        assert read == allowed, "reads what it may, and nothing else"
        for key, name in zip(keys, names, strict=True):
            assert self.names.setdefault(key, name) == name, "one key for two identities"
        covered = sum(
            (i + 1) * BLOCK <= max((s.end for s in request.plan.spans if s.covered), default=0)
            for i in range(len(names))
        )
        spared = set(names[:covered])
        left = {self.names[key] for key in gone}
        assert not left & spared
        memory = {n: held for n, held in self.held.items() if "cpu" in held.tiers}
        if left:
            least = min(memory[name].share(now) for name in left)
            staying = memory.keys() - left - spared
            assert all(memory[name].share(now) <= least for name in staying)
        for name in left:
            self._leave(name, "cpu")

        for i, name in enumerate(names):
            ttl_s = request.plan.span_of((i + 1) * BLOCK).ttl_s
            held = self.held.setdefault(name, Held(ttl_s, now))
            held.ttl_s, held.used_at = max(held.ttl_s, ttl_s), now
            held.tiers.add("device")
            if i < covered:
                held.tiers.add("cpu")
        for key in dropped:
            self._leave(self.names[key], "device")

    def empty_device(self) -> None:
        for name in list(self.held):
            self._leave(name, "device")

    def resident(self) -> Counter[tuple[str, int]]:
        return Counter((tier, held.ttl_s) for held in self.held.values() for tier in held.tiers)

    def _leave(self, name: Identity, tier: str) -> None:
        held = self.held[name]
        held.tiers.discard(tier)
        if not held.tiers:
            del self.held[name]


done = Counter[str]()


@settings(
    max_examples=examples(640),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    st.lists(
        st.integers(0, 64 * 2**19 - 1),
        min_size=MIN_OPERATIONS,
        max_size=MAX_OPERATIONS,
    )
)
def check(operations: list[int]) -> None:
    cache, model, now = Cache(), Model(), 0.0
    for number, operation in enumerate(operations):
        drawn, kind = divmod(operation, 64)
        if kind < 8:
            now += PAUSES[drawn % len(PAUSES)]
            done["pause"] += 1
        elif kind == 8:
            cache.empty_device()
            model.empty_device()
            done["reset"] += 1
        expired = {model.names[key] for key in cache.sweep(now)}
        assert expired == model.sweep(now)
        if kind > 8:
            request = request_of(drawn, f"nonce {number}")
            keys = cache.keys(request)
            read, dropped, gone = cache.use(request, now)
            model.use(request, keys, now, read, dropped, gone)
            done["read"] += read > 0
            done["dropped"] += len(dropped)
            done["evicted"] += len(gone)
        done["expired"] += len(expired)
        assert Counter({(t, ttl): n for t, ttl, n in cache.ledger.resident() if n}) == (
            model.resident()
        )
        assert len(cache.ledger) == len(model.held)
    done["operations"] += len(operations)


def test_random_operations() -> None:
    done.clear()
    check()
    assert done["operations"] >= examples(100_000)
    # Each of these was put to the test many times.
    for what in ("pause", "reset", "read", "dropped", "evicted", "expired"):
        assert done[what] > examples(1000), (what, done)
