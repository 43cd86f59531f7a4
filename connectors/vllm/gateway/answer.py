"""The answer of the server behind the gateway, without what was asked for on our behalf."""

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec

from vllm_cachescope.prompt.plan import PLAN_KEY

_PROMPT = re.compile(rb',"prompt_token_ids":(\[[0-9,]+\])')
"""In JSON without blanks. In a string each quotation mark has a backslash before it."""


class Answer:
    """Takes off an answer what its client has not asked for: the prompt's tokens, which the gateway
    has to know, and the engine's report.

    Args:
        keeps_tokens: whether the client has asked for tokens.
        on_tokens: called with the prompt's tokens.
        on_report: called with the engine's report, as it travels.
        on_output: called with how many tokens of an answer came, and when any did.
    """

    def __init__(
        self,
        keeps_tokens: bool,
        on_tokens: Callable[[list[int]], object],
        on_report: Callable[[dict[str, Any]], object],
        on_output: Callable[[int], object],
    ) -> None:
        self._keeps_tokens = keeps_tokens
        self._on_tokens = on_tokens
        self._on_report = on_report
        self._on_output = on_output
        self._unsent = b""

    def whole(self, raw: bytes) -> bytes:
        """Return an answer that comes in one piece as its client gets it."""
        try:
            data = json.loads(raw)
        except ValueError:
            return raw
        if not isinstance(data, dict):
            return raw
        self._take(data, {"prompt_token_ids": None}, {"token_ids": None})
        return _encoded(data)

    def events(self, chunk: bytes) -> list[bytes]:
        """Return the events of a stream that are whole with ``chunk``, as the client gets them."""
        *events, self._unsent = (self._unsent + chunk).split(b"\n\n")
        return [self._event(event) + b"\n\n" for event in events]

    def rest(self) -> bytes:
        """Return what came behind the last event."""
        rest, self._unsent = self._unsent, b""
        return rest

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {"):
            return event
        if not self._keeps_tokens and (found := _PROMPT.search(event)):
            # Thousands of numbers: cut out as they are.
            self._on_tokens(msgspec.json.decode(found[1], type=list[int]))
            event = event[: found.start()] + event[found.end() :]
        try:
            data = json.loads(event.removeprefix(b"data: "))
        except ValueError:
            return event
        self._take(data, {}, {})
        return b"data: " + _encoded(data)

    def _take(
        self, data: dict[str, Any], no_prompt: dict[str, None], no_output: dict[str, None]
    ) -> None:
        """Take off what the client has not asked for.

        Args:
            data: the answer, or an event.
            no_prompt: what it has in place of a prompt's tokens where nobody asks for them.
            no_output: the same of an output's.
        """
        listed = data.get("choices")
        choices = [one for one in listed if isinstance(one, dict)] if type(listed) is list else []
        # Completions have the prompt's beside each choice.
        for holder in (data, *choices):
            if tokens := holder.get("prompt_token_ids"):
                self._on_tokens(tokens)
                if not self._keeps_tokens:
                    del holder["prompt_token_ids"]
                    holder |= no_prompt
        # Behind the tokens: a report without them is none.
        transfer = data.get("kv_transfer_params")
        if isinstance(transfer, dict) and PLAN_KEY in transfer:
            self._on_report(transfer.pop(PLAN_KEY))
            data["kv_transfer_params"] = transfer or None
        for choice in choices:
            if (output := choice.get("token_ids")) is not None:
                self._on_output(len(output))
                if not self._keeps_tokens:
                    del choice["token_ids"]
                    choice |= no_output


def ends(event: bytes) -> bool:
    """Whether an event ends an answer, or comes after its end."""
    return b'"finish_reason":"' in event or event.startswith(b"data: [")


def tells_usage(event: bytes) -> bool:
    """Whether an event may tell usage."""
    return b'"usage":{' in event


def _encoded(data: dict[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
