"""The room in a disk tier: which entries are deleted because there are too many.

The first to expire go first: of an organisation beyond its quota, its own; of a tier that is full,
those of organisations that hold more than their reserve, and the others only if that is not enough.
"""

from collections.abc import Callable, Iterable, Iterator

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.connectors.disk.index import Entry, Index
from vllm_cachescope.tenancy.owner_tags import org_of


def account_of(quotas: Quotas | None, key: bytes) -> bytes:
    """Return the account that an entry counts towards; without quotas its organisation's tag."""
    return org_of(key) if quotas is None else quotas.account_of(key)


def beyond_quotas(index: Index, quotas: Quotas | None, accounts: Iterable[bytes]) -> list[Entry]:
    """Return what accounts hold beyond their quotas."""
    found: list[Entry] = []
    if quotas is None:
        return found
    for account in accounts:
        if (quota := quotas.quota(account)) is not None:
            over = index.held_by(account) - quota * quotas.entry_bytes
            found += _taken(index.first_of(account), over, _payload_bytes)
    return found


def to_free(index: Index, quotas: Quotas | None, wanted: int) -> list[Entry]:
    """Return entries whose files take up ``wanted`` bytes at least, or all there are."""
    if quotas is None or not quotas.has_reserves:
        return _taken(index.first(), wanted, _file_bytes)
    found = _taken(_unreserved(index, quotas), wanted, _file_bytes)
    wanted -= sum(map(_file_bytes, found))
    if wanted > 0:
        taken = {entry.id for entry in found}
        rest = (entry for entry in index.first() if entry.id not in taken)
        found += _taken(rest, wanted, _file_bytes)
    return found


def _unreserved(index: Index, quotas: Quotas) -> Iterator[Entry]:
    """Yield what each account holds beyond its reserve, the first to expire first."""
    held = index.held()
    for entry in index.first():
        left = held.get(entry.account, 0) - entry.payload_bytes
        if left >= quotas.reserve(entry.account) * quotas.entry_bytes:
            held[entry.account] = left
            yield entry


def _taken(entries: Iterator[Entry], wanted: int, measure: Callable[[Entry], int]) -> list[Entry]:
    taken: list[Entry] = []
    while wanted > 0 and (entry := next(entries, None)) is not None:
        taken.append(entry)
        wanted -= measure(entry)
    return taken


def _payload_bytes(entry: Entry) -> int:
    return entry.payload_bytes


def _file_bytes(entry: Entry) -> int:
    return entry.file_bytes
