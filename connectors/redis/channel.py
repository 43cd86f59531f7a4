"""A channel to one Redis server, in which values go straight to and from our memory.

redis-py connects, authenticates and speaks TLS. From there on the socket is ours: a client that
hands out values as `bytes` copies each of them twice on the way to its slot.
"""

import select
import socket
import ssl
from collections.abc import Callable
from typing import NoReturn

from redis.connection import AbstractConnection
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeout

from vllm_cachescope.tiers.store import StoreFailed, StoreLate

_BUFFER_BYTES = 16 << 10


class Refusal(str):
    """An error the server answered with."""

    @property
    def code(self) -> str:
        """Its first word, as in ``OOM``."""
        return self.partition(" ")[0]


Reply = int | bytes | Refusal | list["Reply"] | None


class Channel:
    """A connection to one server. Whatever goes wrong closes it: an answer that was not read to
    its end would be taken for the next one.

    Args:
        connection: redis-py's connection, not connected yet.
        clock: the clock of all deadlines, in seconds.
    """

    def __init__(self, connection: AbstractConnection, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._clock = clock
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        try:
            connection.connect()
        except (RedisTimeout, TimeoutError) as error:
            connection.disconnect()
            raise StoreLate(f"no connection: {error}") from None
        except (RedisError, OSError) as error:
            connection.disconnect()
            raise StoreFailed(str(error)) from None
        sock = connection._sock
        assert sock is not None
        self._socket: socket.socket = sock
        self._gathers: bool = not isinstance(sock, ssl.SSLSocket)

    def close(self) -> None:
        """Close the connection."""
        self._start = self._end = 0
        self._connection.disconnect()

    @property
    def alive(self) -> bool:
        """Whether the connection stands and nothing unexpected has arrived on it: what a server
        sends unasked is that it hangs up."""
        if not self._connection.is_connected or self._start != self._end:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    # Sending.

    def send(self, commands: list[bytes], deadline: float) -> None:
        """Send commands that `command` made."""
        self._send([b"".join(commands)], deadline)

    def send_value(self, before: bytes, payload: memoryview, after: bytes, deadline: float) -> None:
        """Send a command with ``payload`` in it from where it lies."""
        self._send([before, payload, after], deadline)

    def _send(self, pieces: list[bytes | memoryview], deadline: float) -> None:
        views = [memoryview(piece) for piece in pieces]
        try:
            while views:
                self._socket.settimeout(self._left(deadline))
                # TLS has no gathering write.
                sent = self._socket.sendmsg(views) if self._gathers else self._socket.send(views[0])
                while views and sent >= len(views[0]):
                    sent -= len(views.pop(0))
                if views:
                    views[0] = views[0][sent:]
        except OSError as error:
            self._fail(error)

    # Receiving.

    def reply(self, deadline: float) -> Reply:
        """Receive one answer whole. For answers that are small."""
        kind, rest = self._line(deadline)
        if kind == b"+":
            return rest
        if kind == b"-":
            return Refusal(rest.decode(errors="replace"))
        if kind not in (b":", b"$", b"*"):
            self._garbage(kind + rest)
        number = self._number(rest)
        if kind == b":":
            return number
        if number < 0:
            return None
        if kind == b"*":
            return [self.reply(deadline) for _ in range(number)]
        body = bytearray(number)
        self.receive(memoryview(body), deadline)
        self.end_value(deadline)
        return bytes(body)

    def value_length(self, deadline: float) -> int | Refusal | None:
        """Receive the beginning of a value: its length, None if there is no value."""
        kind, rest = self._line(deadline)
        if kind == b"-":
            return Refusal(rest.decode(errors="replace"))
        if kind != b"$":
            self._garbage(kind + rest)
        number = self._number(rest)
        return None if number < 0 else number

    def receive(self, target: memoryview, deadline: float) -> None:
        """Receive as many bytes of a value as ``target`` has."""
        done = min(len(target), self._end - self._start)
        target[:done] = self._buffer[self._start : self._start + done]
        self._start += done
        try:
            while done < len(target):
                self._socket.settimeout(self._left(deadline))
                received = self._socket.recv_into(target[done:])
                if received == 0:
                    raise ConnectionResetError("the server closed the connection")
                done += received
        except OSError as error:
            self._fail(error)

    def skip(self, length: int, deadline: float) -> None:
        """Receive ``length`` bytes of a value, and drop them."""
        waste = memoryview(bytearray(min(length, 1 << 20)))
        while length > 0:
            step = min(length, len(waste))
            self.receive(waste[:step], deadline)
            length -= step

    def end_value(self, deadline: float) -> None:
        """Receive what comes after a value."""
        end = bytearray(2)
        self.receive(memoryview(end), deadline)
        if end != b"\r\n":
            self._garbage(bytes(end))

    def _line(self, deadline: float) -> tuple[bytes, bytes]:
        searched = self._start
        while True:
            # Only short lines come here, so a copy of the buffer is cheap.
            at = bytes(self._buffer[searched : self._end]).find(b"\r\n")
            if at >= 0:
                line = bytes(self._buffer[self._start : searched + at])
                self._start = searched + at + 2
                return line[:1], line[1:]
            searched = max(self._start, self._end - 1)
            self._more(deadline)
            if self._start == 0:
                searched = 0

    def _more(self, deadline: float) -> None:
        """Receive a little more into the buffer: what follows a line may be a value, and belongs
        in its slot."""
        pending = self._end - self._start
        if self._start:
            self._buffer[:pending] = self._buffer[self._start : self._end]
            self._start, self._end = 0, pending
        if pending == len(self._buffer):
            self._garbage(bytes(self._buffer[:40]))
        try:
            self._socket.settimeout(self._left(deadline))
            received = self._socket.recv_into(self._buffer[pending : pending + 512])
            if received == 0:
                raise ConnectionResetError("the server closed the connection")
        except OSError as error:
            self._fail(error)
        self._end += received

    def _number(self, text: bytes) -> int:
        try:
            return int(text)
        except ValueError:
            self._garbage(text)

    def _left(self, deadline: float) -> float:
        left = deadline - self._clock()
        if left <= 0:
            raise TimeoutError("no answer in time")
        return left

    def _garbage(self, what: bytes) -> NoReturn:
        self.close()
        raise StoreFailed(f"not an answer of Redis: {what[:40]!r}")

    def _fail(self, error: OSError) -> NoReturn:
        self.close()
        if isinstance(error, TimeoutError):
            raise StoreLate("no answer in time") from None
        raise StoreFailed(str(error)) from None


def command(*words: bytes) -> bytes:
    """Return a command as it is sent."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)
