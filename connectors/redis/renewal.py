"""The renewal of entries in Redis: a later end, in the store and in the lease, or in neither."""

from collections.abc import Iterator, Mapping
from itertools import islice

from vllm_cachescope.connectors.redis.channel import command
from vllm_cachescope.tiers.envelope import HEADER_BYTES

AT_ONCE = 64
"""Entries that one call of the script renews: some 0.2 ms of the server's work."""

# A script, since a lease written to an entry that has just gone would stay for ever, and a lease
# must not be older than the expiry beside it. A server that is full refuses no write of a script
# after its first one. An entry that is no string is found out by whoever reads it.
_SCRIPT = b"""
for i, name in ipairs(KEYS) do
  if redis.call('PEXPIRE', name, ARGV[2 * i - 1], 'GT') == 1 then
    local done = redis.pcall('SETRANGE', name, %d, ARGV[2 * i])
    if type(done) == 'table' and done.err:sub(1, 9) ~= 'WRONGTYPE' then return done end
  end
end""" % (HEADER_BYTES)


def renewals(
    leases: Mapping[bytes, tuple[int, bytes]], at_once: int
) -> Iterator[tuple[bytes, bytes]]:
    """Yield commands that let entries live longer, if they are there and would end sooner, each
    with the name of one of its entries.

    Args:
        leases: by the entry's name, how long it lives from now on, in ms, and its lease until then.
        at_once: how many entries a command may name: in a Cluster one, `AT_ONCE` elsewhere.
    """
    entries = iter(leases.items())
    while batch := dict(islice(entries, at_once)):
        arguments = (word for ms, lease in batch.values() for word in (b"%d" % ms, lease))
        words = (b"EVAL", _SCRIPT, b"%d" % len(batch), *batch, *arguments)
        yield next(iter(batch)), command(*words)
