"""The fingerprint of a request: hashes and no text, by which the next request is compared.

Names stay readable, because a report must name them: the model, the tools, the parameters. All
values, tool schemas and prompt text are kept as keyed 64-bit hashes with their sizes. Without the
secret, nobody can test a guess at a text against a fingerprint.
"""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vllm_cachescope.diagnosis.part_kind import ROLE_BITS, Role, Trait
from vllm_cachescope.diagnosis.token_estimate import BYTES_PER_TOKEN
from vllm_cachescope.prompt.request import Protocol, Region
from vllm_cachescope.tenancy.scope import Scope

HASH_BYTES = 8

_PIECE_BYTES = 2048
_PROMPT_PIECE_BYTES = 512  # where a prompt is one text, only its pieces show where it diverges

_ASSISTANT, _ANSWER = int(Role.ASSISTANT), int(Role.ASSISTANT) | int(Trait.STARTS)


def piece_bytes(protocol: Protocol) -> int:
    """Return the size of a piece, in bytes. A part longer than that is also hashed in pieces, to
    find where inside it two requests diverge."""
    return _PROMPT_PIECE_BYTES if protocol is Protocol.COMPLETIONS else _PIECE_BYTES


@dataclass(frozen=True, slots=True)
class ToolFingerprint:
    """The fingerprint of one tool.

    Attributes:
        name: the client's name for the tool; a built-in tool without a name goes by its type.
        ordered: hash of its JSON as it was sent. The rendered prompt keeps the order of keys.
        unordered: hash of its JSON with keys sorted at every depth.
        fields: names of its fields; those inside OpenAI's ``function`` object count as its own.
        field_hashes: a hash of each, keys sorted, `HASH_BYTES` long, in the order of ``fields``.
    """

    name: str
    ordered: bytes
    unordered: bytes
    fields: tuple[str, ...]
    field_hashes: bytes

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes."""
        fields = 50 * len(self.fields) + sum(map(len, self.fields))
        return 300 + len(self.name) + fields + len(self.field_hashes)

    def field_map(self) -> dict[str, bytes]:
        """Return the hash of each field by its name."""
        return {name: hash_at(self.field_hashes, i) for i, name in enumerate(self.fields)}


@dataclass(frozen=True, slots=True)
class MarkFingerprint:
    """The fingerprint of one breakpoint marker.

    Attributes:
        part: index of the part that it ends.
        path: where it stands, as in ``tools[7].cache_control``.
        ttl_s: the lifetime that the client asked for, in seconds; None for the default.
        scope: how widely the client lets it be shared; None for the default.
    """

    part: int
    path: str
    ttl_s: int | None
    scope: Scope | None


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """A request without its text, packed.

    Parts are numbered in prompt order over all regions: tools first, then system, then messages.

    Attributes:
        protocol: the wire format it came in.
        model: the model's name, cut to 100 characters.
        tools: its tools; index i is part i.
        counts: number of parts in each region.
        hashes: for each part, the hash of its content and its role, `HASH_BYTES` long; its
            breakpoint is not in it.
        kinds: for each part, one byte: a `Role` and `Trait` bits.
        ends: for each part, the estimated tokens of the prompt up to its end.
        chars: for each part, its length in characters.
        loose: for each part, a hash that the same content has in any spelling: other spaces, other
            ids of tool calls, another order of a call's arguments. `HASH_BYTES` long.
        edges: for each part, a hash of its first 128 bytes and one of its last; zeros where it is
            shorter than both.
        pieces: of each part longer than `piece_bytes`, the hashes of its leading pieces.
        piece_ends: for each part, the number of hashes in ``pieces`` up to its last.
        paths: the parts' paths in the client's body, a line each.
        marks: its breakpoints.
        params: hashes of the parameters that can change the prompt, by name.
        automatic: whether everything is to be cached, breakpoint or not.
        ttl_s: lifetime the request as a whole asks for, in seconds.
        previous_id: id of the response that the request continues without repeating the
            conversation; None if it repeats it.
    """

    protocol: Protocol
    model: str
    tools: tuple[ToolFingerprint, ...]
    counts: tuple[int, int, int]
    hashes: bytes
    kinds: bytes
    ends: "array[int]"
    chars: "array[int]"
    loose: bytes
    edges: bytes
    pieces: bytes
    piece_ends: "array[int]"
    paths: str
    marks: tuple[MarkFingerprint, ...]
    params: Mapping[str, bytes]
    automatic: bool
    ttl_s: int | None
    previous_id: str | None

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def tokens(self) -> int:
        """Estimated tokens of the whole prompt."""
        return self.ends[-1] if self.ends else 0

    @property
    def covered_tokens(self) -> int:
        """Estimated tokens up to the last breakpoint; all of them where caching is automatic."""
        if self.automatic:
            return self.tokens
        return max((self.ends[mark.part] for mark in self.marks), default=0)

    @property
    def static_parts(self) -> int:
        """Number of parts before the messages."""
        return self.counts[Region.TOOLS] + self.counts[Region.SYSTEM]

    @property
    def static_hashes(self) -> bytes:
        """The hashes of the parts before the messages, packed."""
        return self.hashes[: self.static_parts * HASH_BYTES]

    @property
    def message_hashes(self) -> bytes:
        """The hashes of the messages' parts, packed."""
        return self.hashes[self.static_parts * HASH_BYTES :]

    @property
    def opening(self) -> bytes:
        """A hash of how its messages begin; empty without messages.

        Equal for all requests of one conversation, even where its tools or system prompt change.
        """
        first = self.static_parts
        if first == len(self):
            return b""
        return self.pieces_of(first)[:HASH_BYTES] or self.hash(first)

    @property
    def last_answer(self) -> int | None:
        """Index of the last part of the model's last answer; None if no answer is in it."""
        kinds = self.kinds
        for part in reversed(range(self.static_parts, len(kinds))):
            if kinds[part] & ROLE_BITS == _ASSISTANT:
                return part
        return None

    @property
    def is_opening(self) -> bool:
        """Whether no answer of the model is in its messages: it opens a conversation."""
        return self.last_answer is None

    @property
    def parent_parts(self) -> int:
        """How many parts the request that it goes on from must have had.

        Those before the model's last answer, since a client repeats the conversation up to there;
        0 if no answer is in it.
        """
        last = self.last_answer
        if last is None:
            return 0
        while last > self.static_parts and self.role(last - 1) is Role.ASSISTANT:
            last -= 1
        return last

    @property
    def piece_tokens(self) -> int:
        """Estimated tokens in one of ``pieces``."""
        return piece_bytes(self.protocol) // BYTES_PER_TOKEN

    def region(self, part: int) -> Region:
        """Return the region of ``part``; past the end is the messages' region."""
        if part < self.counts[Region.TOOLS]:
            return Region.TOOLS
        return Region.SYSTEM if part < self.static_parts else Region.MESSAGES

    def hash(self, part: int) -> bytes:
        """Return the hash of ``part``."""
        return hash_at(self.hashes, part)

    def hashes_of(self, parts: range) -> bytes:
        """Return the hashes of ``parts``, packed."""
        return self.hashes[parts.start * HASH_BYTES : parts.stop * HASH_BYTES]

    def edges_of(self, part: int) -> tuple[bytes, bytes]:
        """Return the hashes of the beginning and the end of ``part``, zeros if it is short."""
        return hash_at(self.edges, 2 * part), hash_at(self.edges, 2 * part + 1)

    def start(self, part: int) -> int:
        """Return the estimated tokens before ``part``."""
        return self.ends[part - 1] if part else 0

    def size(self, part: int) -> int:
        """Return the estimated tokens in ``part``."""
        return self.ends[part] - self.start(part)

    def tokens_of(self, parts: range) -> int:
        """Return the estimated tokens in ``parts``."""
        return self.start(parts.stop) - self.start(parts.start) if parts else 0

    def role(self, part: int) -> Role:
        """Return the role of ``part``."""
        return Role(self.kinds[part] & ROLE_BITS)

    def has(self, part: int, trait: Trait) -> bool:
        """Whether ``part`` has ``trait``."""
        return bool(self.kinds[part] & int(trait))

    def pieces_of(self, part: int) -> bytes:
        """Return the hashes of the leading pieces of ``part``."""
        first = self.piece_ends[part - 1] if part else 0
        return self.pieces[first * HASH_BYTES : self.piece_ends[part] * HASH_BYTES]

    def path(self, part: int) -> str:
        """Return the path of ``part`` in the client's body."""
        return self.paths.split("\n", part + 1)[part]

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes; tools that it shares with others in full."""
        packed = 2 * len(self.hashes) + len(self.kinds) + len(self.edges) + len(self.pieces)
        arrays = 4 * (len(self.ends) + len(self.chars) + len(self.piece_ends))
        tools = sum([tool.nbytes for tool in self.tools])
        return packed + arrays + len(self.paths) + tools + 160 * len(self.params) + 1500

    def after(self, parent: "Fingerprint") -> "Fingerprint":
        """Return this request with the messages of ``parent`` before its own.

        For a request that names the response it continues (``previous_response_id``) instead of
        repeating the conversation. The server puts that response's answer between the two. Its
        text is not known here; the hash of the response's id stands in its place.
        """
        own, old = self.static_parts, parent.static_parts
        shift = self.start(own) - parent.start(old)
        middle = parent.tokens + shift
        # The first message part of ``self`` is the reference: it becomes the answer.
        rest = own + 1
        extra = middle - self.ends[own]
        answered = parent.piece_ends[-1] - (parent.piece_ends[old - 1] if old else 0)
        before = self.piece_ends[own - 1] if own else 0
        first = parent.piece_ends[old - 1] if old else 0
        skipped = self.piece_ends[own]
        own_paths, old_paths = self.paths.split("\n"), parent.paths.split("\n")
        return replace(
            self,
            counts=(*self.counts[:2], self.counts[2] + parent.counts[2]),
            hashes=self.hashes[: own * HASH_BYTES]
            + parent.hashes[old * HASH_BYTES :]
            + self.hash(own)
            + self.hashes[rest * HASH_BYTES :],
            kinds=self.kinds[:own] + parent.kinds[old:] + bytes((_ANSWER,)) + self.kinds[rest:],
            ends=array(
                "I",
                [
                    *self.ends[:own],
                    *(end + shift for end in parent.ends[old:]),
                    middle,
                    *(end + extra for end in self.ends[rest:]),
                ],
            ),
            chars=self.chars[:own] + parent.chars[old:] + array("I", [0]) + self.chars[rest:],
            loose=self.loose[: own * HASH_BYTES]
            + parent.loose[old * HASH_BYTES :]
            + self.loose[own * HASH_BYTES :],
            edges=self.edges[: 2 * own * HASH_BYTES]
            + parent.edges[2 * old * HASH_BYTES :]
            + bytes(2 * HASH_BYTES)
            + self.edges[2 * rest * HASH_BYTES :],
            pieces=self.pieces[: before * HASH_BYTES]
            + parent.pieces[first * HASH_BYTES :]
            + self.pieces[skipped * HASH_BYTES :],
            piece_ends=array(
                "I",
                [
                    *self.piece_ends[:own],
                    *(end - first + before for end in parent.piece_ends[old:]),
                    before + answered,
                    *(end - skipped + before + answered for end in self.piece_ends[rest:]),
                ],
            ),
            paths="\n".join((*own_paths[:own], *old_paths[old:], *own_paths[own:])),
            marks=tuple(
                replace(mark, part=mark.part + (parent.counts[2] if mark.part >= own else 0))
                for mark in self.marks
            ),
        )


def hash_at(packed: bytes, index: int) -> bytes:
    """Return the hash at ``index`` of a packed list of hashes."""
    return packed[index * HASH_BYTES : (index + 1) * HASH_BYTES]
