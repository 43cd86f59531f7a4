"""Parameters of the chat template that keep the first value that they had in the session."""

from collections.abc import Sequence

from vllm_cachescope.repair.editable_body import EditableBody
from vllm_cachescope.repair.repair import Repair, RepairKind
from vllm_cachescope.repair.session_memory import PARAMETERS, Lessons, SessionState
from vllm_cachescope.repair.spelling import packed, unpacked

_MAX_BYTES = 1024  # of a value
_ABSENT = b""


def mend_parameters(
    paths: Sequence[str], body: EditableBody, state: SessionState, lessons: Lessons
) -> list[Repair]:
    """Give each parameter its first value, absence included, and return what that changed.

    Args:
        paths: the parameters, as in ``chat_template_kwargs.date_string``.
        body: the body, which is changed.
        state: what came first in the session.
        lessons: takes what comes first now.
    """
    found: list[Repair] = []
    given = body.body.get(PARAMETERS)
    if given is not None and not isinstance(given, dict):
        return found  # The server will refuse it.
    values = dict(given or {})
    for path in paths:
        name = path.removeprefix(f"{PARAMETERS}.")
        now = packed(values[name]) if name in values else _ABSENT
        first = state.values.get(path)
        if first is None:
            if len(now) <= _MAX_BYTES:
                lessons.values[path] = now
        elif first != now:
            if first == _ABSENT:
                del values[name]
            else:
                values[name] = unpacked(first)
            found.append(Repair(RepairKind.FIELD, path))
    if found and values:
        body.body[PARAMETERS] = values
    elif found:
        body.body.pop(PARAMETERS, None)
    return found
