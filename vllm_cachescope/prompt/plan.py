"""The cache plan of one prompt: which tokens are shared how widely, and for how long."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_cachescope.prompt.plan_seal import opened, sealed
from vllm_cachescope.tenancy.owner_tags import NOBODY, owner_at
from vllm_cachescope.tenancy.scope import Scope

PLAN_KEY = "cachescope"
"""Key in ``kv_transfer_params`` of a request's sealed plan, and of the report on its prompt."""

_KIND, _SPANS = "plan", "spans"


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens with one scope and one lifetime.

    Attributes:
        end: position just past its last token, in tokens from the start of the prompt.
        scope: how widely its blocks are shared.
        key: the scope key that enters its block hashes.
        ttl_s: lifetime of its blocks, in seconds.
        covered: whether a breakpoint lies at or after its end. Uncovered tokens stay in the
            device cache while there is room and are stored nowhere else.
    """

    end: int
    scope: Scope
    key: str
    ttl_s: int
    covered: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """The spans of one prompt, in order, only ever narrowing.

    Attributes:
        spans: at least one; the last one ends where the prompt ends.
        nonce: unique to the prompt; the engine's report is found under it. Empty in a plan that
            the engine made for a prompt without one: nobody asks for that report.
        owner: the owner of its blocks of session scope; see `owner_tags`.
    """

    spans: tuple[Span, ...]
    nonce: str
    owner: bytes = NOBODY

    def span_of(self, block_end: int) -> Span:
        """Return the span that a block belongs to: the narrowest one that any of its tokens is in.

        Spans only narrow, so this is the span of the block's last token. Tokens generated past
        the end of the prompt have the scope of the prompt's last token and are not covered.

        Args:
            block_end: position just past the block's last token.
        """
        # A loop, since a plan has a handful of spans and this is called for every block.
        for span in self.spans:
            if block_end <= span.end:
                return span
        last = self.spans[-1]
        return Span(block_end, last.scope, last.key, last.ttl_s, covered=False)

    def owner_of(self, block_end: int) -> bytes:
        """Return the owner of a block; see `span_of`."""
        return self.owner_in(self.span_of(block_end))

    def owner_in(self, span: Span) -> bytes:
        """Return the owner of the blocks of ``span``."""
        return owner_at(span.scope, self.owner)

    @property
    def covered_tokens(self) -> int:
        """How many leading tokens a breakpoint covers."""
        return max((span.end for span in self.spans if span.covered), default=0)

    def uncovered(self) -> "Plan":
        """Return the plan of the same prompt of which no token is kept behind the device."""
        return replace(self, spans=tuple(replace(span, covered=False) for span in self.spans))

    def quota_start(self, block_end: int) -> int:
        """Return where the tokens begin that count towards the same quota as a block does.

        A prompt counts towards two quotas at most: its global spans, which come first, towards
        that of global content, and the rest towards its organisation's. With spans that are
        global up to token 100 and the organisation's up to token 300, this is 0 for the block
        that ends at token 96 and 100 for the one that ends at token 112.

        Args:
            block_end: position just past the block's last token.
        """
        if self.span_of(block_end).scope is Scope.GLOBAL:
            return 0
        return max((span.end for span in self.spans if span.scope is Scope.GLOBAL), default=0)

    def ranges(self, block_size: int) -> Iterator[tuple[int, int, Span]]:
        """Yield ``(start, end, span)`` in tokens, cut where blocks are: a block that straddles
        two spans belongs to the later one. The last range ends where the prompt ends."""
        start = 0
        for span in self.spans[:-1]:
            end = span.end // block_size * block_size
            if end > start:
                yield start, end, span
                start = end
        last = self.spans[-1]
        if last.end > start:
            yield start, last.end, last


def seal(plan: Plan, secret: bytes) -> dict[str, Any]:
    """Return ``plan`` as JSON-able data with a MAC, for the way from the API to the engine."""
    spans = [[s.end, int(s.scope), s.key, s.ttl_s, s.covered] for s in plan.spans]
    return sealed(_KIND, _SPANS, spans, plan.nonce, plan.owner, secret)


def unseal(data: Any, secret: bytes) -> Plan | None:
    """Return the plan `seal` made, or None if ``data`` was not made with ``secret``."""
    if not isinstance(data, Mapping):
        return None
    if (found := opened(_KIND, _SPANS, data, secret)) is None:
        return None
    spans, nonce, owner = found
    return Plan(tuple(Span(end, Scope(scope), *rest) for end, scope, *rest in spans), nonce, owner)
