"""Keeps the lifetimes of all blocks true to what the engine does, and accounts for each prompt."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.request import Request

from vllm_cachescope.cache.eviction_history import EvictionHistory, EvictionReason, EvictionRecord
from vllm_cachescope.cache.ledger import Entry, Ledger
from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause, eviction_miss
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.cache.report import EngineId, Outcome, Report, attribute_tokens
from vllm_cachescope.connectors.vllm.engine import hashing
from vllm_cachescope.connectors.vllm.engine.tiers.cpu import CPU, CpuTier
from vllm_cachescope.connectors.vllm.engine.tiers.device import DEVICE, DeviceTier
from vllm_cachescope.connectors.vllm.engine.tiers.device_quotas import DeviceQuotas
from vllm_cachescope.connectors.vllm.engine.tiers.remote import RemoteTierManager, remote_tiers
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tenancy.owner_tags import NOBODY, org_of, owner_at
from vllm_cachescope.tiers.block_states import Absence
from vllm_cachescope.tiers.keyspace import qualified

REMEMBERED_PROMPTS = 4096
"""How many finished prompts' reports can still be asked for."""

MAX_MISSES = 32
"""A report lists at most this many runs of blocks that went for one reason."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """How the engine cuts prompts into blocks.

    Attributes:
        tokens_per_hash: tokens per block hash.
        groups: ``(group id, tokens per block)`` of each KV cache group.
        blocks_per_chunk: blocks that tiers behind the device keep as one.
        bytes_per_key: device bytes behind one key, over all workers.
    """

    tokens_per_hash: int
    groups: tuple[tuple[int, int], ...]
    blocks_per_chunk: int
    bytes_per_key: int

    def own_chunks(self, plan: Plan, end: int) -> int:
        """Return how many of a prompt's chunks count towards the organisation of the one that ends
        at ``end`` (tokens), up to there."""
        start = plan.quota_start(end)
        sizes = [size * self.blocks_per_chunk for _, size in self.groups]
        return sum(end // size - start // size for size in sizes)


@dataclass(slots=True)
class Prompt:
    """What the keeper knows of one prompt.

    Attributes:
        plan: its plan.
        block_size: tokens per block, for accounting.
        request: the engine's request; None once it has finished.
        read: ``(outcome, tokens)`` read when it was first scheduled; None before.
        misses: what it might have read besides, had the cache kept it.
        unasked: why a remote tier could not be asked for what comes then.
        created: indices of the blocks it newly cached under a breakpoint.
        registered: tokens whose blocks the ledger has seen.
        promoted: for keys that were loaded into the CPU tier for it, the tier they came from.
        counted: whether its tokens are in the metrics.
        purged: beginnings of the owners that were purged while it ran: it leaves no block of
            theirs behind.
    """

    plan: Plan
    block_size: int
    request: Request | None
    local_tokens: int = 0
    read: list[tuple[str, int]] | None = None
    misses: tuple[CacheMiss, ...] = ()
    unasked: CacheMiss | None = None
    created: list[int] = field(default_factory=list)
    registered: int = 0
    promoted: dict[bytes, str] = field(default_factory=dict)
    counted: bool = False
    purged: tuple[bytes, ...] = ()

    def is_purged(self, block_end: int) -> bool:
        """Whether the block that ends there was purged while the prompt ran."""
        return bool(self.purged) and self.plan.owner_of(block_end).startswith(self.purged)


@dataclass(frozen=True, slots=True)
class _Gone:
    """How a block went: what is equal for blocks that went alike, and when, if it is known."""

    alike: tuple[str, Absence] | tuple[str, EvictionReason, int]
    at: float = 0.0

    def miss(self, tokens: int, now: float) -> CacheMiss:
        if len(self.alike) == 3:
            tier, reason, ttl_s = self.alike
            return eviction_miss(EvictionRecord(reason, ttl_s, self.at, tier), tokens, now)
        tier, absence = self.alike
        return CacheMiss(absence.cause, tokens, tier, detail=absence.detail)


class CacheScopeConnectorScheduler:
    """The scheduler's side of CacheScope. Runs on the scheduler's thread and never blocks.

    Args:
        layout: how prompts are cut into blocks.
        manager: vLLM's offloading manager, whose primary tier runs our policy.
        clock: seconds, never running backwards.
        engine: returns which engine this is, once it hashes prompts.
        shares: what organisations may have of the device and the CPU tier, by the tier's name.
    """

    def __init__(
        self,
        layout: BlockLayout,
        manager: TieringOffloadingManager,
        clock: Callable[[], float],
        engine: Callable[[], EngineId],
        shares: Mapping[str, Quotas],
    ) -> None:
        self._layout = layout
        self._clock = clock
        self._engine = engine
        self._ledger = Ledger()
        self._departures = EvictionHistory()
        self._device: DeviceTier | None = None
        self._cpu = CpuTier(manager, self._is_expired, self._is_barred, self._is_unwanted)
        self._shares = shares
        self._device_quotas: DeviceQuotas | None = None
        self._cpu.policy.bind(
            self._ledger, clock, self._marks_of, self._cpu_evicted, shares.get(CPU)
        )
        self._remotes = remote_tiers(manager)
        for remote in self._remotes:
            remote.bind(
                layout.own_chunks, self._plan_of, self._entry_of, self._owner_of, self._promoted
            )
        self._prompts: dict[str, Prompt] = {}
        # Prompts that are over and whose last blocks vLLM is about to store.
        self._leaving: dict[str, Prompt] = {}
        self._by_nonce: OrderedDict[str, Prompt] = OrderedDict()
        # Chunks that expired in the middle of a transfer; freed when it is over.
        self._overdue: set[bytes] = set()
        # Device blocks that were evicted; whether a twin remains shows only afterwards.
        self._device_evicted: list[bytes] = []
        self.evictions: Counter[tuple[str, str]] = Counter()
        self.tokens: Counter[tuple[str, str, int]] = Counter()
        self.refused_plans = 0

    def bind(self, manager: KVCacheManager) -> None:
        """Follow vLLM's prefix cache from here on."""
        self._device = DeviceTier(
            manager, self.sweep, self._looked_up, self._device_evicted.append, self._device_reset
        )
        if (shares := self._shares.get(DEVICE)) is not None:
            self._device_quotas = DeviceQuotas(
                shares, self._device, self._ledger, self._clock, self._give_up
            )

    # One request's way through, in the order in which vLLM calls.

    def start(self, request: Request) -> None:
        """A request came in. Must run before vLLM's offloading sees it."""
        self.sweep()
        plan = hashing.plan_of(request)
        block_size = self._layout.tokens_per_hash
        prompt = Prompt(plan, block_size, request)
        if hashing.is_private(plan):
            self.refused_plans += 1
            # Nobody can ever read its blocks again: they are not worth a copy.
            request.kv_transfer_params = {
                **(request.kv_transfer_params or {}),
                "max_offload_tokens": 0,
            }
        else:
            # Further samples of a prompt (n > 1) read what the first one computed; the prompt
            # counts once, as the first one found it.
            self._by_nonce.setdefault(plan.nonce, prompt)
            while len(self._by_nonce) > REMEMBERED_PROMPTS:
                self._by_nonce.popitem(last=False)
        self._prompts[request.request_id] = prompt
        self._changed(plan)

    def _looked_up(self, request: Request, tokens: int) -> None:
        """The prefix cache holds the first ``tokens`` tokens; for the rest there must be room."""
        prompt = self._prompts.get(request.request_id)
        if self._device_quotas is None or prompt is None:
            return
        newcomers: Counter[bytes] = Counter()
        wanted: set[bytes] = set()
        for group, block_size in self._layout.groups:
            for start, end, span in prompt.plan.ranges(block_size):
                blocks = end // block_size - max(start, tokens) // block_size
                newcomers[org_of(owner_at(span.scope, prompt.plan.owner))] += max(0, blocks)
            suffix = group.to_bytes(4, "big")
            wanted.update(block_hash + suffix for block_hash in request.block_hashes)
        self._device_quotas.make_room(newcomers, wanted)

    def found_local(self, request: Request, tokens: int) -> None:
        """vLLM's prefix cache holds the first ``tokens`` tokens, in whole blocks."""
        if (prompt := self._prompts.get(request.request_id)) is not None:
            prompt.local_tokens = tokens

    def admit(self, request: Request, external_tokens: int) -> None:
        """The request is scheduled, reading what was found.

        Args:
            request: the request.
            external_tokens: tokens read from further tiers, right behind the local ones.
        """
        prompt = self._prompts.get(request.request_id)
        if prompt is None:
            return
        if prompt.read is None:
            prompt.read = [(Outcome.READ_DEVICE, prompt.local_tokens)]
            prompt.read += self._sources(prompt, request, external_tokens)
            self._explain(prompt, request, sum(tokens for _, tokens in prompt.read))
        prompt.registered = 0
        found = prompt.local_tokens + external_tokens
        # Refreshed now and not when a load is done: what is in use must not expire meanwhile.
        known = self._register(prompt, request, found, known_only=True)
        self._refresh_remotes(prompt, request, found)
        if external_tokens or not known:
            # `computed` does it all once more. What is loaded comes to the device only later, and
            # a block that another request fills in this very step is that one's to create.
            prompt.registered = 0

    def computed(self, output: SchedulerOutput) -> None:
        """A step was scheduled: the blocks that it fills are in vLLM's prefix cache now."""
        for req_id, tokens in output.num_scheduled_tokens.items():
            prompt = self._prompts.get(req_id)
            if prompt is not None and prompt.request is not None:
                self._register(prompt, prompt.request, prompt.request.num_computed_tokens + tokens)

    def stored(self) -> None:
        """vLLM has offloaded what the step and the requests that were over before it left."""
        self._leaving.clear()
        self._keep_quotas()

    def finish(self, request: Request) -> Report | None:
        """The request is over; return what became of its prompt, None if it never ran."""
        prompt = self._prompts.pop(request.request_id, None)
        if prompt is None:
            return None
        self._leaving[request.request_id] = prompt
        # An aborted request may have had blocks loaded that no step has used.
        self._register(prompt, request, request.num_computed_tokens)
        self._refresh(prompt, request)
        self._refresh_remotes(prompt, request, prompt.registered)
        prompt.request = None
        prompt.promoted.clear()
        self._changed(prompt.plan)
        first = self._by_nonce.get(prompt.plan.nonce, prompt)
        if first.read is None:
            return None
        report = self._report(first)
        if not first.counted:
            first.counted = True
            for row in report.rows:
                self.tokens[row.outcome, row.scope.label, row.ttl_s] += row.tokens
        return report

    def report(self, nonce: str) -> Report | None:
        """Return what has become so far of the prompt with ``nonce``, None if it is not known."""
        prompt = self._by_nonce.get(nonce)
        known = prompt is not None and prompt.read is not None
        return self._report(prompt) if known else None

    def sweep(self) -> int:
        """Drop everything that has expired, on every tier; return how many entries."""
        self._settle_device()
        expired = self._ledger.pop_expired(self._clock())
        for key, entry in expired:
            tier = CPU if CPU in entry.tiers else DEVICE
            gone = EvictionRecord(EvictionReason.TTL, entry.ttl_s, entry.expires_at, tier)
            self._departures.record(key, gone)
        self._let_go(expired, EvictionReason.TTL)
        self._keep_quotas()
        return len(expired)

    def tidy(self) -> int:
        """Do what `sweep` does, and see to what it left because it was in use."""
        if self._device_quotas is not None:
            self._device_quotas.keep_all()
        return self.sweep()

    def purge(self, prefix: bytes) -> dict[str, int]:
        """Forget all blocks whose owner begins with ``prefix``; return how many the device and
        the CPU tier held. Requests that run go on, and leave none of them behind."""
        self.sweep()
        for prompt in chain(self._prompts.values(), self._leaving.values()):
            prompt.purged = tuple({*prompt.purged, prefix})
        purged = self._ledger.purge(prefix)
        now = self._clock()
        for key, entry in purged:
            tier = CPU if CPU in entry.tiers else DEVICE
            self._departures.record(
                key, EvictionRecord(EvictionReason.PURGE, entry.ttl_s, now, tier)
            )
        return self._let_go(purged, EvictionReason.PURGE)

    def _keep_quotas(self) -> None:
        self._cpu.keep_quotas()
        if self._device_quotas is not None:
            self._device_quotas.keep()

    def _changed(self, plan: Plan) -> None:
        """Blocks of a prompt's owners came into use, or out of it."""
        if self._device_quotas is not None:
            for owner in (plan.owner, NOBODY):
                self._device_quotas.changed(org_of(owner))

    def _let_go(self, entries: list[tuple[bytes, Entry]], reason: EvictionReason) -> dict[str, int]:
        """Have the device and the CPU tier drop what the ledger has forgotten; return how many
        each held."""
        on_device = [key for key, entry in entries if DEVICE in entry.tiers]
        in_memory = [key for key, entry in entries if CPU in entry.tiers]
        if entries and self._device is not None:
            # All of them: a load may have just brought one to the device.
            self._device.evict(key for key, _ in entries)
            self._device_evicted.clear()
            self.evictions[DEVICE, reason] += len(on_device)
        if in_memory:
            self._overdue |= set(in_memory)
            self.evictions[CPU, reason] += len(in_memory)
        if self._overdue:
            self._overdue = self._cpu.discard(self._overdue)
        return {DEVICE: len(on_device), CPU: len(in_memory)}

    def resident(self) -> list[tuple[str, int, int]]:
        """Return ``(tier, ttl_s, entries)`` for each tier and TTL class."""
        self._settle_device()
        return list(self._ledger.resident())

    def held(self, tier: str) -> dict[bytes, int]:
        """Return how many entries of each organisation the device or the CPU tier holds, by the
        organisation's tag."""
        self._settle_device()
        return self._ledger.held(tier)

    def _register(
        self, prompt: Prompt, request: Request, tokens: int, known_only: bool = False
    ) -> bool:
        """Start or refresh the lifetimes of the blocks in the first ``tokens`` tokens; with
        ``known_only``, start none. Return whether the ledger knows all of them now."""
        if tokens - prompt.registered < self._layout.tokens_per_hash:
            return True
        now, known = self._clock(), True
        for index, (group, block_size) in enumerate(self._layout.groups):
            stride = block_size // self._layout.tokens_per_hash
            first = prompt.registered // block_size
            hashes = islice(
                request.block_hashes,
                first * stride + stride - 1,
                tokens // self._layout.tokens_per_hash,
                stride,
            )
            suffix = group.to_bytes(4, "big")
            blocks = [(first + i, block_hash + suffix) for i, block_hash in enumerate(hashes)]
            # From the last to the first, so that a prefix loses its end first.
            for block, key in reversed(blocks):
                end = (block + 1) * block_size
                span = prompt.plan.span_of(end)
                on_device = self._device is not None and self._device.holds(key)
                if prompt.is_purged(end):
                    if on_device and key not in self._ledger:
                        self._device.evict([key])
                    continue
                if key not in self._ledger and (known_only or not on_device):
                    known = False
                    continue
                new = self._ledger.touch(key, span.ttl_s, now, prompt.plan.owner_in(span))
                if new:
                    self._departures.drop(key)
                if on_device:
                    self._ledger.place(key, DEVICE)
                if key in self._overdue:
                    self._overdue.remove(key)
                    self._ledger.place(key, CPU)
                in_prompt = end <= request.num_prompt_tokens
                if new and index == 0 and span.covered and in_prompt:
                    per_hash = range(block * stride, (block + 1) * stride)
                    prompt.created.extend(per_hash)
        self._changed(prompt.plan)
        prompt.registered = tokens // self._layout.tokens_per_hash * self._layout.tokens_per_hash
        return known

    def _refresh(self, prompt: Prompt, request: Request) -> None:
        """The request has used its blocks until now."""
        self.sweep()
        now = self._clock()
        for group, block_size in self._layout.groups:
            stride = block_size // self._layout.tokens_per_hash
            suffix = group.to_bytes(4, "big")
            end = prompt.registered // self._layout.tokens_per_hash
            for index in reversed(range(stride - 1, min(end, len(request.block_hashes)), stride)):
                key = request.block_hashes[index] + suffix
                if (entry := self._ledger.get(key)) is not None:
                    self._ledger.touch(key, entry.ttl_s, now)

    def _refresh_remotes(self, prompt: Prompt, request: Request, tokens: int) -> None:
        """The request uses its first ``tokens`` tokens, of which remote tiers may hold copies."""
        if not self._remotes:
            return
        used: list[tuple[bytes, int, int]] = []
        for _, end, key in self._chunks(request, min(tokens, prompt.plan.covered_tokens)):
            entry, span = self._ledger.get(key), prompt.plan.span_of(end)
            name = qualified(prompt.plan.owner_in(span), key)
            used.append((name, max(span.ttl_s, entry.ttl_s) if entry else span.ttl_s, end))
        for remote in self._remotes:
            remote.used(request.request_id, used)

    def _chunks(self, request: Request, tokens: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield ``(start, end, key)`` of each whole chunk in the first ``tokens`` tokens."""
        for group, block_size in self._layout.groups:
            chunk = block_size * self._layout.blocks_per_chunk
            stride = chunk // self._layout.tokens_per_hash
            suffix = group.to_bytes(4, "big")
            hashes = islice(request.block_hashes, stride - 1, tokens // chunk * stride, stride)
            for end, block_hash in zip(count(chunk, chunk), hashes, strict=False):
                yield end - chunk, end, block_hash + suffix

    def _sources(self, prompt: Prompt, request: Request, tokens: int) -> list[tuple[str, int]]:
        """Return ``(outcome, tokens)`` of what is read behind the local tokens, in order."""
        if not prompt.promoted:
            return [(Outcome.READ_CPU, tokens)] if tokens else []
        position, last = prompt.local_tokens, prompt.local_tokens + tokens
        tiers: dict[tuple[int, int], str] = {}
        for start, end, key in self._chunks(request, last):
            # Where several groups have blocks, the farthest tier any came from counts.
            tier = prompt.promoted.get(key)
            if tier is not None or (start, end) not in tiers:
                tiers[start, end] = tier or CPU
        read: list[tuple[str, int]] = []
        for (start, end), tier in sorted(tiers.items()):
            start, end = max(start, position), min(end, last)
            if start < end:
                read.append((Outcome.READ_CPU, start - position))
                read.append((f"read_{tier}", end - start))
                position = end
        read.append((Outcome.READ_CPU, last - position))
        return [(outcome, tokens) for outcome, tokens in read if tokens]

    def _promoted(self, tier: str, request_id: str, loaded: Iterable[tuple[bytes, int]]) -> None:
        prompt = self._prompts.get(request_id)
        now = self._clock()
        for key, ttl_s in loaded:
            if prompt is not None:
                prompt.promoted[key] = tier
            # It may have been stored with a longer lifetime than this prompt asks for.
            if key in self._ledger and not self._ledger.is_expired(key, now):
                self._ledger.touch(key, ttl_s, now)

    def _plan_of(self, request_id: str) -> Plan | None:
        prompt = self._prompts.get(request_id)
        return None if prompt is None else prompt.plan

    def _entry_of(self, key: bytes) -> Entry | None:
        entry = self._ledger.get(key)
        return None if entry is None or entry.expires_at <= self._clock() else entry

    def _is_expired(self, key: bytes) -> bool:
        return key in self._overdue or self._ledger.is_expired(key, self._clock())

    def _is_barred(self, key: OffloadKey, context: ReqContext) -> bool:
        prompt, end = self._place(key, context)
        return prompt is not None and prompt.is_purged(end)

    def _is_unwanted(self, key: OffloadKey, context: ReqContext) -> bool:
        """Whether a chunk was purged, or is beyond what its organisation may hold by its place in
        the prompt alone: storing it would cost the prompt its beginning."""
        prompt, end = self._place(key, context)
        if prompt is None or (shares := self._shares.get(CPU)) is None:
            return prompt is not None and prompt.is_purged(end)
        org, chunks = org_of(prompt.plan.owner_of(end)), self._layout.own_chunks(prompt.plan, end)
        return prompt.is_purged(end) or shares.over(org, chunks) > 0

    def _marks_of(self, key: OffloadKey, context: ReqContext) -> tuple[int, bytes]:
        prompt, end = self._place(key, context)
        if prompt is None:
            return hashing.UNPLANNED_TTL_S, NOBODY
        span = prompt.plan.span_of(end)
        return span.ttl_s, prompt.plan.owner_in(span)

    def _owner_of(self, key: OffloadKey, context: ReqContext) -> bytes:
        prompt, end = self._place(key, context)
        return NOBODY if prompt is None else prompt.plan.owner_of(end)

    def _place(self, key: OffloadKey, context: ReqContext) -> tuple[Prompt | None, int]:
        """Return the prompt that a key is asked for, and where the key's chunk ends in it."""
        prompt = self._prompts.get(context.req_id) or self._leaving.get(context.req_id)
        end = context.get_offload_key_position(key)
        return (None, 0) if prompt is None or end is None else (prompt, end)

    def _report(self, prompt: Prompt) -> Report:
        since = self._departures.since
        return replace(
            attribute_tokens(prompt.plan, prompt.block_size, prompt.read or (), prompt.created),
            misses=prompt.misses,
            unasked=prompt.unasked,
            engine=self._engine(),
            reach_s=None if since is None else self._clock() - since,
        )

    def _explain(self, prompt: Prompt, request: Request, read: int) -> None:
        """Find out what the prompt might have read after its first ``read`` tokens."""
        _, block_size = self._layout.groups[0]
        start = read // block_size * block_size
        blocks = range(start, request.num_prompt_tokens // block_size * block_size, block_size)
        if request.skip_reading_prefix_cache:
            prompt.misses = (CacheMiss(MissCause.NOT_LOOKED_UP, len(blocks) * block_size),)
            return
        runs: list[tuple[_Gone, int]] = []
        for block in blocks:
            end = block + block_size
            keys = self._keys_at(request, end)
            if all(key in self._ledger for key in keys):
                # What is there is of no use behind a block that is not. Where it is the first, it
                # was left out: an answer begins with the prompt's last token.
                gone = runs[-1][0] if runs else None
            else:
                gone = self._whereabouts(prompt, request, end, keys)
            if gone is None:
                prompt.unasked = self._unasked(prompt, request, end)
                break
            if runs and (gone.alike == runs[-1][0].alike or len(runs) == MAX_MISSES):
                runs[-1] = runs[-1][0], runs[-1][1] + block_size
            else:
                runs.append((gone, block_size))
        prompt.misses = tuple(gone.miss(tokens, self._clock()) for gone, tokens in runs)

    def _whereabouts(
        self, prompt: Prompt, request: Request, end: int, keys: Iterable[bytes]
    ) -> _Gone | None:
        """Return why the block that ends at ``end`` was not read; None where nothing is known."""
        asked = list(self._asked(prompt, request, end))
        for remote, key in asked:
            if (absence := remote.tier.lost(request.request_id, key)) is not None:
                return _Gone((remote.name, absence))
        # Where a model has several groups of layers, a block is of no use unless all have theirs.
        departures = (self._departures.find(key) for key in keys if key not in self._ledger)
        first = next((departure for departure in departures if departure is not None), None)
        if first is None or first.reason is not EvictionReason.TTL:
            for remote, key in asked:
                absence = remote.tier.absence(request.request_id, key)
                if absence is not None and absence.certain:
                    return _Gone((remote.name, absence))
        return None if first is None else _Gone((first.tier, first.reason, first.ttl_s), first.at)

    def _unasked(self, prompt: Prompt, request: Request, end: int) -> CacheMiss | None:
        for remote, key in self._asked(prompt, request, end):
            if (absence := remote.tier.absence(request.request_id, key)) is not None:
                return CacheMiss(absence.cause, 0, remote.name, detail=absence.detail)
        return None

    def _keys_at(self, request: Request, end: int) -> list[bytes]:
        """Return the key of each group's block that ends at ``end``."""
        block_hash = request.block_hashes[end // self._layout.tokens_per_hash - 1]
        return [
            block_hash + group.to_bytes(4, "big")
            for group, block_size in self._layout.groups
            if end % block_size == 0
        ]

    def _asked(
        self, prompt: Prompt, request: Request, end: int
    ) -> Iterator[tuple[RemoteTierManager, bytes]]:
        """Yield each remote tier with the key of the chunk that holds the block which ends at
        ``end``."""
        if not self._remotes:
            return
        group, block_size = self._layout.groups[0]
        chunk = block_size * self._layout.blocks_per_chunk
        chunk_end = -(-end // chunk) * chunk
        if chunk_end > request.num_prompt_tokens:
            return
        block_hash = request.block_hashes[chunk_end // self._layout.tokens_per_hash - 1]
        key = block_hash + group.to_bytes(4, "big")
        for remote in self._remotes:
            yield remote, qualified(prompt.plan.owner_of(chunk_end), key)

    def _cpu_evicted(self, key: bytes, ttl_s: int, reason: EvictionReason) -> None:
        self.evictions[CPU, reason] += 1
        self._departed(key, ttl_s, reason, CPU)

    def _departed(self, key: bytes, ttl_s: int, reason: EvictionReason, tier: str) -> None:
        if key not in self._ledger:
            self._departures.record(key, EvictionRecord(reason, ttl_s, self._clock(), tier))

    def _settle_device(self) -> None:
        if self._device is None:
            return
        self._device_left(self._device_evicted, EvictionReason.CAPACITY)
        self._device_evicted.clear()

    def _device_left(self, keys: Iterable[bytes], reason: EvictionReason) -> None:
        assert self._device is not None
        for key in keys:
            entry = self._ledger.get(key)
            if entry is not None and DEVICE in entry.tiers and not self._device.holds(key):
                self._ledger.displace(key, DEVICE)
                self.evictions[DEVICE, reason] += 1
                self._departed(key, entry.ttl_s, reason, DEVICE)

    def _give_up(self, keys: Collection[bytes]) -> None:
        """Take blocks out of the prefix cache: their organisations hold too many."""
        assert self._device is not None
        self._settle_device()
        self._device.give_up(keys)
        self._device_left(keys, EvictionReason.QUOTA)
        self._device_evicted.clear()

    def _device_reset(self) -> None:
        self._device_evicted.clear()
        for key, ttl_s in self._ledger.clear_tier(DEVICE):
            self.evictions[DEVICE, EvictionReason.RESET] += 1
            self._departed(key, ttl_s, EvictionReason.RESET, DEVICE)
