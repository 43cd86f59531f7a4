"""What repairs saved: a request compared once more, as its client sent it, with its session's
earlier ones as their client sent them.

What would have been read without any repair is what those earlier requests, unrepaired as well,
would have left. So a client that changes to another order and stays there saves once, and not with
each request.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_cachescope.diagnosis.changes import ChangeKind
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.lineage_store import LineageStore
from vllm_cachescope.diagnosis.placement import LineagePlacement
from vllm_cachescope.repair.repair import Repair, RepairKind, earliest
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shares import AccountOf, own_account

_ORG_BYTES = 4 * 2**20
_MAX_BYTES = 64 * 2**20
_WORDS = 200  # characters of a change in words: names are the client's

_KINDS = {
    RepairKind.TOOLS: (ChangeKind.TOOLS_REORDERED, ChangeKind.TOOLS_ADDED),
    RepairKind.JSON: (
        ChangeKind.TOOL_KEYS_REORDERED,
        ChangeKind.TOOL_CHANGED,
        ChangeKind.MESSAGES_CHANGED,
    ),
    RepairKind.FIELD: (
        ChangeKind.TOOL_CHANGED,
        ChangeKind.PARAM_CHANGED,
        ChangeKind.PARAM_ADDED,
        ChangeKind.PARAM_REMOVED,
    ),
    RepairKind.HEAD: (ChangeKind.SYSTEM_CHANGED, ChangeKind.MESSAGES_CHANGED),
}


@dataclass(frozen=True, slots=True)
class Unrepaired:
    """A request as its client sent it, among those of its session.

    Attributes:
        placement: its place among them.
        repairs: what was put right in it; nothing if it was served as it came.
    """

    placement: LineagePlacement
    repairs: tuple[Repair, ...]

    def saved(
        self,
        served: LineagePlacement,
        prompt_tokens: int,
        read_tokens: int,
        block_tokens: int,
        tools_behind_system: bool = False,
    ) -> tuple[Repair, ...]:
        """Return the repairs with the tokens that they saved.

        All of them are put down to the repair that stands first in the prompt: without it nothing
        behind it would have been read. Lengths of unrepaired prompts are estimates, scaled to the
        prompt's true length. What other sessions have left is not counted, nor what has expired.

        Args:
            served: the place of the request as it was served.
            prompt_tokens: its length in tokens.
            read_tokens: tokens that were read from the cache.
            block_tokens: tokens per block, of which only whole ones are read.
            tools_behind_system: whether the prompt has its tools behind the system prompt.
        """
        if not self.repairs:
            return ()
        saved, estimate = 0, self.placement.node.fingerprint.tokens
        if estimate and served.shared_tokens > self.placement.shared_tokens:
            shared = self.placement.shared_tokens
            if tools_behind_system:
                shared += self._moved_by_system_in_front()
            readable = round(shared * prompt_tokens / estimate)
            readable = min(readable, prompt_tokens)
            saved = max(0, read_tokens - readable + readable % block_tokens)
        first = earliest(self.repairs, tools_behind_system)
        return tuple(
            replace(repair, saved_tokens=saved if repair is first else 0) for repair in self.repairs
        )

    def _moved_by_system_in_front(self) -> int:
        """Return how many estimated tokens more are shared than if the tools came first: those of a
        system prompt that is as it was, less those of tools behind one that is not."""
        areas = {change.area for change in self.placement.changes if change.diverges}
        made, shared = self.placement.node.fingerprint, self.placement.shared_tokens
        tools, system = made.counts[0], made.static_parts
        if "system" in areas:
            return -min(shared, made.ends[tools - 1] if tools else 0)
        if "tools" not in areas or "params" in areas or system == tools:
            return 0
        return made.ends[system - 1] - (made.ends[tools - 1] if tools else 0)


class UnrepairedRequests:
    """The requests of sessions as their clients sent them. Not thread-safe.

    Args:
        clock: seconds, never running backwards.
        account_of: returns who answers for an organisation.
    """

    def __init__(self, clock: Callable[[], float], account_of: AccountOf = own_account) -> None:
        self._lineages = LineageStore(
            clock, org_bytes=_ORG_BYTES, max_bytes=_MAX_BYTES, account_of=account_of
        )

    def observe(
        self, caller: Caller, fingerprint: Fingerprint, repairs: tuple[Repair, ...]
    ) -> Unrepaired:
        """Place a request among those of its session.

        Args:
            caller: whose request it is.
            fingerprint: of the request as the client sent it.
            repairs: what was put right in it.
        """
        placement = self._lineages.observe(caller, fingerprint)
        changes = [change for change in placement.changes if change.diverges]
        told: list[Repair] = []
        for repair in repairs:
            of_kind = (change for change in changes if change.kind in _KINDS[repair.kind])
            change = next(of_kind, None)
            told.append(repair if change is None else replace(repair, change=str(change)[:_WORDS]))
        return Unrepaired(placement, tuple(told))

    def answered(self, caller: Caller, unrepaired: Unrepaired, response_id: str | None) -> None:
        """Note the id of a request's response, by which a client may go on from it."""
        self._lineages.answered(caller, unrepaired.placement.node, response_id)

    def drop(self, caller: Caller, unrepaired: Unrepaired) -> None:
        """Drop a request that never ran."""
        self._lineages.drop(caller, unrepaired.placement)

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Drop what is kept of ``org``, or of one session of ``org``; with None, of everyone."""
        self._lineages.purge(org, session)
