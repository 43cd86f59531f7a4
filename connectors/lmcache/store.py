"""The store of blocks behind one of LMCache's adapters.

An entry is two objects: the value, which is a header and the block behind it, and a record, which
is its lease. Without a record that has time left there is no entry. The value is written once,
before its record. The record is written again when the entry is used: the adapters can only replace
whole objects, and a block is too much to write for each use.
"""

from collections.abc import Callable, Iterator, Sequence

from vllm_cachescope.connectors.lmcache.adapters import Kind, name
from vllm_cachescope.connectors.lmcache.backend import Backend
from vllm_cachescope.tiers.envelope import HEADER_BYTES
from vllm_cachescope.tiers.store import Misfit, Store, StoreFailed, StoreUnfit, Value, Written


class LMCacheStore(Store):
    """One thread's way to an adapter that all threads of a tier share.

    Args:
        backend: the adapter, and what else they share.
        address: where it is.

    Attributes:
        backend: see above.
    """

    def __init__(self, backend: Backend, address: str) -> None:
        self.address = address
        self.backend = backend

    def alive(self) -> bool:
        return self.backend.alive()

    def connect(self, deadline: float) -> None:
        try:
            self.backend.connect(self, deadline)
        except StoreUnfit as error:
            raise StoreFailed(str(error)) from None

    def greet(self, deadline: float) -> dict[str, int]:
        known = self.backend.alive()
        session = self.backend.connect(self, deadline)
        if known:
            self.backend.shake_hands(session, deadline)
        return self.backend.memory()

    def secret_digests(self, deadline: float) -> None:
        session = self.backend.connect(self, deadline)
        self.backend.undo_handshake(session, deadline)

    def find(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        entries = self.backend.entries
        return entries.present([entries.entry(key) for key in keys], deadline)

    def read(
        self, keys: Sequence[bytes], slots: Sequence[memoryview], deadline: Callable[[], float]
    ) -> Iterator[bytes | Misfit | None]:
        staging, entries = self.backend.staging, self.backend.entries
        session = self.backend.session()
        wanted = [entries.entry(key) for key in keys]
        # Once more: a RESP adapter does not survive being asked for what is not there.
        present = entries.present(wanted, deadline())
        for part in _parts(len(wanted), staging.batch):
            there = [i for i in part if present[i]]
            names = [name(wanted[i], Kind.VALUE) for i in there]
            buffers = staging.values.take(len(there))
            with (
                entries.blaming(session) as is_to_blame,
                session.loading(names, buffers) as tasks,
            ):
                loads = dict(zip(there, zip(tasks, buffers, strict=True), strict=True))
                for i in part:
                    if i not in loads:
                        yield None
                        continue
                    task, buffer = loads[i]
                    if session.wait(task, deadline())[0]:
                        end = HEADER_BYTES + slots[i].nbytes
                        slots[i][:] = buffer.view[HEADER_BYTES:end]
                        yield bytes(buffer.view[:HEADER_BYTES])
                    elif is_to_blame(wanted[i]):
                        session.check_alive(deadline())
                        yield Misfit.UNREADABLE
                    else:
                        raise StoreFailed("it may have suffered from a value that did not load")

    def write(self, values: Sequence[Value], deadline: float) -> list[Written]:
        staging, entries = self.backend.staging, self.backend.entries
        session = self.backend.session()
        targets = [entries.entry(value.key) for value in values]
        until_ms = [entries.wall_ms(value.expires_at) for value in values]
        present = entries.present(targets, deadline)
        results = [Written.PRESENT if there else Written.EXPIRED for there in present]
        self.backend.upkeep.touch({targets[i]: until_ms[i] for i, p in enumerate(present) if p})
        now_ms = entries.now_ms()
        absent = [i for i, there in enumerate(present) if not there and until_ms[i] > now_ms]
        # What is left of earlier lives: some adapters do not store what they hold already.
        entries.drop([targets[i] for i in absent], deadline)
        for part in _parts(len(absent), staging.batch):
            chosen = [absent[j] for j in part]
            buffers = staging.values.take(len(chosen))
            for i, buffer in zip(chosen, buffers, strict=True):
                end = HEADER_BYTES + values[i].payload.nbytes
                buffer.view[:HEADER_BYTES] = values[i].head
                buffer.view[HEADER_BYTES:end] = values[i].payload
            names = [name(targets[i], Kind.VALUE) for i in chosen]
            with session.storing(names, buffers) as tasks:
                for i, task in zip(chosen, tasks, strict=True):
                    stored = session.wait(task, deadline)[0]
                    results[i] = Written.STORED if stored else Written.REFUSED
            if any(results[i] is Written.REFUSED for i in chosen):
                session.check_alive(deadline)
                self.refusal = "LMCache's log says why"
            entries.record(
                {targets[i]: until_ms[i] for i in chosen if results[i] is Written.STORED},
                deadline,
            )
        return results

    def touch(self, keys: Sequence[tuple[bytes, float]], deadline: float) -> None:
        entries = self.backend.entries
        self.backend.upkeep.touch(
            {entries.entry(key): entries.wall_ms(expires_at) for key, expires_at in keys}
        )

    def drop(self, keys: Sequence[bytes], deadline: float) -> int:
        self.connect(deadline)
        entries = self.backend.entries
        return entries.drop([entries.entry(key) for key in keys], deadline)

    def purge(self, prefix: bytes, deadline: float) -> int:
        self.connect(deadline)
        return self.backend.entries.purge(prefix, deadline)

    def take_expired(self) -> int:
        return self.backend.upkeep.take_expired()

    def close(self) -> None:
        self.backend.disconnect(self)


def _parts(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(count, start + size))
