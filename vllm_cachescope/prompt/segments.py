"""The segments of a request: what becomes a `Plan` once their ends are known in tokens.

A prompt is cut at every breakpoint and at the end of every region. Each segment has a scope and a
TTL, and is covered by a breakpoint or not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from vllm_cachescope.prompt.request import Part, PromptRequest, Region
from vllm_cachescope.tenancy.scope import Scope


@dataclass(frozen=True, slots=True)
class RegionDefault:
    """The scope and the TTL of a region where the client names none.

    Attributes:
        scope: how widely the region is shared.
        ttl_s: the region's TTL, in seconds.
    """

    scope: Scope
    ttl_s: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the prompt that begins where the segment before it ends.

    Attributes:
        after: the part the segment ends with; None for the end of the prompt, which comes after
            the last part and whatever the template adds there.
        scope: how widely the segment is shared.
        ttl_s: the segment's TTL, in seconds.
        covered: whether a breakpoint stands at or after the segment's end. An uncovered segment
            may be reused while the device still has its blocks, but is not offloaded.
    """

    after: Part | None
    scope: Scope
    ttl_s: int
    covered: bool


def segments(
    request: PromptRequest, defaults: Mapping[Region, RegionDefault]
) -> tuple[Segment, ...]:
    """Return the segments of ``request``: at least one, the last of which ends the prompt.

    Scopes only narrow along the prompt. A segment has the scope that the breakpoint at its end
    names, or else its region's default, but

    - never one narrower than the next scope that a breakpoint names: who shares a prefix widely
      shares all of it;
    - never one wider than that of the segment before it, nor than one that an ignored marker in
      it names.

    A covered segment has the longest TTL of the breakpoints at or after its end, an uncovered one
    its region's default. A breakpoint that names no TTL has the request's, or else the default of
    the region it stands in. In an automatic request the end of every region counts as a
    breakpoint. Neighbours with the same scope, TTL and cover become one segment.

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
    # Backwards: the TTL and the explicit scope come from the breakpoints at or after the end.
    cut: list[Segment] = []
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
        cut.append(Segment(part, scope, longest or ttl_s, covered=longest > 0))
    cut.reverse()

    # Forwards: no scope is wider than those before it, nor than an ignored marker asks for.
    scopes = accumulate(
        (
            max(segment.scope, least)
            for segment, least in zip(cut, _least(parts, ends), strict=True)
        ),
        max,
    )
    merged: list[Segment] = []
    for segment, scope in zip(cut, scopes, strict=True):
        after = None if segment is cut[-1] else segment.after
        segment = Segment(after, scope, segment.ttl_s, segment.covered)
        if merged and _alike(merged[-1], segment):
            merged.pop()
        merged.append(segment)
    return tuple(merged)


def _least(parts: Sequence[Part], ends: Sequence[Part]) -> Iterator[Scope]:
    """Yield for each part of ``ends`` the narrowest scope that ignored markers name on it and on
    the parts between it and the end before."""
    rest = iter(parts)
    for end in ends:
        least = Scope.GLOBAL
        for part in rest:
            least = max(least, part.narrowed or least)
            if part is end:
                break
        yield least


def _alike(one: Segment, other: Segment) -> bool:
    return (one.scope, one.ttl_s, one.covered) == (other.scope, other.ttl_s, other.covered)
