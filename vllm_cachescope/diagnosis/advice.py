"""Advice on a break or a miss, in a sentence."""

from collections.abc import Sequence

from vllm_cachescope.cache.miss_causes import NO_ROOM, CacheMiss, MissCause
from vllm_cachescope.diagnosis.changes import Change, ChangeKind
from vllm_cachescope.diagnosis.flapping import FlappingField
from vllm_cachescope.diagnosis.outcome import UNAVOIDABLE, DiagnosisKind
from vllm_cachescope.durations import format_duration


def advise_on_changes(
    kind: DiagnosisKind, changes: Sequence[Change], flapping: FlappingField | None
) -> str:
    """Return what to do about the first of ``changes``; empty if there is nothing to do.

    Args:
        kind: how the request differs.
        changes: what changed, the earliest first.
        flapping: the field that changed first, if it keeps changing.
    """
    if not changes or kind is DiagnosisKind.CONTEXT_COMPACTED:
        return ""
    change = changes[0]
    advice = _CHANGE_ADVICE[change.kind].format(
        path=change.path,
        names=_list(change.names),
        fields=_list(change.fields),
        before=change.before,
        after=change.after,
    )
    if flapping is None:
        return advice
    habit = "goes back and forth" if flapping.returns else "is new each time"
    cost = f"{flapping.flips} changes so far, about {flapping.tokens_lost} tokens"
    return f"{advice} It {habit}: {cost}."


def _list(names: tuple[str, ...], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


_CHANGE_ADVICE = {
    ChangeKind.MODEL: "Stay with one model in a conversation: {after} cannot read what {before} "
    "cached.",
    ChangeKind.PARAM_ADDED: "Send {names} from the first request on, or not at all.",
    ChangeKind.PARAM_REMOVED: "Keep sending {names} as before.",
    ChangeKind.PARAM_CHANGED: "Keep {names} the same for the whole conversation.",
    ChangeKind.TOOLS_ADDED: "Send all tools from the first request on: {names} came later.",
    ChangeKind.TOOLS_REMOVED: "Keep {names} among the tools, and refuse the call instead.",
    ChangeKind.TOOLS_REORDERED: "Sort the tools by name before sending them.",
    ChangeKind.TOOL_CHANGED: "Keep {fields} of {names} fixed; move what varies into a message.",
    ChangeKind.TOOL_KEYS_REORDERED: "Serialise the schema of {names} with sorted keys.",
    ChangeKind.SYSTEM_ADDED: "Put {path} into a message: it came after the conversation began.",
    ChangeKind.SYSTEM_REMOVED: "Keep {path}, or put it into a message to begin with.",
    ChangeKind.SYSTEM_CHANGED: "Move the value that varies in {path} into the latest message.",
    ChangeKind.SYSTEM_REORDERED: "Keep the order of the system blocks from {path} on.",
    ChangeKind.MESSAGES_ADDED: "Append to the conversation: {path} was put in before its end.",
    ChangeKind.MESSAGES_REMOVED: "Keep {path} in the history, or drop much at once and seldom.",
    ChangeKind.MESSAGES_CHANGED: "Leave {path} as it was first sent; append a correction instead.",
    ChangeKind.MESSAGES_REORDERED: "Keep the order of the messages from {path} on.",
    ChangeKind.HISTORY_COMPACTED: "",
    ChangeKind.MARK_ADDED: "Set {path} from the first request on.",
    ChangeKind.MARK_REMOVED: "Keep the breakpoint {path}: what it covered is no longer stored.",
    ChangeKind.TTL_CHANGED: "Keep {path} at {before}.",
    ChangeKind.SCOPE_CHANGED: "Keep {path} at {before}: each scope has cache entries of its own.",
}


def advise_on_misses(misses: Sequence[CacheMiss]) -> str:
    """Return what to do about the largest of ``misses``; empty if there is nothing to do."""
    avoidable = [miss for miss in misses if miss.cause not in UNAVOIDABLE]
    if not avoidable:
        return ""
    miss = max(avoidable, key=lambda miss: miss.tokens)
    if miss.cause is MissCause.EXPIRED and miss.ttl_s is not None:
        longer = "1h" if miss.ttl_s < 3600 else "a longer lifetime"
        return f"Use {longer}: the prefix expired after {format_duration(miss.ttl_s)} without use."
    if miss.cause is MissCause.HASH_SETTINGS_DIFFER and miss.detail:
        return f"Expect this once after each load: {miss.detail}."
    if miss.detail and miss.detail.startswith(NO_ROOM):
        return f"Give the CPU tier more memory (cpu_bytes): {miss.detail}."
    if miss.cause is MissCause.NEVER_STORED and miss.detail:
        return f"{_MISS_ADVICE[miss.cause]} ({miss.detail})."
    return f"{_MISS_ADVICE[miss.cause]}."


_MISS_ADVICE = {
    MissCause.EXPIRED: "Use a longer lifetime",
    MissCause.EVICTED: "Give the tier more memory, or fewer prompts a long lifetime",
    MissCause.NEVER_STORED: "Set a breakpoint at or after the end of what is to be reused",
    MissCause.SCOPE_CHANGED: "Mark the same content with the same scope in every request: each "
    "scope has cache entries of its own",
    MissCause.TIER_UNAVAILABLE: "Bring the tier back; until then its entries are misses",
    MissCause.TIMED_OUT: "Raise the tier's deadline, or relieve the tier",
    MissCause.ENGINE_RESTARTED: "Use a tier that outlives the engine",
    MissCause.OTHER_REPLICA: "Route a session to one replica, or share a tier between replicas",
    MissCause.HASH_SETTINGS_DIFFER: "Give all engines one secret, one hash algorithm and one "
    "PYTHONHASHSEED",
    MissCause.RENDERED_DIFFERENTLY: "Use a chat template that renders earlier turns as it did "
    "before: this one leaves out or changes what it had rendered",
    MissCause.UNKNOWN: "Report this: a tier lost tokens without saying why",
}
