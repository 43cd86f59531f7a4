"""The exact place of a change: to the character, where a fingerprint only knows it to a piece."""

from dataclasses import replace

from vllm_cachescope.cli.traffic import Call
from vllm_cachescope.diagnosis.attribution import uncached_by_cause
from vllm_cachescope.diagnosis.canonical import canonical_content, respelled
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.diagnosis.placement import LineagePlacement
from vllm_cachescope.diagnosis.token_estimate import BYTES_PER_TOKEN
from vllm_cachescope.prompt.boundaries import common_prefix
from vllm_cachescope.prompt.request import Part, Region


def changed_parts(
    placement: LineagePlacement, before: Call, call: Call
) -> tuple[Part | None, Part | None]:
    """Return the part that changed first, as it was and as it is; None for one that is not there.

    Args:
        placement: of the call.
        before: the call that it was compared with.
        call: the call.
    """
    change = placement.changes[0]
    if change.part_before is None or placement.ancestor is None:
        return None, None
    path = placement.ancestor.fingerprint.path(change.part_before)
    return _part(before, path), _part(call, change.path)


def _part(call: Call, path: str) -> Part | None:
    return next((part for part in call.request.parts if part.path == path), None)


def exact(
    diagnosis: Diagnosis, placement: LineagePlacement, before: Call | None, call: Call
) -> Diagnosis:
    """Return ``diagnosis`` with the place of its first change, and what is shared up to there, to
    the character.

    Args:
        diagnosis: of the call.
        placement: the same.
        before: the call that it was compared with; None if its text is no longer at hand.
        call: the call.
    """
    where = diagnosis.where
    if where is None or before is None or not placement.changes:
        return diagnosis
    change = placement.changes[0]
    if not (change.parts_before == change.parts_after == 1):
        return diagnosis
    old, new = changed_parts(placement, before, call)
    if old is None or new is None:
        return diagnosis
    made = placement.node.fingerprint
    paths = made.paths.split("\n")
    if change.path not in paths:
        return diagnosis
    part, data = paths.index(change.path), _bytes(new)
    same = common_prefix(_bytes(old), data)
    token = made.start(part) + made.size(part) * same // max(1, len(data))
    if token <= where.token:
        return diagnosis
    more = max(0, token - diagnosis.shared_tokens)
    if where.token < diagnosis.shared_tokens - BYTES_PER_TOKEN:
        more = 0  # What is shared is shared with another call.
    more = min(more, diagnosis.missed_tokens)
    placed = replace(
        diagnosis,
        where=replace(where, token=token),
        shared_tokens=diagnosis.shared_tokens + more,
        missed_tokens=diagnosis.missed_tokens - more,
    )
    return replace(placed, uncached=uncached_by_cause(placed, placed.shared_tokens, ()))


def _bytes(part: Part) -> bytes:
    content = part.content if part.region is Region.TOOLS else respelled(part.content)
    return canonical_content(content).data
