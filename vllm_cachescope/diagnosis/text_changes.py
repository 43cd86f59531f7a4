"""Changes of the system prompt and of the messages between two requests."""

from collections import Counter
from collections.abc import Iterator

from vllm_cachescope.diagnosis.alignment import Gap, common_items, common_pieces, gaps, part_hashes
from vllm_cachescope.diagnosis.changes import ABSENT, MAX_CHANGES, Change, ChangeKind
from vllm_cachescope.diagnosis.compaction import find_compaction
from vllm_cachescope.diagnosis.fingerprint import Fingerprint


def same_static_parts(old: Fingerprint, new: Fingerprint) -> bool:
    """Whether tools and system prompt are the same, part by part."""
    return old.counts[:2] == new.counts[:2] and old.static_hashes == new.static_hashes


def compaction_change(old: Fingerprint, new: Fingerprint, compaction: Gap) -> Change:
    """Return a compaction as a change."""
    return _change(ChangeKind.HISTORY_COMPACTED, old, compaction.gone, new, compaction.came)


def system_changes(old: Fingerprint, new: Fingerprint) -> Iterator[Change]:
    """Yield what differs between the system prompts."""
    of_old = range(old.counts[0], old.static_parts)
    of_new = range(new.counts[0], new.static_parts)
    if (at := _reordered(old, new, of_old, of_new)) is not None:
        yield _change(ChangeKind.SYSTEM_REORDERED, old, of_old[at:], new, of_new[at:])
        return
    kinds = (ChangeKind.SYSTEM_ADDED, ChangeKind.SYSTEM_REMOVED, ChangeKind.SYSTEM_CHANGED)
    for gone, came, _ in gaps(old, new, of_old, of_new):
        yield from _edits(old, gone, new, came, kinds)


def message_changes(old: Fingerprint, new: Fingerprint) -> Iterator[Change]:
    """Yield what differs between the messages, but for the turns that ``new`` has after ``old``."""
    of_old = range(old.static_parts, len(old))
    of_new = range(new.static_parts, len(new))
    found = list(gaps(old, new, of_old, of_new))
    if same_static_parts(old, new) and (compaction := find_compaction(old, new, found)):
        yield compaction_change(old, new, compaction)
        return
    if (at := _reordered(old, new, of_old, of_new[: len(of_old)])) is not None:
        end = len(of_old)
        yield _change(ChangeKind.MESSAGES_REORDERED, old, of_old[at:], new, of_new[at:end])
        return
    kinds = (ChangeKind.MESSAGES_ADDED, ChangeKind.MESSAGES_REMOVED, ChangeKind.MESSAGES_CHANGED)
    edited = False
    for gone, came, tail in found:
        if tail and not (gone and came):
            continue  # the conversation grew, or goes on from an earlier point
        edited = True
        # What `new` has beyond the edit are the turns that came after it.
        yield from _edits(old, gone, new, came[: len(gone)] if tail else came, kinds)
    at = common_items(old.kinds[of_old.start :], new.kinds[of_new.start :], 1)
    if not edited and at < min(len(of_old), len(of_new)):
        # The same blocks, grouped into other messages.
        i, j = of_old[at], of_new[at]
        yield _change(ChangeKind.MESSAGES_CHANGED, old, range(i, i + 1), new, range(j, j + 1))


def _reordered(old: Fingerprint, new: Fingerprint, of_old: range, of_new: range) -> int | None:
    """Return the offset from which two lists hold the same parts in another order.

    None if their parts are not the same, or are in the same order.
    """
    theirs, ours = part_hashes(old, of_old), part_hashes(new, of_new)
    # The sums are soon compared, and lists with other sums are no reorderings.
    if theirs == ours or sum(theirs) != sum(ours) or Counter(theirs) != Counter(ours):
        return None
    return next(k for k, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)


def _edits(
    old: Fingerprint,
    gone: range,
    new: Fingerprint,
    came: range,
    kinds: tuple[ChangeKind, ChangeKind, ChangeKind],
) -> Iterator[Change]:
    """Yield the changes of one gap: parts replaced one by one, then those added or removed."""
    added, removed, changed = kinds
    pairs = min(len(gone), len(came))
    for k in range(min(pairs, MAX_CHANGES)):
        yield _change(changed, old, gone[k : k + 1], new, came[k : k + 1])
    if len(gone) > pairs:
        yield _change(removed, old, gone[pairs:], new, came[pairs:])
    if len(came) > pairs:
        yield _change(added, old, gone[pairs:], new, came[pairs:])


def _change(
    kind: ChangeKind, old: Fingerprint, gone: range, new: Fingerprint, came: range
) -> Change:
    """Return the change of the parts ``gone`` of ``old`` into the parts ``came`` of ``new``."""
    path = new.path(came.start) if came else old.path(gone.start)
    token = new.start(came.start)
    if len(gone) == len(came) == 1:
        token += common_pieces(old, gone.start, new, came.start) * new.piece_tokens
    return Change(
        kind,
        path,
        token,
        chars_before=sum(old.chars[gone.start : gone.stop]),
        chars_after=sum(new.chars[came.start : came.stop]),
        parts_before=len(gone),
        parts_after=len(came),
        part_before=gone.start if gone else None,
        # A removal is named by what was removed: putting in anything else does not bring it back.
        value=new.hashes_of(came[:8]) or ABSENT + old.hashes_of(gone[:8]),
        old_value=old.hashes_of(gone[:8]) or ABSENT + new.hashes_of(came[:8]),
    )
