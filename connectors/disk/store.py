"""The store of blocks in a directory.

An entry is a file, which is written once, and its row in the index, with its lease. A use renews
the row and not the file. The row comes last and goes first: whatever happens to a process, what has
a row was written in whole.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from vllm_cachescope.cache.quotas import SHOWN_ORGS
from vllm_cachescope.connectors.disk.backend import Backend
from vllm_cachescope.connectors.disk.directory import INDEX
from vllm_cachescope.connectors.disk.index import Entry, Index, IndexFull
from vllm_cachescope.connectors.disk.purge_log import DiskPurgeLog
from vllm_cachescope.connectors.disk.room import account_of, beyond_quotas, to_free
from vllm_cachescope.tenancy.owner_tags import org_of
from vllm_cachescope.tiers.envelope import HEADER_BYTES
from vllm_cachescope.tiers.keyspace import Keyspace
from vllm_cachescope.tiers.leases import Leases
from vllm_cachescope.tiers.store import (
    ForeignSecret,
    Misfit,
    Store,
    StoreFailed,
    StoreLate,
    Value,
    Written,
)

HANDSHAKE_MS = 60_000
"""How long the digest of a secret outlives the last engine that has it, in ms."""

WORTH = 64
"""A use is recorded if it lets an entry live longer by one part in so many of what is left. So one
in constant use is not recorded each time, and expires early by that part at most."""

AHEAD = 8
"""How many files are open ahead of the one that is read, for the disk to begin with them."""

_BLOCK_BYTES = 4096
"""What most file systems hand out at once."""


class DiskStore(Store):
    """One thread's way to the directory that all threads of a tier share.

    Args:
        backend: the directory, and what else they share.
        keyspace: names of the entries.
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        leases: grants and reads the leases of entries.
        clock: the tier's clock.

    Attributes:
        backend: see above.
    """

    def __init__(
        self,
        backend: Backend,
        keyspace: Keyspace,
        secret_digest: bytes,
        leases: Leases,
        clock: Callable[[], float],
    ) -> None:
        self.address = str(backend.directory.path)
        self.backend = backend
        self._keyspace = keyspace
        self._secret_digest = secret_digest
        self._leases = leases
        self._clock = clock
        self._open: Index | None = None

    def alive(self) -> bool:
        return self._open is not None and self.backend.is_current(self._open)

    def connect(self, deadline: float) -> None:
        self.backend.give_up(self._open)
        self._open = None
        self._open = self.backend.connect(self, deadline)

    def greet(self, deadline: float) -> dict[str, Any]:
        if not self.alive():
            self.connect(deadline)
        with self._index(deadline) as index:
            now_ms = self.backend.now_ms()
            ours, until_ms = self._secret_digest, now_ms + HANDSHAKE_MS
            try:
                digest = index.claim(self._keyspace.namespace, ours, now_ms, until_ms)
            except (IndexFull, StoreLate):
                # What is there can be read still.
                digest = index.claimed(self._keyspace.namespace, now_ms) or ours
            if digest != ours:
                raise ForeignSecret("another engine uses this store with another secret")
            held = Counter(index.held()).most_common(SHOWN_ORGS)
            return {
                "used_bytes": index.file_bytes(),
                "capacity_bytes": self.backend.space.capacity_bytes,
                "orgs": {org_of(account).hex(): nbytes for account, nbytes in held},
            }

    def secret_digests(self, deadline: float) -> set[bytes]:
        directory = self.backend.directory
        if not directory.is_there():
            return set()
        directory.check(directory.path)
        if not (directory.path / INDEX).exists():
            return set()
        index = self.backend.reopened(None, deadline - self._clock())
        try:
            return index.digests(self.backend.now_ms())
        finally:
            index.close()

    def find(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        with self._index(deadline) as index:
            found = index.find(self._keyspace.namespace, keys, self.backend.now_ms())
        return [key in found for key in keys]

    def read(
        self, keys: Sequence[bytes], slots: Sequence[memoryview], deadline: Callable[[], float]
    ) -> Iterator[bytes | Misfit | None]:
        lost: list[Entry] = []
        opened: deque[tuple[Entry, int | None]] = deque()
        try:
            with self._index(deadline()) as index:
                found = index.find(self._keyspace.namespace, keys, self.backend.now_ms())
            coming = iter([found[key] for key in keys if key in found])
            for key, slot in zip(keys, slots, strict=True):
                if self._clock() >= deadline():
                    raise StoreLate("the disk is slow")
                if (expected := found.get(key)) is None:
                    yield None
                    continue
                while len(opened) <= AHEAD and (entry := next(coming, None)) is not None:
                    opened.append((entry, self.backend.directory.open(entry.file)))
                entry, file = opened.popleft()
                assert entry is expected
                if file is None:
                    lost.append(entry)
                    yield None
                else:
                    yield self._value(entry, file, slot)
        finally:
            for _, file in opened:
                if file is not None:
                    self.backend.directory.close(file)
            if lost:
                self._forget(lost, deadline())

    def _value(self, entry: Entry, file: int, slot: memoryview) -> bytes | Misfit:
        try:
            ends_ms = self._leases.end(self._keyspace.name(entry.key), entry.lease)
            if ends_ms is None:
                return Misfit.UNLEASED
            if ends_ms <= self.backend.now_ms():
                return Misfit.OVERDUE
            return self.backend.directory.read(file, slot)
        finally:
            self.backend.directory.close(file)

    def write(self, values: Sequence[Value], deadline: float) -> list[Written]:
        now_ms, model = self.backend.now_ms(), self._keyspace.namespace
        with self._index(deadline) as index:
            present = index.find(model, [value.key for value in values], now_ms)
        self.touch([(v.key, v.expires_at) for v in values if v.key in present], deadline)
        results = [Written.PRESENT] * len(values)
        entries: dict[int, Entry] = {}
        until_ms = [self.backend.wall_ms(value.expires_at) for value in values]
        absent = [i for i, value in enumerate(values) if value.key not in present]
        coming = sum(_file_bytes(values[i]) for i in absent)
        try:
            if absent and not self._has_room(coming, deadline):
                return [Written.REFUSED if i in absent else r for i, r in enumerate(results)]
            for i in absent:
                if until_ms[i] <= now_ms:
                    results[i] = Written.EXPIRED
                elif (entry := self._written(values[i], until_ms[i], deadline)) is None:
                    results[i] = Written.REFUSED
                else:
                    results[i], entries[i] = Written.STORED, entry
            entered = self._enter(entries, deadline)
        except BaseException:
            self.backend.remove_files(entries.values())
            raise
        for i in entries:
            results[i] = entered.get(i, Written.REFUSED)
        return results

    def _has_room(self, coming_bytes: int, deadline: float) -> bool:
        backend = self.backend
        try:
            with self._index(deadline) as index:
                if backend.make_room(index, coming_bytes):
                    return True
            free = backend.space.keep_free_bytes / 2**20
            self.refusal = f"less than {free:.0f} MiB would be left free on its file system"
        except (IndexFull, StoreLate) as error:
            self.refusal = str(error)
        return False

    def _written(self, value: Value, until_ms: int, deadline: float) -> Entry | None:
        """Write a value's file; return the entry to be, or None if that is refused."""
        if self._clock() >= deadline:
            self.refusal = "the disk is slow"
            return None
        file = self.backend.new_file()
        try:
            self.backend.directory.write(file, value.head, value.payload)
        except OSError as error:
            self.refusal = error.strerror or str(error)
            return None
        return Entry(
            0,
            value.key,
            self._keyspace.namespace,
            account_of(self.backend.quotas, value.key),
            until_ms,
            self._leases.grant(self._keyspace.name(value.key), until_ms),
            file,
            value.payload.nbytes,
            _file_bytes(value),
        )

    def _enter(self, entries: Mapping[int, Entry], deadline: float) -> dict[int, Written]:
        """Enter what was written into the index; return what came of each, or nothing if the index
        refuses."""
        if not entries:
            return {}
        backend, quotas, now_ms = self.backend, self.backend.quotas, self.backend.now_ms()
        results: dict[int, Written] = {}
        unused: list[Entry] = []
        try:
            with self._index(deadline) as index, index.transaction():
                for i, entry in entries.items():
                    is_new, expired = index.enter(entry, now_ms)
                    results[i] = Written.STORED if is_new else Written.PRESENT
                    unused += expired if is_new else [entry]
                accounts = {entry.account for entry in entries.values()}
                evicted = beyond_quotas(index, quotas, accounts)
                index.delete(evicted)
                over = index.file_bytes() - backend.space.capacity_bytes
                crowded = to_free(index, quotas, over)
                index.delete(crowded)
        except (IndexFull, StoreLate) as error:
            self.refusal = str(error)
            evicted, crowded, unused, results = [], [], list(entries.values()), {}
        backend.note_evicted(evicted)
        backend.note_crowded(crowded)
        # A file that stays is none of the tier's any more, and deleted by a repair.
        with suppress(StoreFailed):
            backend.remove_files([*unused, *evicted, *crowded])
        return results

    def touch(self, keys: Sequence[tuple[bytes, float]], deadline: float) -> None:
        now_ms = self.backend.now_ms()
        until_ms = {key: self.backend.wall_ms(at) for key, at in keys}
        with self._index(deadline) as index:
            found = index.find(self._keyspace.namespace, until_ms, now_ms)
            renewals = [
                (until_ms[key], self._leases.grant(self._keyspace.name(key), until_ms[key]), e.id)
                for key, e in found.items()
                if (until_ms[key] - e.ends_ms) * WORTH >= until_ms[key] - now_ms > 0
            ]
            # Where that cannot be written down now, entries expire as if they had not been used.
            with suppress(IndexFull, StoreLate):
                index.prolong(renewals)

    def drop(self, keys: Sequence[bytes], deadline: float) -> int:
        with self._index(deadline) as index:
            found = index.find(self._keyspace.namespace, keys, -1)
        return self._forget(list(found.values()), deadline)

    def purge(self, prefix: bytes, deadline: float) -> int:
        purged = 0
        while True:
            with self._index(deadline) as index:
                entries = index.owned(prefix)
            if not entries:
                return purged
            if self._clock() >= deadline:
                raise StoreLate("there are too many entries to delete in time")
            purged += self._forget(entries, deadline)

    def _forget(self, entries: Sequence[Entry], deadline: float) -> int:
        """Delete entries; return how many there were. The files go first: that frees a full disk,
        and what must not be read is gone whatever comes of the rest."""
        self.backend.remove_files(entries)
        with self._index(deadline) as index, index.transaction():
            return index.delete(entries)

    def take_expired(self) -> int:
        return self.backend.take_count("expired")

    def take_damaged(self) -> int:
        return self.backend.take_count("damaged")

    def take_evicted(self) -> list[bytes]:
        return self.backend.take_evicted()

    def take_crowded(self) -> list[bytes]:
        return self.backend.take_crowded()

    def purge_log(self) -> DiskPurgeLog:
        return DiskPurgeLog(self._secret_digest, self._index, self.backend.wall_clock)

    def close(self) -> None:
        self.backend.give_up(self._open)
        self._open = None
        self.backend.disconnect(self)

    @contextmanager
    def _index(self, deadline: float) -> Iterator[Index]:
        """Use the index, and connect first where there is no connection."""
        if self._open is None:
            self.connect(deadline)
        index = self._open
        assert index is not None
        try:
            index.wait_for(deadline - self._clock())
            yield index
        except (IndexFull, StoreLate):
            raise
        except StoreFailed as error:
            self._open = None
            self.backend.give_up(index, error)
            raise


def _file_bytes(value: Value) -> int:
    """Return how many bytes the file of a value takes up on the disk."""
    return -(-(HEADER_BYTES + value.payload.nbytes) // _BLOCK_BYTES) * _BLOCK_BYTES
