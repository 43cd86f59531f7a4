"""The places of changes in a prompt's tokens, by where its tokens were seen to diverge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vllm_cachescope.diagnosis.changes import Change
from vllm_cachescope.diagnosis.fingerprint import Fingerprint

_RENDERED = ("tools", "system", "messages")

# An estimated place may be this much too far behind, as a fraction.
_ESTIMATE_ERROR = 0.25


@dataclass(frozen=True, slots=True)
class MeasuredDivergence:
    """Where the tokens of a request and of its ancestor diverge, as far as their hashes tell.

    Attributes:
        token: leading tokens that both have, in whole steps.
        step: tokens of a step: in the next step they diverge.
        tools_behind_system: whether the template renders tools behind the system prompt; None if
            that is not known.
    """

    token: int
    step: int
    tools_behind_system: bool | None = None


def place_changes(
    changes: Sequence[Change], new: Fingerprint, measured: MeasuredDivergence, scale: float
) -> tuple[Change, ...]:
    """Return changes with their places in tokens, the earliest first.

    Wire formats have tools in front of the system prompt. Many templates render them behind it. If
    it is not known which, the tokens tell: the earliest change stands where they diverge.

    Args:
        changes: from `compare`, with estimates.
        new: the later of the two requests that they are between.
        measured: where the tokens of the two diverge.
        scale: tokens for each estimated one.
    """
    tools = new.start(new.counts[0])
    system = new.start(new.static_parts) - tools

    def as_sent(change: Change) -> int:
        return change.token

    def tools_behind(change: Change) -> int:
        shift = {"tools": system, "system": -tools}.get(change.area, 0)
        return max(0, change.token + shift)

    texts = [change for change in changes if change.area in _RENDERED]
    if not texts:
        return tuple(replace(change, token=round(change.token * scale)) for change in changes)

    def error(place: Callable[[Change], int]) -> float:
        return abs(min(map(place, texts)) * scale - measured.token)

    behind = measured.tools_behind_system
    if behind is None:
        behind = error(tools_behind) < error(as_sent)
    place = tools_behind if behind else as_sent
    first = min(texts, key=place)

    def placed(change: Change) -> Change:
        if change.area not in _RENDERED:
            return replace(change, token=round(change.token * scale))
        token = max(round(place(change) * scale), measured.token)
        last = measured.token + measured.step - 1
        # Tokens that diverge much earlier than the change do so for another reason.
        if change is first and token <= last + token * _ESTIMATE_ERROR:
            token = min(token, last)
        return replace(change, token=token)

    # By the estimates where several would stand in front of where the tokens diverge.
    found = sorted(
        ((placed(change), place(change)) for change in changes),
        key=lambda both: (not both[0].diverges, both[0].token, both[1]),
    )
    return tuple(change for change, _ in found)
