"""Breakpoints that stay on the tools or the system prompt while the conversation grows."""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_cachescope.cli.traffic import Call
from vllm_cachescope.prompt.request import Region

_REQUESTS = 3  # of one conversation, each longer than the one before

_Conversation = tuple[str | None, str, str]  # session, model, and the mark's path


@dataclass(slots=True)
class _Mark:
    """The last mark of a conversation's requests.

    Attributes:
        source: the first request that had grown behind it.
        longest: parts of the longest request so far.
        requests: how many requests were longer than all before them.
    """

    source: str = ""
    longest: int = 0
    requests: int = 0


class StuckBreakpoints:
    """Notices conversations of which no breakpoint covers the messages, though they grow."""

    def __init__(self) -> None:
        self._marks: dict[_Conversation, _Mark] = {}
        self._moved: set[tuple[str | None, str]] = set()

    def see(self, call: Call) -> None:
        """Take note of where a call's last breakpoint stands."""
        request = call.request
        if request.automatic:
            return
        marked = [part for part in request.parts if part.mark is not None]
        if not marked or marked[-1].mark is None:
            return
        if marked[-1].region is Region.MESSAGES:
            self._moved.add((call.session, request.model))
            return
        mark = self._marks.setdefault(
            (call.session, request.model, marked[-1].mark.path), _Mark(call.source)
        )
        if len(request.parts) > mark.longest:
            mark.longest = len(request.parts)
            mark.requests += 1
            if mark.requests == 2:
                mark.source = call.source

    def found(self) -> Iterator[tuple[str, str, int]]:
        """Yield the path of each such breakpoint, the first request that had grown behind it, and
        how many requests have it."""
        for (session, model, path), mark in self._marks.items():
            if mark.requests >= _REQUESTS and (session, model) not in self._moved:
                yield path, mark.source, mark.requests
