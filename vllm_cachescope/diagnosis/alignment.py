"""The alignment of two requests: equal parts, and gaps in which parts gave way to others."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vllm_cachescope.diagnosis.fingerprint import HASH_BYTES, Fingerprint

_PLACE_BITS = 0x1F  # of a part's kind: its role, and whether it starts a message


class Gap(NamedTuple):
    """Parts of an earlier request that gave way to parts of a later one.

    Attributes:
        gone: the parts of the earlier request; empty where parts were put in.
        came: the parts of the later request; empty where parts were removed.
        tail: whether the gap reaches the end of either request.
    """

    gone: range
    came: range
    tail: bool


def common_items(old: bytes, new: bytes, width: int = HASH_BYTES) -> int:
    """Number of leading items of ``width`` bytes that two packed lists share.

    Each new request is compared with every request kept. Hence no loop: one exclusive-or over the
    whole lists finds the first bit that differs.
    """
    size = min(len(old), len(new))
    differ = int.from_bytes(old[:size], "big") ^ int.from_bytes(new[:size], "big")
    return (size - (differ.bit_length() + 7) // 8) // width


def common_pieces(old: Fingerprint, i: int, new: Fingerprint, j: int) -> int:
    """Number of leading pieces that part ``i`` of ``old`` and part ``j`` of ``new`` share."""
    if old.kinds[i] & _PLACE_BITS != new.kinds[j] & _PLACE_BITS:
        return 0
    return common_items(old.pieces_of(i), new.pieces_of(j))


def part_hashes(fingerprint: Fingerprint, parts: range) -> list[int]:
    """Return the hash of each of ``parts``, as numbers: they are quicker to make and compare."""
    return memoryview(fingerprint.hashes).cast("Q")[parts.start : parts.stop].tolist()


def ascending(order: Sequence[int], weight_of: Callable[[int], int] = lambda _: 1) -> list[int]:
    """Return the positions of the heaviest ascending subsequence, in O(n log n) comparisons.

    Args:
        order: distinct numbers.
        weight_of: the weight of the number at a position. By default all weigh the same, and the
            longest subsequence is the heaviest.
    """
    if list(order) == sorted(order):
        return list(range(len(order)))  # As a rule: nothing changed places.
    # Ends of subsequences worth going on from: as the last number grows, so does the weight.
    ends: list[int] = []
    best: list[tuple[int, int]] = []  # (weight, position) of the subsequence with that end
    before: list[int] = []
    for k, value in enumerate(order):
        at = bisect_left(ends, value)
        weight, last = best[at - 1] if at else (0, -1)
        before.append(last)
        weight += weight_of(k)
        if at and best[at - 1][0] >= weight:
            continue
        beaten = at
        while beaten < len(ends) and best[beaten][0] <= weight:
            beaten += 1
        ends[at:beaten] = [value]
        best[at:beaten] = [(weight, k)]
    chain: list[int] = []
    k = best[-1][1] if best else -1
    while k >= 0:
        chain.append(k)
        k = before[k]
    return chain[::-1]


def gaps(old: Fingerprint, new: Fingerprint, of_old: range, of_new: range) -> Iterator[Gap]:
    """Yield the gaps between two requests, in prompt order. Between gaps the parts are equal.

    Equal parts are found by those that occur once on each side (as in patience diff) and their
    neighbours, so that repeated short messages do not mislead.

    Args:
        old: the earlier request.
        new: the later one.
        of_old: the parts of ``old`` to look at.
        of_new: the parts of ``new`` to look at.
    """
    theirs, ours = part_hashes(old, of_old), part_hashes(new, of_new)
    head = common_items(old.hashes_of(of_old), new.hashes_of(of_new))
    if head == len(theirs) == len(ours):
        return
    here, there = Counter(ours[head:]), Counter(theirs[head:])
    where = {item: k for k, item in enumerate(theirs[head:], head) if there[item] == 1}
    anchors = [
        (where[item], k)
        for k, item in enumerate(ours[head:], head)
        if here[item] == 1 and item in where
    ]
    low_a, low_b = head, head
    # Where parts changed places, the larger one is taken to have stayed.
    in_order = ascending([a for a, _ in anchors], lambda n: new.size(of_new[anchors[n][1]]))
    for n in in_order:
        a, b = anchors[n]
        if a < low_a or b < low_b:
            continue  # Within the equal parts around the anchor before it.
        while a > low_a and b > low_b and theirs[a - 1] == ours[b - 1]:
            a, b = a - 1, b - 1
        if (a, b) != (low_a, low_b):
            yield Gap(_slice(of_old, low_a, a), _slice(of_new, low_b, b), False)
        while a < len(theirs) and b < len(ours) and theirs[a] == ours[b]:
            a, b = a + 1, b + 1
        low_a, low_b = a, b
    if low_a < len(theirs) or low_b < len(ours):
        yield Gap(_slice(of_old, low_a, len(theirs)), _slice(of_new, low_b, len(ours)), True)


def _slice(parts: range, start: int, stop: int) -> range:
    return range(parts.start + start, parts.start + stop)
