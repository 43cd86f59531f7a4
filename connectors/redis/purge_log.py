"""The purge log in Redis: a sorted set of notices by the server's time, and a hash of followers."""

from collections.abc import Callable, Sequence

from vllm_cachescope.connectors.redis.channel import Refusal, Reply, command
from vllm_cachescope.connectors.redis.sorted_sets import members, number, pairs
from vllm_cachescope.tiers.keyspace import PurgeLogNames
from vllm_cachescope.tiers.purge_log import (
    AT_ONCE,
    MAX_ENTRIES,
    RETENTION_S,
    Follower,
    News,
    PurgeLog,
)
from vllm_cachescope.tiers.store import StoreFailed

RETENTION_US = RETENTION_S * 1_000_000

GONE_S = 3600
"""How long a follower that is not heard of any more stays listed, in seconds."""

# The time is taken where the entry is written: a position that shows is the last one that will be
# written up to there. A server that is full takes notices still, and the shebang asks for that.
_NOW = b"""#!lua flags=allow-oom
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
"""

_ANNOUNCE = (
    _NOW
    + b"""
local known = redis.call('ZSCORE', KEYS[1], ARGV[1])
if known then return string.format('%%.0f', tonumber(known)) end
local last = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]
if last and tonumber(last) >= now then now = tonumber(last) + 1 end
redis.call('ZADD', KEYS[1], string.format('%%.0f', now), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%%.0f', now - %d))
local over = redis.call('ZCARD', KEYS[1]) - %d
if over > 0 then
  local cut = redis.call('ZRANGE', KEYS[1], over - 1, over - 1, 'WITHSCORES')[2]
  redis.call('SET', KEYS[3], string.format('%%.0f', tonumber(cut)), 'PX', %d)
  redis.call('ZREMRANGEBYRANK', KEYS[1], 0, over - 1)
end
redis.call('PEXPIRE', KEYS[1], %d)
return string.format('%%.0f', now)"""
    % (RETENTION_US, MAX_ENTRIES, RETENTION_S * 1000, RETENTION_S * 1000)
)

_FOLLOW = (
    _NOW
    + b"""
local new = redis.call('HSET', KEYS[2], ARGV[1], ARGV[2] .. string.format('@%%.0f', now))
redis.call('PEXPIRE', KEYS[2], %d)
local cut = redis.call('GET', KEYS[3]) or '0'
local news = redis.call('ZRANGE', KEYS[1], '(' .. ARGV[3], '+inf', 'BYSCORE', 'LIMIT', 0, %d,
  'WITHSCORES')
return {string.format('%%.0f', now), cut, new, news}"""
    % (GONE_S * 1000, AT_ONCE)
)

_LIST = _NOW + b"return {string.format('%.0f', now), redis.call('HGETALL', KEYS[1])}"


class RedisPurgeLog(PurgeLog):
    """One thread's way to the log of all engines with one secret.

    Args:
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        ask_node_of: sends commands to the node that has a name, and returns the answers.
    """

    def __init__(
        self,
        secret_digest: bytes,
        ask_node_of: Callable[[bytes, Sequence[bytes], float], list[Reply]],
    ) -> None:
        self._names = PurgeLogNames(secret_digest)
        self._ask_node_of = ask_node_of

    def announce(self, entry: bytes, deadline: float) -> int:
        return number(self._run(_ANNOUNCE, deadline, entry))

    def follow(self, follower_id: bytes, claim: bytes, since: int, deadline: float) -> News:
        reply = self._run(_FOLLOW, deadline, follower_id, claim, b"%d" % since)
        now, cut, new, news = reply if isinstance(reply, list) else (None, None, None, [])
        entries = [(int(at), entry) for entry, at in pairs(news)]
        complete_from = max(number(cut), number(now) - RETENTION_US)
        return News(number(now), complete_from, number(new) == 1, entries)

    def followers(self, deadline: float) -> list[Follower]:
        name = self._names.followers
        listing = command(b"EVAL", _LIST, b"1", name)
        (reply,) = self._ask_node_of(name, [listing], deadline)
        now, listed = reply if isinstance(reply := _checked(reply), list) else (None, [])
        values = members(listed)
        found = []
        for follower_id, value in zip(values[::2], values[1::2], strict=True):
            # The server's time stands behind the claim.
            claim, _, heard_of = value.rpartition(b"@")
            if heard_of.isdigit():
                idle_s = (number(now) - int(heard_of)) / 1e6
                found.append(Follower(follower_id, claim, idle_s))
        if gone := [one.follower_id for one in found if one.idle_s > GONE_S]:
            self._ask_node_of(name, [command(b"HDEL", name, *gone)], deadline)
        return found

    def _run(self, script: bytes, deadline: float, *arguments: bytes) -> Reply:
        names = (self._names.log, self._names.followers, self._names.cut)
        words = (b"EVAL", script, b"3", *names, *arguments)
        (reply,) = self._ask_node_of(names[0], [command(*words)], deadline)
        return _checked(reply)


def _checked(reply: Reply) -> Reply:
    """Return an answer that is no refusal.

    Raises:
        StoreFailed: if it is one.
    """
    if isinstance(reply, Refusal):
        raise StoreFailed(str(reply))
    return reply
