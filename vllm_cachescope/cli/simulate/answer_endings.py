"""The endings of recorded answers: as recorded, or as the requests show that go on from them."""

import json
from collections.abc import Sequence
from enum import StrEnum
from hashlib import blake2b

from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.cli.traffic import Call
from vllm_cachescope.prompt.request import Part

_RESULTS = frozenset({"tool_result", "function_call_output", "custom_tool_call_output"})


class EndingsFrom(StrEnum):
    """What may tell how answers ended."""

    ALL = "all"
    RECORDED = "recorded"
    NONE = "none"


def answer_endings(calls: Sequence[Call], source: EndingsFrom) -> dict[str, Ended]:
    """Return how the answers to calls ended, by the calls' ``source``, where it is known.

    Where no answer is recorded, and only there, the calls that follow show it: results of tools
    come where the answer called one. An answer that none goes on from is taken to have ended its
    turn. If only some were told by what follows them, a policy would learn that those of which
    nothing is known never return, which no server could know.
    """
    if source is EndingsFrom.NONE:
        return {}
    recorded = {call.source: call.ended for call in calls if call.ended is not None}
    if recorded or source is EndingsFrom.RECORDED:
        return recorded
    asked = [call for call in calls if call.text is None and call.request.parts]
    shown = _shown(asked)
    # Requests of which none goes on from another are no conversations.
    return {call.source: shown.get(call.source, Ended.ANSWER) for call in asked} if shown else {}


def _shown(calls: Sequence[Call]) -> dict[str, Ended]:
    shown: dict[str, Ended] = {}
    # By what their prompts are, the calls that nothing has gone on from yet.
    waiting: dict[bytes, str] = {}
    for call in calls:
        parts = call.request.parts
        digest = blake2b(call.request.model.encode(), digest_size=16)
        for number, part in enumerate(parts, 1):
            value = (part.region.label, part.role, part.content)
            digest.update(json.dumps(value, sort_keys=True, default=str).encode())
            source = waiting.get(digest.digest()) if number < len(parts) else None
            if source is not None and (ended := _ended_before(parts[number:])) is not None:
                shown[source] = ended
                del waiting[digest.digest()]
        waiting[digest.digest()] = call.source
    return shown


def _ended_before(parts: Sequence[Part]) -> Ended | None:
    """Return how an answer ended that begins these parts; None if none does, or nothing follows."""
    if not _is_answer(parts[0]):
        return None
    after = next((part for part in parts if not _is_answer(part)), None)
    if after is None:
        return None
    is_result = after.role == "tool" or _type_of(after) in _RESULTS
    return Ended.TOOLS if is_result else Ended.ANSWER


def _is_answer(part: Part) -> bool:
    """Whether the model itself wrote a part."""
    if part.role is not None:
        return part.role == "assistant"
    kind = _type_of(part)
    return kind == "reasoning" or kind.endswith("_call")  # Items of Responses have no role.


def _type_of(part: Part) -> str:
    return str(part.content.get("type")) if isinstance(part.content, dict) else ""
