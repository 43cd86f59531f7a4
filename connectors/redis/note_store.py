"""The store of notes on sessions in Redis: a hash for each session, and beside them, for each
account, which sessions there are and how much they take up."""

from collections.abc import Callable, Mapping, Sequence

from vllm_cachescope.connectors.redis.address import Address
from vllm_cachescope.connectors.redis.channel import Refusal, Reply, command
from vllm_cachescope.connectors.redis.connections import Connections
from vllm_cachescope.connectors.redis.server_clock import ServerClock
from vllm_cachescope.connectors.redis.sorted_sets import members, number
from vllm_cachescope.connectors.redis.topology import Topology
from vllm_cachescope.tiers.keyspace import NoteNames
from vllm_cachescope.tiers.note_store import (
    BOUNDS,
    NOTE_BYTES,
    NoteBounds,
    NoteName,
    NoteStore,
)
from vllm_cachescope.tiers.store import StoreFailed

# A session that is not in the index is not counted, and must not be read: an organisation's purge
# would not find it.
_READ = b"""
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return {} end
return redis.call('HGETALL', KEYS[2])"""

_WRITE = (
    b"""
local index, sizes, notes = KEYS[1], KEYS[2], KEYS[3]
local session, ttl, gone = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[7])
local most, most_bytes = tonumber(ARGV[3]), tonumber(ARGV[4])
local most_notes, most_of_one = tonumber(ARGV[5]), tonumber(ARGV[6])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if not redis.call('ZSCORE', index, session) then redis.call('UNLINK', notes) end
if gone > 0 then redis.call('HDEL', notes, unpack(ARGV, 8, 7 + gone)) end
redis.call('HSET', notes, unpack(ARGV, 8 + gone))
local names = redis.call('HKEYS', notes)
table.sort(names)
local bytes, kept = 0, 0
for i = #names, 1, -1 do
  local more = redis.call('HSTRLEN', notes, names[i]) + %d
  if kept > 0 and (kept == most_notes or bytes + more > most_of_one) then
    redis.call('HDEL', notes, names[i])
  else
    bytes, kept = bytes + more, kept + 1
  end
end
local left = redis.call('PTTL', notes)
if left < ttl then redis.call('PEXPIRE', notes, ttl) left = ttl end
redis.call('ZADD', index, string.format('%%.0f', now + left), session)
local before = tonumber(redis.call('HGET', sizes, session) or '0')
redis.call('HSET', sizes, session, bytes)
local total = redis.call('HINCRBY', sizes, 'total', bytes - before)
local function forget(one)
  local size = tonumber(redis.call('HGET', sizes, one) or '0')
  total = redis.call('HINCRBY', sizes, 'total', -size)
  redis.call('HDEL', sizes, one)
  redis.call('ZREM', index, one)
end
local over = redis.call('ZRANGE', index, '-inf', string.format('(%%.0f', now), 'BYSCORE',
  'LIMIT', 0, 100)
for _, one in ipairs(over) do forget(one) end
while total > most_bytes or redis.call('ZCARD', index) > most do
  local first = redis.call('ZRANGE', index, 0, 0)[1]
  if not first then break end
  forget(first)
  over[#over + 1] = first
end
for _, name in ipairs({index, sizes}) do
  if redis.call('PTTL', name) < left then redis.call('PEXPIRE', name, left) end
end
return over"""
    % NOTE_BYTES
)

# Of the sessions in the index those of one organisation, or one session.
_FORGET = b"""
local gone = {}
for _, one in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  if string.sub(one, 1, #ARGV[1]) == ARGV[1] then
    local size = tonumber(redis.call('HGET', KEYS[2], one) or '0')
    redis.call('HINCRBY', KEYS[2], 'total', -size)
    redis.call('HDEL', KEYS[2], one)
    redis.call('ZREM', KEYS[1], one)
    gone[#gone + 1] = one
  end
end
return gone"""

_AT_ONCE = 500


class RedisNoteStore(NoteStore):
    """One thread's way to the notes in a Redis.

    Args:
        address: where it is.
        topology: which nodes it has.
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        timeout_s: how long connecting to one node may take, in seconds.
        clock: seconds, never running backwards; the clock of deadlines.
        bounds: how many notes are kept.
    """

    def __init__(
        self,
        address: Address,
        topology: Topology,
        secret_digest: bytes,
        timeout_s: float,
        clock: Callable[[], float],
        bounds: NoteBounds = BOUNDS,
    ) -> None:
        self._bounds = bounds
        self.address = address.shown
        self._connections = Connections(address, topology, timeout_s, clock)
        self._topology = topology
        self._names = NoteNames(secret_digest)
        self._clock = clock
        self._server_clock = ServerClock()

    def alive(self) -> bool:
        return self._connections.alive()

    def connect(self, deadline: float) -> None:
        self._connections.connect(deadline)

    def close(self) -> None:
        self._connections.close()

    def ahead_s(self, deadline: float) -> float:
        asked = self._clock()
        # In a Cluster one node's time is that of all: the nodes' clocks may differ a little.
        if self._server_clock.is_due(asked):
            reply = self._ask(self._names.prefix, deadline, b"TIME")
            if isinstance(reply, list):
                seconds, micros = map(number, reply)
                self._server_clock.learn(seconds + micros / 1e6, asked, self._clock())
        if (ahead_s := self._server_clock.ahead_s) is None:
            raise StoreFailed("it does not tell the time")
        return ahead_s

    def read(self, name: NoteName, deadline: float) -> Mapping[bytes, bytes]:
        names = self._names.index(name.account), self._notes(name)
        flat = members(self._run(_READ, names, deadline, name.org + name.session))
        return dict(zip(flat[::2], flat[1::2], strict=True))

    def write(
        self,
        name: NoteName,
        notes: Mapping[bytes, bytes],
        obsolete: Sequence[bytes],
        ttl_s: float,
        deadline: float,
    ) -> None:
        account = name.account
        names = self._names.index(account), self._names.sizes(account), self._notes(name)
        flat = [word for pair in notes.items() for word in pair]
        most = self._bounds
        bounds = most.sessions, most.nbytes, most.notes, most.session_bytes
        over = self._run(
            _WRITE,
            names,
            deadline,
            name.org + name.session,
            b"%d" % (ttl_s * 1000),
            *(b"%d" % bound for bound in bounds),
            b"%d" % len(obsolete),
            *obsolete,
            *flat,
        )
        self._unlink(account, members(over), deadline)

    def drop(self, name: NoteName, deadline: float) -> None:
        names = self._names.index(name.account), self._names.sizes(name.account)
        gone = self._run(_FORGET, names, deadline, name.org + name.session)
        sessions = members(gone)
        if name.session:
            # Whether or not the index has lost it.
            sessions = [name.org + name.session]
        self._unlink(name.account, sessions, deadline)

    def drop_all(self, deadline: float) -> None:
        self.connect(deadline)
        for node in self._topology.nodes:
            cursor = b"0"
            while True:
                words = (b"SCAN", cursor, b"MATCH", self._names.all, b"COUNT", b"1000")
                reply = _checked(self._connections.ask(node, deadline, *words))
                if not isinstance(reply, list):
                    raise StoreFailed(f"SCAN: {reply!r}")
                if names := members(reply[1]):
                    unlinked = {one: command(b"UNLINK", one) for one in names}
                    self._connections.ask_each(unlinked, deadline)
                cursor = bytes(reply[0]) if isinstance(reply[0], bytes) else b"0"
                if cursor == b"0":
                    break

    def _unlink(self, account: bytes, sessions: Sequence[bytes], deadline: float) -> None:
        for first in range(0, len(sessions), _AT_ONCE):
            names = [self._names.notes(account, s) for s in sessions[first : first + _AT_ONCE]]
            self._ask(names[0], deadline, b"UNLINK", *names)

    def _notes(self, name: NoteName) -> bytes:
        return self._names.notes(name.account, name.org + name.session)

    def _run(
        self, script: bytes, names: Sequence[bytes], deadline: float, *arguments: bytes
    ) -> Reply:
        words = (b"EVAL", script, b"%d" % len(names), *names, *arguments)
        return self._ask(names[0], deadline, *words)

    def _ask(self, name: bytes, deadline: float, *words: bytes) -> Reply:
        (reply,) = self._connections.ask_node_of(name, [command(*words)], deadline)
        return _checked(reply)


def _checked(reply: Reply) -> Reply:
    """Return an answer that is no refusal.

    Raises:
        StoreFailed: if it is one.
    """
    if isinstance(reply, Refusal):
        raise StoreFailed(str(reply))
    return reply
