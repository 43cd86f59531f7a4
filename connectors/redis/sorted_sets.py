"""Sorted sets of entries in a Redis, by when the entries expire on the server's clock in µs.

Each set expires with the last entry that is in it: nobody has to clean up after the last engine.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from vllm_cachescope.connectors.redis.channel import Refusal, Reply, command
from vllm_cachescope.connectors.redis.server_clock import ServerClock
from vllm_cachescope.logs import logger_of

logger = logger_of(__name__)

AT_ONCE = 1000
"""Members that one call of the script adds; Lua takes some 8000 words at most."""

# A script, since a set whose expiry was lost with the connection would stay for ever. What has no
# expiry yet counts as longer than any for GT.
_ADD = b"""
local added = redis.call('ZADD', KEYS[1], unpack(ARGV, 2))
redis.call('PEXPIREAT', KEYS[1], ARGV[1], 'NX')
redis.call('PEXPIREAT', KEYS[1], ARGV[1], 'GT')
return added"""


class SortedSets:
    """One thread's way to sorted sets.

    Args:
        clock: the tier's clock.
        server_clock: shared with the tier's other threads.
        ask_node_of: sends commands to the node that has a name, and returns the answers.
        loss: what is lost where the server refuses, for the log.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        server_clock: ServerClock,
        ask_node_of: Callable[[bytes, Sequence[bytes], float], list[Reply]],
        loss: str,
    ) -> None:
        self._clock = clock
        self._server_clock = server_clock
        self._ask_node_of = ask_node_of
        self._loss = loss
        self.refusal: Refusal | None = None

    def ask(self, name: bytes, commands: Sequence[bytes], deadline: float) -> list[Reply]:
        """Return a node's answers to commands; none if it refuses one of them, as it does where
        the user has no right to them.

        Args:
            name: a name that the node has.
            commands: what `command` made.
            deadline: until when the answers are waited for.
        """
        if not commands:
            return []
        replies = self._ask_node_of(name, commands, deadline)
        refusal = next((reply for reply in replies if isinstance(reply, Refusal)), None)
        if refusal is not None and refusal != self.refusal:
            logger.warning("%s: %s", self._loss, refusal)
        self.refusal = refusal
        return [] if refusal is not None else replies

    def ahead_s(self, name: bytes, deadline: float) -> float | None:
        """Return how far the clock of the node that has ``name`` is ahead of ours, in seconds; None
        if it does not tell."""
        asked = self._clock()
        if self._server_clock.is_due(asked):
            (reply,) = self.ask(name, [command(b"TIME")], deadline) or (None,)
            if isinstance(reply, list):
                seconds, micros = map(number, reply)
                self._server_clock.learn(seconds + micros / 1e6, asked, self._clock())
        return self._server_clock.ahead_s

    def now_us(self, ahead_s: float) -> int:
        """Return the server's time in µs."""
        return int((self._clock() + ahead_s) * 1e6)


def add(name: bytes, expires_us: Mapping[bytes, int], *only: bytes) -> Iterator[bytes]:
    """Yield the commands that add members to a set, or let them be in it for longer. The set lives
    as long as the last of them at least.

    Args:
        name: the set's name.
        expires_us: when each member expires.
        only: ``XX`` if members that are not in the set are to be ignored.
    """
    left = iter(expires_us.items())
    while batch := dict(islice(left, AT_ONCE)):
        scored = (word for member, at in batch.items() for word in (b"%d" % at, member))
        until_ms = b"%d" % expiry_ms(max(batch.values()))
        yield command(b"EVAL", _ADD, b"1", name, until_ms, *only, b"GT", *scored)


def expiry_ms(last_us: int) -> int:
    """Return when a name may expire that is needed until a time in µs, in ms."""
    return last_us // 1000 + 1


def pairs(reply: Reply = None) -> Iterator[tuple[bytes, float]]:
    """Yield members of a sorted set with their scores."""
    flat = reply if isinstance(reply, list) else []
    for member, score in zip(flat[::2], flat[1::2], strict=True):
        assert isinstance(member, bytes) and isinstance(score, bytes)
        yield member, float(score)


def members(reply: Reply = None) -> list[bytes]:
    """Return members of a sorted set."""
    return [item for item in reply if isinstance(item, bytes)] if isinstance(reply, list) else []


def number(reply: Reply) -> int:
    """Return a number that the server answered with; 0 if it is none."""
    return int(reply) if isinstance(reply, int | bytes) else 0
