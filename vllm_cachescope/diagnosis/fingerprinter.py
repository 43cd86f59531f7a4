"""Makes the fingerprints of requests."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from hmac import digest
from itertools import accumulate, chain, groupby, islice
from operator import attrgetter
from typing import Any, TypeVar

from vllm_cachescope.diagnosis.canonical import (
    canonical_content,
    loosened,
    packed_bytes,
    respelled,
    text_of,
)
from vllm_cachescope.diagnosis.fingerprint import (
    HASH_BYTES,
    Fingerprint,
    MarkFingerprint,
    ToolFingerprint,
    piece_bytes,
)
from vllm_cachescope.diagnosis.long_text import is_long, utf8
from vllm_cachescope.diagnosis.namespace import namespace_fields
from vllm_cachescope.diagnosis.part_kind import ROLE_BITS, Trait, part_kind
from vllm_cachescope.diagnosis.token_estimate import estimate_tokens
from vllm_cachescope.prompt.request import Part, PromptRequest, Protocol, Region
from vllm_cachescope.tenancy.shared_memo import SharedMemo
from vllm_cachescope.tenancy.shares import AccountOf, own_account
from vllm_cachescope.wire.billing_header import drop_billing_headers

_MAX_PIECES = 1024
_EDGE_BYTES = 128  # hashed at both ends of a part, to know an edited part from another one

# Parts of a region beyond these counts are hashed as one, so that a body of a hundred thousand
# tools costs no more to keep than one of a few hundred.
_MAX_PARTS = {Region.TOOLS: 512, Region.SYSTEM: 256, Region.MESSAGES: 4096}
_MAX_PARAMS = 64
_MAX_MARKS = 16
_MAX_NAME = 100
_MAX_FIELDS = 16
_MAX_INNER_FIELDS = 256  # of all tools in a namespace

_STARTS = int(Trait.STARTS)

_T = TypeVar("_T")

_region_of = attrgetter("region")


@dataclass(frozen=True, slots=True)
class _PartGroup:
    """Hashes and sizes of parts that stand together: the tools, the system prompt or one message.

    Attributes:
        hashes, kinds, chars, loose, edges, pieces, tools: as in `Fingerprint`, of these parts.
        tokens: estimated tokens in each part.
        n_pieces: how many of ``pieces`` each part has.
    """

    hashes: bytes
    kinds: bytes
    tokens: tuple[int, ...]
    chars: tuple[int, ...]
    loose: bytes
    edges: bytes
    pieces: bytes
    n_pieces: tuple[int, ...]
    tools: tuple[ToolFingerprint, ...]

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes."""
        packed = 2 * len(self.hashes) + len(self.kinds) + len(self.edges) + len(self.pieces)
        return 700 + packed + 50 * len(self.kinds) + sum(tool.nbytes for tool in self.tools)


class Fingerprinter:
    """Makes fingerprints under one secret.

    A session sends its tools, its system prompt and its messages with each turn. Their hashes are
    remembered, so that each is hashed once.

    Args:
        secret: key of the hashes. Fingerprints made under different secrets are never equal.
        memo_tools: how many tools to remember, each by the keyed hash of its full JSON.
        memo_bytes: memory for messages, lists of tools and system prompts, in bytes; a message
            takes some 800 bytes.
        account_of: returns who answers for an organisation, by its id.
        count: returns the tokens of a part, from its content and its canonical bytes.
    """

    def __init__(
        self,
        secret: bytes,
        memo_tools: int = 4096,
        memo_bytes: int = 16 << 20,
        account_of: AccountOf = own_account,
        count: Callable[[Any, bytes], int] = estimate_tokens,
    ) -> None:
        self._count = count
        # The secret's digest is the beginning of all that is hashed, and so the key. As only 8
        # bytes of a hash are kept, nobody can extend one. Most servers have instructions for
        # SHA-256: no hash is faster there.
        self._base = sha256(digest(secret, b"fingerprint", "sha256"))
        self._tools: SharedMemo[bytes, ToolFingerprint] = SharedMemo(
            memo_tools, account_of=account_of
        )
        self._groups: SharedMemo[bytes, _PartGroup] = SharedMemo(
            memo_bytes, lambda one: one.nbytes, account_of
        )

    def __call__(
        self, request: PromptRequest, extra: Mapping[str, Any] | None = None, org: str = ""
    ) -> Fingerprint:
        """Return the fingerprint of ``request``.

        Args:
            request: the request.
            extra: fields to compare that `PromptRequest.params` leaves out, such as beta headers
                or the service tier, by name.
            org: whose request it is. What is remembered of it serves no other organisation: how
                long a fingerprint takes tells nothing of them.
        """
        size = piece_bytes(request.protocol)
        parts: list[Part] = []
        groups: list[_PartGroup] = []
        counts = [0, 0, 0]
        for region, sent in groupby(request.parts, _region_of):
            rendered = _rendered(request.protocol, region, _folded(region, list(sent)))
            groups += [self._group(org, together, size) for together in _grouped(region, rendered)]
            parts += rendered
            counts[region] = len(rendered)
        first = parts[counts[0] + counts[1] :][:1]
        referred = bool(first) and first[0].path == "previous_response_id"
        return Fingerprint(
            protocol=request.protocol,
            model=self._name(request.model),
            tools=tuple(chain.from_iterable([group.tools for group in groups])),
            counts=(counts[0], counts[1], counts[2]),
            hashes=b"".join([group.hashes for group in groups]),
            kinds=b"".join([group.kinds for group in groups]),
            ends=array("I", accumulate(chain.from_iterable([group.tokens for group in groups]))),
            chars=array("I", chain.from_iterable([group.chars for group in groups])),
            loose=b"".join([group.loose for group in groups]),
            edges=b"".join([group.edges for group in groups]),
            pieces=b"".join([group.pieces for group in groups]),
            piece_ends=array(
                "I", accumulate(chain.from_iterable([group.n_pieces for group in groups]))
            ),
            paths="\n".join([part.path for part in parts]),
            marks=tuple(_marks(parts))[:_MAX_MARKS],
            params=self._params({**request.params, **(extra or {})}),
            automatic=request.automatic,
            ttl_s=request.ttl_s,
            previous_id=self._name(str(first[0].content)) if referred else None,
        )

    @property
    def remembered_tools(self) -> int:
        """How many tools are remembered now."""
        return len(self._tools)

    @property
    def remembered_groups(self) -> int:
        """How many messages, lists of tools and system prompts are remembered now."""
        return len(self._groups)

    def purge(self, org: str | None = None) -> None:
        """Purge what is remembered of the tools and messages of ``org``; with None, of all."""
        self._tools.purge(org)
        self._groups.purge(org)

    def _group(self, org: str, parts: list[Part], size: int) -> _PartGroup:
        """Return what to keep of ``parts``, which stand together.

        Args:
            org: whose they are.
            parts: as `_grouped` yields them.
            size: bytes in a piece.
        """
        sent = [(part.role, self._sent(part.content)) for part in parts]
        state = self._base.copy()
        state.update(packed_bytes((size, int(parts[0].region), sent)))
        return _remembered(
            self._groups, org, state.digest(), lambda: self._group_anew(org, parts, size)
        )

    @staticmethod
    def _sent(content: Any) -> Any:
        """Return what tells a part's content from any other: of a long text, its hash."""
        text = text_of(content)
        if text is None or not is_long(text):
            return content
        kind = None if content is text else content["type"]
        return [sha256(utf8(text)).digest(), kind]

    def _group_anew(self, org: str, parts: list[Part], size: int) -> _PartGroup:
        hashes: list[bytes] = []
        kinds, tokens, chars = bytearray(), [], []
        loose: list[bytes] = []
        edges: list[bytes] = []
        pieces: list[bytes] = []
        n_pieces: list[int] = []
        tools: list[ToolFingerprint] = []
        for part in parts:
            content = part.content if part.region is Region.TOOLS else respelled(part.content)
            form, data, text = canonical_content(content)
            kind = part_kind(part, text)
            hash_ = self._hash(form + bytes((kind & ROLE_BITS,)), data)
            if part.region is Region.TOOLS:
                tools.append(self._tool(org, part.content, hash_))
            elif not hashes:
                kind |= _STARTS
            hashes.append(hash_)
            kinds.append(kind)
            tokens.append(self._count(content, data))
            chars.append(len(data) if text is None else len(text))
            other = None if part.region is Region.TOOLS else loosened(content, text)
            loose.append(hash_ if other is None else self._hash(other))
            edges.append(self._edges(data))
            of_part = self._pieces(data, size)
            pieces += of_part
            n_pieces.append(len(of_part))
        return _PartGroup(
            b"".join(hashes),
            bytes(kinds),
            tuple(tokens),
            tuple(chars),
            b"".join(loose),
            b"".join(edges),
            b"".join(pieces),
            tuple(n_pieces),
            tuple(tools),
        )

    def _hash(self, *data: bytes | memoryview) -> bytes:
        """Return the keyed hash of ``data``, which may come in pieces."""
        state = self._base.copy()
        for piece in data:
            state.update(piece)
        return state.digest()[:HASH_BYTES]

    def _edges(self, data: bytes) -> bytes:
        """Return the hashes of the two ends of a part, zeros if it is short."""
        if len(data) < 2 * _EDGE_BYTES:
            return bytes(2 * HASH_BYTES)
        return self._hash(data[:_EDGE_BYTES]) + self._hash(data[-_EDGE_BYTES:])

    def _pieces(self, data: bytes, size: int) -> list[bytes]:
        """Return the hashes of the leading pieces of a part."""
        view = memoryview(data)
        whole = min(len(data) // size, _MAX_PIECES) * size
        return [self._hash(view[at : at + size]) for at in range(0, whole, size)]

    def _tool(self, org: str, content: Any, ordered: bytes) -> ToolFingerprint:
        """Return the fingerprint of one tool.

        Args:
            org: whose it is.
            content: the tool.
            ordered: the hash of its JSON as it was sent.
        """
        return _remembered(self._tools, org, ordered, lambda: self._analyse(content, ordered))

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
        if isinstance(inner := fields.get("tools"), list):
            del kept["tools"]
            kept |= islice(namespace_fields(inner), _MAX_INNER_FIELDS)
        hashes = {
            key: self._hash(packed_bytes(value, sort_keys=True)) for key, value in kept.items()
        }
        return ToolFingerprint(
            name=self._name(name),
            ordered=ordered,
            unordered=self._hash(packed_bytes(content, sort_keys=True)),
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
            self._name(n): self._hash(packed_bytes(flat[n], sort_keys=True))
            for n in names[:_MAX_PARAMS]
        }
        if rest := names[_MAX_PARAMS:]:
            kept["(others)"] = self._hash(packed_bytes({n: flat[n] for n in rest}, sort_keys=True))
        return kept

    def _name(self, name: str) -> str:
        """Cut a name to a bounded length; two long names stay different."""
        if len(name) <= _MAX_NAME:
            return name
        digest = self._hash(name.encode("utf-8", "surrogatepass")).hex()
        return f"{name[: _MAX_NAME - 17]}~{digest}"


def _marks(parts: Iterable[Part]) -> Iterator[MarkFingerprint]:
    for i, part in enumerate(parts):
        if (mark := part.mark) is not None:
            yield MarkFingerprint(i, mark.path, mark.ttl_s, mark.scope)


def _remembered(memo: SharedMemo[bytes, _T], org: str, key: bytes, make: Callable[[], _T]) -> _T:
    """Return what ``memo`` has of ``org`` under ``key``; otherwise make it and put it in."""
    if (known := memo.get(org, key)) is not None:
        return known
    made = make()
    memo.put(org, key, made)
    return made


def _folded(region: Region, parts: list[Part]) -> list[Part]:
    """Return ``parts`` with those beyond the region's limit as one part."""
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


def _grouped(region: Region, parts: list[Part]) -> Iterator[list[Part]]:
    """Yield the parts of one region that stand together.

    That is one message each, or the whole system prompt, or all tools: as a rule none of the tools
    changes.
    """
    if region is Region.TOOLS or (parts and parts[0].path.startswith("system")):
        yield parts
        return
    for _, together in groupby(parts, _message_of):
        yield list(together)


def _message_of(part: Part) -> str:
    """Return what is equal for two parts of one message: ``messages[4``."""
    return part.path.partition("]")[0]
