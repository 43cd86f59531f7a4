"""Real Redis servers for tests, and a proxy that mistreats what passes through it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import redis

from vllm_cachescope.tiers.keyspace import HANDSHAKES, KINDS, names_of

REDIS_SERVER = shutil.which(os.environ.get("REDIS_SERVER", "redis-server"))
"""Path of the server to test with; ``REDIS_SERVER=valkey-server`` tests with Valkey."""


def free_port() -> int:
    """Return a TCP port on the loopback that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def entries(server: "RedisServer") -> set[bytes]:
    """Return the names of the tiers' entries in a server, without what stands beside them."""
    return set(server.client.scan_iter(names_of(b"")))


def beside_engines(server: "RedisServer") -> set[bytes]:
    """Return the names that stand in a server as long as engines use it: the digest of their
    secret and of their kind, which come back with their next greeting, and the list of who follows
    purges."""
    client = server.client
    return {*client.keys(HANDSHAKES), *client.keys("cachescope:*:{purges}:*"), *client.keys(KINDS)}


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Return once ``condition`` holds.

    Raises:
        TimeoutError: if it does not in ``timeout_s`` seconds.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it does not come true")
        time.sleep(0.005)


class RedisServer:
    """A redis-server of our own, without persistence.

    Args:
        directory: where it may write.
        options: further command-line arguments.
        port: the port to listen on; a free one if not given.
    """

    def __init__(self, directory: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.socket = directory / f"{self.port}.sock"
        self._arguments = [
            str(REDIS_SERVER),
            *("--port", str(self.port), "--bind", "127.0.0.1"),
            *("--unixsocket", str(self.socket)),
            *("--save", "", "--appendonly", "no", "--dir", str(directory)),
            *options,
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def client(self) -> "redis.Redis":
        """A client of its own for the test."""
        return redis.Redis(port=self.port, protocol=2)

    def start(self) -> None:
        """Start the server, empty."""
        self._process = subprocess.Popen(
            self._arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_until(self._answers)
        except TimeoutError:
            self.kill()
            raise

    def kill(self) -> None:
        """Kill it as a crash does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Make it hang; return once it does."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        # A process that is running takes a while to notice.
        status = Path(f"/proc/{self._process.pid}/status")
        wait_until(lambda: "State:\tT" in status.read_text())

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Get rid of it, whatever state it is in."""
        assert self._process is not None
        if self._process.poll() is None:
            self.resume()
            self.kill()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as sock:
                sock.sendall(b"PING\r\n")
                # Any answer: a server that asks for a password is up as well.
                return sock.recv(1) in (b"+", b"-")
        except OSError:
            return False


class Proxy:
    """Stands between a client and a server, byte by byte.

    Attributes:
        chunk: most bytes it passes on at once from the server; None for all there are.
        pause_s: how long it waits after each chunk, in seconds.
        cut_after: closes a connection after so many bytes from the server; None for never.
        passed: bytes that it has passed on from the server so far, over all connections.
        most: has what would make them more wait; None for no limit.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.chunk: int | None = None
        self.pause_s = 0.0
        self.cut_after: int | None = None
        self.passed = 0
        self.most: int | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"redis://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Take no further connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(1 << 16):
                server.sendall(data)
        except OSError:
            pass
        _close(client, server)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        passed = 0
        try:
            while data := server.recv(self.chunk or 1 << 16):
                if self.cut_after is not None and passed + len(data) > self.cut_after:
                    client.sendall(data[: self.cut_after - passed])
                    break
                while not self._may_pass(len(data)):
                    time.sleep(0.005)
                client.sendall(data)
                passed += len(data)
                if self.chunk is not None:
                    time.sleep(self.pause_s)
        except OSError:
            pass
        _close(client, server)

    def _may_pass(self, nbytes: int) -> bool:
        with self._lock:
            if self.most is not None and self.passed + nbytes > self.most:
                return False
            self.passed += nbytes
            return True


def _close(*sockets: socket.socket) -> None:
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
