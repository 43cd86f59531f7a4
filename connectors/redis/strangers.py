"""The engines on a Redis that share nothing with this one: each leaves which kind it is."""

from collections.abc import Callable, Sequence

from vllm_cachescope.connectors.redis.channel import Reply, command
from vllm_cachescope.tiers.engine_kind import EngineKind, difference_in_words
from vllm_cachescope.tiers.keyspace import KINDS, Keyspace

KIND_S = 3600
"""How long the kind of an engine that is not heard of any more is told to others, in seconds."""

KINDS_LISTED = 64
"""How many kinds of engines are told of."""

# Each value has in front of it when it was left, in seconds.
_MEET = b"""
local now, met = tonumber(redis.call('TIME')[1]), {}
local held = redis.call('HGETALL', KEYS[1])
for i = 1, #held, 2 do
  local at, kind = string.match(held[i + 1], '^(%%d+) (.*)$')
  if not at or tonumber(at) < now - %d then
    redis.call('HDEL', KEYS[1], held[i])
  elseif held[i] ~= ARGV[1] then
    met[#met + 1] = kind
  end
end
if #met < %d then
  redis.call('HSET', KEYS[1], ARGV[1], now .. ' ' .. ARGV[2])
  redis.call('PEXPIRE', KEYS[1], %d)
end
return met""" % (KIND_S, KINDS_LISTED, KIND_S * 1000)


def strangers(
    keyspace: Keyspace,
    secret_digest: bytes,
    ask_node_of: Callable[[bytes, Sequence[bytes], float], list[Reply]],
    deadline: float,
) -> list[str]:
    """Leave which kind of engine this is; return in what others differ from it, in words, of those
    that have used the server lately. Nothing where the server refuses.

    Args:
        keyspace: that of the engine's entries.
        secret_digest: tells its secret from others.
        ask_node_of: sends commands to the node that has a name, and returns the answers.
        deadline: until when an answer is waited for.
    """
    ours = EngineKind.of(keyspace.identity, secret_digest)
    words = (b"EVAL", _MEET, b"1", KINDS, keyspace.namespace.encode(), ours.to_bytes())
    (met,) = ask_node_of(KINDS, [command(*words)], deadline)
    kinds = met if isinstance(met, list) else []
    others = (difference_in_words(ours, kind) for kind in kinds if isinstance(kind, bytes))
    return sorted({words for words in others if words is not None})
