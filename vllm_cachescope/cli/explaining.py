"""Explains recorded requests in order: where their prefixes broke, and what was lost."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from cachetools import LRUCache

from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.cli.block_losses import in_blocks
from vllm_cachescope.cli.exact_place import changed_parts, exact
from vllm_cachescope.cli.explanation import NOT_READ, Explained
from vllm_cachescope.cli.findings.edits import Edit, edit_of
from vllm_cachescope.cli.findings.loss import (
    Loss,
    cache_losses,
    change_loss,
    sharing_loss,
    unread_loss,
)
from vllm_cachescope.cli.shared_prefixes import SharedPrefixes
from vllm_cachescope.cli.traffic import Call, Usage
from vllm_cachescope.cli.ttl_replay import TtlReplay
from vllm_cachescope.diagnosis.advice import advise_on_misses
from vllm_cachescope.diagnosis.attribution import EngineReport, uncached_by_cause
from vllm_cachescope.diagnosis.canonical import respelled
from vllm_cachescope.diagnosis.changes import ChangeKind
from vllm_cachescope.diagnosis.diagnosis import conclude, diagnose
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.forest import LineageNode
from vllm_cachescope.diagnosis.lineage_store import LineageStore
from vllm_cachescope.diagnosis.outcome import NEW_CONTENT, Diagnosis
from vllm_cachescope.diagnosis.placement import LineagePlacement
from vllm_cachescope.prompt.boundaries import common_prefix
from vllm_cachescope.prompt.request import Region
from vllm_cachescope.tenancy.scope import Caller, Scope

# How much of each session is compared with; recorded traffic may span days.
_REQUESTS = 256
_ENDS = 2**16
_SESSION_TTL_S = 7 * 86400.0
_BYTES = 2**30
_CALLS = 2048  # calls whose text is at hand to be quoted

_SHORTEST = 1024
"""Hosted services cache no prompt of fewer tokens."""

_EDITED = (
    ChangeKind.TOOL_CHANGED,
    ChangeKind.TOOL_KEYS_REORDERED,
    ChangeKind.SYSTEM_CHANGED,
    ChangeKind.MESSAGES_CHANGED,
)


def explain(
    calls: Iterable[Call],
    ttl_s: float | None = None,
    prefixes: SharedPrefixes | None = None,
    text: bool = True,
    block_tokens: int | None = None,
) -> Iterator[Explained]:
    """Explain calls in order, each against its nearest ancestor in its session.

    The cache is taken to hold what a breakpoint covers until its TTL ends, and no more.

    Args:
        calls: the calls, in order of time.
        ttl_s: TTL in seconds of everything, whatever the calls ask for, counted from the last use;
            infinity for no expiry at all; None for what each breakpoint asks for, or five minutes.
            For a call without a timestamp nothing expires.
        prefixes: what the calls explained before have left; None for nothing.
        text: whether what changed is quoted.
        block_tokens: tokens in a block, of which an engine reads whole ones only; None to count as
            though prefixes could end anywhere.
    """
    explainer = _Explainer(ttl_s, prefixes or SharedPrefixes(ttl_s), text, block_tokens)
    for call in calls:
        yield explainer.explain(call)


class _Explainer:
    def __init__(
        self, ttl_s: float | None, prefixes: SharedPrefixes, text: bool, block: int | None
    ) -> None:
        self._now = 0.0
        self._ttl_s, self._prefixes, self._text, self._block = ttl_s, prefixes, text, block
        self._fingerprint = Fingerprinter(prefixes.secret, count=prefixes.count)
        self._store = LineageStore(
            lambda: self._now,
            ttl_s=_SESSION_TTL_S,
            requests=_REQUESTS,
            ends=_ENDS,
            org_bytes=_BYTES,
            max_bytes=_BYTES,
        )
        self._replays: dict[str | None, TtlReplay] = {}
        self._calls: LRUCache[LineageNode, Call] = LRUCache(_CALLS)
        self._cached = False

    def explain(self, call: Call) -> Explained:
        self._now = max(self._now, call.at or self._now)
        caller = Caller("traffic", call.session)
        made = self._fingerprint(call.request, call.extra)
        placement = self._store.observe(caller, made)
        self._store.answered(caller, placement.node, call.response_id)
        before = self._calls.get(placement.ancestor) if placement.ancestor is not None else None
        self._calls[placement.node] = call

        edit = self._edit(placement, before, call)
        diagnosis = exact(diagnose(placement), placement, before, call)
        replay = self._replays.setdefault(call.session, TtlReplay(self._ttl_s, _REQUESTS))
        misses = [
            miss
            for miss in replay.use(placement)
            if call.at is not None or miss.cause is not MissCause.EXPIRED
        ]
        left = self._prefixes.use(call, made, self._now)
        own = diagnosis.shared_tokens - sum(miss.tokens for miss in misses)
        misses, shared = _with_others(misses, own, left)
        diagnosis = _concluded(diagnosis, misses, own + sum(shared.values()))
        unread = 0
        if (usage := call.usage) is not None:
            self._cached |= bool(usage.read_tokens or usage.created_tokens)
            diagnosis, unread = _measured(diagnosis, usage)
        losses = self._losses(diagnosis, edit)
        if self._block is not None and usage is None:
            diagnosis, straddled = in_blocks(diagnosis, made, self._block)
            losses += [straddled] if straddled is not None else []
        if usage is not None and unread:
            losses.append(unread_loss(unread, usage.read_tokens, self._cached))
        char = None
        if call.text is not None:
            char = common_prefix(before.text or "" if before is not None else "", call.text)
        return Explained(
            call.source,
            call.session,
            call.at,
            diagnosis,
            char,
            call.request.ignored,
            shared,
            tuple(sorted(losses, key=lambda loss: -loss.tokens)),
            counted=call.usage is not None,
        )

    def _losses(self, diagnosis: Diagnosis, edit: Edit | None) -> list[Loss]:
        changed = change_loss(diagnosis, edit, self._text) or sharing_loss(
            diagnosis, edit, self._text
        )
        return [*([changed] if changed else []), *cache_losses(diagnosis)]

    def _edit(self, placement: LineagePlacement, before: Call | None, call: Call) -> Edit | None:
        """Return how the part was edited that changed first; None if none was."""
        change = placement.changes[0] if placement.changes else None
        if change is None or before is None or change.kind not in _EDITED:
            return None
        assert placement.ancestor is not None
        old, new = changed_parts(placement, before, call)
        if old is None or new is None:
            return None
        if new.region is Region.TOOLS:
            return edit_of(old.content, new.content)
        return edit_of(respelled(old.content), respelled(new.content))


def _with_others(
    misses: list[CacheMiss], own: int, left: Mapping[Scope, int]
) -> tuple[list[CacheMiss], dict[Scope, int]]:
    """Return the misses that remain once what other conversations had left is read, too; and what
    of that is more than the call's own conversation had, by scope.

    Args:
        misses: what the conversation itself had lost, in prompt order.
        own: leading tokens that the conversation itself had.
        left: leading tokens that any call had left, by scope.
    """
    more = sum(left.values()) - own
    if more <= 0:
        return misses, {}
    shared: dict[Scope, int] = {}
    for scope in reversed(list(left)):
        if tokens := min(left[scope], more - sum(shared.values())):
            shared[scope] = tokens
    return _behind(misses, more), shared


def _behind(misses: list[CacheMiss], tokens: int) -> list[CacheMiss]:
    """Return ``misses`` without the first ``tokens`` tokens of them."""
    rest: list[CacheMiss] = []
    for miss in misses:
        read = min(tokens, miss.tokens)
        tokens -= read
        if miss.tokens > read:
            rest.append(replace(miss, tokens=miss.tokens - read))
    return rest


def _concluded(diagnosis: Diagnosis, misses: list[CacheMiss], read: int) -> Diagnosis:
    """Return a diagnosis with what the cache had lost, and with ``read``, the leading tokens that
    were there."""
    expected = diagnosis.expected and not misses
    suggestion = diagnosis.suggestion if diagnosis.missed_tokens else advise_on_misses(misses)
    counted = replace(diagnosis, engine=tuple(misses), expected=expected, suggestion=suggestion)
    return replace(counted, uncached=uncached_by_cause(counted, read, misses))


def _measured(diagnosis: Diagnosis, usage: Usage) -> tuple[Diagnosis, int]:
    """Return a diagnosis in the tokens that the response counted, and how many tokens were not read
    for no reason that shows in the traffic."""
    scale = usage.prompt_tokens / diagnosis.prompt_tokens if diagnosis.prompt_tokens else 1.0
    scaled = tuple(replace(miss, tokens=round(miss.tokens * scale)) for miss in diagnosis.engine)
    report = EngineReport(usage.prompt_tokens, usage.read_tokens, 1, scaled)
    found = conclude(diagnosis, report)
    unread = found.unknown_tokens
    kept = tuple(miss for miss in found.engine if miss.cause is not MissCause.UNKNOWN)
    causes = {
        (NOT_READ if cause == MissCause.UNKNOWN else cause): tokens
        for cause, tokens in found.uncached
    }
    whole = usage.created_tokens or usage.read_tokens + unread >= _SHORTEST
    if not whole:
        causes[NEW_CONTENT] = causes.get(NEW_CONTENT, 0) + causes.pop(NOT_READ, 0)
        unread = 0
    uncached = tuple((cause, tokens) for cause, tokens in causes.items() if tokens)
    return replace(found, engine=kept, uncached=uncached), unread
