"""A diagnosis: why a prompt was read from the cache less far than it might have been."""

from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.diagnosis.changes import Change
from vllm_cachescope.diagnosis.flapping import FlappingField
from vllm_cachescope.repair.repair import Repair

NEW_CONTENT = "new_content"
"""Cause of the tokens that no earlier request had: the turns that were added."""

ANOTHER_REPLICA = "another replica"
"""What a replica is called to those who are not to know its name."""

UNAVOIDABLE = (
    MissCause.PARTIAL_BLOCK,
    MissCause.NO_CHECKPOINT,
    MissCause.NOT_LOOKED_UP,
    MissCause.CUT_OFF,
)
"""Causes that nobody can do anything about: a prompt's last block is only cached once it is full; a
model with sliding windows or linear attention resumes prompts only where its state was kept; a
request for the log probabilities of its prompt has to compute all of it; and a client that gives a
request up leaves its prompt computed in part."""


class DiagnosisKind(StrEnum):
    """How a request differs from the one it goes on from.

    The first five are as they should be. The rest are breaks: something in front of content that
    had been cached is not what it was. Of these, CONTEXT_COMPACTED is an expected one.
    """

    FIRST_REQUEST = "first_request"
    NEW_LINEAGE = "new_lineage"
    CONTINUATION = "continuation"
    RETRY = "retry"
    FORK = "fork"
    CONTEXT_COMPACTED = "context_compacted"
    MODEL_CHANGED = "model_changed"
    PARAMS_CHANGED = "params_changed"
    TOOLS_CHANGED = "tools_changed"
    SYSTEM_CHANGED = "system_changed"
    MESSAGES_CHANGED = "messages_changed"
    MARKERS_CHANGED = "markers_changed"

    @property
    def is_break(self) -> bool:
        """Whether it is a break, expected or not."""
        return self is DiagnosisKind.CONTEXT_COMPACTED or self.value.endswith("_changed")


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two prompts diverge.

    Attributes:
        region: ``model``, ``params``, ``tools``, ``system``, ``messages`` or ``markers``.
        path: where in the client's body, as in ``tools[7]`` or ``messages[12].content[0]``.
        token: tokens of the prompt before it; an estimate, scaled to the prompt's true length once
            that is known.
    """

    region: str
    path: str
    token: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a request could not be read from the cache as far as it might have been.

    Attributes:
        kind: how the request differs from the one that it goes on from.
        expected: whether that is as it should be. False for every break but a compaction, and for
            tokens that the cache lost.
        where: where the two prompts diverge; None if they do not.
        changes: what changed, the earliest first: ``changes[0]`` is the cause, the rest would have
            broken the prefix later.
        shared_tokens: leading tokens that some earlier request of the session has too.
        missed_tokens: tokens that could have been read but for the change.
        prompt_tokens: tokens of the whole prompt.
        uncached: every token that was not read, by cause: a `DiagnosisKind`, a `MissCause` or
            `NEW_CONTENT`, with the number of tokens.
        engine: what the engine did, as far as it explains a miss.
        suggestion: what to do about it, in a sentence; empty if there is nothing to do.
        lineage: number of the request's lineage in its session.
        parent_lineage: the lineage it branched off from, if it began one.
        ancestor_id: id of the ancestor's response, if that is known.
        flapping: the field that changed earliest, if it keeps changing.
        measured: whether the engine has counted the tokens; if not, all counts are estimates.
        waited: what the request waited for before it could read, as in "waited for memory 80 ms";
            empty if it did not.
        repaired: what was put right before the request was served, and so is no change.
    """

    kind: DiagnosisKind
    expected: bool
    where: Divergence | None
    changes: tuple[Change, ...]
    shared_tokens: int
    missed_tokens: int
    prompt_tokens: int
    uncached: tuple[tuple[str, int], ...]
    engine: tuple[CacheMiss, ...] = ()
    suggestion: str = ""
    lineage: int = 0
    parent_lineage: int | None = None
    ancestor_id: str | None = None
    flapping: FlappingField | None = None
    measured: bool = False
    waited: str = ""
    repaired: tuple[Repair, ...] = ()

    @property
    def cause(self) -> str:
        """The one cause to count this request under: a `DiagnosisKind` or a `MissCause`."""
        if self.kind.is_break and self.missed_tokens:
            return self.kind
        avoidable = [miss for miss in self.engine if miss.cause not in UNAVOIDABLE]
        if avoidable:
            return max(avoidable, key=lambda miss: miss.tokens).cause
        return self.kind

    @property
    def lost_tokens(self) -> int:
        """Tokens that had to be computed anew: the client's change cost them, or the cache lost
        them for a cause that somebody can do something about."""
        lost = sum(miss.tokens for miss in self.engine if miss.cause not in UNAVOIDABLE)
        return self.missed_tokens + lost

    @property
    def unknown_tokens(self) -> int:
        """Tokens that nothing explains the absence of: a gap in what the tiers report."""
        return sum(tokens for cause, tokens in self.uncached if cause == MissCause.UNKNOWN)

    def anonymous(self) -> "Diagnosis":
        """Return it without the names of other replicas, which are the operator's to know."""
        return replace(self, engine=tuple(map(_anonymous, self.engine)))

    @property
    def names(self) -> tuple[str, ...]:
        """The tools and parameters that changed, each once."""
        return tuple(dict.fromkeys(name for change in self.changes for name in change.names))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON, without the hashes.

        The flapping field stands under ``latch``, its public name; repairs under ``repaired``, if
        there are any.
        """
        data = {"latch" if k == "flapping" else k: v for k, v in asdict(self).items()}
        for change in data["changes"]:
            del change["value"], change["old_value"], change["part_before"]
        for miss in data["engine"]:
            if miss["replica"] is None:
                del miss["replica"]
        del data["repaired"]
        if self.repaired:
            data["repaired"] = [repair.to_dict() for repair in self.repaired]
        data["uncached"] = dict(self.uncached)
        data["cause"] = self.cause
        if not self.waited:
            del data["waited"]
        return data


def _anonymous(miss: CacheMiss) -> CacheMiss:
    if miss.replica is None:
        return miss
    detail = (miss.detail or "").replace(f"replica {miss.replica}", ANOTHER_REPLICA)
    return replace(miss, detail=detail, replica=None)
