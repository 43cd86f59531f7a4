"""Reads a prompt that Python code has marked, as strictly as the Messages endpoint reads a body."""

from collections.abc import Collection

from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.marked_prompt import Prompt
from vllm_cachescope.prompt.request import Mark, Part, PromptRequest, Protocol, Region
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.wire.breakpoints import MAX_BREAKPOINTS, Breakpoints
from vllm_cachescope.wire.fields import read_scope, read_ttl
from vllm_cachescope.wire.mistakes import Mistakes


def read(prompt: Prompt, ttls: Collection[int], default_ttl_s: int) -> PromptRequest:
    """Return ``prompt`` as a request: for each breakpoint the part that it ends, in order, and one
    more for what is behind the last breakpoint.

    Args:
        prompt: the prompt.
        ttls: the lifetimes it may ask for, in seconds.
        default_ttl_s: the lifetime in seconds of a breakpoint that names none.

    Raises:
        BadRequest: if the prompt is empty, or for anything wrong with a breakpoint.
    """
    length = len(prompt.content)
    if not length:
        raise BadRequest("content", prompt.content, "at least one token")
    breakpoints = Breakpoints(ttls, Mistakes(strict=True))
    unit = "characters" if isinstance(prompt.content, str) else "tokens"
    end = 0
    for i, point in enumerate(prompt.breakpoints):
        path = f"breakpoints[{i}]"
        if not isinstance(point.end, int) or not end < point.end <= length:
            behind = f"behind the breakpoint at {end}, " if end else ""
            allowed = f"{behind}within the prompt's {length} {unit}"
            raise BadRequest(f"{path}.end", point.end, allowed)
        end = point.end
        scope = read_scope(point.scope, f"{path}.scope")
        if scope is Scope.SESSION and prompt.session is None:
            raise BadRequest(f"{path}.scope", point.scope, "global, org, as there is no session")
        breakpoints.add(Mark(path, read_ttl(point.ttl, f"{path}.ttl", ttls), scope), i, point)
    marks, _, _ = breakpoints.settle(None, None, default_ttl_s, MAX_BREAKPOINTS)
    parts = [Part(Region.MESSAGES, mark.path, None, mark=mark) for mark in marks.values()]
    if parts and end < length:
        parts.append(Part(Region.MESSAGES, "content", None))
    return PromptRequest(
        Protocol.COMPLETIONS, "", tuple(parts), automatic=not parts, session=prompt.session
    )
