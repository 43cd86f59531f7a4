"""The cache plan of a request, before its ends become token positions.

A plan cuts the prompt at every breakpoint and at the end of every region, and says of each
segment how widely it is shared, how long it is kept, and whether it is to be kept at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from vllm_cachescope.prompt.request import Part, PromptRequest, Region
from vllm_cachescope.tenancy.scope import Scope


@dataclass(frozen=True, slots=True)
class RegionDefault:
    """What holds for a region where the client does not say.

    Attributes:
        scope: how widely it is shared.
        ttl_s: its lifetime in seconds.
    """

    scope: Scope
    ttl_s: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the prompt, from the end of the segment before it.

    Attributes:
        after: the part that it ends with; None for the end of the prompt, which lies after the
            last part and whatever the template adds to it.
        scope: how widely it is shared.
        ttl_s: its lifetime in seconds.
        covered: whether a breakpoint stands at or after its end. What no breakpoint covers may
            be reused while the device still has it, but is not offloaded.
    """

    after: Part | None
    scope: Scope
    ttl_s: int
    covered: bool


def segments(
    request: PromptRequest, defaults: Mapping[Region, RegionDefault]
) -> tuple[Segment, ...]:
    """Return the plan of ``request``: at least one segment, the last of which ends the prompt.

    Scopes only narrow along the plan. A segment has the scope of the breakpoint that ends it,
    or else its region's default, but

    - never one narrower than the next explicit scope: who shares a prefix widely shares all of it;
    - never one wider than that of the segment before it.

    A covered segment lives as long as the longest of the breakpoints at or after its end; one
    that is not covered, as long as its region's default. A breakpoint that names no lifetime has
    the request's or, failing that, the default of the region it stands in. In an automatic
    request the end of every region counts as a breakpoint. Neighbours that differ in nothing are
    one segment.

    Args:
        request: the request, its parts in prompt order.
        defaults: the operator's defaults, for every region.
    """
    parts = request.parts
    if not parts:
        default = defaults[Region.MESSAGES]
        ttl_s = default.ttl_s if request.ttl_s is None else request.ttl_s
        return (Segment(None, default.scope, ttl_s, request.automatic),)

    ends = [
        part
        for i, part in enumerate(parts)
        if part.mark is not None or i + 1 == len(parts) or parts[i + 1].region is not part.region
    ]
    # Backwards: what a segment takes from the breakpoints at or after its end.
    plan: list[Segment] = []
    longest = 0
    explicit: Scope | None = None
    for part in reversed(ends):
        default = defaults[part.region]
        ttl_s = default.ttl_s if request.ttl_s is None else request.ttl_s
        scope = default.scope
        if request.automatic:
            longest = max(longest, ttl_s)
        if part.mark is not None:
            longest = max(longest, ttl_s if part.mark.ttl_s is None else part.mark.ttl_s)
            if part.mark.scope is not None:
                scope = explicit = part.mark.scope
        if explicit is not None:
            scope = min(scope, explicit)
        plan.append(Segment(part, scope, longest or ttl_s, covered=longest > 0))
    plan.reverse()

    # Forwards: what it takes from those before it.
    scopes = accumulate((segment.scope for segment in plan), max)
    merged: list[Segment] = []
    for segment, scope in zip(plan, scopes, strict=True):
        after = None if segment is plan[-1] else segment.after
        segment = Segment(after, scope, segment.ttl_s, segment.covered)
        if merged and _alike(merged[-1], segment):
            merged.pop()
        merged.append(segment)
    return tuple(merged)


def _alike(one: Segment, other: Segment) -> bool:
    return (one.scope, one.ttl_s, one.covered) == (other.scope, other.ttl_s, other.covered)
