"""Compares two fingerprints, change by change."""

from collections.abc import Iterator
from itertools import chain, islice

from vllm_cachescope.diagnosis.breakpoint_changes import breakpoint_changes
from vllm_cachescope.diagnosis.changes import ABSENT, MAX_CHANGES, Change, ChangeKind
from vllm_cachescope.diagnosis.compaction import find_compaction
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.parameters import is_front
from vllm_cachescope.diagnosis.text_changes import (
    compaction_change,
    message_changes,
    same_static_parts,
    system_changes,
)
from vllm_cachescope.diagnosis.tool_changes import tool_changes


def compare(old: Fingerprint, new: Fingerprint) -> tuple[Change, ...]:
    """Return what differs, `MAX_CHANGES` at most.

    Changes by which the prompts diverge come first, the earliest in the prompt at their head; then
    those that leave the prompt as it was. Messages that ``new`` has after everything in ``old``
    are no difference: a conversation grows.
    """
    # A summary may stand last in the system prompt; elsewhere `message_changes` finds it.
    compaction = None if same_static_parts(old, new) else find_compaction(old, new)
    if compaction:
        texts = iter([compaction_change(old, new, compaction)])
    else:
        texts = chain(system_changes(old, new), message_changes(old, new))
    changes = [
        *_model_changes(old, new),
        *_param_changes(old, new),
        *islice(tool_changes(old, new), MAX_CHANGES),
        *islice(texts, MAX_CHANGES),
        *breakpoint_changes(old, new),
    ]
    # Stable: at one token, model before parameters before tools and so on.
    changes.sort(key=lambda change: (not change.diverges, change.token))
    return tuple(changes[:MAX_CHANGES])


def compare_whole(old: Fingerprint, new: Fingerprint) -> tuple[Change, ...]:
    """Return what `compare` does, for a request known to begin with all of ``old``'s prompt.

    Only what stands beside the prompt can differ: breakpoints, and parameters that route.
    """
    return (*_param_changes(old, new), *breakpoint_changes(old, new))


def _model_changes(old: Fingerprint, new: Fingerprint) -> Iterator[Change]:
    if old.model != new.model:
        yield Change(
            ChangeKind.MODEL,
            "model",
            0,
            before=old.model,
            after=new.model,
            value=new.model.encode("utf-8", "surrogatepass"),
            old_value=old.model.encode("utf-8", "surrogatepass"),
        )


def _param_changes(old: Fingerprint, new: Fingerprint) -> Iterator[Change]:
    for name in sorted(old.params.keys() | new.params.keys()):
        before, after = old.params.get(name), new.params.get(name)
        if before == after:
            continue
        if before is None:
            kind = ChangeKind.PARAM_ADDED
        elif after is None:
            kind = ChangeKind.PARAM_REMOVED
        else:
            kind = ChangeKind.PARAM_CHANGED
        token = 0 if is_front(name) else new.start(new.static_parts)
        yield Change(
            kind, name, token, names=(name,), value=after or ABSENT, old_value=before or ABSENT
        )
