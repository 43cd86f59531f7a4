"""The global scope, taken out of a request whose caller may not share with everyone."""

from dataclasses import replace

from vllm_cachescope.prompt.ignored_marker import IgnoredMarker, IgnoredReason
from vllm_cachescope.prompt.request import PromptRequest
from vllm_cachescope.prompt.segments import RegionDefault
from vllm_cachescope.tenancy.scope import Scope


def without_global(request: PromptRequest) -> PromptRequest:
    """Return ``request`` with what it marks global shared inside the organisation instead."""
    parts, ignored = list(request.parts), list(request.ignored)
    for i, part in enumerate(parts):
        mark = part.mark
        if mark is not None and mark.scope is Scope.GLOBAL:
            parts[i] = replace(part, mark=replace(mark, scope=Scope.ORG))
            ignored.append(IgnoredMarker(f"{mark.path}.scope", IgnoredReason.NOT_A_WRITER))
    return replace(request, parts=tuple(parts), ignored=tuple(ignored))


def org_default(default: RegionDefault) -> RegionDefault:
    """Return a region's default for who may not share with everyone."""
    return RegionDefault(max(default.scope, Scope.ORG), default.ttl_s)
