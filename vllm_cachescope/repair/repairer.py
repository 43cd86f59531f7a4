"""The repairer: puts right in a request what would break its prefix without need."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vllm_cachescope.config.repair import RepairChoice, RepairSettings
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.repair.editable_body import EditableBody, editable
from vllm_cachescope.repair.forms import Forms
from vllm_cachescope.repair.heads import CannotMove, Heads
from vllm_cachescope.repair.parameters import mend_parameters
from vllm_cachescope.repair.repair import Repair, RepairKind
from vllm_cachescope.repair.session_memory import (
    REFUSED,
    Lessons,
    SessionMemory,
    SessionState,
)
from vllm_cachescope.repair.tool_order import identities, in_order
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shares import AccountOf, own_account

_MAX_NAME = 256  # characters of a tool's name


@dataclass(frozen=True, slots=True)
class Mended:
    """A body after its repair.

    Attributes:
        fields: the body; the client's own object if nothing was put right.
        repairs: what was put right, one for each kind.
        lessons: what `Repairer.learn` is to remember once the server has accepted the request.
    """

    fields: dict[str, Any]
    repairs: tuple[Repair, ...]
    lessons: Lessons


class Repairer:
    """Puts requests right by what came first in their sessions. Safe for threads.

    Args:
        settings: what is put right.
        orgs: what is put right for single organisations instead, by their ids.
        clock: seconds, never running backwards.
        account_of: returns who answers for an organisation.
    """

    def __init__(
        self,
        settings: RepairSettings,
        orgs: Mapping[str, RepairChoice],
        clock: Callable[[], float],
        account_of: AccountOf = own_account,
    ) -> None:
        self._default = _Mender(settings)
        self._by_org = {org: _Mender(choice) for org, choice in orgs.items()}
        self.memory = SessionMemory(settings.max_bytes, settings.ttl, clock, account_of)

    @property
    def is_used(self) -> bool:
        """Whether anything is put right for anyone."""
        return any(mender.choice.is_on for mender in (self._default, *self._by_org.values()))

    def is_on(self, caller: Caller, protocol: Protocol) -> bool:
        """Tell whether requests of ``caller`` are put right: those that name a session, of formats
        in which tools, system prompt and messages can be told apart."""
        mender = self._by_org.get(caller.org, self._default)
        return (
            mender.choice.is_on
            and caller.session is not None
            and protocol is not Protocol.COMPLETIONS
        )

    def mend(self, caller: Caller, protocol: Protocol, fields: dict[str, Any]) -> Mended:
        """Put a body right. ``fields`` is left as it is."""
        mender = self._by_org.get(caller.org, self._default)
        return mender.mend(self.memory, caller, protocol, fields)

    def learn(self, lessons: Lessons) -> None:
        """Remember what an accepted request was the first of its session to say."""
        self.memory.learn(lessons)


class _Mender:
    """Puts requests right as one choice has it."""

    def __init__(self, choice: RepairChoice) -> None:
        self.choice = choice
        self._heads = Heads(choice.volatile_head)

    def mend(
        self, memory: SessionMemory, caller: Caller, protocol: Protocol, fields: dict[str, Any]
    ) -> Mended:
        choice, state, lessons = self.choice, memory.state(caller), memory.lessons(caller)
        if REFUSED in state.values:
            return Mended(fields, (), lessons)
        body = EditableBody(editable(fields), protocol)
        forms = Forms(state, lessons, partial(memory.text, caller))
        found: list[Repair] = []
        if choice.json_form or choice.latched_field:
            found += forms.mend_tools(body, choice.json_form, choice.latched_field)
        if choice.tools_order:
            found += _mend_order(body, state.rank, lessons)
        if choice.latched_params:
            found += mend_parameters(choice.latched_params, body, state, lessons)
        if choice.json_form:
            found += forms.mend_inputs(body)
        if choice.volatile_head:
            mended, body = self._mend_heads(body, state, lessons)
            found += mended
        return Mended(body.body if found else fields, _by_kind(found), lessons)

    def _mend_heads(
        self, body: EditableBody, state: SessionState, lessons: Lessons
    ) -> tuple[list[Repair], EditableBody]:
        for may_move in (True, False):
            heads = EditableBody(editable(body.body), body.protocol)
            try:
                return self._heads.mend(heads, state, lessons, may_move), heads
            except CannotMove:
                continue
            except UnicodeError:
                break
        return [], body


def _mend_order(body: EditableBody, rank: Mapping[str, int], lessons: Lessons) -> list[Repair]:
    tools = body.tools
    names = identities(tools)
    if not names or any(len(name) > _MAX_NAME for name in names):
        return []
    lessons.tools += [name for name in names if name not in rank]
    known = dict(rank)
    for name in lessons.tools:
        known.setdefault(name, len(known))
    ordered = in_order(tools, known)
    if ordered is None:
        return []
    places = [i for i, tool in enumerate(ordered) if identities([tool]) != [names[i]]]
    body.body["tools"] = ordered
    return [Repair(RepairKind.TOOLS, f"tools[{i}]") for i in places]


def _by_kind(found: list[Repair]) -> tuple[Repair, ...]:
    """Return one repair for each kind, with its first place and how many there are."""
    merged: dict[RepairKind, Repair] = {}
    for one in found:
        known = merged.get(one.kind)
        merged[one.kind] = one if known is None else replace(known, count=known.count + 1)
    return tuple(merged.values())
