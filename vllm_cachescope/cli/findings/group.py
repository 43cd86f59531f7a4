"""A group: all losses of one rule at one place, as a summary names them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.cli.explanation import Explained
from vllm_cachescope.cli.findings.loss import Loss


@dataclass(slots=True)
class Group:
    """The losses of one rule at one place.

    Attributes:
        loss: the last of them that says as much as any before it: how often a value changed.
        first: file and line of the first.
        last: file and line of the last.
        calls: how many calls have one.
        tokens: what they cost in all.
        sources: files and lines of the first few.
    """

    loss: Loss
    first: str
    last: str
    calls: int
    tokens: int
    sources: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        return {
            **self.loss.to_dict(),
            "tokens": self.tokens,
            "calls": self.calls,
            "first": self.first,
            "last": self.last,
        }


_SOURCES = 20


def grouped(calls: Iterable[Explained]) -> list[Group]:
    """Return the losses of ``calls`` by rule and place: what warns first, the most tokens first."""
    groups: dict[tuple[str, str], Group] = {}
    for call in calls:
        for loss in call.losses:
            key = (loss.rule.code, loss.place)
            group = groups.get(key)
            if group is None:
                groups[key] = Group(loss, call.source, call.source, 1, loss.tokens, [call.source])
                continue
            group.last = call.source
            group.calls += 1
            group.tokens += loss.tokens
            if len(group.sources) < _SOURCES:
                group.sources.append(call.source)
            if len(loss.suggestion) >= len(group.loss.suggestion):
                group.loss = loss  # It knows by now how often the value changed.
    return sorted(groups.values(), key=lambda group: (-group.loss.rule.level, -group.tokens))
