"""Reuse that a change prevented: how far a request would have agreed with an earlier one."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from vllm_cachescope.diagnosis.alignment import common_items, part_hashes
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.part_kind import Role, Trait
from vllm_cachescope.diagnosis.prefix_match import PrefixMatch, same_static

_STARTS = int(Trait.STARTS)
_SIMILAR_CHARS = 32


def reusable_tokens(
    old: Fingerprint,
    new: Fingerprint,
    shared: PrefixMatch,
    parent_known: bool,
    messages: Sequence[int],
) -> int:
    """Return up to which token ``new`` would have agreed with ``old`` but for the divergence.

    0 if nothing shows that ``new`` goes on with the conversation of ``old``. One of these shows it:

    - An answer of the model stands in both, next to the same neighbour.
    - The whole conversation of ``old`` stands in ``new``, under another model, tools or system.
    - The last message of ``old`` was edited after it had been answered.
    - All answers of ``old`` stand in ``new`` in their places, spelled in another way.

    Args:
        old: the earlier request.
        new: the later one.
        shared: how far they agree, from `match_prefix`.
        parent_known: whether the request that ``new`` repeats and goes on from has been seen.
        messages: the `part_hashes` of ``new``'s messages, made once for all earlier requests.
    """
    if shared.whole or shared.parts == len(new):
        return 0
    static = new.static_parts
    if same_static(old, new, shared):
        at = shared.parts
        end = _last_common_turn(
            old, new, part_hashes(old, range(at, len(old))), messages[at - static :]
        )
        if end is None and not parent_known:
            end = _respelled_turns(old, new, at)
        if end is None and not parent_known:
            end = _edited_last_turn(old, new, at)
        return 0 if end is None else new.start(end)

    theirs = part_hashes(old, range(old.static_parts, len(old)))
    if not theirs:
        return 0
    end = _last_common_turn(old, new, theirs, messages)
    again = end is not None
    if end is None and list(messages[: len(theirs)]) == theirs:
        end = static + len(theirs)
    if end is None:
        return 0
    tools, system = _similar_tools(old, new), similar_system(old, new)
    if again or (end < len(new) and new.role(end) is Role.ASSISTANT):
        # Two requests without tools are no more alike for that.
        return new.start(end) if system or (tools and new.tools) else 0
    # All they have in common is the question. With tools and system prompt alike it is a retry
    # with a change; otherwise a side call about the question.
    return new.start(end) if end == len(new) and tools and system else 0


def similar_system(old: Fingerprint, new: Fingerprint) -> bool:
    """Whether the two system prompts are versions of one, rather than two different ones."""
    ours, theirs = range(new.counts[0], new.static_parts), range(old.counts[0], old.static_parts)
    if not ours or not theirs:
        return not ours and not theirs
    known = Counter(old.hash(i) for i in theirs)
    same = sum(new.size(i) for i in ours if known[new.hash(i)])
    if same * 4 >= max(new.tokens_of(ours), old.tokens_of(theirs)):
        return True
    return any(similar(old, i, new, j) for i, j in zip(theirs, ours, strict=False))


def similar(old: Fingerprint, i: int, new: Fingerprint, j: int) -> bool:
    """Whether part ``j`` of ``new`` looks like an edited version of part ``i`` of ``old``."""
    if old.role(i) is not new.role(j):
        return False
    small, large = sorted((old.chars[i], new.chars[j]))
    (head, tail), (new_head, new_tail) = old.edges_of(i), new.edges_of(j)
    if any(head) and any(new_head):
        return (head == new_head or tail == new_tail) and 2 * small >= large
    # Too short to tell its ends apart; its size is all there is to go by.
    return large - small <= _SIMILAR_CHARS


def _last_common_turn(
    old: Fingerprint, new: Fingerprint, theirs: Sequence[int], ours: Sequence[int]
) -> int | None:
    """Return the end in ``new`` of the last answer that stands in both beside one neighbour.

    The neighbour has to be of another message: an answer that is quoted in another conversation
    stands there without it.

    Args:
        old: the earlier request.
        new: the request.
        theirs: the hashes of the last parts of ``old``.
        ours: the hashes of the last parts of ``new``.
    """
    kinds = old.kinds[len(old) - len(theirs) + 1 :]
    pairs = {pair for pair, kind in zip(pairwise(theirs), kinds, strict=True) if kind & _STARTS}
    for k in reversed(range(len(ours) - 1)):
        if (ours[k], ours[k + 1]) not in pairs:
            continue
        at = len(new) - len(ours) + k
        if new.has(at + 1, Trait.STARTS) and Role.ASSISTANT in (new.role(at), new.role(at + 1)):
            return at + 2
    return None


def _edited_last_turn(old: Fingerprint, new: Fingerprint, at: int) -> int | None:
    """Return where in ``new`` the last message of ``old`` ends, if it was edited from ``at`` on.

    None if nothing shows such an edit. The message has an answer in ``new``: so the client sent
    ``old`` with that edit, in a request that was not seen.
    """
    last = len(old)
    while last > at and old.role(last - 1) is not Role.ASSISTANT:
        last -= 1
    if last > at:
        # The edit is in an earlier message. The last one must stand in ``new`` as it was, and be
        # answered there.
        message = part_hashes(old, range(last, len(old)))
        ours = part_hashes(new, range(at, len(new)))
        for k in range(len(ours) - len(message)):
            end = at + k + len(message)
            if message and ours[k : k + len(message)] == message:
                return end if new.role(end) is Role.ASSISTANT else None
        return None
    end = next((j for j in range(at, len(new)) if new.role(j) is Role.ASSISTANT), at)
    if end == at:
        return None
    of_one = any(new.role(j) is Role.ASSISTANT for j in range(new.static_parts, at))
    again = not set(part_hashes(old, range(at, len(old)))).isdisjoint(
        part_hashes(new, range(at, end))
    )
    edited = at < len(old) and similar(old, at, new, at)
    return end if of_one or again or edited else None


def _respelled_turns(old: Fingerprint, new: Fingerprint, at: int) -> int | None:
    """Return where in ``new`` the turns of ``old`` end, if they all stand there in their places,
    spelled in another way from ``at`` on; None if they do not."""
    last = old.last_answer
    if last is None or last < at:
        return None
    same = common_items(old.loose, new.loose)
    return same if same > last else None


def _similar_tools(old: Fingerprint, new: Fingerprint) -> bool:
    ours, theirs = {tool.name for tool in new.tools}, {tool.name for tool in old.tools}
    if not ours or not theirs:
        return not ours and not theirs
    return 2 * len(ours & theirs) >= len(ours | theirs)
