"""An explanation of recorded requests: where their prefixes broke, and why."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.cli.shared_prefixes import SharedPrefixes
from vllm_cachescope.cli.traffic import Call
from vllm_cachescope.cli.ttl_replay import TtlReplay
from vllm_cachescope.diagnosis.attribution import EngineReport, uncached_by_cause
from vllm_cachescope.diagnosis.diagnosis import conclude, diagnose
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.forest import LineageNode
from vllm_cachescope.diagnosis.lineage_store import LineageStore
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.prompt.boundaries import common_prefix
from vllm_cachescope.prompt.ignored_marker import IgnoredMarker
from vllm_cachescope.tenancy.scope import Caller, Scope

# How much of each session `explain` compares with; recorded traffic may span days.
_REQUESTS = 256
_ENDS = 2**16
_SESSION_TTL_S = 7 * 86400.0
_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Explained:
    """One call and its diagnosis.

    Attributes:
        source: file and line of the call, as in ``traffic.jsonl:12``.
        session: the call's session; None if it names none.
        at: when the call was made, in Unix seconds; None if not recorded.
        diagnosis: why the prompt could not be read from the cache in full.
        char: for a text trace, how many leading characters the prompt shares with its ancestor's.
        ignored: the cache markers in it that a server ignores.
        shared: tokens that only calls of other conversations had left for it, by their scope.
    """

    source: str
    session: str | None
    at: float | None
    diagnosis: Diagnosis
    char: int | None = None
    ignored: tuple[IgnoredMarker, ...] = ()
    shared: Mapping[Scope, int] = field(default_factory=dict)

    @property
    def is_break(self) -> bool:
        """Whether a prefix broke here, expected or not."""
        return self.diagnosis.kind.is_break and (
            self.diagnosis.missed_tokens > 0 or not self.diagnosis.expected
        )

    @property
    def could_share(self) -> bool:
        """Whether the call begins a conversation whose tools and system prompt nearly equal those
        of another."""
        return not self.is_break and self.diagnosis.missed_tokens > 0

    @property
    def file(self) -> str:
        """The file of the call."""
        return self.source.rpartition(":")[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the call as plain data for JSON."""
        return {
            "source": self.source,
            "session": self.session,
            "at": self.at,
            "char": self.char,
            "ignored_markers": [
                {"path": marker.path, "reason": marker.reason.value} for marker in self.ignored
            ],
            "shared": {scope.label: tokens for scope, tokens in self.shared.items()},
            **self.diagnosis.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Total:
    """The cost of one cause.

    Attributes:
        calls: calls whose main cause it was.
        tokens: uncached tokens of all calls.
    """

    calls: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Explanation:
    """All calls of some traffic, explained."""

    calls: list[Explained] = field(default_factory=list)

    @property
    def breaks(self) -> list[Explained]:
        """The calls at which a prefix broke, expected or not."""
        return [call for call in self.calls if call.is_break]

    @property
    def unexpected(self) -> list[Explained]:
        """The breaks that should not have happened."""
        return [call for call in self.breaks if not call.diagnosis.expected]

    @property
    def could_share(self) -> list[Explained]:
        """The calls that begin a conversation and could have shared more with another."""
        return [call for call in self.calls if call.could_share]

    def totals(self) -> dict[str, Total]:
        """Return what each cause cost, by its name, the most tokens first."""
        calls = Counter(call.diagnosis.cause for call in self.calls)
        tokens: Counter[str] = Counter()
        for call in self.calls:
            tokens.update(dict(call.diagnosis.uncached))
        causes = sorted(calls.keys() | tokens.keys(), key=lambda c: (-tokens[c], -calls[c], c))
        return {str(cause): Total(calls[cause], tokens[cause]) for cause in causes}

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(call.diagnosis.prompt_tokens for call in self.calls)

    @property
    def reusable_tokens(self) -> int:
        """Tokens that a cache would have read which loses no block before the end of its TTL."""
        uncached = sum(n for call in self.calls for _, n in call.diagnosis.uncached)
        return self.prompt_tokens - uncached

    @property
    def shared(self) -> Counter[Scope]:
        """Tokens that a conversation could read because others had left them, by their scope."""
        tokens: Counter[Scope] = Counter()
        for call in self.calls:
            tokens.update(call.shared)
        return tokens

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as plain data for JSON."""
        return {
            "calls": [call.to_dict() for call in self.calls],
            "totals": {
                cause: {"calls": total.calls, "tokens": total.tokens}
                for cause, total in self.totals().items()
            },
            "prompt_tokens": self.prompt_tokens,
            "reusable_tokens": self.reusable_tokens,
            "shared_tokens": {scope.label: tokens for scope, tokens in self.shared.items()},
            "breaks": len(self.breaks),
            "unexpected_breaks": len(self.unexpected),
            "could_share": len(self.could_share),
            "ignored_markers": sum(len(call.ignored) for call in self.calls),
        }


def explain(
    calls: Iterable[Call], ttl_s: float | None = None, prefixes: SharedPrefixes | None = None
) -> Iterator[Explained]:
    """Explain calls in order, each against its nearest ancestor in its session.

    The cache is taken to hold every block it was given until the block's TTL ends.

    Args:
        calls: the calls, in order of time.
        prefixes: what the calls explained before have left; None for nothing.
        ttl_s: TTL in seconds of what names none, counted from the last use; None for no expiry at
            all, whatever TTLs the calls name. For a call without a timestamp nothing expires.
    """
    now = 0.0

    def clock() -> float:
        return now

    store = LineageStore(
        clock,
        ttl_s=_SESSION_TTL_S,
        requests=_REQUESTS,
        ends=_ENDS,
        org_bytes=_BYTES,
        max_bytes=_BYTES,
    )
    prefixes = prefixes or SharedPrefixes(ttl_s)
    fingerprint = Fingerprinter(prefixes.secret)
    texts: dict[LineageNode, str] = {}
    replays: dict[str | None, TtlReplay] = {}
    for call in calls:
        now = max(now, call.at or now)
        caller = Caller("traffic", call.session)
        made = fingerprint(call.request, call.extra)
        placement = store.observe(caller, made)
        store.answered(caller, placement.node, call.response_id)
        diagnosis = diagnose(placement)
        if ttl_s is not None:
            replay = replays.setdefault(call.session, TtlReplay(ttl_s, _REQUESTS))
            expired = replay.use(placement)
            if expired and call.at is not None:
                diagnosis = _with_expired(diagnosis, expired)
        left = prefixes.use(call, made, now)
        diagnosis, shared = _with_others(diagnosis, left)
        char = None
        if call.text is not None:
            texts[placement.node] = call.text
            before = texts.get(placement.ancestor, "") if placement.ancestor else ""
            char = common_prefix(before, call.text)
        ignored = call.request.ignored
        yield Explained(call.source, call.session, call.at, diagnosis, char, ignored, shared)


def _with_others(
    diagnosis: Diagnosis, left: Mapping[Scope, int]
) -> tuple[Diagnosis, dict[Scope, int]]:
    """Return a diagnosis that counts what any earlier call had ``left`` of the prompt as read, and
    what of it is more than the call's own conversation had, by scope."""
    read, own = sum(left.values()), diagnosis.prompt_tokens
    own -= sum(tokens for _, tokens in diagnosis.uncached)
    if read <= own:
        return diagnosis, {}
    shared: dict[Scope, int] = {}
    for scope in reversed(list(left)):
        if tokens := min(left[scope], read - own - sum(shared.values())):
            shared[scope] = tokens
    engine = tuple(one for one in diagnosis.engine if one.cause is not MissCause.EXPIRED)
    counted = replace(diagnosis, engine=engine)
    return replace(counted, uncached=uncached_by_cause(counted, read, engine)), shared


def _with_expired(diagnosis: Diagnosis, misses: Sequence[CacheMiss]) -> Diagnosis:
    shared = diagnosis.shared_tokens
    read = shared - sum(miss.tokens for miss in misses)
    report = EngineReport(diagnosis.prompt_tokens, read, 1, tuple(misses), shared_tokens=shared)
    return conclude(diagnosis, report)
