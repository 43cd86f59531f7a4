"""How far a request agrees with an earlier one, and how far it would have but for one change."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vllm_cachescope.diagnosis.fingerprint import HASH_BYTES, Fingerprint
from vllm_cachescope.diagnosis.part_kind import ROLE_BITS, Role, Trait
from vllm_cachescope.prompt.request import Protocol

ROUTING_PARAMS = frozenset({"prompt_cache_key", "service_tier", "speed"})
"""Parameters that say where or how fast to run, and never reach the prompt."""

# Parameters that a chat template renders at the start of the prompt, that replace the template, or
# that change the hash of every block.
# All others are taken to change the prompt from the messages on, as Anthropic's table of what
# invalidates the cache has it for thinking and tool_choice.
_FRONT_PARAMS = (
    "add_special_tokens",
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "reasoning",
    "reasoning_effort",
    "truncate_prompt_tokens",
    "truncation_side",
    "truncation",
)

_STARTS, _ASSISTANT = int(Trait.STARTS), int(Role.ASSISTANT)
_PLACE = 0x1F  # of a part's kind: its role, and whether it starts a message

_SIMILAR_CHARS = 32
_SUMMARY_MIN_TOKENS = 100
_SUMMARY_SURE_TOKENS = 512
_COMPACTED_MIN_TURNS = 4


Gap = tuple[range, range, bool]
"""Parts that gave way to others, and whether nothing comes after them; see `gaps`."""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """How far a request agrees with an earlier one, from the first token on.

    Attributes:
        parts: parts they share.
        tokens: estimated tokens they share, into the first part that differs.
        whole: whether all of the earlier request is shared.
    """

    parts: int
    tokens: int
    whole: bool


def match_prefix(old: Fingerprint, new: Fingerprint) -> PrefixMatch:
    """Return how much of ``old`` is a prefix of ``new``, parameters and model counted in."""
    limit = _agreement(old, new)
    # Kinds say where messages start: two blocks of one message are not two messages.
    parts = min(common_items(old.hashes, new.hashes), common_items(old.kinds, new.kinds, 1), limit)
    if parts == len(old):
        return PrefixMatch(parts, old.tokens, True)
    tokens = new.start(parts)
    if parts < limit:
        inside = common_pieces(old, parts, new, parts)
        last = parts == len(old) - 1
        if last and inside and _grew(old, new, parts, inside):
            return PrefixMatch(parts, old.tokens, True)
        # An answer that the client began and the server went on with.
        if last and old.role(parts) is Role.ASSISTANT and new.role(parts) is Role.ASSISTANT:
            return PrefixMatch(parts, tokens + inside * new.piece_tokens, True)
        tokens += inside * new.piece_tokens
    return PrefixMatch(parts, min(tokens, old.tokens, new.tokens), False)


def departs_alike(old: Fingerprint, other: Fingerprint, shared: PrefixMatch) -> bool:
    """Whether a request agrees with ``old`` as far as with ``other``, which is ``shared``: the two
    are the same up to the part at which it departs from them, and go on after it."""
    parts = shared.parts + 1
    return (
        not shared.whole
        and len(old) > parts < len(other)
        and old.hashes[: parts * HASH_BYTES] == other.hashes[: parts * HASH_BYTES]
        and old.kinds[:parts] == other.kinds[:parts]
        and old.model == other.model
        and old.params == other.params
    )


def departs_here(old: Fingerprint, new: Fingerprint, shared: PrefixMatch) -> bool:
    """Whether ``old``, which agrees with ``new`` as far as the best so far, departs from it at the
    same part, and nothing can be found inside that part."""
    at = shared.parts
    return (
        at < len(new)
        and at < len(old)
        and old.hash(at) != new.hash(at)
        and not new.pieces_of(at)
        # A last part may go on: an answer that the client began, a prompt that is one text.
        and not (
            at + 1 == len(old)
            and (new.protocol is Protocol.COMPLETIONS or new.role(at) is Role.ASSISTANT)
        )
    )


def _grew(old: Fingerprint, new: Fingerprint, part: int, inside: int) -> bool:
    """Whether a prompt that is one text went on where it ended, as far as its pieces show."""
    return (
        old.protocol is Protocol.COMPLETIONS
        and inside * HASH_BYTES == len(old.pieces_of(part))
        and old.chars[part] <= new.chars[part]
    )


def same_static(old: Fingerprint, new: Fingerprint, shared: PrefixMatch) -> bool:
    """Whether model, parameters, tools and system are the same."""
    static = new.static_parts
    return old.counts[:2] == new.counts[:2] and shared.parts >= static and same_params(old, new)


def same_params(old: Fingerprint, new: Fingerprint) -> bool:
    """Whether model and prompt-affecting parameters are the same."""
    return _agreement(old, new) == len(new)


def may_share(old: Fingerprint, new: Fingerprint, parts: range) -> bool:
    """Whether any of ``parts`` of ``new`` may stand in ``old``. False means that none does.

    A search for bytes: it may find a hash across two others, and costs next to nothing.
    """
    hashes = old.hashes
    return any(new.hash(part) in hashes for part in parts)


def is_unrelated(old: Fingerprint, static: bytes, messages: frozenset[int]) -> bool:
    """Whether ``old`` begins otherwise than a request and has no message in common with it.

    Args:
        old: the earlier request.
        static: the request's `Fingerprint.static_hashes`.
        messages: the hashes of its messages, as `split` gives them.
    """
    if old.static_hashes == static:
        return False
    return messages.isdisjoint(split(old, range(old.static_parts, len(old))))


def reusable(
    old: Fingerprint,
    new: Fingerprint,
    shared: PrefixMatch,
    parent_known: bool,
    messages: Sequence[int],
) -> int:
    """Return up to which token ``new`` would have agreed with ``old`` but for the divergence.

    0 if nothing shows that ``new`` goes on with the conversation of ``old``. What shows it is an
    answer of the model that stands in both, next to the same neighbour; the whole conversation of
    ``old`` under another model, tools or system; or a last message that was edited after it had
    been answered.

    Args:
        old: the earlier request.
        new: the request.
        shared: their overlap.
        parent_known: whether the request that ``new`` repeats and goes on from has been seen.
        messages: the hashes of ``new``'s messages, split once for all earlier requests.
    """
    if shared.whole or shared.parts == len(new):
        return 0
    static = new.static_parts
    if same_static(old, new, shared):
        at = shared.parts
        end = _last_common_turn(old, new, split(old, range(at, len(old))), messages[at - static :])
        if end is None and not parent_known:
            end = _edited_last_turn(old, new, at)
        return 0 if end is None else new.start(end)

    theirs = split(old, range(old.static_parts, len(old)))
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
        # That neither has tools shows nothing.
        return new.start(end) if system or (tools and new.tools) else 0
    # The same question in both, nothing more: a retry with a change, or a side call about it.
    return new.start(end) if end == len(new) and tools and system else 0


def similar_system(old: Fingerprint, new: Fingerprint) -> bool:
    """Whether the two system prompts are versions of one, rather than two different ones."""
    ours, theirs = range(new.counts[0], new.static_parts), range(old.counts[0], old.static_parts)
    if not ours or not theirs:
        return not ours and not theirs
    known = Counter(old.hash(i) for i in theirs)
    same = sum(new.size(i) for i in ours if known[new.hash(i)])
    if same * 4 >= max(_total(new, ours), _total(old, theirs)):
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


def compaction(
    old: Fingerprint, new: Fingerprint, found: Sequence[Gap] | None = None
) -> tuple[range, range] | None:
    """Return which parts of ``old`` gave way to which of ``new``, if that is a compaction.

    Model, tools and system are the same, but for a summary that stands last in the system prompt.
    Either the client declares it with a block of its own; or
    a run of turns gave way to something much shorter while later turns stayed; or no answer of
    the model is left, and what stands there instead says that it is a summary or, being long
    itself, is at most an eighth of what it replaced.

    Args:
        old: the earlier request.
        new: the request.
        found: the `gaps` between them after the system prompt of ``old``, where they are known.
    """
    static = _before_summary(old, new)
    if static is None:
        return None
    if found is None:
        found = list(gaps(old, new, range(static, len(old)), range(static, len(new))))
    for gone, came, tail in found:
        if gone and came and _is_compaction(old, gone, new, came, tail):
            return gone, came
    return None


def _before_summary(old: Fingerprint, new: Fingerprint) -> int | None:
    """Return the number of parts before the messages, or before a summary in front of them; None
    if not all of them are the same."""
    if old.model != new.model or old.counts[0] != new.counts[0]:
        return None
    static = max(old.static_parts, new.static_parts)
    same = min(common_items(old.hashes, new.hashes), old.static_parts, new.static_parts)
    if same == static:
        return static
    return same if same == static - 1 > new.counts[0] else None


def _is_compaction(
    old: Fingerprint, gone: range, new: Fingerprint, came: range, tail: bool
) -> bool:
    if any(new.has(j, Trait.COMPACTION) for j in came):
        return True
    before, after = _total(old, gone), _total(new, came)
    turns = sum(old.role(i) is Role.ASSISTANT for i in gone)
    if not tail:
        return turns >= 2 and 2 * after <= before and len(gone) >= 2 * len(came)
    if turns < _COMPACTED_MIN_TURNS or not is_opening(new):
        return False
    if any(new.has(j, Trait.SUMMARY) for j in came):
        return after >= _SUMMARY_MIN_TOKENS and 2 * after <= before
    return len(came) == 1 and after >= _SUMMARY_SURE_TOKENS and 8 * after <= before


def parent_parts(new: Fingerprint) -> int:
    """Return how many parts the request that ``new`` goes on from must have had.

    Those before the model's last answer, with which a client repeats a conversation; 0 if there
    is no answer in it.
    """
    last = _last_turn(new)
    if last is None:
        return 0
    while last > new.static_parts and new.role(last - 1) is Role.ASSISTANT:
        last -= 1
    return last


def is_opening(new: Fingerprint) -> bool:
    """Whether no answer of the model is in the messages: nothing precedes this request."""
    return _last_turn(new) is None


def is_answer_to_less(old: Fingerprint, new: Fingerprint, shared: PrefixMatch) -> bool:
    """Whether ``new`` goes on from ``old`` without the last blocks of its last message.

    A client may end its latest message with a reminder and leave it out once it was answered.
    Nothing is lost by that: what it leaves out stood at the end.
    """
    at = shared.parts
    return (
        at > new.static_parts
        and at < len(new)
        and new.role(at) is Role.ASSISTANT
        and not any(old.role(i) is Role.ASSISTANT for i in range(at, len(old)))
    )


def _last_turn(new: Fingerprint) -> int | None:
    kinds = new.kinds
    for i in reversed(range(new.static_parts, len(kinds))):
        if kinds[i] & ROLE_BITS == _ASSISTANT:
            return i
    return None


def _agreement(old: Fingerprint, new: Fingerprint) -> int:
    """How many parts model and parameters let the two share."""
    if old.model != new.model:
        return 0
    if old.params == new.params:
        return len(new)
    names = {
        name
        for name in old.params.keys() | new.params.keys()
        if old.params.get(name) != new.params.get(name) and name not in ROUTING_PARAMS
    }
    if not names:
        return len(new)
    return 0 if any(is_front(name) for name in names) else new.static_parts


def is_front(name: str) -> bool:
    """Whether the parameter ``name`` changes the prompt from its first token on."""
    return name.partition(".")[0] in _FRONT_PARAMS


def common_items(old: bytes, new: bytes, width: int = HASH_BYTES) -> int:
    """Number of leading items of ``width`` bytes that two packed lists share.

    One exclusive-or over the whole lists: this runs for every request kept, so no loop.
    """
    size = min(len(old), len(new))
    differ = int.from_bytes(old[:size], "big") ^ int.from_bytes(new[:size], "big")
    return (size - (differ.bit_length() + 7) // 8) // width


def common_pieces(old: Fingerprint, i: int, new: Fingerprint, j: int) -> int:
    """How many leading pieces part ``i`` of ``old`` and part ``j`` of ``new`` share."""
    if old.kinds[i] & _PLACE != new.kinds[j] & _PLACE:
        return 0
    return common_items(old.pieces_of(i), new.pieces_of(j))


def _total(print_: Fingerprint, parts: range) -> int:
    return print_.start(parts.stop) - print_.start(parts.start) if parts else 0


def split(print_: Fingerprint, parts: range) -> list[int]:
    """Return the hash of each of ``parts``, as numbers: they are quicker to make and compare."""
    return memoryview(print_.hashes).cast("Q")[parts.start : parts.stop].tolist()


def _last_common_turn(
    old: Fingerprint, new: Fingerprint, theirs: Sequence[int], ours: Sequence[int]
) -> int | None:
    """Return the end in ``new`` of the last answer that stands in both beside one neighbour.

    The neighbour is of another message: an answer quoted elsewhere brings only itself along.

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

    That message has been answered in ``new``, so an edited ``old`` must have been a request, if
    one that was not seen.
    """
    last = len(old)
    while last > at and old.role(last - 1) is not Role.ASSISTANT:
        last -= 1
    if last > at:
        # The edit is further up: the message itself must be there, and answered.
        message = split(old, range(last, len(old)))
        ours = split(new, range(at, len(new)))
        for k in range(len(ours) - len(message)):
            end = at + k + len(message)
            if message and ours[k : k + len(message)] == message:
                return end if new.role(end) is Role.ASSISTANT else None
        return None
    end = next((j for j in range(at, len(new)) if new.role(j) is Role.ASSISTANT), at)
    if end == at:
        return None
    of_one = any(new.role(j) is Role.ASSISTANT for j in range(new.static_parts, at))
    again = not set(split(old, range(at, len(old)))).isdisjoint(split(new, range(at, end)))
    edited = at < len(old) and similar(old, at, new, at)
    return end if of_one or again or edited else None


def _similar_tools(old: Fingerprint, new: Fingerprint) -> bool:
    ours, theirs = {tool.name for tool in new.tools}, {tool.name for tool in old.tools}
    if not ours or not theirs:
        return not ours and not theirs
    return 2 * len(ours & theirs) >= len(ours | theirs)


def ascending(order: Sequence[int], weight_of: Callable[[int], int] = lambda _: 1) -> list[int]:
    """Return the positions of the heaviest ascending subsequence, in O(n log n) comparisons.

    Args:
        order: distinct numbers.
        weight_of: what the number at a position weighs; as it is, the longest subsequence wins.
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
    """Yield ``(gone, came, tail)``: the parts ``gone`` of ``old`` gave way to ``came`` of ``new``.

    Between gaps the parts are equal. Equal parts are found by those that occur once on each side
    (as in patience diff) and their neighbours, so that repeated short messages do not mislead.
    ``tail`` is true for a gap that reaches the end of either side.

    Args:
        old: the earlier request.
        new: the request.
        of_old: the parts of ``old`` to look at.
        of_new: the parts of ``new`` to look at.
    """
    theirs, ours = split(old, of_old), split(new, of_new)
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
            continue  # swallowed by the run before it
        while a > low_a and b > low_b and theirs[a - 1] == ours[b - 1]:
            a, b = a - 1, b - 1
        if (a, b) != (low_a, low_b):
            yield _slice(of_old, low_a, a), _slice(of_new, low_b, b), False
        while a < len(theirs) and b < len(ours) and theirs[a] == ours[b]:
            a, b = a + 1, b + 1
        low_a, low_b = a, b
    if low_a < len(theirs) or low_b < len(ours):
        yield _slice(of_old, low_a, len(theirs)), _slice(of_new, low_b, len(ours)), True


def _slice(parts: range, start: int, stop: int) -> range:
    return range(parts.start + start, parts.start + stop)
