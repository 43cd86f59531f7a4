"""What an agent's session file leaves out of its prompts: the tools and the system prompt."""

from dataclasses import replace

from vllm_cachescope.cli.traffic.call import Call
from vllm_cachescope.diagnosis.canonical import json_bytes
from vllm_cachescope.diagnosis.token_estimate import BYTES_PER_TOKEN, estimate_tokens
from vllm_cachescope.prompt.request import Part, Region

_MOST_TOKENS = 1_000_000


class UnseenHead:
    """Puts a head of the right length in front of the prompts of one conversation.

    A session file repeats what was said, and not the tools and the system prompt. How long they
    are shows at the first request whose response counted its tokens. They are taken to stay as
    they are: nothing in the file tells of a change.
    """

    def __init__(self) -> None:
        self._part: Part | None = None

    def before(self, call: Call) -> Call:
        """Return ``call`` with that head in front of its prompt."""
        parts = call.request.parts
        if self._part is None:
            if call.usage is None:
                return call
            known = sum(estimate_tokens(part.content, json_bytes(part.content)) for part in parts)
            missing = min(max(0, call.usage.prompt_tokens - known), _MOST_TOKENS)
            text = " " * (missing * BYTES_PER_TOKEN)
            self._part = Part(Region.SYSTEM, "system (not recorded)", text)
        if not self._part.content:
            return call
        return replace(call, request=replace(call.request, parts=(self._part, *parts)))
