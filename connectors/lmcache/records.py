"""Small objects beside the values: the leases of entries, and whose secret an engine uses."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from lmcache.v1.distributed.api import ObjectKey

from vllm_cachescope.connectors.lmcache.memory import AT_ONCE, Staging
from vllm_cachescope.connectors.lmcache.session import Session
from vllm_cachescope.tiers.store import StoreFailed

T = TypeVar("T")


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
