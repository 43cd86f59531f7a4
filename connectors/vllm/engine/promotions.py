"""Promotions: requests wait for room in the CPU tier before vLLM looks up what remote tiers hold.

vLLM itself takes room chunk by chunk while it looks up, and answers "miss" where there is none: of
many prompts at once each gets a part, computes the rest, and evicts with what it computes the parts
that others have just loaded.
"""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
    RequestOffloadState,
)
from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.request import Request

from vllm_cachescope.cache.miss_causes import NO_ROOM
from vllm_cachescope.connectors.vllm.engine.tiers.base import TierParent
from vllm_cachescope.connectors.vllm.engine.tiers.cpu import ScopePolicy
from vllm_cachescope.connectors.vllm.engine.tiers.remote import RemoteTierManager
from vllm_cachescope.durations import format_wait
from vllm_cachescope.observations import Observations
from vllm_cachescope.tenancy.owner_tags import UNLISTED_TAG, is_unlisted, org_of
from vllm_cachescope.tiers.inquiries import Lookup
from vllm_cachescope.tiers.promotion_queue import PromotionQueue, Room, Verdict, WaitOutcome

_CHOSEN_TIERS = "kv_load_tiers"
"""What a client calls its choice of tiers among a request's ``kv_transfer_params``."""


@dataclass(slots=True)
class _Wanted:
    """What a request finds behind the device.

    Attributes:
        present: keys that the CPU tier has, or is being given.
        missing: keys that remote tiers have and the CPU tier does not.
        loads: how many of these each remote tier would load, by the tier's place.
        is_known: whether all remote tiers have answered.
    """

    present: list[OffloadKey] = field(default_factory=list)
    missing: list[OffloadKey] = field(default_factory=list)
    loads: Counter[int] = field(default_factory=Counter)
    is_known: bool = True


class Promotions:
    """Says when vLLM may look up a request, and keeps in the CPU tier what it is promised.

    All methods are called on the scheduler's thread.

    Args:
        scheduler: vLLM's side of the connector in the scheduler.
        parent: knows whose a request is, and what computing would take.
        remotes: the remote tiers, nearest first.
        queue: says who may promote.
    """

    def __init__(
        self,
        scheduler: OffloadingConnectorScheduler,
        parent: TierParent,
        remotes: list[RemoteTierManager],
        queue: PromotionQueue,
    ) -> None:
        self._scheduler = scheduler
        self._parent = parent
        self._remotes = remotes
        self._queue = queue
        manager = scheduler.manager
        assert isinstance(manager, TieringOffloadingManager)
        self._primary = manager.primary_tier
        policy = self._primary._policy
        assert isinstance(policy, ScopePolicy)
        self._policy = policy
        # Requests that vLLM may look up, with the keys that are held for each.
        self._open: dict[str, list[OffloadKey]] = {}
        self._waiting: dict[str, _Wanted] = {}
        self._waited_s: dict[str, float] = {}

    def may_look_up(self, request: Request, local_tokens: int) -> bool:
        """Whether vLLM may look up a request in this step. If not, it asks in the next one.

        Args:
            request: the request.
            local_tokens: tokens of the prompt that the prefix cache holds.
        """
        request_id = request.request_id
        if not self._remotes or request_id in self._open or self._is_exempt(request):
            return True
        status = self._scheduler._req_status.get(request_id)
        if status is None:
            return True
        now = time.monotonic()
        wanted = self._waiting.get(request_id)
        is_new = wanted is None
        if wanted is None:
            status.update_offload_keys()
            wanted = self._find(status, local_tokens)
            if not wanted.is_known:
                return False
            if not wanted.missing:
                # Others may be loading some of it, and others again want its room.
                self._hold(request_id, wanted.present)
                return True
            self._waiting[request_id] = wanted
            plan = self._parent.plan_of(request_id)
            org = org_of(plan.owner) if plan is not None else UNLISTED_TAG
            self._queue.join(
                request_id,
                # Anyone can make up unlisted organisations: together they take one's turns.
                UNLISTED_TAG if is_unlisted(org) else org,
                len(wanted.missing),
                self._parent.prefill_seconds(wanted.missing),
                now,
            )
        elif not any(self._remotes[place].tier.usable for place in wanted.loads):
            self._queue.leave(request_id, WaitOutcome.TIER_LOST)
            self._compute(request_id)
            return True
        bound_s = self._queue.bound_s(request_id)
        verdict = self._queue.ask(
            request_id, now, partial(self._room, status, local_tokens, is_new)
        )
        if verdict is Verdict.GO:
            self._go(request_id)
        elif verdict is Verdict.COMPUTE:
            self._compute(request_id)
            for remote in self._remotes:
                remote.tier.give_up(request_id, f"{NO_ROOM} within {format_wait(bound_s)}")
        return verdict is not Verdict.WAIT

    def on_scheduled(self, request_id: str) -> None:
        """A request reads what was found; vLLM protects it from here on."""
        self._queue.settle(request_id, time.monotonic())
        self._release(request_id)

    def end(self, request_id: str) -> float | None:
        """A request is over, or starts anew.

        Returns:
            How long it has waited for room, in seconds; None if it has not.
        """
        self._queue.leave(request_id)
        self._release(request_id)
        self._open.pop(request_id, None)
        self._waiting.pop(request_id, None)
        return self._waited_s.pop(request_id, None)

    def end_step(self, preempted: Iterable[str]) -> None:
        """A step is scheduled; requests that were preempted in it start anew."""
        self._queue.end_step()
        for request_id in preempted:
            self.end(request_id)

    def take_waits(self) -> Observations:
        """Return how long requests waited for room since the last time; see `PromotionQueue`."""
        return self._queue.take_waits()

    def _is_exempt(self, request: Request) -> bool:
        """Whether what a request finds is not known by looking at the tiers alone."""
        params = request.kv_transfer_params
        return request.skip_reading_prefix_cache or bool(params and _CHOSEN_TIERS in params)

    def _room(self, status: RequestOffloadState, local_tokens: int, is_new: bool) -> Room:
        """Whether there is room for all that a request wants, as things are now."""
        request_id = status.req_context.req_id
        if not is_new:
            # Until now it has waited for room, and not for the tiers.
            for remote in self._remotes:
                remote.tier.restart(request_id)
        wanted = self._find(status, local_tokens)
        if not wanted.is_known:
            return Room.LACKING
        self._waiting[request_id] = wanted
        self._queue.resize(request_id, len(wanted.missing))
        for place, chunks in wanted.loads.items():
            tier = self._remotes[place].tier
            if min(chunks, tier.most_loads) > tier.load_room:
                return Room.LACKING
        newcomers = Counter(
            self._parent.ttl_and_owner(key, status.req_context)[1] for key in wanted.missing
        )
        if not self._policy.fits_quotas(newcomers):
            return Room.SPENT
        primary = self._primary
        # What can never fit gets all that there is.
        need = min(len(wanted.missing), primary._num_chunks - len(wanted.present))
        room = primary._get_num_free_chunks() + primary._num_evictable_cache_chunks
        if need > room or need > room - self._policy.held_idle(wanted.present):
            return Room.LACKING
        return Room.ENOUGH

    def _go(self, request_id: str) -> None:
        wanted = self._waiting.pop(request_id)
        self._hold(request_id, [*wanted.present, *wanted.missing])
        if (waited_s := self._queue.waited_s(request_id)) > 0:
            self._waited_s[request_id] = waited_s

    def _hold(self, request_id: str, keys: list[OffloadKey]) -> None:
        self._policy.hold(keys)
        self._open[request_id] = keys

    def _compute(self, request_id: str) -> None:
        del self._waiting[request_id]
        self._open[request_id] = []

    def _release(self, request_id: str) -> None:
        if keys := self._open.get(request_id):
            self._policy.release(keys)
            self._open[request_id] = []

    def _find(self, status: RequestOffloadState, local_tokens: int) -> _Wanted:
        """Return what vLLM's look-up would find behind the device."""
        wanted = _Wanted()
        for group, state in zip(
            self._scheduler.config.kv_group_configs, status.group_states, strict=True
        ):
            keys = state.offload_keys[local_tokens // group.tokens_per_chunk :]
            window = group.sliding_window_size_in_chunks
            if window is None:
                for key in keys:
                    if not self._add(wanted, key, status.req_context):
                        break
                continue
            in_a_row = 0
            for key in reversed(keys):
                in_a_row = in_a_row + 1 if self._add(wanted, key, status.req_context) else 0
                if in_a_row > window:
                    break
        return wanted

    def _add(self, wanted: _Wanted, key: OffloadKey, context: ReqContext) -> bool:
        """Note where a key is found; return whether it is anywhere, as far as is known."""
        if not self._parent.may_read(key, context):
            return False
        if self._policy.get(key) is not None:
            wanted.present.append(key)
            return True
        is_known = True
        for place, remote in enumerate(self._remotes):
            found = remote.peek(key, context)
            if found is Lookup.HIT:
                wanted.missing.append(key)
                wanted.loads[place] += 1
                return True
            is_known &= found is not Lookup.RETRY
        wanted.is_known &= is_known
        return not is_known
