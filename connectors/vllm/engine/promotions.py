"""Promotions: requests wait for room in the CPU tier before vLLM looks up what remote tiers hold.

vLLM itself takes room chunk by chunk while it looks up, and answers "miss" where there is none: of
many prompts at once each gets a part, computes the rest, and evicts with what it computes the parts
that others have just loaded.

A prompt that the CPU tier cannot hold is promoted in parts: each waits like a prompt of its own,
and makes room for the next one once it is on the device (`streams`).
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
from vllm_cachescope.connectors.vllm.engine.streams import Streams
from vllm_cachescope.connectors.vllm.engine.tiers.base import TierParent
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_policy import ScopePolicy
from vllm_cachescope.connectors.vllm.engine.tiers.remote import RemoteTierManager
from vllm_cachescope.durations import format_wait
from vllm_cachescope.observations import Observations
from vllm_cachescope.tenancy.owner_tags import UNLISTED_TAG, is_unlisted, org_of
from vllm_cachescope.tiers.company import Company
from vllm_cachescope.tiers.inquiries import Lookup
from vllm_cachescope.tiers.promotion_queue import PromotionQueue, Room, Verdict, WaitOutcome

_CHOSEN_TIERS = "kv_load_tiers"
"""What a client calls its choice of tiers among a request's ``kv_transfer_params``."""


@dataclass(slots=True)
class _Wanted:
    """What a request finds behind the device, or the first part of it.

    Attributes:
        present: keys that the CPU tier has, or is being given.
        missing: keys that remote tiers have and the CPU tier does not.
        loads: how many of these each remote tier would load, by the tier's place.
        is_known: whether all remote tiers have answered.
        is_part: whether there is more behind.
    """

    present: list[OffloadKey] = field(default_factory=list)
    missing: list[OffloadKey] = field(default_factory=list)
    loads: Counter[int] = field(default_factory=Counter)
    is_known: bool = True
    is_part: bool = False


class Promotions:
    """Says when vLLM may look up a request, and keeps in the CPU tier what it is promised.

    All methods are called on the scheduler's thread.

    Args:
        scheduler: vLLM's side of the connector in the scheduler.
        parent: knows whose a request is, and what computing would take.
        remotes: the remote tiers, nearest first.
        queue: says who may promote.
        streams: has prompts read in parts.
    """

    def __init__(
        self,
        scheduler: OffloadingConnectorScheduler,
        parent: TierParent,
        remotes: list[RemoteTierManager],
        queue: PromotionQueue,
        streams: Streams,
    ) -> None:
        self._scheduler = scheduler
        self._parent = parent
        self._remotes = remotes
        self._queue = queue
        self._streams = streams
        self._company = Company()
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
        # How many tokens each request had read at its last restart, of those that read in parts.
        self._parts: dict[str, int] = {}
        groups = scheduler.config.kv_group_configs
        # Where a later block is of use without those before it, or not without those of other
        # groups, the first blocks found are no part that helps.
        self._has_parts = len(groups) == 1 and groups[0].sliding_window_size_in_chunks is None

    def may_look_up(self, request: Request, local_tokens: int) -> bool:
        """Whether vLLM may look up a request in this step. If not, it asks in the next one.

        Args:
            request: the request.
            local_tokens: tokens of the prompt that the prefix cache holds.
        """
        request_id = request.request_id
        if self._open.get(request_id):
            return self._company.may_go(
                request_id,
                time.monotonic(),
                any(remote.tier.loads for remote in self._remotes),
                self._parent.short_step_s,
            )
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
                self._open_up(request_id, wanted)
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
                resumes=self._parts.get(request_id, 0) > 0,
            )
        elif wanted.loads and not any(self._remotes[place].tier.usable for place in wanted.loads):
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
        self._company.end(request_id)
        self._release(request_id)

    def has_more(self, request: Request) -> bool:
        """Whether a request that has just read something from tiers behind the device is to be
        looked up once more and read what comes behind: it has read a part, and all went well."""
        tokens, request_id = request.num_computed_tokens, request.request_id
        if (before := self._parts.pop(request_id, None)) is None or tokens <= before:
            return False
        resumed = [remote.tier.resume(request_id) for remote in self._remotes]
        if not any(resumed):
            return False
        self._parts[request_id] = tokens
        self._open.pop(request_id, None)
        return True

    def end(self, request_id: str) -> float | None:
        """A request is over, or starts anew.

        Returns:
            How long it has waited for room, in seconds; None if it has not.
        """
        self._queue.leave(request_id)
        self._company.end(request_id)
        self._release(request_id)
        self._open.pop(request_id, None)
        self._waiting.pop(request_id, None)
        self._parts.pop(request_id, None)
        self._streams.end(request_id)
        return self._waited_s.pop(request_id, None)

    def end_step(self, tokens: int, preempted: Iterable[str]) -> None:
        """A step with so many tokens to compute is scheduled; requests that were preempted in it
        start anew."""
        self._queue.end_step()
        self._company.end_step(tokens)
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
        # What can never fit, and not be read in parts either, gets all that there is.
        need = min(len(wanted.missing), primary._num_chunks - len(wanted.present))
        room = primary._get_num_free_chunks() + primary._num_evictable_cache_chunks
        if need > room or need > room - self._policy.held_idle(wanted.present):
            return Room.LACKING
        return Room.ENOUGH

    def _go(self, request_id: str) -> None:
        self._open_up(request_id, self._waiting.pop(request_id))
        if (waited_s := self._queue.waited_s(request_id)) > 0:
            self._waited_s[request_id] = self._waited_s.get(request_id, 0.0) + waited_s

    def _open_up(self, request_id: str, wanted: _Wanted) -> None:
        keys = [*wanted.present, *wanted.missing]
        self._policy.hold(keys)
        self._open[request_id] = keys
        if wanted.is_part:
            self._parts.setdefault(request_id, 0)
        else:
            self._parts.pop(request_id, None)
        for place, remote in enumerate(self._remotes):
            remote.tier.limit(request_id, wanted.loads[place] if wanted.is_part else None)

    def _compute(self, request_id: str) -> None:
        del self._waiting[request_id]
        self._open[request_id] = []

    def _release(self, request_id: str) -> None:
        if keys := self._open.get(request_id):
            self._policy.release(keys)
            self._open[request_id] = []

    def _find(self, status: RequestOffloadState, local_tokens: int) -> _Wanted:
        """Return what vLLM's look-up would find behind the device, or a part of it if the CPU tier
        cannot hold it, or not all of it may be loaded at once."""
        wanted = self._find_all(status, local_tokens)
        chunks = self._primary._num_chunks
        fits = len(wanted.present) + len(wanted.missing) <= chunks and all(
            loads <= self._remotes[place].tier.most_loads for place, loads in wanted.loads.items()
        )
        if fits or not wanted.is_known or not self._has_parts:
            return wanted
        # One half can be filled while what the other one holds is copied.
        return self._find_all(status, local_tokens, max(1, chunks // 2))

    def _find_all(
        self, status: RequestOffloadState, local_tokens: int, most: int | None = None
    ) -> _Wanted:
        """Return what is found behind the device; no more than ``most`` keys, and what may be
        loaded at once, if that is given."""
        wanted = _Wanted()
        for group, state in zip(
            self._scheduler.config.kv_group_configs, status.group_states, strict=True
        ):
            keys = state.offload_keys[local_tokens // group.tokens_per_chunk :]
            window = group.sliding_window_size_in_chunks
            if window is None:
                for key in keys:
                    if most is not None and self._is_full(wanted, most):
                        wanted.is_part = True
                        break
                    if not self._add(wanted, key, status.req_context):
                        break
                continue
            in_a_row = 0
            for key in reversed(keys):
                in_a_row = in_a_row + 1 if self._add(wanted, key, status.req_context) else 0
                if in_a_row > window:
                    break
        return wanted

    def _is_full(self, wanted: _Wanted, most: int) -> bool:
        return len(wanted.present) + len(wanted.missing) >= most or any(
            loads >= self._remotes[place].tier.most_loads for place, loads in wanted.loads.items()
        )

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
