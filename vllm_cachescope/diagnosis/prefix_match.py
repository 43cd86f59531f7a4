"""The prefix match of two requests: how far they agree, from the first token on."""

from dataclasses import dataclass

from vllm_cachescope.diagnosis.alignment import common_items, common_pieces, part_hashes
from vllm_cachescope.diagnosis.fingerprint import HASH_BYTES, Fingerprint
from vllm_cachescope.diagnosis.parameters import ROUTING_PARAMS, is_front
from vllm_cachescope.diagnosis.part_kind import Role
from vllm_cachescope.prompt.request import Protocol


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The leading parts and tokens that a request has in common with an earlier one.

    Attributes:
        parts: how many leading parts are equal in both.
        tokens: estimated tokens in them, and in the equal beginning of the first part that differs.
        whole: whether the request begins with all of the earlier one.
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
        # Where the sizes of parts are no estimates, pieces still are: never more than the part.
        begun = min(inside * new.piece_tokens, new.size(parts)) if inside else 0
        last = parts == len(old) - 1
        if last and inside and _grew(old, new, parts, inside):
            return PrefixMatch(parts, old.tokens, True)
        # An answer that the client began and the server went on with.
        if last and old.role(parts) is Role.ASSISTANT and new.role(parts) is Role.ASSISTANT:
            return PrefixMatch(parts, tokens + begun, True)
        tokens += begun
    return PrefixMatch(parts, min(tokens, old.tokens, new.tokens), False)


def diverges_alike(old: Fingerprint, other: Fingerprint, shared: PrefixMatch) -> bool:
    """Whether a request agrees with ``old`` exactly as far as with ``other``.

    It does if the two are equal up to and including the part at which it diverges from ``other``,
    and go on after that part.

    Args:
        old: an earlier request.
        other: another one.
        shared: how far the request agrees with ``other``.
    """
    parts = shared.parts + 1
    return (
        not shared.whole
        and len(old) > parts < len(other)
        and old.hashes[: parts * HASH_BYTES] == other.hashes[: parts * HASH_BYTES]
        and old.kinds[:parts] == other.kinds[:parts]
        and old.model == other.model
        and old.params == other.params
    )


def diverges_here(old: Fingerprint, new: Fingerprint, shared: PrefixMatch) -> bool:
    """Whether ``new`` agrees with ``old`` no further than ``shared``.

    It does not if the two differ at the first part after ``shared``, and that part is too short to
    find an equal beginning inside it.

    Args:
        old: an earlier request that agrees with ``new`` on all of ``shared.parts``.
        new: the request.
        shared: how far ``new`` agrees with the best earlier request so far.
    """
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
    return (
        old.counts[:2] == new.counts[:2]
        and shared.parts >= static
        and _agreement(old, new) == len(new)
    )


def may_share(old: Fingerprint, new: Fingerprint, parts: range) -> bool:
    """Whether any of ``parts`` of ``new`` may stand in ``old``. False means that none does.

    It searches the packed hashes for bytes, which costs next to nothing, but may find a hash that
    two neighbours form by chance.
    """
    hashes = old.hashes
    return any(new.hash(part) in hashes for part in parts)


def is_unrelated(old: Fingerprint, static: bytes, messages: frozenset[int]) -> bool:
    """Whether an earlier request has another beginning than a request and no message of it.

    Args:
        old: the earlier request.
        static: the request's `Fingerprint.static_hashes`.
        messages: the hashes of the request's messages, as `part_hashes` returns them.
    """
    if old.static_hashes == static:
        return False
    return messages.isdisjoint(part_hashes(old, range(old.static_parts, len(old))))


def is_answer_to_less(old: Fingerprint, new: Fingerprint, shared: PrefixMatch) -> bool:
    """Whether ``new`` goes on from ``old`` without the last blocks of its last message.

    A client may end its latest message with a reminder, and leave the reminder out once the
    message was answered. That costs nothing: the reminder stood at the end.
    """
    at = shared.parts
    return (
        at > new.static_parts
        and at < len(new)
        and new.role(at) is Role.ASSISTANT
        and not any(old.role(i) is Role.ASSISTANT for i in range(at, len(old)))
    )


def _agreement(old: Fingerprint, new: Fingerprint) -> int:
    """Return how many leading parts can be the same to the engine, by model and parameters."""
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
