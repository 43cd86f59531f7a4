"""The address of a Redis: one server, a service that Sentinels watch over, or a Cluster.

====================================  =========================================================
``redis://[user:password@]host:port/db``  one server; ``rediss://`` over TLS
``unix://[user:password@]/path?db=0``     one server on a Unix socket
``redis+sentinel://…@host:port,…/service/db``  the service's primary; ``rediss+sentinel://``
``redis+cluster://…@host:port,…``         a Cluster, found through any of its nodes;
                                          ``rediss+cluster://``
====================================  =========================================================

Further options of redis-py's connections stand in the query, as in ``?ssl_ca_certs=/ca.pem``. The
Sentinels' own credentials are ``sentinel_username`` and ``sentinel_password`` there.
"""

from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from redis.connection import AbstractConnection, Connection, SSLConnection, parse_url
from redis.sentinel import Sentinel

DEFAULT_PORT = 6379
DEFAULT_SENTINEL_PORT = 26379

SCHEMES = (
    *("redis", "rediss", "unix"),
    *("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"),
)
"""The schemes of addresses."""


@dataclass(frozen=True, slots=True)
class Address:
    """A Redis as its URL names it.

    Attributes:
        shown: the address without credentials.
        hosts: the servers, Sentinels or Cluster nodes the URL names; empty for a Unix socket.
        service: the name Sentinels know the service by; None without Sentinels.
        cluster: whether it is a Cluster.
        connection_class: redis-py's class of connections.
        options: its arguments, without host and port.
        sentinel_options: arguments of connections to Sentinels.
    """

    shown: str
    hosts: tuple[tuple[str, int], ...]
    service: str | None
    cluster: bool
    connection_class: type[AbstractConnection]
    options: dict[str, Any]
    sentinel_options: dict[str, Any]

    def connection(self, node: tuple[str, int] | None, timeout_s: float) -> AbstractConnection:
        """Return a connection that is not connected yet.

        Args:
            node: the Cluster node to connect to; None for the one server there is.
            timeout_s: how long connecting may take, in seconds.

        Raises:
            redis.exceptions.ConnectionError: if no Sentinel knows the primary.
        """
        options = dict(self.options)
        if node is None and self.service is not None:
            sentinel = Sentinel(
                self.hosts,
                sentinel_kwargs={**self.sentinel_options, "socket_timeout": timeout_s},
                socket_timeout=timeout_s,
            )
            try:
                node = sentinel.discover_master(self.service)
            finally:
                sentinel.close()
        elif node is None and self.hosts:
            node = self.hosts[0]
        if node is not None:
            options["host"], options["port"] = node
        # RESP2 has no pushes: every byte that comes is part of the answer we wait for.
        return self.connection_class(
            **options, protocol=2, socket_connect_timeout=timeout_s, socket_timeout=timeout_s
        )


def parse(url: str, password: str | None = None) -> Address:
    """Return the address in ``url``.

    Args:
        url: the address.
        password: the password of the servers; None for the one in ``url``, if any.

    Raises:
        ValueError: if it is none, or there are two passwords.
    """
    address = _parsed(url)
    if password is None:
        return address
    if address.options.get("password") is not None:
        raise ValueError("there are two passwords, one of them in it; leave that one out")
    return replace(address, options={**address.options, "password": password})


def _parsed(url: str) -> Address:
    if not url.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        # Not shown: what stands before a "://" that is missing may hold the password.
        raise ValueError(f"there is no address of this scheme; allowed: {', '.join(SCHEMES)}")
    scheme, plus, kind = url.partition("://")[0].partition("+")
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    if not plus:
        options = parse_url(url)
        hosts_named: tuple[tuple[str, int], ...] = ()
        connection_class = options.pop("connection_class", Connection)
        if scheme != "unix":
            node = (options.pop("host", "localhost"), options.pop("port", DEFAULT_PORT))
            hosts_named = (node,)
        shown = f"{parts.scheme}://{hosts}{parts.path}"
        return Address(shown, hosts_named, None, False, connection_class, options, {})

    default = DEFAULT_SENTINEL_PORT if kind == "sentinel" else DEFAULT_PORT
    nodes = tuple(_host(host, default) for host in hosts.split(",") if host)
    if not nodes:
        raise ValueError(f"a {kind} address names at least one host")
    path = parts.path.strip("/")
    service: str | None = None
    if kind == "sentinel":
        service, _, path = path.partition("/")
        if not service:
            raise ValueError("a sentinel address names the service: …://host:port/service")
        service = unquote(service)
    elif path:
        raise ValueError("a Redis Cluster has only database 0: leave the path out")
    # What is left reads like the address of one server.
    plain = urlunsplit((scheme, f"{credentials}@x" if credentials else "x", path, parts.query, ""))
    options = parse_url(plain)
    for name in ("host", "port"):
        options.pop(name, None)
    sentinel_options = {
        name: options.pop(f"sentinel_{name}")
        for name in ("username", "password")
        if f"sentinel_{name}" in options
    }
    return Address(
        f"{parts.scheme}://{hosts}{parts.path}",
        nodes,
        service,
        kind == "cluster",
        options.pop("connection_class", SSLConnection if scheme == "rediss" else Connection),
        options,
        sentinel_options,
    )


def _host(text: str, default_port: int) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        return text.strip("[]"), default_port
    if not port.isdigit():
        raise ValueError(f"{text!r} is not host:port")
    return host.strip("[]"), int(port)
