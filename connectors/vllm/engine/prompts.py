"""The prompts that an engine runs, and what is known of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from cachetools import FIFOCache
from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.request import Request

from vllm_cachescope.cache.miss_causes import CacheMiss
from vllm_cachescope.cache.prefix_hashes import PrefixHashes
from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.connectors.vllm.engine.block_layout import Group
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tenancy.scope import Scope

MAX_PROMPTS = 4096
"""How many prompts' reports can be asked for: the most recent ones."""


@dataclass(slots=True)
class Creation:
    """What a prompt newly cached, by group.

    A block of full attention stands for its own tokens. One of a window stands for all tokens up
    to its end: without it none of them could be read there, though all other blocks were cached
    before. And what one group holds beyond the others cannot be read.

    Attributes:
        blocks: ``(start, end)`` in tokens of runs of new blocks of full attention.
        window_end: where the last new block of a window ends, in tokens.
        cached_to: where the last block that is cached ends, new or not, by group.
    """

    blocks: list[tuple[int, int]] = field(default_factory=list)
    window_end: int = 0
    cached_to: dict[int, int] = field(default_factory=dict)

    def note(self, group: Group, end: int, is_new: bool) -> None:
        """Note that a block of ``group`` which ends at ``end`` (tokens) is cached now."""
        self.cached_to[group.id] = max(end, self.cached_to.get(group.id, 0))
        if not is_new:
            return
        if group.window is not None:
            self.window_end = max(end, self.window_end)
            return
        start = end - group.tokens_per_block
        # A step's blocks come from the last to the first, and those of several groups together.
        if self.blocks and start < self.blocks[-1][0] <= end:
            self.blocks[-1] = start, self.blocks[-1][1]
        elif not self.blocks or not self.blocks[-1][0] <= start < end <= self.blocks[-1][1]:
            self.blocks.append((start, end))

    def ranges(self, groups: Sequence[Group], covered: int) -> list[tuple[int, int]]:
        """Return ``(start, end)`` in tokens of what was created, in order; some may overlap.

        Args:
            groups: all groups.
            covered: leading tokens that a breakpoint covers, in whole blocks.
        """
        limit = min(covered, *(self.cached_to.get(group.id, 0) for group in groups))
        created = sorted([*self.blocks, (0, self.window_end)])
        return [(start, min(end, limit)) for start, end in created if start < min(end, limit)]


@dataclass(slots=True)
class Prompt:
    """One prompt, as far as the engine knows it.

    Attributes:
        plan: its plan.
        request: vLLM's request; None once it has finished.
        local_tokens: tokens that the prefix cache held at the last look-up.
        read: ``(outcome, tokens)`` of what was read when the prompt was first scheduled; None
            before.
        is_resumed: whether what comes next is read on top of that: the prompt is read in parts.
        prefill_rate: tokens per second that the engine was seen to compute when the prompt was
            read; None if it was seen to compute none.
        misses: the tokens behind those that were read, up to the first unknown block.
        unasked: why a remote tier could not be asked for that block; None if all were asked.
        created: what the prompt newly cached.
        registered: tokens whose blocks are in the ledger.
        computed_tokens: leading tokens that were read, or computed in any step.
        blocks: the hashes of its blocks; None before it is scheduled.
        promoted: name of the tier that a key was loaded from into the CPU tier, by key.
        is_counted: whether the prompt's tokens are in the metrics.
        purged: the scopes whose blocks were purged while the prompt ran. The prompt leaves none of
            them behind.
        adapter: what its LoRA adapter is; None if it has none.
        output_tokens: how many tokens were generated; None before it has finished.
        ended: how its answer ended, where the API side has told before its blocks were stored.
        used: the keys of its blocks, in order, from its end until vLLM has stored the last of them.
    """

    plan: Plan
    request: Request | None
    local_tokens: int = 0
    read: list[tuple[str, int]] | None = None
    is_resumed: bool = False
    prefill_rate: float | None = None
    misses: tuple[CacheMiss, ...] = ()
    unasked: CacheMiss | None = None
    created: Creation = field(default_factory=Creation)
    registered: int = 0
    computed_tokens: int = 0
    blocks: PrefixHashes | None = None
    promoted: dict[bytes, str] = field(default_factory=dict)
    is_counted: bool = False
    purged: set[Scope] = field(default_factory=set)
    adapter: str | None = None
    output_tokens: int | None = None
    ended: Ended | None = None
    used: list[bytes] = field(default_factory=list)

    def is_purged(self, block_end: int) -> bool:
        """Whether the block that ends at ``block_end`` was purged while the prompt ran."""
        return bool(self.purged) and self.plan.span_of(block_end).scope in self.purged

    def purge(self, prefix: bytes) -> None:
        """Note that blocks whose owner begins with ``prefix`` were purged, if it has such."""
        for span in self.plan.spans:
            if self.plan.owner_in(span).startswith(prefix):
                self.purged.add(span.scope)


class Prompts:
    """The prompts that run, by request id, and the most recent ones, by nonce."""

    def __init__(self) -> None:
        self._running: dict[str, Prompt] = {}
        # Prompts that have finished since vLLM last stored, and whose last blocks it will store.
        self._finished: dict[str, Prompt] = {}
        self._by_nonce: FIFOCache[str, Prompt] = FIFOCache(MAX_PROMPTS)
        self._ahead: dict[str, Prompt] = {}

    def add(self, request: Request, plan: Plan, adapter: str | None) -> None:
        """Note that a request runs, with the LoRA ``adapter`` that `hashing.adapter_of` returns."""
        prompt = Prompt(plan, request, adapter=adapter)
        self._running[request.request_id] = prompt
        if plan.nonce:
            # Further samples of a prompt (n > 1) have its nonce and read what the first sample
            # computed. The prompt counts once, as its first sample found the cache.
            self._by_nonce.setdefault(plan.nonce, prompt)

    @property
    def running(self) -> int:
        """How many requests run or wait."""
        return len(self._running)

    @property
    def has_finished(self) -> bool:
        """Whether requests are over whose last blocks vLLM has yet to store."""
        return bool(self._finished)

    def get(self, request_id: str) -> Prompt | None:
        """Return the prompt of a request that runs."""
        return self._running.get(request_id)

    def finished(self, request_id: str) -> Prompt | None:
        """Return the prompt of a request that has finished since vLLM last stored."""
        return self._finished.get(request_id)

    def find(self, nonce: str) -> Prompt | None:
        """Return the first sample of the prompt with ``nonce``, whether it runs or not."""
        return self._by_nonce.get(nonce)

    def locate(self, key: OffloadKey, context: ReqContext) -> tuple[Prompt | None, int]:
        """Return the prompt that ``key`` is looked up or stored for, and the position in tokens at
        which the key's chunk ends there; ``(None, 0)`` if either is not known."""
        request_id = context.req_id
        prompt = (
            self._running.get(request_id)
            or self._finished.get(request_id)
            or self._ahead.get(request_id)
        )
        end = context.get_offload_key_position(key)
        return (None, 0) if prompt is None or end is None else (prompt, end)

    def finish(self, request_id: str) -> Prompt | None:
        """Note that a request is over; return its prompt. vLLM has yet to store its last blocks."""
        prompt = self._running.pop(request_id, None)
        if prompt is not None:
            self._finished[request_id] = prompt
        return prompt

    def add_ahead(self, request_id: str, plan: Plan) -> None:
        """Note that chunks are brought nearer under ``request_id``, before a request with this plan
        comes. What is purged meanwhile is not for it either."""
        self._ahead[request_id] = Prompt(plan, None)

    def end_ahead(self, request_id: str) -> None:
        """Note that no more are brought under ``request_id``."""
        self._ahead.pop(request_id, None)

    def drop_finished(self) -> None:
        """Note that vLLM has stored the last blocks of the requests that are over."""
        for prompt in self._finished.values():
            prompt.used = []
        self._finished.clear()

    def disown(self, adapter: int) -> None:
        """Note that the weights of a LoRA adapter, by vLLM's number of it, have changed under the
        prompts that run with it."""
        for prompt in self._running.values():
            request = prompt.request
            if request is None or (lora := request.lora_request) is None:
                continue
            if lora.lora_int_id == adapter:
                prompt.purge(b"")
                request.skip_reading_prefix_cache = True

    def purge(self, prefix: bytes) -> None:
        """Note that blocks whose owner begins with ``prefix`` were purged."""
        prompts = chain(self._running.values(), self._finished.values(), self._ahead.values())
        for prompt in prompts:
            prompt.purge(prefix)
