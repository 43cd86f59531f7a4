"""What is remembered of a request so that the next one can be compared with it: hashes, no text.

Names stay readable, because a report must name them: the model, the tools, the parameters. All
values, tool schemas and prompt text are kept as keyed 64-bit hashes with their sizes. Without the
secret, nobody can test a guess at a text against a fingerprint.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from hashlib import sha256
from hmac import digest
from itertools import accumulate, chain, groupby
from operator import attrgetter
from typing import Any, TypeVar

import msgspec
from cachetools import LRUCache
from pydantic_core import PydanticSerializationError, to_json

from vllm_cachescope.prompt.request import Part, PromptRequest, Protocol, Region
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.wire.billing_header import drop_billing_headers

HASH_BYTES = 8
BYTES_PER_TOKEN = 4
"""Estimate for English text and code under byte-level BPE vocabularies. Only estimates use it:
counts that reach a bill come from the engine."""

CHUNK_BYTES = 2048
"""A part longer than this is also hashed in pieces of this size, to find where inside it two
requests diverge."""
_PROMPT_CHUNK_BYTES = 512  # of a prompt that is one text: all there is to find the place by
_MAX_CHUNKS = 1024

_EDGE_BYTES = 128  # hashed at both ends of a part, to know an edited part from another one
_IMAGE_TOKENS = 1600  # about what vision models spend on a large image; its base64 tells nothing

# Parts of a region beyond these counts are hashed as one, so that a body of a hundred thousand
# tools costs no more to keep than one of a few hundred.
_MAX_PARTS = {Region.TOOLS: 512, Region.SYSTEM: 256, Region.MESSAGES: 4096}
_MAX_PARAMS = 64
_MAX_MARKS = 16
_MAX_NAME = 100
_MAX_FIELDS = 16

_ORDERED = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_SORTED = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True)

_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_COMPACTION_TYPES = ("compaction", "compaction_summary", "context_compaction")
_SUMMARY_WORDS = (
    "summary",
    "summarized",
    "summarised",
    "compacted",
    "compaction",
    "continued from a previous",
    "previous conversation",
    "conversation so far",
)
_SUMMARY_HEAD = 400  # characters in which a summary says that it is one

_T = TypeVar("_T")

_region_of = attrgetter("region")


class Role(IntEnum):
    """Whose a part is. Roles a client invents are all `OTHER`."""

    NONE = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TOOL = 4
    DEVELOPER = 5
    OTHER = 6


class Trait(IntFlag):
    """What else is known of a part, in the bits above its role.

    STARTS: it is the first of its message. SUMMARY: its first words say that it summarises
    earlier turns. COMPACTION: it is a block by which a client declares a compaction.
    """

    STARTS = 0x10
    SUMMARY = 0x20
    COMPACTION = 0x40


ROLE_BITS = 0x0F
"""Where in a part's kind its `Role` is."""

# Plain integers: operators of enum classes cost a microsecond each, some hundred times a request.
_ROLES = {role.name.lower(): int(role) for role in Role if role is not Role.OTHER}
_OTHER, _ASSISTANT, _USER = int(Role.OTHER), int(Role.ASSISTANT), int(Role.USER)
_SYSTEM, _TOOL, _NONE = int(Role.SYSTEM), int(Role.TOOL), int(Role.NONE)
_STARTS, _SUMMARY, _COMPACTION = int(Trait.STARTS), int(Trait.SUMMARY), int(Trait.COMPACTION)


@dataclass(frozen=True, slots=True)
class ToolFingerprint:
    """One tool.

    Attributes:
        name: what the client calls it; a built-in tool without a name goes by its type.
        ordered: hash of its JSON as it was sent. The rendered prompt keeps the order of keys.
        unordered: the same with keys sorted at every depth.
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
        return {name: _at(self.field_hashes, i) for i, name in enumerate(self.fields)}


@dataclass(frozen=True, slots=True)
class MarkFingerprint:
    """A breakpoint: the index of the part it ends, its path, and what the client asked for."""

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
        hashes: `HASH_BYTES` for each part: its content and its role; not its breakpoint.
        kinds: a byte for each part: a `Role` and `Trait` bits.
        ends: for each part, the estimated tokens of the prompt up to its end.
        chars: characters in each part.
        edges: twice `HASH_BYTES` for each part, of its first and its last bytes; zeros where it
            is short.
        chunks: hashes of the leading pieces of long parts, `HASH_BYTES` each.
        chunk_ends: for each part, the number of hashes in ``chunks`` up to its last.
        paths: the parts' paths, a line each.
        marks: its breakpoints.
        params: hashes of the parameters that can change the prompt, by name.
        automatic: whether everything is to be cached without being marked.
        ttl_s: lifetime the request as a whole asks for, in seconds.
        previous_id: the response it continues by reference instead of repeating it.
    """

    protocol: Protocol
    model: str
    tools: tuple[ToolFingerprint, ...]
    counts: tuple[int, int, int]
    hashes: bytes
    kinds: bytes
    ends: "array[int]"
    chars: "array[int]"
    edges: bytes
    chunks: bytes
    chunk_ends: "array[int]"
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
        """How its messages begin: what the requests of one conversation have in common, whatever
        becomes of its tools and system prompt. Empty without messages."""
        first = self.static_parts
        if first == len(self):
            return b""
        return self.chunks_of(first)[:HASH_BYTES] or self.hash(first)

    @property
    def chunk_tokens(self) -> int:
        """Estimated tokens in one of ``chunks``."""
        size = _PROMPT_CHUNK_BYTES if self.protocol is Protocol.COMPLETIONS else CHUNK_BYTES
        return size // BYTES_PER_TOKEN

    def region(self, part: int) -> Region:
        """Return the region of ``part``; past the end is the messages' region."""
        if part < self.counts[Region.TOOLS]:
            return Region.TOOLS
        return Region.SYSTEM if part < self.static_parts else Region.MESSAGES

    def hash(self, part: int) -> bytes:
        """Return the hash of ``part``."""
        return _at(self.hashes, part)

    def hashes_of(self, parts: range) -> bytes:
        """Return the hashes of ``parts``, packed."""
        return self.hashes[parts.start * HASH_BYTES : parts.stop * HASH_BYTES]

    def edges_of(self, part: int) -> tuple[bytes, bytes]:
        """Return the hashes of the beginning and the end of ``part``, zeros if it is short."""
        return _at(self.edges, 2 * part), _at(self.edges, 2 * part + 1)

    def start(self, part: int) -> int:
        """Return the estimated tokens before ``part``."""
        return self.ends[part - 1] if part else 0

    def size(self, part: int) -> int:
        """Return the estimated tokens in ``part``."""
        return self.ends[part] - self.start(part)

    def role(self, part: int) -> Role:
        """Return whose ``part`` is."""
        return Role(self.kinds[part] & ROLE_BITS)

    def has(self, part: int, trait: Trait) -> bool:
        """Whether ``part`` has ``trait``."""
        return bool(self.kinds[part] & int(trait))

    def chunks_of(self, part: int) -> bytes:
        """Return the hashes of the leading pieces of ``part``."""
        first = self.chunk_ends[part - 1] if part else 0
        return self.chunks[first * HASH_BYTES : self.chunk_ends[part] * HASH_BYTES]

    def path(self, part: int) -> str:
        """Return the path of ``part`` in the client's body."""
        return self.paths.split("\n", part + 1)[part]

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes, shared tool prints counted in full."""
        packed = len(self.hashes) + len(self.kinds) + len(self.edges) + len(self.chunks)
        arrays = 4 * (len(self.ends) + len(self.chars) + len(self.chunk_ends))
        tools = sum([tool.nbytes for tool in self.tools])
        return packed + arrays + len(self.paths) + tools + 160 * len(self.params) + 1500

    def after(self, parent: "Fingerprint") -> "Fingerprint":
        """Return this request with the messages of ``parent`` before its own.

        For a request that names the response it continues instead of repeating the conversation.
        The answer itself, which the server puts between the two, is stood for by its id.
        """
        own, old = self.static_parts, parent.static_parts
        shift = self.start(own) - parent.start(old)
        middle = parent.tokens + shift
        # Its first own message part is the reference; the answer takes that part's place.
        rest = own + 1
        extra = middle - self.ends[own]
        answered = parent.chunk_ends[-1] - (parent.chunk_ends[old - 1] if old else 0)
        before = self.chunk_ends[own - 1] if own else 0
        first = parent.chunk_ends[old - 1] if old else 0
        skipped = self.chunk_ends[own]
        own_paths, old_paths = self.paths.split("\n"), parent.paths.split("\n")
        return replace(
            self,
            counts=(*self.counts[:2], self.counts[2] + parent.counts[2]),
            hashes=self.hashes[: own * HASH_BYTES]
            + parent.hashes[old * HASH_BYTES :]
            + self.hash(own)
            + self.hashes[rest * HASH_BYTES :],
            kinds=self.kinds[:own]
            + parent.kinds[old:]
            + bytes((_ASSISTANT | _STARTS,))
            + self.kinds[rest:],
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
            edges=self.edges[: 2 * own * HASH_BYTES]
            + parent.edges[2 * old * HASH_BYTES :]
            + bytes(2 * HASH_BYTES)
            + self.edges[2 * rest * HASH_BYTES :],
            chunks=self.chunks[: before * HASH_BYTES]
            + parent.chunks[first * HASH_BYTES :]
            + self.chunks[skipped * HASH_BYTES :],
            chunk_ends=array(
                "I",
                [
                    *self.chunk_ends[:own],
                    *(end - first + before for end in parent.chunk_ends[old:]),
                    before + answered,
                    *(end - skipped + before + answered for end in self.chunk_ends[rest:]),
                ],
            ),
            paths="\n".join((*own_paths[:own], *old_paths[old:], *own_paths[own:])),
            marks=tuple(
                replace(mark, part=mark.part + (parent.counts[2] if mark.part >= own else 0))
                for mark in self.marks
            ),
        )


@dataclass(frozen=True, slots=True)
class _Pack:
    """What a fingerprint keeps of parts that stand together: the tools, the system prompt or one
    message.

    Attributes:
        hashes, kinds, chars, edges, chunks, tools: as in `Fingerprint`, of these parts.
        tokens: estimated tokens in each part.
        n_chunks: how many of ``chunks`` each part has.
    """

    hashes: bytes
    kinds: bytes
    tokens: tuple[int, ...]
    chars: tuple[int, ...]
    edges: bytes
    chunks: bytes
    n_chunks: tuple[int, ...]
    tools: tuple[ToolFingerprint, ...]

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes."""
        packed = len(self.hashes) + len(self.kinds) + len(self.edges) + len(self.chunks)
        return 700 + packed + 50 * len(self.kinds) + sum(tool.nbytes for tool in self.tools)


class Fingerprinter:
    """Makes fingerprints under one secret.

    Args:
        secret: key of the hashes. Fingerprints made under different secrets are never equal.
        memo_tools: how many tools' prints to keep, so that a tool that comes with every request
            is analysed once. Looked up by the keyed hash of its full JSON.
        memo_bytes: how much memory to take for what fingerprints have of messages, lists of tools
            and system prompts, since a conversation repeats them with each turn; a message takes
            some 800 bytes.
    """

    def __init__(self, secret: bytes, memo_tools: int = 4096, memo_bytes: int = 16 << 20) -> None:
        # Keyed by what comes first: no more of a digest is kept than would let anyone go on from
        # it. Most servers have instructions for SHA-256, which make it the fastest hash there is.
        self._base = sha256(digest(secret, b"fingerprint", "sha256"))
        self._tools: LRUCache[bytes, ToolFingerprint] = LRUCache(memo_tools)
        self._packs: LRUCache[bytes, _Pack] = LRUCache(memo_bytes, lambda pack: pack.nbytes)

    def __call__(
        self, request: PromptRequest, extra: Mapping[str, Any] | None = None
    ) -> Fingerprint:
        """Return the fingerprint of ``request``.

        Args:
            request: the request.
            extra: fields to compare that `PromptRequest.params` leaves out, such as beta headers
                or the service tier, by name.
        """
        prompt = request.protocol is Protocol.COMPLETIONS
        chunk_bytes = _PROMPT_CHUNK_BYTES if prompt else CHUNK_BYTES
        parts: list[Part] = []
        packs: list[_Pack] = []
        counts = [0, 0, 0]
        for region, sent in groupby(request.parts, _region_of):
            rendered = _rendered(request.protocol, region, _folded(region, list(sent)))
            packs += [self._pack(one, chunk_bytes) for one in _messages(region, rendered)]
            parts += rendered
            counts[region] = len(rendered)
        first = parts[counts[0] + counts[1] :][:1]
        referred = bool(first) and first[0].path == "previous_response_id"
        return Fingerprint(
            protocol=request.protocol,
            model=self._name(request.model),
            tools=tuple(chain.from_iterable([pack.tools for pack in packs])),
            counts=(counts[0], counts[1], counts[2]),
            hashes=b"".join([pack.hashes for pack in packs]),
            kinds=b"".join([pack.kinds for pack in packs]),
            ends=array("I", accumulate(chain.from_iterable([pack.tokens for pack in packs]))),
            chars=array("I", chain.from_iterable([pack.chars for pack in packs])),
            edges=b"".join([pack.edges for pack in packs]),
            chunks=b"".join([pack.chunks for pack in packs]),
            chunk_ends=array("I", accumulate(chain.from_iterable([p.n_chunks for p in packs]))),
            paths="\n".join([part.path for part in parts]),
            marks=tuple(_marks(parts))[:_MAX_MARKS],
            params=self._params({**request.params, **(extra or {})}),
            automatic=request.automatic,
            ttl_s=request.ttl_s,
            previous_id=self._name(str(first[0].content)) if referred else None,
        )

    def forget(self) -> None:
        """Forget what is remembered of the tools and messages of all requests."""
        self._tools.clear()
        self._packs.clear()

    def _pack(self, parts: list[Part], chunk_bytes: int) -> _Pack:
        """Return what to keep of ``parts``, which stand together."""
        sent = [(part.role, part.content) for part in parts]
        state = self._base.copy()
        state.update(_packed((chunk_bytes, int(parts[0].region), sent)))
        return _remembered(self._packs, state.digest(), lambda: self._pack_anew(parts, chunk_bytes))

    def _pack_anew(self, parts: list[Part], chunk_bytes: int) -> _Pack:
        hashes: list[bytes] = []
        kinds, tokens, chars = bytearray(), [], []
        edges: list[bytes] = []
        chunks: list[bytes] = []
        n_chunks: list[int] = []
        tools: list[ToolFingerprint] = []
        for part in parts:
            content = part.content if part.region is Region.TOOLS else _spelt(part.content)
            form, data, text = _encoded(content)
            kind = _kind(part, text)
            hash_ = self.hash(form + bytes((kind & ROLE_BITS,)), data)
            if part.region is Region.TOOLS:
                tools.append(self.tool(part.content, hash_))
            elif not hashes:
                kind |= _STARTS
            hashes.append(hash_)
            kinds.append(kind)
            tokens.append(_estimate(content, data))
            chars.append(len(data) if text is None else len(text))
            pieces = self._pieces(data, chunk_bytes)
            edges.append(self._edges(data))
            chunks += pieces
            n_chunks.append(len(pieces))
        return _Pack(
            b"".join(hashes),
            bytes(kinds),
            tuple(tokens),
            tuple(chars),
            b"".join(edges),
            b"".join(chunks),
            tuple(n_chunks),
            tuple(tools),
        )

    def hash(self, *data: bytes | memoryview) -> bytes:
        """Return the keyed hash of ``data``, which may come in pieces."""
        state = self._base.copy()
        for piece in data:
            state.update(piece)
        return state.digest()[:HASH_BYTES]

    def _edges(self, data: bytes) -> bytes:
        """Return the hashes of the two ends of a part, zeros if it is short."""
        if len(data) < 2 * _EDGE_BYTES:
            return bytes(2 * HASH_BYTES)
        return self.hash(data[:_EDGE_BYTES]) + self.hash(data[-_EDGE_BYTES:])

    def _pieces(self, data: bytes, chunk_bytes: int) -> list[bytes]:
        """Return the hashes of the leading pieces of a part."""
        view = memoryview(data)
        whole = min(len(data) // chunk_bytes, _MAX_CHUNKS) * chunk_bytes
        return [self.hash(view[at : at + chunk_bytes]) for at in range(0, whole, chunk_bytes)]

    def tool(self, content: Any, ordered: bytes) -> ToolFingerprint:
        """Return the print of the tool ``content``; ``ordered`` is the hash of its JSON as sent."""
        return _remembered(self._tools, ordered, lambda: self._analyse(content, ordered))

    def _analyse(self, content: Any, ordered: bytes) -> ToolFingerprint:
        fields: dict[str, Any] = {}
        if isinstance(content, dict):
            fields = {str(key): value for key, value in content.items()}
            if isinstance(function := fields.get("function"), Mapping):
                del fields["function"]
                fields |= {str(key): value for key, value in function.items()}
        name = next(
            (
                value
                for key in ("name", "server_label", "type")
                if isinstance(value := fields.get(key), str) and value
            ),
            "?",
        )
        kept = dict(list(fields.items())[:_MAX_FIELDS])
        hashes = {key: self.hash(_packed(value, sort_keys=True)) for key, value in kept.items()}
        return ToolFingerprint(
            name=self._name(name),
            ordered=ordered,
            unordered=self.hash(_packed(content, sort_keys=True)),
            fields=tuple(self._name(key) for key in hashes),
            field_hashes=b"".join(hashes.values()),
        )

    def _params(self, params: Mapping[str, Any]) -> dict[str, bytes]:
        flat: dict[str, Any] = {}
        for name, value in params.items():
            # One level down, so that a report says output_config.effort and not output_config.
            if isinstance(value, Mapping) and value:
                flat |= {f"{name}.{key}": inner for key, inner in value.items()}
            else:
                flat[name] = value
        names = sorted(flat)
        kept = {
            self._name(n): self.hash(_packed(flat[n], sort_keys=True)) for n in names[:_MAX_PARAMS]
        }
        if rest := names[_MAX_PARAMS:]:
            kept["(others)"] = self.hash(_packed({n: flat[n] for n in rest}, sort_keys=True))
        return kept

    def _name(self, name: str) -> str:
        """Cut a name to a bounded length; two long names stay different."""
        if len(name) <= _MAX_NAME:
            return name
        digest = self.hash(name.encode("utf-8", "surrogatepass")).hex()
        return f"{name[: _MAX_NAME - 17]}~{digest}"


def _encoded(content: Any) -> tuple[bytes, bytes, str | None]:
    """Return what the bytes of a part are made of, they, and its text if it is nothing else."""
    text = _text(content)
    if text is not None:
        return b"t", text.encode("utf-8", "surrogatepass"), text
    if (strings := _strings(content)) is not None:
        return b"s", strings, None
    return b"j", _json(content), None


def _marks(parts: Iterable[Part]) -> Iterator[MarkFingerprint]:
    for i, part in enumerate(parts):
        if (mark := part.mark) is not None:
            yield MarkFingerprint(i, mark.path, mark.ttl_s, mark.scope)


def _remembered(memo: "LRUCache[bytes, _T]", key: bytes, make: Callable[[], _T]) -> _T:
    """Return what is in ``memo`` under ``key``, or make it."""
    try:
        return memo[key]
    except KeyError:
        made = make()
    with suppress(ValueError):  # Larger than all that may be kept.
        memo[key] = made
    return made


def _at(packed: bytes, index: int) -> bytes:
    return packed[index * HASH_BYTES : (index + 1) * HASH_BYTES]


def _folded(region: Region, parts: list[Part]) -> list[Part]:
    limit = _MAX_PARTS[region]
    if len(parts) <= limit:
        return parts
    kept, rest = parts[:limit], parts[limit:]
    path = f"{rest[0].path}…"
    last = Part(region, path, [part.content for part in rest], rest[0].role, rest[-1].mark)
    return [*kept, last]


def _rendered(protocol: Protocol, region: Region, parts: list[Part]) -> list[Part]:
    """Return ``parts`` of one region as they reach the prompt, without what vLLM leaves out."""
    if region is Region.TOOLS:
        return parts
    if protocol is Protocol.CHAT:
        # To vLLM, null is the same as no content.
        return [part for part in parts if part.content is not None]
    return drop_billing_headers(parts) if protocol is Protocol.MESSAGES else parts


def _messages(region: Region, parts: list[Part]) -> Iterator[list[Part]]:
    """Yield the parts of one region that stand together: those of one message, a system prompt's,
    and all tools, since as a rule none of them changes."""
    if region is Region.TOOLS or (parts and parts[0].path.startswith("system")):
        yield parts
        return
    for _, together in groupby(parts, _message_of):
        yield list(together)


def _message_of(part: Part) -> str:
    """Return what is equal for two parts of one message: ``messages[4``."""
    return part.path.partition("]")[0]


def _text(content: Any) -> str | None:
    """Return the text of a string or of a bare text block: both render to the same prompt."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict) and content.get("type") in _TEXT_TYPES and len(content) == 2:
        text = content.get("text")
        return text if isinstance(text, str) else None
    return None


def _spelt(content: Any) -> Any:
    """Return ``content`` in one of the spellings that vLLM reads alike.

    Of a tool's call and its result the order of the fields means nothing; a result is the same as
    a string and as a text block; vLLM parses a call's arguments where they are JSON in a string
    (`AnthropicServingMessages` and the chat renderer of vLLM 0.32). Clients change from one to the
    other: a result becomes a block when a breakpoint is put on it.
    """
    if isinstance(content, list):
        return [_spelt(one) if isinstance(one, dict) else one for one in content]
    if not isinstance(content, dict):
        return content
    if content.get("type") == "tool_result":
        fields = {name: value for name, value in sorted(content.items()) if value is not None}
        if fields.get("is_error") is False:
            del fields["is_error"]
        inner = fields.get("content")
        if isinstance(inner, list) and len(inner) == 1 and (text := _text(inner[0])) is not None:
            fields["content"] = text
        return fields
    if content.get("type") == "tool_use":
        return dict(sorted(content.items()))
    if content.get("type") == "function" and isinstance(call := content.get("function"), dict):
        return {**dict(sorted(content.items())), "function": _call(call)}
    return content


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    call = dict(sorted(function.items()))
    if isinstance(arguments := call.get("arguments"), str):
        # Left as they are where they are not JSON: the server will say so.
        with suppress(ValueError, RecursionError):
            call["arguments"] = [json.loads(arguments)]
    return call


def _kind(part: Part, text: str | None) -> int:
    if part.region is Region.TOOLS:
        return _NONE
    type_ = part.content.get("type") if isinstance(part.content, dict) else None
    type_ = type_ if isinstance(type_, str) else ""
    if part.role is not None:
        kind = _ROLES.get(part.role, _OTHER)
    elif type_.endswith("_output"):
        kind = _TOOL
    elif type_.endswith("_call") or type_ in ("reasoning", *_COMPACTION_TYPES):
        kind = _ASSISTANT
    elif part.region is Region.SYSTEM:
        kind = _SYSTEM
    else:
        kind = _USER
    if type_ in _COMPACTION_TYPES:
        kind |= _COMPACTION
    if part.region is Region.MESSAGES and text is not None and kind != _ASSISTANT:
        head = text[:_SUMMARY_HEAD].lower()
        if any(word in head for word in _SUMMARY_WORDS):
            kind |= _SUMMARY
    return kind


def _estimate(content: Any, data: bytes) -> int:
    tokens = -(-len(data) // BYTES_PER_TOKEN)
    if not isinstance(content, dict):
        return tokens
    if _is_media(content):
        return min(tokens, _IMAGE_TOKENS)
    inner = content.get("content")
    for block in inner if isinstance(inner, list) else ():
        if isinstance(block, dict) and _is_media(block):
            tokens -= max(0, len(_json(block)) // BYTES_PER_TOKEN - _IMAGE_TOKENS)
    return tokens


def _is_media(block: Mapping[str, Any]) -> bool:
    source = block.get("source")
    return block.get("type") in _IMAGE_TYPES or (
        block.get("type") == "document"
        and isinstance(source, dict)
        and source.get("type") == "base64"
    )


def _strings(content: Any) -> bytes | None:
    """Return bytes that stand for an object of strings only, such as most tool results.

    None for anything else. Each string follows its length, so nothing has to be escaped: several
    times faster than JSON, and tool results are most of a long conversation.
    """
    if type(content) is not dict:
        return None
    strings: list[str] = []
    for key, value in content.items():
        if type(value) is not str:
            return None
        strings += (f"{len(key)}:{len(value)}:", key, value)
    return "".join(strings).encode("utf-8", "surrogatepass")


def _packed(value: Any, *, sort_keys: bool = False) -> bytes:
    """Return bytes that only ``value`` has, several times as fast as `_json`."""
    try:
        return msgspec.msgpack.encode(value, order="sorted" if sort_keys else None)
    except (OverflowError, RecursionError, TypeError, ValueError):
        return _json(value, sort_keys=sort_keys)


def _json(value: Any, *, sort_keys: bool = False) -> bytes:
    """Return ``value`` as JSON bytes, whatever it holds: half a surrogate pair, any depth."""
    try:
        if not sort_keys:
            # Four times as fast as the standard library, and as particular as it is fast.
            return to_json(value)
    except (PydanticSerializationError, ValueError):
        pass
    try:
        encoder = _SORTED if sort_keys else _ORDERED
        return encoder.encode(value).encode("utf-8", "surrogatepass")
    except (RecursionError, TypeError, ValueError):
        return _flat(value, sort_keys)


def _flat(value: Any, sort_keys: bool) -> bytes:
    """Return bytes that differ for different values, without recursion."""
    out: list[bytes] = []
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Mapping):
            items = list(item.items())
            if sort_keys:
                items.sort(key=lambda pair: str(pair[0]))
            out.append(b"{%d " % len(items))
            for key, inner in reversed(items):
                stack += (inner, str(key))
        elif isinstance(item, list | tuple):
            out.append(b"[%d " % len(item))
            stack += reversed(item)
        else:
            raw = repr(item).encode("utf-8", "surrogatepass")
            out.append(b"%d:" % len(raw) + raw)
    return b"".join(out)
