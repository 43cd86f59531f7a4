"""Remedies: what to do about each kind of loss, in a sentence."""

from vllm_cachescope.cache.miss_causes import CacheMiss
from vllm_cachescope.cli.findings.edits import Edit, EditKind
from vllm_cachescope.cli.findings.rules import Rule
from vllm_cachescope.diagnosis.changes import Change
from vllm_cachescope.diagnosis.flapping import FlappingField

_BY_RULE = {
    "tool_keys_reordered": "Serialise the tools with sorted keys.",
    "tool_list_reordered": "Sort {where} before sending it: it is a set, and came from one.",
    "tool_value": "Take the value that varies out of {where}; say it in the latest message.",
    "tool_spaces": "Render {where} in one way: only its spaces differ.",
    "tool_changed": "Keep {where} as it was first sent for the whole conversation; a new version "
    "begins with the next one.",
    "system_value": "Move the value that varies in {where} into the latest message.",
    "system_spaces": "Render {where} in one way: only its spaces differ. Trim or join it the same "
    "way each time.",
    "system_changed": "Keep {where} as it was first sent for the whole conversation; say what is "
    "new in the latest message.",
    "message_value": "Leave {where} as it was first sent: the value in it is made anew each time.",
    "message_spaces": "Send earlier messages back as they came: only the spaces of {where} differ.",
    "call_ids_changed": "Keep the ids of earlier tool calls as they were first sent: they are made "
    "anew in each request.",
    "call_keys_reordered": "Send the input of a tool call back as the model wrote it: its keys "
    "come in another order.",
    "message_cut": "Shorten earlier messages seldom and many at once: each cut costs all that "
    "follows {where}.",
    "context_compacted": "",
    "not_covered": "Move a breakpoint on to the end of the latest message in each request: what "
    "stands behind the last one is computed again.",
}
_UNICODE = "Send {where} in one Unicode form (NFC): the characters are the same."
_GREW = (
    "Say what is new in the latest message: {where} was added to, and all behind it is "
    "computed again."
)


def remedy(
    rule: Rule,
    about: Change | CacheMiss | bool,
    edit: Edit | None = None,
    flapping: FlappingField | None = None,
    advice: str = "",
) -> str:
    """Return what to do about a loss; empty if there is nothing to do.

    Args:
        rule: its kind.
        about: the change that caused it; the largest miss; or for ``not_read`` whether anything in
            the recording was read or written.
        edit: how a part was edited, if one was.
        flapping: the field that changed first, if it keeps changing.
        advice: the diagnosis' own, for a change of which it knows as much as there is.
    """
    if isinstance(about, bool):
        return _not_read(cached=about)
    if isinstance(about, CacheMiss):
        if rule.name == "expired":
            return _expired(about)
        return _BY_RULE[rule.name]
    where = about.path + (edit.inside if edit else "")
    template = _BY_RULE.get(rule.name)
    if edit is not None and edit.kind is EditKind.UNICODE:
        template = _UNICODE
    elif edit is not None and edit.kind is EditKind.GREW and rule.name.endswith("_changed"):
        template = _GREW
    if template is None:
        return advice
    told = template.format(where=where)
    if flapping is None or not told:
        return told
    habit = "goes back and forth" if flapping.returns else "is new each time"
    cost = f"{flapping.flips} changes so far, about {flapping.tokens_lost:,} tokens"
    return f"{told} It {habit}: {cost}."


def _expired(miss: CacheMiss) -> str:
    idle_s = (miss.ttl_s or 0) + (miss.age_s or 0)
    for longer, seconds in (("1h", 3600), ("24h", 86400)):
        if miss.ttl_s is not None and miss.ttl_s < seconds and idle_s <= seconds:
            return f'Ask for a lifetime of {longer} ("ttl": "{longer}"), or send something sooner.'
    return "Use a longer lifetime, or expect the first request after such a pause to cost this."


def _not_read(cached: bool) -> str:
    if not cached:
        return "Turn prompt caching on: in all of this recording nothing was read or written."
    return (
        "Look at the server: the request is as it was, so the entry was evicted, had expired, or "
        "was on another replica."
    )
