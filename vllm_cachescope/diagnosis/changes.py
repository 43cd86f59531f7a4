"""A change: one difference between a request and an earlier one, and the kinds there are."""

from dataclasses import dataclass, field
from enum import StrEnum

from vllm_cachescope.diagnosis.parameters import ROUTING_PARAMS

MAX_CHANGES = 100
"""A comparison lists at most this many changes, earliest first."""

PRESENT, ABSENT = b"+", b"-"
"""A change's values where something was added or removed."""


class ChangeKind(StrEnum):
    """The kind of a difference between a request and its ancestor."""

    MODEL = "model_changed"
    PARAM_ADDED = "param_added"
    PARAM_REMOVED = "param_removed"
    PARAM_CHANGED = "param_changed"
    TOOLS_ADDED = "tools_added"
    TOOLS_REMOVED = "tools_removed"
    TOOLS_REORDERED = "tools_reordered"
    TOOL_CHANGED = "tool_changed"
    TOOL_KEYS_REORDERED = "tool_keys_reordered"
    SYSTEM_ADDED = "system_added"
    SYSTEM_REMOVED = "system_removed"
    SYSTEM_CHANGED = "system_changed"
    SYSTEM_REORDERED = "system_reordered"
    MESSAGES_ADDED = "messages_added"
    MESSAGES_REMOVED = "messages_removed"
    MESSAGES_CHANGED = "messages_changed"
    MESSAGES_REORDERED = "messages_reordered"
    HISTORY_COMPACTED = "history_compacted"
    MARK_ADDED = "mark_added"
    MARK_REMOVED = "mark_removed"
    TTL_CHANGED = "ttl_changed"
    SCOPE_CHANGED = "scope_changed"

    @property
    def area(self) -> str:
        """One of ``model``, ``params``, ``tools``, ``system``, ``messages`` and ``markers``."""
        return _AREAS[self]


_AREAS = {
    ChangeKind.MODEL: "model",
    ChangeKind.PARAM_ADDED: "params",
    ChangeKind.PARAM_REMOVED: "params",
    ChangeKind.PARAM_CHANGED: "params",
    ChangeKind.TOOLS_ADDED: "tools",
    ChangeKind.TOOLS_REMOVED: "tools",
    ChangeKind.TOOLS_REORDERED: "tools",
    ChangeKind.TOOL_CHANGED: "tools",
    ChangeKind.TOOL_KEYS_REORDERED: "tools",
    ChangeKind.SYSTEM_ADDED: "system",
    ChangeKind.SYSTEM_REMOVED: "system",
    ChangeKind.SYSTEM_CHANGED: "system",
    ChangeKind.SYSTEM_REORDERED: "system",
    ChangeKind.MESSAGES_ADDED: "messages",
    ChangeKind.MESSAGES_REMOVED: "messages",
    ChangeKind.MESSAGES_CHANGED: "messages",
    ChangeKind.MESSAGES_REORDERED: "messages",
    ChangeKind.HISTORY_COMPACTED: "messages",
    ChangeKind.MARK_ADDED: "markers",
    ChangeKind.MARK_REMOVED: "markers",
    ChangeKind.TTL_CHANGED: "markers",
    ChangeKind.SCOPE_CHANGED: "markers",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between a request and an earlier one.

    Attributes:
        kind: what differs.
        path: where in the client's body, as in ``tools[7]``; for something removed, where it stood
            before.
        token: estimated tokens of the prompt before the change.
        names: the tools or parameters that changed.
        fields: for a changed tool, which of its fields.
        before: the old model, TTL or scope, in words.
        after: the new model, TTL or scope, in words.
        chars_before: characters in the parts that were there.
        chars_after: characters in the parts that are there now.
        parts_before: how many parts were there.
        parts_after: how many parts are there now.
        part_before: number of the first part that was there, in the earlier request's
            fingerprint; None if none was there.
        value: a hash of the new value, by which a value that comes back is noticed.
        old_value: a hash of the old value.
    """

    kind: ChangeKind
    path: str
    token: int
    names: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    before: str | None = None
    after: str | None = None
    chars_before: int | None = None
    chars_after: int | None = None
    parts_before: int = 0
    parts_after: int = 0
    part_before: int | None = field(default=None, repr=False)
    value: bytes = field(default=b"", repr=False)
    old_value: bytes = field(default=b"", repr=False)

    @property
    def area(self) -> str:
        """The area that is changed, as in `ChangeKind.area`."""
        return self.kind.area

    def __str__(self) -> str:
        """Say it in a line: ``tool_changed at tools[7]: Bash (description), 9 → 12 characters``."""
        about = ", ".join(self.names)
        if self.fields:
            about += f" ({', '.join(self.fields)})"
        details = [about] if about and about != self.path else []
        if self.before is not None or self.after is not None:
            details.append(f"{self.before or 'none'} → {self.after or 'none'}")
        if self.chars_before is not None or self.chars_after is not None:
            details.append(f"{self.chars_before or 0:,} → {self.chars_after or 0:,} characters")
        line = f"{self.kind} at {self.path}"
        return f"{line}: {', '.join(details)}" if details else line

    @property
    def rekeys(self) -> bool:
        """Whether blocks of equal tokens have other hashes in the cache from here on."""
        return self.kind is ChangeKind.SCOPE_CHANGED or "cache_salt" in self.names

    @property
    def diverges(self) -> bool:
        """Whether the prompts, or the hashes of their blocks, differ from here on.

        They do not for a breakpoint that moved, a lifetime, or a parameter that only routes.
        """
        if self.area == "params":
            return not ROUTING_PARAMS.issuperset(self.names)
        return self.area != "markers" or self.kind is ChangeKind.SCOPE_CHANGED
