"""A traced request: what a replay knows of a recorded request."""

from dataclasses import dataclass

from vllm_cachescope.cache.runs import NO_SIGNALS, RequestSignals


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """A recorded request as blocks.

    Attributes:
        at: when it was made, in seconds; never before the request in front of it.
        keys: a key for each block of its prompt; equal keys mean equal prompts up to there.
        tokens: length of its prompt, in tokens. The last block may be partial.
        signals: what it tells of its blocks' future.
        ttl_s: the TTL that it asks for, in seconds; None for blocks that do not expire.
        org: whose request it is; empty for nobody's.
        session: the session it belongs to; None if it names none.
        session_over: whether the session is over with it.
    """

    at: float
    keys: tuple[bytes, ...]
    tokens: int
    signals: RequestSignals = NO_SIGNALS
    ttl_s: int | None = None
    org: str = ""
    session: str | None = None
    session_over: bool = False
