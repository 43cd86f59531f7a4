"""The index of owners in a Redis: which entries are whose, so that a purge finds them at once.

Each owner has a set of its entries' blocks, each organisation one of its sessions, and one more set
lists the models. A model's sets are on one node of a Cluster. Entries are in the index before they
are in the store. An index that may have lost something is not trusted: beside a model's sets stands
the id of the server that began them, and a server that has evicted anything may have evicted them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from vllm_cachescope.connectors.redis.channel import Refusal, Reply, command
from vllm_cachescope.connectors.redis.server_clock import ServerClock
from vllm_cachescope.connectors.redis.sorted_sets import SortedSets, add, expiry_ms, members
from vllm_cachescope.tenancy.owner_tags import TAG_BYTES
from vllm_cachescope.tiers.keyspace import MODELS, Keyspace, OwnerNames, split

LISTED = 1000
"""Entries of an owner that are listed at once."""

_NOT_WHOLE = b"?"
"""Stands in the place of a server's id where an engine stored what it could not enter."""


class NoIndex(Exception):
    """Raised where the user may not read the index."""


class OwnerIndex:
    """One thread's way to the index.

    Args:
        keyspace: names of the entries, and of the sets.
        clock: the tier's clock.
        server_clock: shared with the tier's other threads.
        ask_node_of: sends commands to the node that has a name, and returns the answers.
    """

    def __init__(
        self,
        keyspace: Keyspace,
        clock: Callable[[], float],
        server_clock: ServerClock,
        ask_node_of: Callable[[bytes, Sequence[bytes], float], list[Reply]],
    ) -> None:
        self._names = OwnerNames(keyspace.namespace.encode())
        self._model = keyspace.namespace.encode()
        self._clock = clock
        self._ask_node_of = ask_node_of
        self._sets = SortedSets(
            clock, server_clock, ask_node_of, "Purges look through all of Redis, without an index"
        )

    def enter(self, entries: Iterable[tuple[bytes, float]], deadline: float) -> str:
        """Enter entries that are about to be stored.

        Args:
            entries: their keys, and when they expire on the tier's clock, in seconds.
            deadline: until when an answer is waited for.

        Returns:
            Why they must not be stored, in the server's words; empty if they may be.
        """
        entries = list(entries)
        if (ahead_s := self._sets.ahead_s(self._names.began, deadline)) is not None:
            last_us = max(int((at + ahead_s) * 1e6) for _, at in entries)
            commands = [*self._entering(entries, ahead_s), self._lasting(last_us)]
            began = command(b"GET", self._names.began)
            replies = self._sets.ask(self._names.began, [*commands, began], deadline)
            if replies and (replies[-1] is not None or self._begin(last_us, deadline)):
                listing = add(MODELS, {self._model: last_us})
                if self._sets.ask(MODELS, [*listing], deadline):
                    return ""
        return self._give_up(max(at for _, at in entries) - self._clock(), deadline)

    def touch(self, entries: Iterable[tuple[bytes, float]], deadline: float) -> None:
        """Keep entries until a later time; one that is not in the index is ignored.

        Args:
            entries: their keys, and when they expire on the tier's clock, in seconds.
            deadline: until when an answer is waited for.
        """
        if (ahead_s := self._sets.ahead_s(self._names.began, deadline)) is None:
            return
        entries = list(entries)
        last_us = max(int((at + ahead_s) * 1e6) for _, at in entries)
        commands = [*self._entering(entries, ahead_s, b"XX"), self._lasting(last_us)]
        self._sets.ask(self._names.began, commands, deadline)
        self._sets.ask(MODELS, [*add(MODELS, {self._model: last_us}, b"XX")], deadline)

    def find(self, prefix: bytes, deadline: Callable[[], float]) -> Iterator[list[bytes]]:
        """Yield the names of all entries in the index, of whatever model, whose owner begins with
        ``prefix``. They leave the index before the next ones are yielded.

        Args:
            prefix: an organisation's tag, or an owner.
            deadline: returns until when the next answer is waited for.

        Raises:
            NoIndex: if the user may not read the index.
        """
        org, session = prefix[:TAG_BYTES], prefix[TAG_BYTES:]
        for model in self._models(deadline()):
            names = OwnerNames(model)
            listing = command(b"ZRANGE", names.sessions(org), b"0", b"-1")
            for tag in [session] if session else members(self._ask(listing, names, deadline())):
                entries = names.entries(org, tag)
                first = command(b"ZRANGE", entries, b"0", b"%d" % (LISTED - 1))
                while blocks := members(self._ask(first, names, deadline())):
                    yield [names.entry(org, tag, block) for block in blocks]
                    self._ask(command(b"ZREM", entries, *blocks), names, deadline())

    def is_whole(self, deadline: Callable[[], float]) -> bool:
        """Whether all entries are in the index, of whatever model.

        Args:
            deadline: returns until when the next answer is waited for.

        Raises:
            NoIndex: if the user may not read the index.
        """
        for model in self._models(deadline()):
            name = OwnerNames(model).began
            asked = [command(b"GET", name), command(b"INFO")]
            began, info = self._ask_node_of(name, asked, deadline())
            if not (server_id := _server_id(info)) or began not in (None, server_id):
                return False
        (info,) = self._ask_node_of(MODELS, [command(b"INFO")], deadline())
        return bool(_server_id(info))

    def _entering(
        self, entries: Sequence[tuple[bytes, float]], ahead_s: float, *only: bytes
    ) -> Iterator[bytes]:
        """Yield the commands that enter entries."""
        now = b"%d" % self._sets.now_us(ahead_s)
        owners: defaultdict[bytes, dict[bytes, int]] = defaultdict(dict)
        for key, at in entries:
            owner, block = split(key)
            owners[owner][block] = int((at + ahead_s) * 1e6)
        orgs: defaultdict[bytes, dict[bytes, int]] = defaultdict(dict)
        for owner, blocks in owners.items():
            org, session = owner[:TAG_BYTES], owner[TAG_BYTES:]
            orgs[org][session] = max(blocks.values())
            yield from _add(self._names.entries(org, session), blocks, now, only)
        for org, sessions in orgs.items():
            yield from _add(self._names.sessions(org), sessions, now, only)

    def _begin(self, last_us: int, deadline: float) -> bool:
        """Note which server began the model's sets. Return whether it says who it is."""
        name = self._names.began
        (info,) = self._ask_node_of(name, [command(b"INFO")], deadline)
        if not (server_id := _server_id(info)):
            return False
        until_ms = b"%d" % expiry_ms(last_us)
        begin = command(b"SET", name, server_id, b"NX", b"PXAT", until_ms)
        return bool(self._sets.ask(name, [begin, self._lasting(last_us)], deadline))

    def _lasting(self, last_us: int) -> bytes:
        """Return the command that keeps the note on who began the sets until a time at least."""
        return command(b"PEXPIREAT", self._names.began, b"%d" % expiry_ms(last_us), b"GT")

    def _give_up(self, lifetime_s: float, deadline: float) -> str:
        """Note that entries are stored which are not in the index. Return the server's words if it
        does not take the note."""
        name, lifetime_ms = self._names.began, b"%d" % max(1, int(lifetime_s * 1000))
        commands = [
            command(b"SET", name, _NOT_WHOLE, b"NX", b"PX", lifetime_ms),
            command(b"SET", name, _NOT_WHOLE, b"XX", b"KEEPTTL"),
            command(b"PEXPIRE", name, lifetime_ms, b"GT"),
        ]
        replies = self._ask_node_of(name, commands, deadline)
        return next((str(reply) for reply in replies if isinstance(reply, Refusal)), "")

    def _models(self, deadline: float) -> set[bytes]:
        listing = command(b"ZRANGE", MODELS, b"0", b"-1")
        return {*members(self._ask(listing, None, deadline)), self._model}

    def _ask(self, asked: bytes, names: OwnerNames | None, deadline: float) -> Reply:
        """Return the answer of the node that has a model's sets, or that of the models."""
        replies = self._sets.ask(names.began if names else MODELS, [asked], deadline)
        if not replies:
            raise NoIndex
        return replies[0]


def _add(
    name: bytes, expires_us: Mapping[bytes, int], now: bytes, only: Sequence[bytes]
) -> Iterator[bytes]:
    yield from add(name, expires_us, *only)
    yield command(b"ZREMRANGEBYSCORE", name, b"-inf", now)


def _server_id(info: Reply) -> bytes:
    """Return the id of the server that gives this information; empty if it does not say, or has
    evicted anything since it began."""
    if not isinstance(info, bytes) or isinstance(info, Refusal):
        return b""
    fields = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
    return fields.get(b"run_id", b"") if fields.get(b"evicted_keys") == b"0" else b""
