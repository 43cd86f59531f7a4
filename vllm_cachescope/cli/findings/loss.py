"""A loss: tokens that a call could have read and did not, put down to one rule and one place."""

import re
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.cache.miss_causes import MissCause
from vllm_cachescope.cli.findings.edits import Edit, EditKind
from vllm_cachescope.cli.findings.quotes import Quote, quote
from vllm_cachescope.cli.findings.remedies import remedy
from vllm_cachescope.cli.findings.rules import RULES, Level, Rule
from vllm_cachescope.diagnosis.changes import Change, ChangeKind
from vllm_cachescope.diagnosis.outcome import Diagnosis

_MESSAGE = re.compile(r"^(messages|input)\[\d+\].*|(@)\d+$", re.DOTALL)

_BY_CHANGE = {
    ChangeKind.MODEL: "model_changed",
    ChangeKind.PARAM_ADDED: "param_changed",
    ChangeKind.PARAM_REMOVED: "param_changed",
    ChangeKind.PARAM_CHANGED: "param_changed",
    ChangeKind.HISTORY_COMPACTED: "context_compacted",
    ChangeKind.MARK_REMOVED: "marker_removed",
}

_HARMLESS = (ChangeKind.MARK_ADDED, ChangeKind.TTL_CHANGED)
"""Changes that cost no read: what was cached stays where it is."""

_BY_EDIT = {
    ChangeKind.TOOL_CHANGED: {
        EditKind.KEYS: "tool_keys_reordered",
        EditKind.LISTS: "tool_list_reordered",
        EditKind.SPACES: "tool_spaces",
        EditKind.VALUE: "tool_value",
    },
    ChangeKind.TOOL_KEYS_REORDERED: {},
    ChangeKind.SYSTEM_CHANGED: {EditKind.SPACES: "system_spaces", EditKind.VALUE: "system_value"},
    ChangeKind.MESSAGES_CHANGED: {
        EditKind.KEYS: "call_keys_reordered",
        EditKind.LISTS: "call_keys_reordered",
        EditKind.IDS: "call_ids_changed",
        EditKind.SPACES: "message_spaces",
        EditKind.VALUE: "message_value",
        EditKind.CUT: "message_cut",
    },
}
_VALUES = {
    ChangeKind.TOOL_CHANGED: "tool_value",
    ChangeKind.SYSTEM_CHANGED: "system_value",
    ChangeKind.MESSAGES_CHANGED: "message_value",
}


@dataclass(frozen=True, slots=True)
class Loss:
    """Tokens that a call could have read and did not.

    Attributes:
        rule: the kind.
        path: where, as in ``messages[4].content[0]``; empty for the prompt as a whole.
        place: the same for all calls in which the place is the same: ``messages``, ``tools.Bash``.
        tokens: how many, an estimate unless the response counted them.
        words: what happened there, in a line.
        suggestion: what to do about it, in a sentence.
        quote: what the place said before and says now; None where that says nothing.
    """

    rule: Rule
    path: str
    place: str
    tokens: int
    words: str
    suggestion: str = ""
    quote: Quote | None = None

    @property
    def is_break(self) -> bool:
        """Whether it is more than a note."""
        return self.rule.level is Level.WARNING

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        told = self.quote
        return {
            "code": self.rule.code,
            "rule": self.rule.name,
            "level": self.rule.level.name.lower(),
            "path": self.path,
            "place": self.place,
            "tokens": self.tokens,
            "message": self.words,
            "suggestion": self.suggestion,
            "quote": told
            and {
                "path": told.path,
                "char": told.char,
                "before": told.before,
                "after": told.after,
            },
        }


def change_loss(diagnosis: Diagnosis, edit: Edit | None, text: bool) -> Loss | None:
    """Return the loss that a change of the request caused; None if nothing was lost by one.

    Args:
        diagnosis: of the call, whose first change is the cause.
        edit: how the part was edited that changed first, if a part was.
        text: whether what was edited may be quoted.
    """
    lost = diagnosis.missed_tokens > 0 or not diagnosis.expected
    change = _cause(diagnosis)
    if not diagnosis.kind.is_break or change is None or not lost:
        return None
    rule = RULES[_rule_name(change, edit, diagnosis)]
    words = _words(change, edit)
    told = quote(change.path, edit) if edit is not None and text else None
    return Loss(
        rule,
        change.path if edit is None else change.path + edit.inside,
        _place(change),
        diagnosis.missed_tokens,
        words,
        remedy(rule, change, edit, diagnosis.flapping, diagnosis.suggestion),
        told,
    )


def sharing_loss(diagnosis: Diagnosis, edit: Edit | None, text: bool) -> Loss | None:
    """Return what a new conversation could have shared with another one; None for nothing."""
    change = _cause(diagnosis)
    if diagnosis.kind.is_break or not diagnosis.missed_tokens or change is None:
        return None
    told = quote(change.path, edit) if edit is not None and text else None
    near = RULES[_rule_name(change, edit, diagnosis)]
    advice = remedy(near, change, edit, diagnosis.flapping, diagnosis.suggestion)
    words = f"{near.words}: {_words(change, edit)}"
    place, tokens = _place(change), diagnosis.missed_tokens
    return Loss(RULES["could_share"], change.path, place, tokens, words, advice, told)


def cache_losses(diagnosis: Diagnosis) -> list[Loss]:
    """Return what was lost by lifetimes and by where the breakpoints stand."""
    losses: list[Loss] = []
    for cause, name in ((MissCause.EXPIRED, "expired"), (MissCause.NEVER_STORED, "not_covered")):
        misses = [miss for miss in diagnosis.engine if miss.cause is cause]
        tokens = sum(miss.tokens for miss in misses)
        if tokens:
            rule = RULES[name]
            longest = max(misses, key=lambda miss: miss.tokens)
            words = _age(longest.ttl_s, longest.age_s) if cause is MissCause.EXPIRED else ""
            losses.append(Loss(rule, "", "", tokens, words or rule.words, remedy(rule, longest)))
    return losses


def unread_loss(tokens: int, read: int, cached: bool) -> Loss:
    """Return the loss of an equal prefix that was not read, as the recorded usage says.

    Args:
        tokens: how many tokens of the prefix were not read.
        read: how many were.
        cached: whether anything in the recording was read from a cache or written to one.
    """
    rule = RULES["not_read"]
    words = f"the usage says {read:,} read, where {read + tokens:,} are as they were"
    return Loss(rule, "", "", tokens, words, remedy(rule, cached))


def _cause(diagnosis: Diagnosis) -> Change | None:
    """Return the first change that can cost a read; None if there is none."""
    return next((one for one in diagnosis.changes if one.kind not in _HARMLESS), None)


def _rule_name(change: Change, edit: Edit | None, diagnosis: Diagnosis) -> str:
    kind = change.kind
    if edit is not None and kind in _BY_EDIT:
        name = _BY_EDIT[kind].get(edit.kind)
        flapping = diagnosis.flapping
        anew = flapping is not None and not flapping.returns and flapping.flips > 1
        if name is None and anew and edit.kind is EditKind.TEXT:
            name = _VALUES.get(kind)
        if name is not None:
            return name
    if kind in _BY_CHANGE:
        return _BY_CHANGE[kind]
    return str(kind)


def _place(change: Change) -> str:
    """Return a place that is the same for all calls that changed there."""
    if change.area == "tools" and change.names:
        return f"tools.{change.names[0]}" if len(change.names) == 1 else "tools"
    found = _MESSAGE.match(change.path)
    return found[1] if found and found[1] else change.path.partition("@")[0]


def _words(change: Change, edit: Edit | None) -> str:
    if edit is None:
        return str(change)
    about = f"{', '.join(change.names)}: " if change.names else ""
    return f"{about}{edit.kind}"


def _age(ttl_s: int | None, age_s: float | None) -> str:
    if ttl_s is None or age_s is None:
        return ""
    return f"not used for {_span(ttl_s + age_s)}; it lives for {_span(ttl_s)}"


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 120:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"
