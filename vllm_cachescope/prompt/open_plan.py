"""The open plan of a prompt: a plan of whoever does not have the prompt's tokens. Its ends are
found where these are known, in the engine.

Whoever makes it renders the beginnings of the request, as for any plan (`boundaries`). A segment
ends where the prompt's own tokens and those of the beginning part: tokens that they share depend on
nothing that comes later, whoever rendered either.
"""

import hashlib
import hmac
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.prompt.boundaries import common_prefix
from vllm_cachescope.prompt.plan import Plan, Span
from vllm_cachescope.tenancy.scope import Scope

TAIL_TOKENS = 64
"""Tokens at the end of a beginning that are sent themselves: there it closes its template."""

CUT_KEY = "cut"
"""Key in a sealed open plan that other plans do not have."""


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
    owner = plan.owner.hex()
    mac = _mac(cut, plan.nonce, owner, secret)
    return {CUT_KEY: cut, "nonce": plan.nonce, "owner": owner, "mac": mac}


def unseal_open(data: Mapping[str, Any], secret: bytes) -> OpenPlan | None:
    """Return the plan `seal_open` made, or None if ``data`` was not made with ``secret``."""
    cut, nonce, owner, mac = (data.get(name) for name in (CUT_KEY, "nonce", "owner", "mac"))
    if not (isinstance(nonce, str) and isinstance(owner, str) and isinstance(mac, str)):
        return None
    try:
        genuine = hmac.compare_digest(_mac(cut, nonce, owner, secret).encode(), mac.encode())
    except (TypeError, ValueError, RecursionError):
        # `seal_open` makes nothing that cannot be encoded.
        return None
    if not genuine or not isinstance(cut, list):
        return None
    spans = tuple(
        OpenSpan(
            None if begun is None else Beginning(begun[0], begun[1], tuple(begun[2:])),
            Scope(scope),
            *rest,
        )
        for begun, scope, *rest in cut
    )
    return OpenPlan(spans, nonce, bytes.fromhex(owner))


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(array("I", tokens).tobytes()).hexdigest()


def _mac(cut: Any, nonce: str, owner: str, secret: bytes) -> str:
    message = json.dumps(["open plan", cut, nonce, owner], separators=(",", ":")).encode()
    return hmac.new(secret, message, hashlib.sha256).hexdigest()[:32]
