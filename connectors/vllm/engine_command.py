"""A command to an engine over its own port: sealed under the secret, and good for one use."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec
from cachetools import TTLCache

PATH, HEALTH_PATH = "/command", "/health"
COMMANDS = frozenset(
    {"end_session", "endings", "evictions", "facts", "health", "heed", "purge", "purged", "report",
     "sweep"}
)  # fmt: skip
"""The commands of the connector, all of which may come this way."""

GOOD_FOR_S = 60.0
"""How far the clocks of two machines may be apart, in seconds: a command is refused later."""

REMEMBERED = 100_000
"""Commands that an engine recognises when they come again."""

MAX_BYTES = 1 << 16

_MAC_BYTES = 32


class Refused(Exception):
    """A command that is not carried out."""


class Command(msgspec.Struct, frozen=True, array_like=True):
    """A command.

    Attributes:
        name: one of `COMMANDS`.
        args: its arguments.
        at: when it was given, in Unix seconds.
        nonce: unlike that of any other.
    """

    name: str
    args: list[Any]
    at: float
    nonce: bytes


def sealed(
    name: str, args: list[Any], secret: bytes, wall_clock: Callable[[], float] = time.time
) -> bytes:
    """Return a command as it travels."""
    command = Command(name, args, wall_clock(), secrets.token_bytes(16))
    body = msgspec.msgpack.encode(command)
    return _mac(body, secret) + body


class CommandReader:
    """Opens commands.

    Args:
        secret: key of their MACs.
        wall_clock: Unix time in seconds.
    """

    def __init__(self, secret: bytes, wall_clock: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._wall_clock = wall_clock
        self._seen: TTLCache[bytes, None] = TTLCache(REMEMBERED, 2 * GOOD_FOR_S, wall_clock)

    def open(self, data: bytes) -> Command:
        """Return the command in ``data``.

        Raises:
            Refused: if it was not sealed under the secret, is too old, or was here before.
        """
        mac, body = data[:_MAC_BYTES], data[_MAC_BYTES:]
        if not hmac.compare_digest(mac, _mac(body, self._secret)):
            raise Refused("it was not sealed under this engine's secret")
        command = msgspec.msgpack.decode(body, type=Command)
        if abs(self._wall_clock() - command.at) > GOOD_FOR_S:
            raise Refused("it is too old, or the clocks are apart")
        if command.nonce in self._seen or command.name not in COMMANDS:
            raise Refused("it was carried out before, or is none")
        self._seen[command.nonce] = None
        return command


def _mac(body: bytes, secret: bytes) -> bytes:
    key = hmac.digest(secret, b"cachescope engine commands", hashlib.sha256)
    return hmac.digest(key, body, hashlib.sha256)
