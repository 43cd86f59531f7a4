"""Prefetches: what sessions that wait for a tool will read comes back into the CPU tier before they
ask for it.

Each is a promotion for a request that does not exist: vLLM's tiering manager looks up its chunks,
takes room and has a remote tier load them, as for any other. It takes room only where the tier is
free or holds what earns less, by the policy's own price, than what it brings.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.request import Request

from vllm_cachescope.cache.session_prompts import SessionPrompts
from vllm_cachescope.cache.tool_gaps import ToolGaps
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.connectors.vllm.engine.block_layout import BlockLayout
from vllm_cachescope.connectors.vllm.engine.counts import Counts, Prefetched
from vllm_cachescope.connectors.vllm.engine.prompts import Prompts
from vllm_cachescope.connectors.vllm.engine.tier_events import TierEvents
from vllm_cachescope.connectors.vllm.engine.tiers.base import Ahead
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_policy import ScopePolicy
from vllm_cachescope.connectors.vllm.engine.tiers.remote import RemoteTierManager
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tiers.inquiries import Lookup

MAX_ACTIVE = 4
"""How many prefetches are under way at once; others wait for them, and are dropped if the session
comes first."""

LONGEST_S = 5.0
"""How long one may take, in seconds; what has not come by then does not come."""

MAX_WAITING = 256
"""How many wait at most; the oldest of further ones is dropped."""

logger = logger_of(__name__)


@dataclass(slots=True)
class _Prefetch:
    """One under way.

    Attributes:
        context: the request that it stands for.
        keys: what is to be looked up, in prompt order; empty once it was.
        worth: the price of what it brings.
        began: when it began.
        loading: what is being loaded, or was.
    """

    context: ReqContext
    keys: list[OffloadKey]
    worth: float
    began: float
    loading: list[OffloadKey] = field(default_factory=list)


class Prefetches:
    """The prefetches of one engine. All methods are called on the scheduler's thread.

    Args:
        manager: vLLM's manager of the tiers.
        prompts: the engine's prompts.
        sessions: the latest prompts of sessions.
        remotes: the remote tiers, nearest first.
        layout: how prompts are cut into blocks.
        on_device: whether the prefix cache holds a key.
        clock: the ledger's clock, in seconds.
        counts: counts what came of them.
        share: the share of the CPU tier that may be under way, or have come and wait for its use.
    """

    def __init__(
        self,
        manager: TieringOffloadingManager,
        prompts: Prompts,
        sessions: SessionPrompts,
        remotes: Sequence[RemoteTierManager],
        layout: BlockLayout,
        on_device: Callable[[bytes], bool],
        clock: Callable[[], float],
        counts: Counts,
        share: float,
    ) -> None:
        self._manager = manager
        self._primary = manager.primary_tier
        policy = self._primary._policy
        assert isinstance(policy, ScopePolicy)
        self._policy = policy
        self._prompts = prompts
        self._sessions = sessions
        self._remotes = remotes
        self._layout = layout
        self._on_device = on_device
        self._clock = clock
        self._counts = counts
        self._chunks = int(share * self._primary._num_chunks)
        self._lock = getattr(manager, "lock", None) or nullcontext()
        self._gaps = ToolGaps()
        self._waiting: deque[str] = deque(maxlen=MAX_WAITING)
        self._active: dict[str, _Prefetch] = {}
        # What was brought, or is being brought, and not used yet; True once it has come.
        self._ahead: dict[bytes, bool] = {}
        self._numbers = itertools.count()

    @property
    def is_active(self) -> bool:
        """Whether any are under way, for which the engine has to take steps."""
        return bool(self._active)

    def on_called(self, nonce: str) -> None:
        """The answer to a prompt has called tools: its session goes on once they have run."""
        if (owner := self._sessions.owner_of(nonce)) is not None:
            self._gaps.call(owner, nonce, self._clock())

    def on_new_request(self, request: Request, plan: Plan) -> None:
        """A request has arrived."""
        if not len(self._gaps):
            return
        (group,) = self._layout.groups
        stride = group.tokens_per_block // self._layout.tokens_per_hash
        hashes = request.block_hashes

        def key_at(block: int) -> bytes | None:
            at = (block + 1) * stride - 1
            return hashes[at] + group.suffix if at < len(hashes) else None

        now = self._clock()
        for nonce in self._sessions.begun_by(plan.owner, key_at):
            self._gaps.answer(nonce, now)
            if nonce in self._waiting:
                self._waiting.remove(nonce)
            # What is under way for it goes on, and the request finds that.

    def on_used(self, keys: Sequence[bytes]) -> None:
        """A request that is over has used ``keys``."""
        if self._ahead:
            for key in keys:
                if self._ahead.pop(key, False):
                    self._counts.prefetched[Prefetched.USED] += 1

    def on_loaded(self, request_id: str, keys: Sequence[bytes]) -> None:
        """Remote tiers have loaded ``keys`` for a request, which may be one of ours."""
        if request_id not in self._active:
            return
        for key in keys:
            if key in self._ahead:
                self._ahead[key] = True
        self._counts.prefetched[Prefetched.LOADED] += len(keys)

    def on_schedule(self) -> None:
        """A step is being scheduled: begin what is due, and go on with what is under way."""
        now = self._clock()
        self._waiting.extend(self._gaps.due(now))
        if not self._waiting and not self._active:
            return
        with self._lock:
            self._settle()
            while self._waiting and len(self._active) < MAX_ACTIVE and self._room() > 0:
                self._begin(self._waiting.popleft(), now)
            for request_id, prefetch in list(self._active.items()):
                self._go_on(prefetch, now)
                if not prefetch.keys and all(map(self._is_settled, prefetch.loading)):
                    self._end(request_id)

    def _begin(self, nonce: str, now: float) -> None:
        kept, prompt = self._sessions.keys_of(nonce), self._prompts.find(nonce)
        if kept is None or prompt is None:
            return
        plan, (group,) = prompt.plan, self._layout.groups
        per_chunk, size = self._layout.blocks_per_chunk, group.tokens_per_block
        last = plan.covered_tokens // size
        chunks = list(enumerate(kept[:last]))[per_chunk - 1 :: per_chunk]
        missing = [
            (at, OffloadKey(key))
            for at, key in chunks
            if self._policy.get(OffloadKey(key)) is None and not self._on_device(key)
        ]
        if not missing:
            return
        first = missing[0][0]
        before = kept[first - per_chunk] if first >= per_chunk else None
        worth = self._policy.worth(missing[0][1], before)
        context = ReqContext(f"cachescope prefetch {next(self._numbers)}")
        context.set_state(Ahead())
        for at, key in missing:
            context.set_offload_key_position(key, (at + 1) * size)
        self._prompts.add_ahead(context.req_id, plan)
        self._manager.on_new_request(context)
        self._active[context.req_id] = _Prefetch(context, [key for _, key in missing], worth, now)

    def _go_on(self, prefetch: _Prefetch, now: float) -> None:
        """Once it is known what the tiers have, look up what comes first of it, all in one step: a
        tier loads for a request once."""
        keys, context = prefetch.keys, prefetch.context
        if now - prefetch.began > LONGEST_S:
            keys.clear()
        wanted: list[OffloadKey] = []
        is_known = True
        for key in keys:
            if self._policy.get(key) is not None:
                continue
            found = {remote.peek(key, context) for remote in self._remotes}
            if not found & {Lookup.HIT, Lookup.RETRY}:
                break
            is_known &= Lookup.HIT in found
            wanted.append(key)
        if not is_known:
            return
        keys.clear()
        for key in wanted:
            if not self._has_room(prefetch):
                break
            if self._manager.lookup(key, context) is not LookupResult.HIT_PENDING:
                break
            prefetch.loading.append(key)
            self._ahead[key] = False

    def _has_room(self, prefetch: _Prefetch) -> bool:
        """Whether one chunk more may come: within the budget, and in place of what is worth less
        or nothing."""
        if self._room() <= 0:
            return False
        if self._primary._get_num_free_chunks() > 0:
            return True
        return self._policy.next_victim_worth() < prefetch.worth

    def _room(self) -> int:
        return self._chunks - len(self._ahead)

    def _is_settled(self, key: OffloadKey) -> bool:
        chunk = self._policy.get(key)
        return chunk is None or chunk.is_ready

    def _end(self, request_id: str) -> None:
        prefetch = self._active.pop(request_id)
        self._manager.on_request_finished(prefetch.context)
        self._prompts.end_ahead(request_id)
        for key in prefetch.loading:
            if self._policy.get(key) is None:
                self._ahead.pop(key, None)

    def _settle(self) -> None:
        """Count what has left the tier unused."""
        for key, has_come in list(self._ahead.items()):
            if has_come and self._policy.get(OffloadKey(key)) is None:
                del self._ahead[key]
                self._counts.prefetched[Prefetched.WASTED] += 1


def can_prefetch(
    settings: EvictionSettings,
    remotes: Sequence[RemoteTierManager],
    layout: BlockLayout,
    events: TierEvents,
) -> bool:
    """Whether an engine makes prefetches.

    Events of chunks that no request has asked for would tell routers of blocks without tokens; and
    where a later block is of use without those before it, the first missing ones are not those to
    bring.

    Args:
        settings: what the operator has set.
        remotes: the remote tiers.
        layout: how prompts are cut into blocks.
        events: the KV events of the tiers behind the device.
    """
    if not settings.prefetch_share or not remotes:
        return False
    if events.enabled or not layout.is_plain:
        logger.warning("eviction.prefetch_share: not with KV events, or several kinds of attention")
        return False
    return True
