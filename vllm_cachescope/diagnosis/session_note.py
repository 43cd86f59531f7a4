"""The note on a request of a session: what another replica needs to know to go on from it.

It holds hashes, counts and names, as fingerprints do, and no text of a prompt. Its times are on a
clock that the replicas share.
"""

import zlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from vllm_cachescope.cache.prefix_hashes import PrefixHashes
from vllm_cachescope.cache.report import EngineId
from vllm_cachescope.diagnosis.computed_prompt import ComputedPrompt
from vllm_cachescope.diagnosis.fingerprint import Fingerprint, MarkFingerprint, ToolFingerprint
from vllm_cachescope.diagnosis.flapping import FieldChanges
from vllm_cachescope.diagnosis.forest import LineageNode
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.repair.session_firsts import SessionFirsts
from vllm_cachescope.tenancy.scope import Scope

FORMAT = 1
"""Grows with every change of what stands in a note, or of what its hashes are made from: replicas
of different formats know nothing of each other's sessions. What is added at the end of a note, and
may be missing there, does not count: earlier versions pass over it."""

MAX_NOTE = 256 * 2**10
"""Bytes of a note as it is sent. The request of a longer one is known where it ran, and not
elsewhere."""

_MAX_PACKED = 16 * 2**20
"""Bytes that a note may unpack to."""

_LEVEL = 1  # zlib's fastest: what does not compress are hashes


@dataclass(frozen=True, slots=True)
class NoteKey:
    """Where the notes stand that belong together.

    Attributes:
        org: the organisation.
        session: the session; None for traffic that names none.
        opening: where there is no session, `Fingerprint.opening` of a conversation.
    """

    org: str
    session: str | None
    opening: bytes = b""


@dataclass(frozen=True, slots=True)
class SessionNote:
    """A request that was answered, and what it means for the one it went on from.

    Attributes:
        node: the request as its session's forest has it, with its `LineageNode.name`.
        ancestor: the name of the request that it went on from; empty if it has none, or none that
            was noted.
        supersedes: whether ``ancestor`` is superseded; see `LineageNode`.
        continues: whether ``ancestor`` is continued.
        obsolete: the name of a request that nothing goes on from any more; empty for none. Not
            part of what is packed.
        flapping: how the fields of its lineage have changed so far.
        firsts: what came first in its session; None where nothing is put right by that.
    """

    node: LineageNode
    ancestor: bytes = b""
    supersedes: bool = False
    continues: bool = False
    obsolete: bytes = b""
    flapping: tuple[FieldChanges, ...] = ()
    firsts: SessionFirsts | None = None

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes."""
        firsts = 0 if self.firsts is None else self.firsts.nbytes
        return self.node.nbytes + firsts + sum(300 + len(one.field) for one in self.flapping)

    @property
    def ttl_s(self) -> int:
        """The longest lifetime of the blocks that the request left, in seconds."""
        return max((prompt.ttl_s for prompt in self.node.computed), default=0)


class _Fields(msgspec.Struct, array_like=True, frozen=True):
    """The fields of a fingerprint, as they are packed."""

    protocol: str
    model: str
    tools: list[tuple[str, bytes, bytes, list[str], bytes]]
    counts: tuple[int, int, int]
    hashes: bytes
    kinds: bytes
    ends: bytes
    chars: bytes
    loose: bytes
    edges: bytes
    pieces: bytes
    piece_ends: bytes
    paths: str
    marks: list[tuple[int, str, int | None, int | None]]
    params: dict[str, bytes]
    automatic: bool
    ttl_s: int | None
    previous_id: str | None


class _Computed(msgspec.Struct, array_like=True, frozen=True):
    """The fields of a computed prompt, as they are packed."""

    tokens: tuple[int, bytes]
    computed_tokens: int
    blocks: tuple[int, bytes] | None
    covered_tokens: int
    readable_tokens: int
    ttl_s: int
    engine: tuple[int, str, str, list[str]]
    began: float
    computed_at: float
    used_at: float


class _Packed(msgspec.Struct, array_like=True, frozen=True):
    """A note, as it is packed."""

    name: bytes
    lineage: int
    at: float
    response_id: str | None
    prompt_tokens: int | None
    replica: str
    ancestor: bytes
    supersedes: bool
    continues: bool
    computed: list[_Computed]
    fingerprint: _Fields
    flapping: list[tuple[str, list[bytes], int, int, bool]] = []
    firsts: tuple[list[str], dict[str, bytes]] | None = None
    arrangements: list[tuple[bytes, bytes]] = []
    heads: list[tuple[str, bytes]] = []


def pack(note: SessionNote, replica: str, ahead_s: float) -> bytes:
    """Return a note as bytes.

    Args:
        note: the note.
        replica: what the operator knows this server by.
        ahead_s: how far the shared clock is ahead of the lineage store's, in seconds.
    """
    node, firsts = note.node, note.firsts
    packed = _Packed(
        node.name,
        node.lineage,
        node.at + ahead_s,
        node.response_id,
        node.prompt_tokens,
        replica,
        note.ancestor,
        note.supersedes,
        note.continues,
        [_packed_prompt(prompt, ahead_s) for prompt in node.computed],
        _packed_fingerprint(node.fingerprint),
        [(f.field, list(f.values), f.flips, f.tokens_lost, f.returns) for f in note.flapping],
        None if firsts is None else (list(firsts.tools), dict(firsts.values)),
        [] if firsts is None else list(firsts.arrangements.items()),
        [] if firsts is None else list(firsts.heads.items()),
    )
    return zlib.compress(msgspec.msgpack.encode(packed), _LEVEL)


def unpack(data: bytes, replica: str, ahead_s: float) -> SessionNote | None:
    """Return the note in ``data``; None if this version cannot read it.

    Args:
        data: from `pack`, by any version.
        replica: what the operator knows this server by.
        ahead_s: how far the shared clock is ahead of the lineage store's, in seconds.
    """
    try:
        unzip = zlib.decompressobj()
        packed = msgspec.msgpack.decode(unzip.decompress(data, _MAX_PACKED), type=_Packed)
        # What the server itself has left before it was started anew names no other replica.
        elsewhere = "" if packed.replica == replica else packed.replica
        node = LineageNode(
            _fingerprint(packed.fingerprint),
            packed.lineage,
            packed.at - ahead_s,
            response_id=packed.response_id,
            prompt_tokens=packed.prompt_tokens,
            computed=tuple(_prompt(one, elsewhere, ahead_s) for one in packed.computed),
            name=packed.name,
        )
    except (zlib.error, msgspec.MsgspecError, ValueError):
        return None
    return SessionNote(
        node,
        packed.ancestor,
        packed.supersedes,
        packed.continues,
        flapping=tuple(
            FieldChanges(name, tuple(values), flips, lost, returns)
            for name, values, flips, lost, returns in packed.flapping
        ),
        firsts=_firsts(packed),
    )


def _firsts(packed: _Packed) -> SessionFirsts | None:
    if packed.firsts is None:
        return None
    tools, values = packed.firsts
    return SessionFirsts(tuple(tools), values, dict(packed.arrangements), dict(packed.heads))


def _packed_prompt(prompt: ComputedPrompt, ahead_s: float) -> _Computed:
    engine, blocks = prompt.engine, prompt.blocks
    return _Computed(
        (prompt.tokens.step, prompt.tokens.hashes),
        prompt.computed_tokens,
        None if blocks is None else (blocks.step, blocks.hashes),
        prompt.covered_tokens,
        prompt.readable_tokens,
        prompt.ttl_s,
        (engine.rank, engine.epoch, engine.hashing, list(engine.tiers)),
        prompt.began + ahead_s,
        prompt.computed_at + ahead_s,
        prompt.used_at + ahead_s,
    )


def _prompt(packed: _Computed, replica: str, ahead_s: float) -> ComputedPrompt:
    rank, epoch, hashing, tiers = packed.engine
    return ComputedPrompt(
        PrefixHashes(*packed.tokens),
        packed.computed_tokens,
        None if packed.blocks is None else PrefixHashes(*packed.blocks),
        packed.covered_tokens,
        packed.readable_tokens,
        packed.ttl_s,
        EngineId(rank, epoch, hashing, tuple(tiers)),
        packed.began - ahead_s,
        packed.computed_at - ahead_s,
        packed.used_at - ahead_s,
        replica,
    )


def _packed_fingerprint(one: Fingerprint) -> _Fields:
    return _Fields(
        one.protocol.value,
        one.model,
        [(t.name, t.ordered, t.unordered, list(t.fields), t.field_hashes) for t in one.tools],
        one.counts,
        one.hashes,
        one.kinds,
        one.ends.tobytes(),
        one.chars.tobytes(),
        one.loose,
        one.edges,
        one.pieces,
        one.piece_ends.tobytes(),
        one.paths,
        [(m.part, m.path, m.ttl_s, None if m.scope is None else int(m.scope)) for m in one.marks],
        dict(one.params),
        one.automatic,
        one.ttl_s,
        one.previous_id,
    )


def _fingerprint(packed: _Fields) -> Fingerprint:
    params: Mapping[str, bytes] = packed.params
    return Fingerprint(
        Protocol(packed.protocol),
        packed.model,
        tuple(
            ToolFingerprint(name, ordered, unordered, tuple(fields), hashes)
            for name, ordered, unordered, fields, hashes in packed.tools
        ),
        packed.counts,
        packed.hashes,
        packed.kinds,
        array("I", packed.ends),
        array("I", packed.chars),
        packed.loose,
        packed.edges,
        packed.pieces,
        array("I", packed.piece_ends),
        packed.paths,
        tuple(
            MarkFingerprint(part, path, ttl_s, None if scope is None else Scope(scope))
            for part, path, ttl_s, scope in packed.marks
        ),
        params,
        packed.automatic,
        packed.ttl_s,
        packed.previous_id,
    )
