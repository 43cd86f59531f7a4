"""The connector's side in the scheduler: keeps the lifetimes of all blocks in step with vLLM, and
reports on each prompt."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.request import Request

from vllm_cachescope.cache.eviction_history import EvictionHistory, EvictionReason
from vllm_cachescope.cache.ledger import Entry, Ledger
from vllm_cachescope.cache.prefill_rate import PrefillRate
from vllm_cachescope.cache.report import Report
from vllm_cachescope.cache.runs import NO_SIGNALS, Ended, RequestSignals
from vllm_cachescope.connectors.vllm.engine import hashing
from vllm_cachescope.connectors.vllm.engine.checkpoints import move_checkpoint
from vllm_cachescope.connectors.vllm.engine.counts import Counts, Read
from vllm_cachescope.connectors.vllm.engine.demotions import can_demote
from vllm_cachescope.connectors.vllm.engine.ends import Ends
from vllm_cachescope.connectors.vllm.engine.engine_settings import EngineSettings
from vllm_cachescope.connectors.vllm.engine.local_tiers import LocalTiers
from vllm_cachescope.connectors.vllm.engine.miss_explainer import MissExplainer
from vllm_cachescope.connectors.vllm.engine.prefetches import Prefetches, can_prefetch
from vllm_cachescope.connectors.vllm.engine.pressure import Pressure
from vllm_cachescope.connectors.vllm.engine.prompt_lifetimes import PromptLifetimes
from vllm_cachescope.connectors.vllm.engine.prompt_plans import (
    REFUSED_TTL_S,
    carries_plan,
    offload_covered,
)
from vllm_cachescope.connectors.vllm.engine.prompt_reporter import PromptReporter
from vllm_cachescope.connectors.vllm.engine.prompts import Prompts
from vllm_cachescope.connectors.vllm.engine.tier_events import TierEvents
from vllm_cachescope.connectors.vllm.engine.tiers.base import TierParent
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_policy import CPU
from vllm_cachescope.connectors.vllm.engine.tiers.device import DEVICE
from vllm_cachescope.connectors.vllm.engine.tiers.remote import refresh, remote_tiers
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.tenancy.owner_tags import NOBODY


class CacheScopeConnectorScheduler(TierParent):
    """The scheduler side, which `CacheScopeConnector` calls in the scheduler's process.

    It runs on the scheduler's thread and never blocks. A method that is named like one of
    the connector's is called from there.

    Args:
        settings: the engine's settings.
        kv_cache: vLLM's manager of the device's blocks.
        offloading: vLLM's manager of the tiers behind it; its primary tier runs `ScopePolicy`.
        clock: seconds, never running backwards: lifetimes run on it.
        events: the KV events of the tiers behind the device.

    Attributes:
        counts: the counts since the metrics were last reported.
        remotes: the remote tiers, nearest first.
        local: the device and the CPU tier.
        keeps_no_copies: whether a block takes room on one of them alone.
        prefill_rate: how fast the engine computes prompts.
    """

    def __init__(
        self,
        settings: EngineSettings,
        kv_cache: KVCacheManager,
        offloading: TieringOffloadingManager,
        clock: Callable[[], float],
        events: TierEvents,
    ) -> None:
        self._events = events
        self._layout = settings.layout
        self._cpu_quotas = settings.quotas.get(CPU)
        self._clock = clock
        self._ledger = Ledger()
        self.prefill_rate = PrefillRate()
        self._prompts = Prompts()
        self.counts = Counts(settings.multipliers, Pressure(settings.org_labels))
        self._org_labels = settings.org_labels
        history = EvictionHistory()
        self.local = LocalTiers(
            self,
            self._ledger,
            history,
            kv_cache,
            offloading,
            settings.quotas,
            settings.eviction,
            clock,
            self.counts,
        )
        self.remotes = remote_tiers(offloading)
        self.keeps_no_copies = can_demote(settings.eviction, self._layout, events.enabled)
        if self.keeps_no_copies:
            self.local.keep_no_copies(stores_late=not self.remotes)
        self._lifetimes = PromptLifetimes(self._layout, self._ledger, self.local, clock)
        capacity = kv_cache.block_pool.num_gpu_blocks + offloading.primary_tier._num_chunks
        self._ends = Ends(self.local, self._ledger, self.counts, 2 * capacity)
        for remote in self.remotes:
            remote.bind(self)
        self.prefetches: Prefetches | None = None
        if can_prefetch(settings.eviction, self.remotes, self._layout, events):
            self.prefetches = Prefetches(
                offloading,
                self._prompts,
                self._ends.prompts,
                self.remotes,
                self._layout,
                self.local.on_device,
                clock,
                self.counts,
                settings.eviction.prefetch_share,
            )
        self._reporter = PromptReporter(
            self._layout,
            history,
            MissExplainer(self._layout, self._ledger, history, self.remotes, clock),
            clock,
            settings.rank,
            settings.hash_settings,
            [remote.name for remote in self.remotes],
            self.prefill_rate,
        )

    # One request's way through, in the order in which vLLM calls.

    def on_new_request(self, request: Request) -> None:
        """A request has arrived. To be called before vLLM's offloading learns of it."""
        self.local.drop_expired()
        plan = hashing.plan_of(request)
        if not plan.nonce and carries_plan(request):
            self.counts.refused_plans += 1
        if (refusal := hashing.refusal_of(request)) is not None:
            self.counts.refused_hints[refusal.value] += 1
        offload_covered(request, plan)
        self._prompts.add(request, plan, hashing.adapter_of(request))
        self._lifetimes.note_change(plan)
        if self.prefetches is not None:
            self.prefetches.on_new_request(request, plan)

    def set_local_tokens(self, request: Request, tokens: int) -> None:
        """The prefix cache holds the first ``tokens`` tokens of a prompt, in whole blocks."""
        if (prompt := self._prompts.get(request.request_id)) is not None:
            prompt.local_tokens = tokens

    def is_loading(self, request: Request) -> bool:
        """Whether a remote tier is loading blocks for a request."""
        return any(remote.tier.is_loading(request.request_id) for remote in self.remotes)

    def update_state_after_alloc(self, request: Request, num_external_tokens: int) -> None:
        """A request is scheduled, and reads what was found.

        Args:
            request: the request.
            num_external_tokens: tokens that it reads from tiers behind the device, right behind
                the local ones.
        """
        prompt = self._prompts.get(request.request_id)
        if prompt is None:
            return
        found = prompt.local_tokens + num_external_tokens
        is_new = prompt.read is None
        reads: Counter[Read] | None = Counter() if is_new or prompt.is_resumed else None
        prompt.registered = 0
        if reads is not None:
            if not is_new:
                # What was read before has been counted.
                prompt.registered = prompt.local_tokens
            self._reporter.note_read(prompt, request, num_external_tokens)
            prompt.is_resumed = False
        if num_external_tokens:
            chunks = self._layout.chunks_between(request, prompt.local_tokens, found)
            self.counts.promotions[CPU, DEVICE] += chunks
        # Now and not when a load is done: what is in use must not expire meanwhile.
        all_known = self._lifetimes.register(prompt, request, found, known_only=True, reads=reads)
        if reads:
            self.counts.add_reads(reads, self._clock(), are_promoted=bool(prompt.promoted))
        refresh(self.remotes, prompt.plan, request, found, self._layout, self._ledger)
        if num_external_tokens or not all_known:
            # Have `on_step_scheduled` register all of them once more. Blocks that are being loaded
            # reach the device only later. And a block of this prompt may be computed by another
            # request of the same step; that request creates it, and must be the first to register
            # it.
            prompt.registered = 0

    def running(self, request_id: str) -> Request | None:
        """Return a request that runs or waits; None if there is no such request."""
        prompt = self._prompts.get(request_id)
        return None if prompt is None else prompt.request

    def on_part_read(self, request: Request) -> None:
        """What a request has read is on the device, to be found there. It will be looked up once
        more, and reads more."""
        prompt = self._prompts.get(request.request_id)
        if prompt is not None:
            self._lifetimes.register(prompt, request, request.num_computed_tokens, known_only=True)
            prompt.is_resumed = True

    def on_step_scheduled(self, scheduler_output: SchedulerOutput) -> None:
        """A step was scheduled: the blocks that it fills are in vLLM's prefix cache now. To be
        called before vLLM's offloading stores any of them, which asks for their lifetimes."""
        if self.prefetches is not None:
            self.prefetches.on_schedule()
        self.prefill_rate.step_began(time.monotonic(), scheduler_output.total_num_scheduled_tokens)
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            prompt = self._prompts.get(request_id)
            if prompt is not None and prompt.request is not None:
                computed = prompt.request.num_computed_tokens + tokens
                self._lifetimes.register(prompt, prompt.request, computed)

    def on_schedule_end(self, scheduler_output: SchedulerOutput) -> None:
        """vLLM has offloaded the blocks of the step and of requests that were over before it."""
        if self._layout.has_checkpoints:
            for prompt in map(self._prompts.get, scheduler_output.num_scheduled_tokens):
                move_checkpoint(prompt, self._layout)
        self._prompts.drop_finished()
        self._ends.on_schedule_end()
        self.local.enforce_quotas()

    def on_step_end(self) -> None:
        """A step has been computed."""
        self.prefill_rate.step_ended(time.monotonic())

    def request_finished(self, request: Request) -> Report | None:
        """A request is over; return what became of its prompt. None if it was never scheduled, or
        came without a plan: nobody on the API side takes the report off its output then."""
        prompt = self._prompts.finish(request.request_id)
        if prompt is None:
            return None
        # An aborted request may have had blocks loaded that no step has used.
        self._lifetimes.register(prompt, request, request.num_computed_tokens)
        self._lifetimes.refresh(prompt, request)
        self._ends.on_finished(prompt, self._layout.whole_blocks(request.num_prompt_tokens))
        refresh(self.remotes, prompt.plan, request, prompt.registered, self._layout, self._ledger)
        if self.prefetches is not None:
            self.prefetches.on_used(prompt.used)
        prompt.output_tokens = request.num_output_tokens
        signals = RequestSignals(prompt.output_tokens, ended=prompt.ended)
        self.local.end_request(prompt.used, signals, prompt.plan.nonce)
        prompt.request = None
        prompt.promoted.clear()
        self._lifetimes.note_change(prompt.plan)
        first = self._prompts.find(prompt.plan.nonce) or prompt
        report = self._reporter.report(first)
        if report is not None and not first.is_counted:
            first.is_counted = True
            self.counts.add_report(report, self._org_labels.of_owner(first.plan.owner))
        return report if prompt.plan.nonce else None

    def on_adapter_replaced(self, adapter: int) -> None:
        """A LoRA adapter, by vLLM's number of it, is no longer what it was. Requests that run with
        it go on, and leave no block behind."""
        self._prompts.disown(adapter)

    # What the API process and the metrics ask.

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return not self._prompts.running

    def report(self, nonce: str) -> Report | None:
        """Return what has become so far of the prompt with ``nonce``; None if it is not known."""
        prompt = self._prompts.find(nonce)
        return None if prompt is None else self._reporter.report(prompt)

    def note_endings(self, endings: Iterable[tuple[str, int]]) -> None:
        """Note how the answers to requests ended, by the nonces of their prompts."""
        for nonce, value in endings:
            if (ended := Ended(value)) is Ended.OVER:
                self._ends.end_prompt(nonce, self._prompts.has_finished)
            elif not self.local.note_ending(nonce, ended) and (prompt := self._prompts.find(nonce)):
                prompt.ended = ended
            if ended is Ended.TOOLS and self.prefetches is not None:
                self.prefetches.on_called(nonce)

    def end_session(self, owner: bytes) -> int:
        """A session is over; return how many of its blocks the local tiers evict first now."""
        return self._ends.end_session(owner, self._prompts.has_finished)

    def sweep(self) -> int:
        """Drop everything that has expired, and evict what exceeds quotas and is no longer in
        use; return how many entries have expired. To be called now and then by an idle engine,
        too."""
        self.local.retry_quotas()
        return self.local.drop_expired()

    def purge(self, prefix: bytes) -> dict[str, int]:
        """Drop all blocks from the device and the CPU tier whose owner begins with ``prefix``;
        return how many each held. Requests that run go on, and leave none of them behind."""
        self._prompts.purge(prefix)
        self._ends.purge(prefix)
        return self.local.purge(prefix)

    def resident(self) -> list[tuple[str, int, int]]:
        """Return ``(tier, ttl_s, entries)`` for the device and the CPU tier and each TTL class."""
        return self.local.resident()

    # What the tiers ask and tell; see `TierParent`.

    @property
    def ledger(self) -> Ledger:
        return self._ledger

    def now(self) -> float:
        return self._clock()

    def may_read(self, key: OffloadKey, context: ReqContext) -> bool:
        if self.local.is_expired(key):
            return False
        prompt, end = self._prompts.locate(key, context)
        return prompt is None or not prompt.is_purged(end)

    def may_store(self, key: OffloadKey, context: ReqContext) -> bool:
        prompt, end = self._prompts.locate(key, context)
        if prompt is None:
            return True
        if prompt.is_purged(end):
            return False
        if self._cpu_quotas is None:
            return True
        account = self._cpu_quotas.account_of(prompt.plan.owner_of(end))
        return self._cpu_quotas.over(account, self.quota_chunks(prompt.plan, end)) == 0

    def ttl_and_owner(self, key: OffloadKey, context: ReqContext) -> tuple[int, bytes]:
        prompt, end = self._prompts.locate(key, context)
        if prompt is None:
            return REFUSED_TTL_S, NOBODY
        span = prompt.plan.span_of(end)
        return span.ttl_s, prompt.plan.owner_in(span)

    def finished(self, context: ReqContext) -> tuple[list[bytes], RequestSignals, str]:
        prompt = self._prompts.finished(context.req_id)
        if prompt is None:
            return [], NO_SIGNALS, ""
        signals = RequestSignals(prompt.output_tokens, ended=prompt.ended)
        return prompt.used, signals, "" if prompt.ended is not None else prompt.plan.nonce

    def live_entry(self, key: bytes) -> Entry | None:
        entry = self._ledger.get(key)
        return None if entry is None or entry.expires_at <= self._clock() else entry

    def plan_of(self, request_id: str) -> Plan | None:
        prompt = self._prompts.get(request_id)
        return None if prompt is None else prompt.plan

    def quota_chunks(self, plan: Plan, end: int) -> int:
        return self._layout.quota_chunks(plan, end)

    def prefill_seconds(self, keys: Collection[bytes]) -> float:
        return self.prefill_rate.seconds_for(self._layout.tokens_of(keys))

    @property
    def short_step_s(self) -> float:
        return self.prefill_rate.short_step_s

    def on_prefix_lookup(self) -> None:
        self.local.drop_expired()

    def on_prefix_found(self, request: Request, tokens: int) -> None:
        prompt = self._prompts.get(request.request_id)
        if prompt is None or not self.local.has_device_quotas:
            return
        newcomers = self._layout.newcomers(prompt.plan, tokens)
        whole = len(request.block_hashes) * self._layout.tokens_per_hash
        wanted = {key for _, key, _ in self._layout.blocks_of_all(request, 0, whole)}
        self.local.make_room(newcomers, wanted)

    def next_checkpoint(self, request: Request, tokens: int) -> int:
        prompt = self._prompts.get(request.request_id)
        return 0 if prompt is None else self._layout.checkpoint(prompt.plan, tokens)

    def on_prefix_cache_reset(self) -> None:
        self.local.on_prefix_cache_reset()
        self._events.on_prefix_cache_reset()

    def on_evicted(
        self, key: bytes, entry: Entry, reason: EvictionReason, by: bytes | None
    ) -> None:
        self.local.on_cpu_evicted(key, entry, reason, by)

    def on_promoting(self, request_id: str, keys: Collection[bytes]) -> None:
        prompt = self._prompts.get(request_id)
        if prompt is not None and prompt.request is not None:
            self._events.note_loading(prompt.request, set(keys))

    def on_promoted(
        self, tier: str, request_id: str, loaded: Collection[tuple[bytes, int]]
    ) -> None:
        prompt = self._prompts.get(request_id)
        now = self._clock()
        self.counts.promotions[tier, CPU] += len(loaded)
        if self.prefetches is not None:
            self.prefetches.on_loaded(request_id, [key for key, _ in loaded])
        for key, ttl_s in loaded:
            if prompt is not None:
                prompt.promoted[key] = tier
            # It may have been stored with a longer lifetime than this prompt asks for.
            if key in self._ledger and not self._ledger.is_expired(key, now):
                self._ledger.touch(key, ttl_s, now)
