"""Traced calls: recorded requests as blocks, for a replay."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b

from vllm_cachescope.cache.runs import Ended, RequestSignals
from vllm_cachescope.cli.simulate.answer_endings import EndingsFrom, answer_endings
from vllm_cachescope.cli.token_counter import SCALE, shipped_tokenizer
from vllm_cachescope.cli.traffic import BLOCK_TOKENS, BlockCall, Call, TrafficError
from vllm_cachescope.simulation.traced_request import TracedRequest

_KEY_BYTES = 8
_STEP_S = 1.0


def traced(
    calls: Iterable[Call | BlockCall],
    block_tokens: int,
    ttl_s: int | None,
    endings: EndingsFrom = EndingsFrom.ALL,
) -> list[TracedRequest]:
    """Return calls as blocks, in order of time.

    Of a call without a time it is assumed that it was made a second after the one before it.

    Args:
        calls: the calls of all files.
        block_tokens: tokens of a block, for those that have text. A block trace has its own.
        ttl_s: the TTL in seconds where a request names none; None for no expiry.
        endings: what may tell how answers ended.

    Raises:
        TrafficError: if there are none, or calls of both kinds.
    """
    calls = list(calls)
    ended = answer_endings([call for call in calls if isinstance(call, Call)], endings)
    requests: list[TracedRequest] = []
    cutter = _Cutter(block_tokens)
    kinds: set[bool] = set()
    at = -_STEP_S
    for call in calls:
        kinds.add(isinstance(call, Call))
        at = at + _STEP_S if call.at is None else call.at
        if isinstance(call, BlockCall):
            partial = call.tokens % BLOCK_TOKENS != 0 and bool(call.blocks)
            signals = RequestSignals(call.output_tokens, ends_partial=partial)
            keys = tuple(b"%d" % block for block in call.blocks)
            requests.append(TracedRequest(at, keys, call.tokens, signals, ttl_s))
        else:
            requests.append(cutter.request(call, at, ttl_s, ended.get(call.source)))
    if not requests:
        raise TrafficError("there is no request to replay")
    if len(kinds) > 1:
        raise TrafficError("some files hold requests and some block hashes; replay them apart")
    requests.sort(key=lambda request: request.at)
    return requests


def whole_blocks(requests: Iterable[TracedRequest]) -> Iterator[TracedRequest]:
    """Yield the requests without last blocks that are not full: engines cache none."""
    for request in requests:
        if request.signals.ends_partial:
            signals = replace(request.signals, ends_partial=False)
            request = replace(request, keys=request.keys[:-1], signals=signals)
        yield request


class _Cutter:
    """Cuts prompts into blocks of tokens, by the tokenizer that comes with this package."""

    def __init__(self, block_tokens: int) -> None:
        self._tokenizer = shipped_tokenizer()
        # In its own tokens, of which a prompt has more than by a large model's tokenizer.
        self._step = max(1, round(block_tokens / SCALE))

    def request(
        self, call: Call, at: float, ttl_s: int | None, ended: Ended | None
    ) -> TracedRequest:
        text = call.text if call.text is not None else _text(call)
        tokens = self._tokens(text)
        keys: list[bytes] = []
        digest = blake2b(call.request.model.encode(), digest_size=_KEY_BYTES)
        for end in range(self._step, len(tokens) + 1, self._step):
            digest.update(json.dumps(tokens[end - self._step : end]).encode())
            keys.append(digest.digest())
        output = None if call.output is None else round(len(self._tokens(call.output)) * SCALE)
        marks = [part.mark.ttl_s for part in call.request.parts if part.mark is not None]
        asked = [ttl for ttl in (call.request.ttl_s, *marks) if ttl is not None]
        return TracedRequest(
            at,
            tuple(keys),
            round(len(tokens) * SCALE),
            RequestSignals(output, ended=ended),
            max(asked, default=ttl_s),
            session=call.session,
            session_over=call.session_over,
        )

    def _tokens(self, text: str) -> Sequence[int]:
        sound = text.encode("utf-8", "replace").decode()
        ids: Sequence[int] = self._tokenizer.encode(sound, add_special_tokens=False).ids
        return ids


def _text(call: Call) -> str:
    """Return a text that two requests share as far as their prompts are alike."""
    return "\n".join(
        f"{part.region.label} {part.role or ''} {json.dumps(part.content, ensure_ascii=False)}"
        for part in call.request.parts
    )
