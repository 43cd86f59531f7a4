"""The role of a part, and what else its shape says about it: one byte for each part."""

from enum import IntEnum, IntFlag

from vllm_cachescope.prompt.request import Part, Region

ROLE_BITS = 0x0F
"""Where in a part's byte its `Role` is. The bits above are its `Trait`."""

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


class Role(IntEnum):
    """Who says a part. Roles a client invents are all `OTHER`."""

    NONE = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TOOL = 4
    DEVELOPER = 5
    OTHER = 6


class Trait(IntFlag):
    """Further traits of a part, in the bits above its role.

    Attributes:
        STARTS: the part is the first of its message.
        SUMMARY: its first words say that it summarises earlier turns.
        COMPACTION: it is a block by which a client declares a compaction.
    """

    STARTS = 0x10
    SUMMARY = 0x20
    COMPACTION = 0x40


# Plain integers: operators of enum classes cost a microsecond each, some hundred times a request.
_ROLES = {role.name.lower(): int(role) for role in Role if role is not Role.OTHER}
_OTHER, _ASSISTANT, _USER = int(Role.OTHER), int(Role.ASSISTANT), int(Role.USER)
_SYSTEM, _TOOL, _NONE = int(Role.SYSTEM), int(Role.TOOL), int(Role.NONE)
_SUMMARY, _COMPACTION = int(Trait.SUMMARY), int(Trait.COMPACTION)


def part_kind(part: Part, text: str | None) -> int:
    """Return the byte of ``part``, its `Role` and `Trait` bits, but for STARTS.

    Whether a part starts its message, only its neighbours say.

    Args:
        part: the part.
        text: its text, where it is nothing but a text.
    """
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
    if part.region is Region.MESSAGES and text is not None:
        head = text[:_SUMMARY_HEAD].lower()
        if any(word in head for word in _SUMMARY_WORDS):
            kind |= _SUMMARY
    return kind
