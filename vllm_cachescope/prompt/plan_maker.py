"""The maker of plans: a prompt's segments and where they end become spans with scope keys."""

import secrets
from collections.abc import Sequence

from vllm_cachescope.prompt.open_plan import Beginning, OpenPlan, OpenSpan
from vllm_cachescope.prompt.plan import Plan, Span
from vllm_cachescope.prompt.segments import Segment
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller, Scope, ScopeKeys


class PlanMaker:
    """Makes the plans of prompts.

    Args:
        secret: key of the scope keys and of the owners.
    """

    def __init__(self, secret: bytes) -> None:
        self._keys = ScopeKeys(secret)
        self._owners = OwnerTags(secret)

    def plan(
        self,
        cut: Sequence[Segment],
        ends: Sequence[int],
        caller: Caller,
        is_listed: bool = True,
    ) -> Plan:
        """Return the plan of one prompt.

        Args:
            cut: its segments.
            ends: where each of them ends, in tokens from the start of the prompt, ascending; the
                last is the prompt's length, at least 1.
            caller: on whose behalf the prompt runs.
            is_listed: whether the caller's organisation is one that nobody can make up.
        """
        nonce = secrets.token_hex(8)
        spans: list[Span] = []
        for segment, end in zip(cut, ends, strict=True):
            if spans and end == spans[-1].end:
                continue
            key, covered = self._shared(segment, caller, nonce)
            spans.append(Span(end, segment.scope, key, segment.ttl_s, covered))
        owner = self._owners.of(caller, is_listed)
        return Plan(tuple(span for span in spans if span.end > 0), nonce, owner)

    def open_plan(
        self,
        cut: Sequence[Segment],
        beginnings: Sequence[Beginning | None],
        caller: Caller,
        is_listed: bool = True,
    ) -> OpenPlan:
        """Return the plan of one prompt whose tokens are not known here.

        Args:
            cut: its segments.
            beginnings: what each of them ends; None for the last, which ends the prompt.
            caller: as of `plan`.
            is_listed: as of `plan`.
        """
        nonce = secrets.token_hex(8)
        spans = []
        for segment, beginning in zip(cut, beginnings, strict=True):
            key, covered = self._shared(segment, caller, nonce)
            spans.append(OpenSpan(beginning, segment.scope, key, segment.ttl_s, covered))
        return OpenPlan(tuple(spans), nonce, self._owners.of(caller, is_listed))

    def _shared(self, segment: Segment, caller: Caller, nonce: str) -> tuple[str, bool]:
        """Return the scope key of a segment, and whether its tokens are kept."""
        unreadable = segment.scope is Scope.SESSION and caller.session is None
        # What nobody can read again is not worth keeping.
        covered = segment.covered and not unreadable
        return self._keys.key(segment.scope, caller, nonce), covered
