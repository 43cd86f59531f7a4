"""Small objects beside the values: when an entry expires, and whose secret an engine uses.

Such an object is a header like a value's (see `envelope`), which says when it expires, and a few
bytes behind it, if any.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from lmcache.v1.distributed.api import ObjectKey

from vllm_cachescope.connectors.lmcache.expiries import UNREADABLE
from vllm_cachescope.connectors.lmcache.memory import AT_ONCE, Buffer, Staging
from vllm_cachescope.connectors.lmcache.session import Session
from vllm_cachescope.tiers import envelope
from vllm_cachescope.tiers.envelope import HEADER_BYTES
from vllm_cachescope.tiers.store import StoreFailed

T = TypeVar("T")


def packed(key: bytes, content: bytes, expires_ms: int) -> bytes:
    """Return a small object.

    Args:
        key: what the object belongs to; `unpacked` needs the same.
        content: what it holds.
        expires_ms: when it expires, in ms of Unix time.
    """
    lifetime = envelope.Lifetime(0, expires_ms)
    return envelope.header(key, memoryview(content), lifetime) + content


def unpacked(key: bytes, found: Buffer, length: int) -> tuple[int, bytes]:
    """Return when a small object expires, in ms of Unix time, and what it holds; `UNREADABLE` and
    nothing if the object is damaged.

    Args:
        key: see `packed`.
        found: the object as it was loaded.
        length: how many bytes it holds behind the header.
    """
    content = bytes(found.view[HEADER_BYTES : HEADER_BYTES + length])
    try:
        lifetime = envelope.check(key, bytes(found.view[:HEADER_BYTES]), memoryview(content))
    except envelope.BadEnvelope:
        return UNREADABLE, b""
    return lifetime.expires_at_ms, content


def put(
    session: Session, staging: Staging, contents: Mapping[ObjectKey, bytes], deadline: float
) -> None:
    """Store small objects.

    Raises:
        StoreFailed: if they are not all stored.
    """
    for batch in batches(list(contents)):
        buffers = staging.records.take(len(batch))
        for key, buffer in zip(batch, buffers, strict=True):
            buffer.view[: len(contents[key])] = contents[key]
        with session.storing(batch, buffers) as tasks:
            stored = [session.wait(task, deadline)[0] for task in tasks]
        if not all(stored):
            session.check_alive(deadline)
            raise StoreFailed("it stores nothing; LMCache's log says why")


def batches(things: Sequence[T]) -> Iterator[Sequence[T]]:
    """Cut ``things`` into batches of `AT_ONCE`, as many as one thread has under way at once."""
    for start in range(0, len(things), AT_ONCE):
        yield things[start : start + AT_ONCE]
