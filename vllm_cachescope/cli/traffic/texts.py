"""Text traces: calls of which the whole prompt is recorded as one text."""

import re

from vllm_cachescope.prompt.request import Part, PromptRequest, Protocol, Region

_ROLE = re.compile(r"(system|developer|user|assistant|tool): ")


def text_request(text: str) -> PromptRequest:
    """Return the prompt ``text`` as a request whose parts are its paragraphs.

    A paragraph such as ``user: Hello`` begins a turn of that role; leading turns of ``system`` are
    the system prompt. A part's path is the turn's number and the paragraph's offset in characters:
    ``input[2]@1834``.
    """
    parts: list[Part] = []
    offset, turn, role, leading = 0, 0, None, True
    for paragraph in text.split("\n\n") if text else ():
        if begins := _ROLE.match(paragraph):
            role = begins[1]
            turn += offset > 0
        leading = leading and role == "system"
        region = Region.SYSTEM if leading else Region.MESSAGES
        parts.append(Part(region, f"input[{turn}]@{offset}", paragraph, role))
        offset += len(paragraph) + 2
    return PromptRequest(Protocol.COMPLETIONS, "", tuple(parts))
