"""Compactions: a client put a summary in place of much of its conversation."""

from collections.abc import Sequence

from vllm_cachescope.diagnosis.alignment import Gap, common_items, gaps
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.part_kind import Role, Trait

_SUMMARY_MIN_TOKENS = 100
_SUMMARY_SURE_TOKENS = 512
_COMPACTED_MIN_TURNS = 4


def find_compaction(
    old: Fingerprint, new: Fingerprint, found: Sequence[Gap] | None = None
) -> Gap | None:
    """Return the gap in which a summary took the place of much of ``old``; None if none did.

    Model, tools and system are the same, but for a summary that stands last in the system prompt.
    One of these shows the compaction:

    - The client declares it with a block of its own.
    - Several turns gave way to something much shorter, while later turns stayed.
    - No answer of the model is left, and a part in place of the turns says that it is a summary.
    - The conversation still begins as it did, and its turns gave way to something much shorter that
      says that it is a summary.
    - No answer of the model is left, and a single part in place of the turns is long itself and at
      most an eighth of what it replaced.

    Args:
        old: the earlier request.
        new: the later one.
        found: the `gaps` between them after the system prompt of ``old``, where they are known.
    """
    static = _before_summary(old, new)
    if static is None:
        return None
    if found is None:
        found = list(gaps(old, new, range(static, len(old)), range(static, len(new))))
    return next((gap for gap in found if gap.gone and gap.came and _shows(old, new, gap)), None)


def _before_summary(old: Fingerprint, new: Fingerprint) -> int | None:
    """Return the number of parts before the messages, or before a summary that stands last in the
    system prompt; None if the two requests differ in any of these parts."""
    if old.model != new.model or old.counts[0] != new.counts[0]:
        return None
    static = max(old.static_parts, new.static_parts)
    same = min(common_items(old.hashes, new.hashes), old.static_parts, new.static_parts)
    if same == static:
        return static
    return same if same == static - 1 > new.counts[0] else None


def _begins_alike(old: Fingerprint, new: Fingerprint, gap: Gap) -> bool:
    """Whether both begin with the same messages up to ``gap``, in which ``new`` has its answers.

    Where the earlier turns began with a summary, too, ``new`` may be another answer to the same
    question.
    """
    gone, came, _ = gap
    alike = gone.start == came.start > max(old.static_parts, new.static_parts)
    return alike and not old.has(gone.start, Trait.SUMMARY)


def _shows(old: Fingerprint, new: Fingerprint, gap: Gap) -> bool:
    """Whether ``gap`` shows a compaction."""
    gone, came, tail = gap
    if any(new.has(j, Trait.COMPACTION) for j in came):
        return True
    before, after = old.tokens_of(gone), new.tokens_of(came)
    turns = sum(old.role(i) is Role.ASSISTANT for i in gone)
    if not tail:
        return turns >= 2 and 2 * after <= before and len(gone) >= 2 * len(came)
    if _begins_alike(old, new, gap):
        head = [new.has(j, Trait.SUMMARY) for j in came[:2]]
        return turns >= 2 and any(head) and 2 * after <= before
    if turns < _COMPACTED_MIN_TURNS or not new.is_opening:
        return False
    if any(new.has(j, Trait.SUMMARY) for j in came):
        return after >= _SUMMARY_MIN_TOKENS and 2 * after <= before
    return len(came) == 1 and after >= _SUMMARY_SURE_TOKENS and 8 * after <= before
