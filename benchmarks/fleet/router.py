"""Routers: what takes an agent's call and chooses the replica that answers it."""

import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from benchmarks.agent_load import Call
from benchmarks.fleet.engine import FrontEnd
from benchmarks.fleet.installed import DYNAMO, GRPC, RUST, SMG, Program
from benchmarks.fleet.size import Size
from benchmarks.harness import BLOCK
from demo.server import Server, free_port

Choices = dict[str, list[int | None]]
"""By session, as the load names it, the number of the replica that answered each of its calls; None
where it is not known."""

SESSION_HEADER = "x-session-id"
"""Names an agent's session to routers, to vLLM and to us."""


class Policy(StrEnum):
    """How a replica is chosen."""

    RANDOM = "random"
    SESSION = "by session"
    PREFIX = "by prefix"


@dataclass(frozen=True, slots=True)
class Router:
    """A router and how it chooses.

    Attributes:
        name: what it is called in the table.
        front_end: of the replicas behind it.
        policy: how it chooses.
        options: its command line's, beyond what every fleet needs; None where the client chooses.
        program: what it is; None where the client chooses.
    """

    name: str
    front_end: FrontEnd
    policy: Policy
    options: tuple[str, ...] | None = None
    program: Program | None = None

    @property
    def tells(self) -> bool:
        """Whether it says where a call went, and a client can go there by itself."""
        return self.program is SMG and self.front_end is not FrontEnd.GRPC

    @property
    def needs(self) -> list[Program]:
        """What has to be installed for it."""
        behind = {FrontEnd.GRPC: GRPC, FrontEnd.RUST: RUST, FrontEnd.DYNAMO: DYNAMO}
        wanted = (self.program, behind.get(self.front_end))
        return list(dict.fromkeys(program for program in wanted if program is not None))


_STICKY = (
    *("--policy", "manual", "--routing-key-headers", SESSION_HEADER),
    # At random, its default, most of the sessions may be on one replica.
    *("--assignment-mode", "min_group"),
)
_PREFIX = ("--policy", "cache_aware")
_DYNAMO_SESSION = ("--router-mode", "random", "--router-session-affinity-ttl-secs", "3600")

ROUTERS = (
    Router("the client", FrontEnd.PYTHON, Policy.RANDOM),
    Router("the client", FrontEnd.PYTHON, Policy.SESSION),
    Router("SMG", FrontEnd.PYTHON, Policy.RANDOM, ("--policy", "random"), SMG),
    Router("SMG", FrontEnd.PYTHON, Policy.SESSION, _STICKY, SMG),
    Router("SMG", FrontEnd.PYTHON, Policy.PREFIX, _PREFIX, SMG),
    Router("SMG", FrontEnd.RUST, Policy.RANDOM, ("--policy", "random"), SMG),
    Router("SMG", FrontEnd.RUST, Policy.SESSION, _STICKY, SMG),
    Router("SMG", FrontEnd.RUST, Policy.PREFIX, _PREFIX, SMG),
    Router("SMG", FrontEnd.GRPC, Policy.RANDOM, ("--policy", "random"), SMG),
    Router("SMG", FrontEnd.GRPC, Policy.SESSION, _STICKY, SMG),
    Router("SMG", FrontEnd.GRPC, Policy.PREFIX, _PREFIX, SMG),
    Router("Dynamo", FrontEnd.DYNAMO, Policy.RANDOM, ("--router-mode", "random"), DYNAMO),
    Router("Dynamo", FrontEnd.DYNAMO, Policy.SESSION, _DYNAMO_SESSION, DYNAMO),
    Router("Dynamo", FrontEnd.DYNAMO, Policy.PREFIX, ("--router-mode", "kv"), DYNAMO),
)
"""All routers that run here."""

ROUTED_HEADER = "x-smg-routed-worker-id"
"""By which SMG says which worker answered."""

Choose = Callable[[Call, int], str]
"""Returns the address to which the session's call of that number goes."""


class Smg(Server):
    """Shepherd Model Gateway."""

    health = "/readiness"


class DynamoFrontEnd(Server):
    """Dynamo's front end, with its router in it. It is ready once it knows the model."""

    health = "/v1/models"

    def _address(self, host: str, port: int) -> list[str]:
        return ["--http-host", host, "--http-port", str(port)]


@contextmanager
def routed(
    router: Router,
    replicas: Sequence[Server],
    size: Size,
    shared: dict[str, str],
    seed: int,
    replayed: Choices | None = None,
) -> Iterator[Choose]:
    """Put a router in front of running replicas.

    Args:
        router: which one.
        replicas: the replicas.
        size: of each.
        shared: variables that Dynamo's parts share.
        seed: of what the client draws.
        replayed: what the router chose for other replicas, to be chosen once more by the client:
            SMG does not do as it is told where it takes a replica for busy. None to let the router
            choose anew.
    """
    urls = [replica.url for replica in replicas]
    if replayed is not None:
        yield lambda call, number: urls[_recorded(replayed, call, number) % len(urls)]
        return
    if router.options is None:
        yield lambda call, number: urls[drawn(router.policy, call, number, seed) % len(urls)]
        return
    assert router.program is not None
    if router.front_end is FrontEnd.DYNAMO:
        command = [str(router.program.path), "-m", "dynamo.frontend", *router.options]
        command += ["--kv-cache-block-size", str(BLOCK)]
        server: Server = DynamoFrontEnd(command, shared)
    else:
        if router.front_end is FrontEnd.GRPC:
            urls = [url.replace("http://", "grpc://") for url in urls]
        command = [str(router.program.path), "launch", "--worker-urls", *urls, *router.options]
        command += ["--model-path", str(size.model), "--block-size", str(BLOCK)]
        command += ["--prometheus-port", str(free_port())]
        # A replica that a burst keeps busy on few cores is not one that is down.
        command += ["--disable-circuit-breaker", "--health-failure-threshold", "100"]
        server = Smg(command)
    with server:
        yield lambda call, number: server.url


def _recorded(choices: Choices, call: Call, number: int) -> int:
    known = choices.get(call.session, [])[number : number + 1]
    # What is asked across tenants, behind the load, was not recorded.
    return number if not known or known[0] is None else known[0]


def drawn(policy: Policy, call: Call, number: int, seed: int) -> int:
    """Return what decides on the replica: the same for one call whatever is behind it."""
    what = f"{seed} {call.session}" + (f" {number}" if policy is Policy.RANDOM else "")
    return zlib.crc32(what.encode())


@contextmanager
def dynamo_plane() -> Iterator[dict[str, str]]:
    """Yield the variables by which Dynamo's parts find each other, without etcd and NATS."""
    with tempfile.TemporaryDirectory(prefix="dynamo-") as directory:
        plane = {"DISCOVERY_BACKEND": "file", "FILE_KV": directory, "EVENT_PLANE": "zmq"}
        plane["REQUEST_PLANE"] = "tcp"
        yield {f"DYN_{name}": value for name, value in plane.items()}


def tenant_fields(front_end: FrontEnd, tenant: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the headers and the fields of the body that name a tenant to a front end.

    There are none for gRPC: SMG's protocol knows no tenants.
    """
    match front_end:
        case FrontEnd.PYTHON:
            return {"authorization": f"Bearer key of {tenant}"}, {}
        case FrontEnd.RUST:
            return {}, {"cache_salt": tenant}
        case FrontEnd.DYNAMO:
            return {"x-tenant-id": tenant}, {}
        case FrontEnd.GRPC:
            return {}, {}
