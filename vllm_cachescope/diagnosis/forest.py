"""The requests of one session: a forest, in which each request goes on from an earlier one.

A session is more than one conversation: the main agent's, subagents with prompts of their own,
titles, forks that share a prefix.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from vllm_cachescope.diagnosis.computed_prompt import ComputedPrompt
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.flapping import FlappingFields
from vllm_cachescope.prompt.request import Region

_MAX_ALIKE = 64


@dataclass(slots=True, eq=False)
class LineageNode:
    """A request in the forest of its session.

    Attributes:
        fingerprint: its fingerprint.
        lineage: number of its lineage, from 1 in each session.
        at: when it came, on the lineage store's clock, in seconds.
        superseded: whether a later request goes on from it, changed or not. A conversation may
            still fork from it, but no longer ends with it.
        continued: whether a later request goes on from it unchanged.
        response_id: the id of its response, once known.
        prompt_tokens: its length in tokens as the engine counted it, once known.
        computed: its prompts as the engine computed them, once the request is over.
        name: the name of the note on it that other replicas can read; empty if there is none.
        parent: the name of the request that it went on from.
        nonces: those of its prompts, by which this server's engines know them.
        answer: the last lines of its answer, see `answer_lines`, until a request of another
            conversation carries them; empty where the turn is not over.
    """

    fingerprint: Fingerprint
    lineage: int
    at: float
    superseded: bool = False
    continued: bool = False
    response_id: str | None = None
    prompt_tokens: int | None = None
    computed: tuple[ComputedPrompt, ...] = ()
    name: bytes = b""
    parent: bytes = b""
    nonces: tuple[str, ...] = ()
    answer: tuple[bytes, ...] = ()

    @property
    def nbytes(self) -> int:
        """About how much memory it takes, in bytes."""
        named = id_bytes(self.response_id) if self.response_id is not None else 0
        return self.fingerprint.nbytes + named + sum(prompt.nbytes for prompt in self.computed)


def id_bytes(response_id: str) -> int:
    """Return about how much memory it takes to find a request by its response's id, in bytes."""
    return 200 + len(response_id)


@dataclass(slots=True)
class Forest:
    """The requests of a session.

    Attributes:
        latest: the latest requests and ends of conversations, oldest first. A new request is
            compared with all of them.
        older: ends of conversations that have not gone on for longer, oldest first. A new request
            is compared with those that open as it does.
        by_opening: the older ones by their `Fingerprint.opening`.
        flapping: its fields that keep changing.
        lineages: how many lineages the session has had; the number of the latest one.
        nbytes: memory that its requests take, in bytes.
    """

    latest: list[LineageNode] = field(default_factory=list)
    older: dict[LineageNode, None] = field(default_factory=dict)
    by_opening: dict[bytes, list[LineageNode]] = field(default_factory=dict)
    flapping: FlappingFields = field(default_factory=FlappingFields)
    lineages: int = 0
    nbytes: int = 0

    def __len__(self) -> int:
        return len(self.latest) + len(self.older)

    def __iter__(self) -> Iterator[LineageNode]:
        yield from self.older
        yield from self.latest

    def __contains__(self, node: LineageNode) -> bool:
        return node in self.older or node in self.latest

    def candidates(self, fingerprint: Fingerprint) -> list[LineageNode]:
        """Return the requests to compare a new one with, oldest first."""
        alike = self.by_opening.get(fingerprint.opening, ())
        return [*alike[-_MAX_ALIKE:], *self.latest]

    def knows_parent_of(self, fingerprint: Fingerprint) -> bool:
        """Whether one of the requests is the one that a new one must go on from; True if that goes
        on from none. Whether its tools and system prompt were others does not matter."""
        first, parts = fingerprint.static_parts, fingerprint.parent_parts
        if parts <= first:
            return True
        wanted = fingerprint.hashes_of(range(first, parts))
        return any(
            node.fingerprint.counts[Region.MESSAGES] == parts - first
            and node.fingerprint.hashes.endswith(wanted)
            for node in self.candidates(fingerprint)
        )

    def merge(self, node: LineageNode) -> None:
        """Take in a request that another replica had."""
        self.latest.append(node)
        self.latest.sort(key=attrgetter("at"))
        self.lineages = max(self.lineages, node.lineage)

    def shelve(self, node: LineageNode) -> None:
        """Move one of ``latest`` to ``older``."""
        self.latest.remove(node)
        self.older[node] = None
        self.by_opening.setdefault(node.fingerprint.opening, []).append(node)

    def drop(self, node: LineageNode) -> None:
        """Drop one of its requests."""
        if node not in self.older:
            self.latest.remove(node)
            return
        del self.older[node]
        alike = self.by_opening[node.fingerprint.opening]
        alike.remove(node)
        if not alike:
            del self.by_opening[node.fingerprint.opening]
