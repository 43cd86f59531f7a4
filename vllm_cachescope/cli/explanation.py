"""An explanation of recorded requests: where their prefixes broke, and why."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_cachescope.cli.findings.loss import Loss
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.prompt.ignored_marker import IgnoredMarker
from vllm_cachescope.tenancy.scope import Scope

NOT_READ = "not_read"
"""Cause of tokens that the recorded usage says were not read, though they were as before."""


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
        losses: what was lost, each put down to a rule and a place; the largest first.
        counted: whether the response counted the tokens; if not, counts are estimates.
    """

    source: str
    session: str | None
    at: float | None
    diagnosis: Diagnosis
    char: int | None = None
    ignored: tuple[IgnoredMarker, ...] = ()
    shared: Mapping[Scope, int] = field(default_factory=dict)
    losses: tuple[Loss, ...] = ()
    counted: bool = False

    @property
    def is_break(self) -> bool:
        """Whether a prefix broke here or was lost, expected or not."""
        return any(loss.is_break or loss.rule.name == "context_compacted" for loss in self.losses)

    @property
    def expected(self) -> bool:
        """Whether all that was lost here is as it should be."""
        return not any(loss.is_break for loss in self.losses)

    @property
    def could_share(self) -> bool:
        """Whether the call begins a conversation whose tools and system prompt nearly equal those
        of another."""
        return any(loss.rule.name == "could_share" for loss in self.losses)

    @property
    def cause(self) -> str:
        """The one cause to count this call under."""
        if any(loss.rule.name == "not_read" for loss in self.losses[:1]):
            return NOT_READ
        return self.diagnosis.cause

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
            "cause": self.cause,
            "expected": self.expected,
            "counted": self.counted,
            "losses": [loss.to_dict() for loss in self.losses],
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
        return [call for call in self.breaks if not call.expected]

    @property
    def could_share(self) -> list[Explained]:
        """The calls that begin a conversation and could have shared more with another."""
        return [call for call in self.calls if call.could_share]

    def totals(self) -> dict[str, Total]:
        """Return what each cause cost, by its name, the most tokens first."""
        calls = Counter(call.cause for call in self.calls)
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
