"""Keeps the lifetimes of all blocks true to what the engine does, and accounts for each prompt."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.request import Request

from vllm_cachescope.connectors.vllm import hashing
from vllm_cachescope.connectors.vllm.cpu_tier import CPU, CpuTier
from vllm_cachescope.connectors.vllm.device_tier import DEVICE, DeviceTier
from vllm_cachescope.connectors.vllm.remote_tier import remote_tiers
from vllm_cachescope.departures import Departure, Departures
from vllm_cachescope.ledger import Ledger, Reason
from vllm_cachescope.plan import Plan
from vllm_cachescope.report import Loss, Outcome, Report, account

REMEMBERED_PROMPTS = 4096
"""How many finished prompts' reports can still be asked for."""


@dataclass(frozen=True, slots=True)
class Layout:
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


@dataclass(slots=True)
class Prompt:
    """What the keeper knows of one prompt.

    Attributes:
        plan: its plan.
        block_size: tokens per block, for accounting.
        request: the engine's request; None once it has finished.
        read: ``(outcome, tokens)`` read when it was first scheduled; None before.
        loss: what it might have read besides, had the cache kept it.
        created: indices of the blocks it newly cached under a breakpoint.
        registered: tokens whose blocks the ledger has seen.
        promoted: for keys that were loaded into the CPU tier for it, the tier they came from.
        counted: whether its tokens are in the metrics.
    """

    plan: Plan
    block_size: int
    request: Request | None
    local_tokens: int = 0
    read: list[tuple[str, int]] | None = None
    loss: Loss | None = None
    created: list[int] = field(default_factory=list)
    registered: int = 0
    promoted: dict[bytes, str] = field(default_factory=dict)
    counted: bool = False

    def report(self) -> Report:
        """Return what has become of the prompt's tokens so far."""
        return account(self.plan, self.block_size, self.read or (), self.created, self.loss)


class Keeper:
    """The scheduler's side of CacheScope. Runs on the scheduler's thread and never blocks.

    Args:
        layout: how prompts are cut into blocks.
        manager: vLLM's offloading manager, whose primary tier runs our policy.
        clock: seconds, never running backwards.
    """

    def __init__(
        self, layout: Layout, manager: TieringOffloadingManager, clock: Callable[[], float]
    ) -> None:
        self._layout = layout
        self._clock = clock
        self._ledger = Ledger()
        self._departures = Departures()
        self._device: DeviceTier | None = None
        self._cpu = CpuTier(manager, self._is_expired)
        self._cpu.policy.bind(self._ledger, clock, self._ttl_of, self._cpu_evicted)
        self._remotes = remote_tiers(manager)
        for remote in self._remotes:
            remote.bind(self._lifetime_left, self._promoted)
        self._prompts: dict[str, Prompt] = {}
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
            manager, self.sweep, self._device_evicted.append, self._device_reset
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
            prompt.loss = self._lost(request, sum(tokens for _, tokens in prompt.read))
        prompt.registered = 0
        # Refreshed now and not when a load is done: what is in use must not expire meanwhile.
        self._register(prompt, request, prompt.local_tokens + external_tokens, known_only=True)
        self._refresh_remotes(prompt, request, prompt.local_tokens + external_tokens)
        # `computed` does it all once more. What is loaded comes to the device only later, a
        # request that was preempted computes again what it has lost, and a block that another
        # request fills in this very step is that one's to create.
        prompt.registered = 0

    def computed(self, output: SchedulerOutput) -> None:
        """A step was scheduled: the blocks that it fills are in vLLM's prefix cache now."""
        for req_id, tokens in output.num_scheduled_tokens.items():
            prompt = self._prompts.get(req_id)
            if prompt is not None and prompt.request is not None:
                self._register(prompt, prompt.request, prompt.request.num_computed_tokens + tokens)

    def finish(self, request: Request) -> Report | None:
        """The request is over; return what became of its prompt, None if it never ran."""
        prompt = self._prompts.pop(request.request_id, None)
        if prompt is None:
            return None
        # An aborted request may have had blocks loaded that no step has used.
        self._register(prompt, request, request.num_computed_tokens)
        self._refresh(prompt, request)
        self._refresh_remotes(prompt, request, prompt.registered)
        prompt.request = None
        prompt.promoted.clear()
        first = self._by_nonce.get(prompt.plan.nonce, prompt)
        if first.read is None:
            return None
        report = first.report()
        if not first.counted:
            first.counted = True
            for row in report.rows:
                self.tokens[row.outcome, row.scope.label, row.ttl_s] += row.tokens
        return report

    def report(self, nonce: str) -> Report | None:
        """Return what has become so far of the prompt with ``nonce``, None if it is not known."""
        prompt = self._by_nonce.get(nonce)
        return prompt.report() if prompt is not None and prompt.read is not None else None

    def sweep(self) -> int:
        """Drop everything that has expired, on every tier; return how many entries."""
        self._settle_device()
        expired = self._ledger.pop_expired(self._clock())
        for key, entry in expired:
            self._departures.record(key, Departure(Reason.TTL, entry.ttl_s, entry.expires_at))
        on_device = [key for key, entry in expired if DEVICE in entry.tiers]
        in_memory = [key for key, entry in expired if CPU in entry.tiers]
        if expired and self._device is not None:
            # All of them: a load may have just brought one to the device.
            self._device.evict(key for key, _ in expired)
            self._device_evicted.clear()
            self.evictions[DEVICE, Reason.TTL] += len(on_device)
        if in_memory:
            self._overdue |= set(in_memory)
            self.evictions[CPU, Reason.TTL] += len(in_memory)
        if self._overdue:
            self._overdue = self._cpu.discard(self._overdue)
        return len(expired)

    def resident(self) -> list[tuple[str, int, int]]:
        """Return ``(tier, ttl_s, entries)`` for each tier and TTL class."""
        self._settle_device()
        return list(self._ledger.resident())

    def _register(
        self, prompt: Prompt, request: Request, tokens: int, known_only: bool = False
    ) -> None:
        """Start or refresh the lifetimes of the blocks in the first ``tokens`` tokens; with
        ``known_only``, start none."""
        if tokens - prompt.registered < self._layout.tokens_per_hash:
            return
        now = self._clock()
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
                span = prompt.plan.span_of((block + 1) * block_size)
                on_device = self._device is not None and self._device.holds(key)
                if key not in self._ledger and (known_only or not on_device):
                    continue
                new = self._ledger.touch(key, span.ttl_s, now)
                if new:
                    self._departures.returned(key)
                if on_device:
                    self._ledger.place(key, DEVICE)
                if key in self._overdue:
                    self._overdue.remove(key)
                    self._ledger.place(key, CPU)
                in_prompt = (block + 1) * block_size <= request.num_prompt_tokens
                if new and index == 0 and span.covered and in_prompt:
                    per_hash = range(block * stride, (block + 1) * stride)
                    prompt.created.extend(per_hash)
        prompt.registered = tokens // self._layout.tokens_per_hash * self._layout.tokens_per_hash

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
        used: list[tuple[bytes, int]] = []
        for _, end, key in self._chunks(request, min(tokens, prompt.plan.covered_tokens)):
            entry = self._ledger.get(key)
            ttl_s = prompt.plan.span_of(end).ttl_s
            used.append((key, max(ttl_s, entry.ttl_s) if entry else ttl_s))
        for remote in self._remotes:
            remote.tier.used(used)

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

    def _lifetime_left(self, key: bytes) -> tuple[int, float] | None:
        entry = self._ledger.get(key)
        if entry is None or entry.expires_at <= (now := self._clock()):
            return None
        return entry.ttl_s, entry.expires_at - now

    def _is_expired(self, key: bytes) -> bool:
        return key in self._overdue or self._ledger.is_expired(key, self._clock())

    def _ttl_of(self, key: OffloadKey, context: ReqContext) -> int:
        prompt = self._prompts.get(context.req_id)
        position = context.get_offload_key_position(key)
        if prompt is None or position is None:
            return hashing.UNPLANNED_TTL_S
        return prompt.plan.span_of(position).ttl_s

    def _lost(self, request: Request, read: int) -> Loss | None:
        """Return what the prompt might have read after its first ``read`` tokens."""
        group, block_size = self._layout.groups[0]
        stride = block_size // self._layout.tokens_per_hash
        suffix = group.to_bytes(4, "big")
        first: Departure | None = None
        tokens = 0
        start = (read // block_size + 1) * stride - 1
        end = request.num_prompt_tokens // self._layout.tokens_per_hash
        for block_hash in islice(request.block_hashes, start, end, stride):
            key = block_hash + suffix
            departure = self._departures.find(key)
            if departure is None and (first is None or key not in self._ledger):
                break
            first = first or departure
            tokens += block_size
        if first is None:
            return None
        return Loss(first.reason, tokens, first.ttl_s, self._clock() - first.at)

    def _cpu_evicted(self, key: bytes, ttl_s: int, reason: Reason) -> None:
        self.evictions[CPU, reason] += 1
        self._departed(key, ttl_s, reason)

    def _departed(self, key: bytes, ttl_s: int, reason: Reason) -> None:
        if key not in self._ledger:
            self._departures.record(key, Departure(reason, ttl_s, self._clock()))

    def _settle_device(self) -> None:
        if self._device is None:
            return
        for key in self._device_evicted:
            entry = self._ledger.get(key)
            if entry is not None and DEVICE in entry.tiers and not self._device.holds(key):
                self._ledger.displace(key, DEVICE)
                self.evictions[DEVICE, Reason.CAPACITY] += 1
                self._departed(key, entry.ttl_s, Reason.CAPACITY)
        self._device_evicted.clear()

    def _device_reset(self) -> None:
        self._device_evicted.clear()
        for key, ttl_s in self._ledger.clear_tier(DEVICE):
            self.evictions[DEVICE, Reason.RESET] += 1
            self._departed(key, ttl_s, Reason.RESET)
