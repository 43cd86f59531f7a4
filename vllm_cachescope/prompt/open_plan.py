"""The open plan of a prompt: a plan of whoever does not have the prompt's tokens. Its ends are
found where these are known, in the engine.

Whoever makes it renders the beginnings of the request, as for any plan (`boundaries`). A segment
ends where the prompt's own tokens and those of the beginning part: tokens that they share depend on
nothing that comes later, whoever rendered either.
"""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.prompt.boundaries import common_prefix
from vllm_cachescope.prompt.plan import Plan, Span
from vllm_cachescope.prompt.plan_seal import opened, sealed
from vllm_cachescope.tenancy.scope import Scope

TAIL_TOKENS = 64
"""Tokens at the end of a beginning that are sent themselves: there it closes its template."""

CUT_KEY = "cut"
"""Key in a sealed open plan that other plans do not have."""

_KIND = "open plan"


@dataclass(frozen=True, slots=True)
class Beginning:
    """The tokens of a request's beginning, in little room.

    Attributes:
        head: how many tokens come before the tail.
        digest: SHA-256 of the head's tokens, in hex.
        tail: the last tokens.
    """

    head: int
    digest: str
    tail: tuple[int, ...]

    @classmethod
    def of(cls, tokens: Sequence[int]) -> "Beginning":
        """Return what is sent of ``tokens``."""
        head = max(0, len(tokens) - TAIL_TOKENS)
        return cls(head, _digest(tokens[:head]), tuple(tokens[head:]))

    def end_in(self, tokens: Sequence[int]) -> int:
        """Return how many of a prompt's first tokens are those of the beginning: 0 if they part
        before the tail, where it is not known."""
        if len(tokens) < self.head or _digest(tokens[: self.head]) != self.digest:
            return 0
        return self.head + common_prefix(self.tail, tuple(tokens[self.head :][:TAIL_TOKENS]))


@dataclass(frozen=True, slots=True)
class OpenSpan:
    """A span whose end is not known yet; see `Span`.

    Attributes:
        beginning: with what it ends; None for the end of the prompt.
        scope: as of `Span`, like the others.
    """

    beginning: Beginning | None
    scope: Scope
    key: str
    ttl_s: int
    covered: bool = True


@dataclass(frozen=True, slots=True)
class OpenPlan:
    """The spans of one prompt, in order, only ever narrowing; see `Plan`.

    Attributes:
        spans: at least one; the last one ends the prompt.
        nonce: as of `Plan`.
        owner: as of `Plan`.
    """

    spans: tuple[OpenSpan, ...]
    nonce: str
    owner: bytes

    def closed(self, tokens: Sequence[int]) -> Plan:
        """Return the plan of a prompt.

        Args:
            tokens: its tokens, at least one.
        """
        spans: list[Span] = []
        last = 0
        for span in self.spans:
            end = len(tokens) if span.beginning is None else span.beginning.end_in(tokens)
            if end > last:
                spans.append(Span(end, span.scope, span.key, span.ttl_s, span.covered))
                last = end
        return Plan(tuple(spans), self.nonce, self.owner)


def seal_open(plan: OpenPlan, secret: bytes) -> dict[str, Any]:
    """Return ``plan`` as JSON-able data with a MAC, as `plan.seal` does."""
    cut = [
        [
            None if (begun := span.beginning) is None else [begun.head, begun.digest, *begun.tail],
            int(span.scope),
            span.key,
            span.ttl_s,
            span.covered,
        ]
        for span in plan.spans
    ]
    return sealed(_KIND, CUT_KEY, cut, plan.nonce, plan.owner, secret)


def unseal_open(data: Mapping[str, Any], secret: bytes) -> OpenPlan | None:
    """Return the plan `seal_open` made, or None if ``data`` was not made with ``secret``."""
    if (found := opened(_KIND, CUT_KEY, data, secret)) is None:
        return None
    cut, nonce, owner = found
    spans = tuple(
        OpenSpan(
            None if begun is None else Beginning(begun[0], begun[1], tuple(begun[2:])),
            Scope(scope),
            *rest,
        )
        for begun, scope, *rest in cut
    )
    return OpenPlan(spans, nonce, owner)


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(array("I", tokens).tobytes()).hexdigest()
