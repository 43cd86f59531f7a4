"""What is served in a second if 1 to 64 users come back at once: with waiting for room and without,
beside vLLM's own file tier and Lifeboat Cache; from Redis, from a disk, with the device full; and
what one organisation's burst costs a user of another.

Two servers run at a time, and each burst is measured on both, in turn. The peer takes part as in
`burst`. A plot of the throughputs is written beside the results.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.burst import TOKENS, burst, fill, lifeboat, ours, peer_python, returning
from benchmarks.cpu_tiering import CpuTieringSpec
from benchmarks.harness import BLOCK, Result, arguments, console, finish, server
from demo.client import AnthropicClient, empty_device_cache
from demo.server import Server
from tests.redis.servers import RedisServer

CROWDS = (1, 2, 4, 8, 16, 32, 64)
QUICK_CROWDS = (1, 4, 8)
MIB = 60
"""Of the CPU tier: three prompts."""

DEVICE_BLOCKS = 70
"""Of a device that holds three prompts."""

CROWD_OF_ONE = 16
"""Sessions of the organisation whose burst a user of another comes into."""

Points = dict[str, dict[int, list[float]]]
"""Prompt tokens served in a second, by side and number of users."""


@dataclass(frozen=True, slots=True)
class Side:
    """A way to serve users who come back.

    Attributes:
        name: what the result calls it.
        start: returns a server with a CPU tier of so many MiB.
        directory: where it keeps blocks, as far as they are in files.
    """

    name: str
    start: Callable[[int], Server]
    directory: Path


@dataclass(slots=True)
class Crowd:
    """Users who come back, and how all of them were answered by a server that knew nothing.

    Attributes:
        bodies: their prompts.
        cold: the answers.
        filled: the directories that have the prompts' blocks.
    """

    bodies: list[dict[str, Any]]
    cold: list[str] = field(default_factory=list)
    filled: set[Path] = field(default_factory=set)

    def fill(self, side: Side) -> None:
        """Have a side store what it is to serve.

        Raises:
            RuntimeError: if it answers otherwise than another side did.
        """
        if side.directory in self.filled:
            return
        console.print(f"burst_crowd: storing, {side.name}")
        with side.start(512) as running:
            texts = fill(running, self.bodies, side.directory)
        self.cold = self.cold or texts
        if texts != self.cold:
            raise RuntimeError(f"{side.name} answers otherwise")
        self.filled.add(side.directory)


def lasting(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return prompts that live longer than all of this takes."""
    for body in bodies:
        body["messages"][-1]["content"][-1]["cache_control"]["ttl"] = "1h"
    return bodies


def plain_files(directory: Path, mib: int) -> Server:
    """Return a server with vLLM's own file tier behind vLLM's own CPU tier."""
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": CpuTieringSpec.__name__,
            "spec_module_path": CpuTieringSpec.__module__,
            "cpu_bytes_to_use": mib * 2**20,
            "secondary_tiers": [{"type": "fs", "root_dir": str(directory)}],
        },
    }
    return server(False, "--kv-transfer-config", json.dumps(transfer))


def compare(
    result: Result,
    count: int,
    crowd: Crowd,
    crowds: Iterable[int],
    one: Side,
    other: Side,
    points: Points,
) -> None:
    """Add what two sides serve of each crowd, and the ratio of the first to the second."""
    crowd.fill(one)
    crowd.fill(other)
    console.print(f"burst_crowd: {one.name}, and {other.name}")
    with one.start(MIB) as first, other.start(MIB) as second:
        for users in crowds:
            rates: dict[str, list[float]] = {one.name: [], other.name: []}
            read: dict[str, list[float]] = {one.name: [], other.name: []}
            for number in range(count):
                sides = [(one.name, first), (other.name, second)]
                for name, running in sides if number % 2 == 0 else sides[::-1]:
                    each = burst(running, crowd.bodies[:users], crowd.cold)
                    rates[name].append(each.tokens / each.seconds)
                    read[name].append(100 * each.read / (users * (TOKENS // BLOCK) * BLOCK))
            for name in rates:
                label = f"{one.name} beside {other.name}, {users} users: {name}"
                result.add(label, rates[name], "tokens/s")
                result.add(f"{label}, read", read[name], "%")
                points.setdefault(name, {}).setdefault(users, []).extend(rates[name])
            result.add(
                f"{one.name} over {other.name}, {users} users",
                [a / b for a, b in zip(rates[one.name], rates[other.name], strict=True)],
                "×",
            )


def neighbour(result: Result, count: int, crowd: Crowd, side: Side) -> None:
    """Add how long a user waits who comes back alone, and together with a burst of another
    organisation or of its own, from a server that knows both."""
    console.print("burst_crowd: a neighbour")
    body, others = crowd.bodies[0], crowd.bodies[1 : CROWD_OF_ONE + 1]
    ways: Mapping[str, str | None] = {
        "alone": None,
        "beside a burst of another organisation": "key of other",
        "behind a burst of its own": "key of acme",
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    with side.start(512) as running:
        for key, known in (("key of acme", [body, *others]), ("key of other", others)):
            for number, each in enumerate(known):
                AnthropicClient(running.url, key).ask(each, f"s{number}", max_tokens=1)
        time.sleep(1)
    with side.start(MIB) as running:
        for _ in range(count):
            for way, key in ways.items():
                found[way].append(1000 * _served_after(running, body, others, key))
    for way, times in found.items():
        result.add(f"a user, {way}: served after", times, "ms")


def _served_after(
    running: Server, body: dict[str, Any], others: Sequence[dict[str, Any]], key: str | None
) -> float:
    """Return after how many seconds a user of acme has an answer who comes 50 ms behind others
    with ``key``; alone if that is None."""
    empty_device_cache(running.url, connector=True)
    with ThreadPoolExecutor(len(others) + 1) as pool:
        if key is not None:
            clients = [AnthropicClient(running.url, key) for _ in others]
            for number, (client, other) in enumerate(zip(clients, others, strict=True)):
                pool.submit(client.ask, other, f"s{number}", max_tokens=1)
            time.sleep(0.05)
        start = time.perf_counter()
        AnthropicClient(running.url, "key of acme").ask(body, "mine", max_tokens=1)
        return time.perf_counter() - start


def plot(points: Points, path: Path) -> None:
    """Draw what each side serves in a second over the number of users."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, by_users in points.items():
        users = sorted(by_users)
        axes.plot(users, [median(by_users[n]) for n in users], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(CROWDS, [str(users) for users in CROWDS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("users who come back at once")
    axes.set_ylabel("prompt tokens served in a second")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def sides_of(scratch: Path, redis: RedisServer) -> dict[str, Side]:
    """Return all sides but the peer, by name."""
    files, disk, fs = scratch / "lmcache", scratch / "disk", scratch / "fs"
    behind: dict[str, tuple[Path, dict[str, Any]]] = {
        "files": (files, {}),
        "Redis": (scratch / "redis", {"tiers": [{"type": "redis", "url": redis.url}]}),
        "disk": (disk, {"tiers": [{"type": "disk", "path": str(disk), "capacity": "8GiB"}]}),
    }
    small = ("--max-model-len", "4096", "--num-gpu-blocks-override", str(DEVICE_BLOCKS))
    sides = {"vLLM fs": Side("vLLM fs", lambda mib: plain_files(fs, mib), fs)}
    for tier, (directory, config) in behind.items():
        directory.mkdir(mode=0o700)
        for suffix, more, options in (
            ("", {}, ()),
            (", without waiting", {"cpu_wait_share": 0.0}, ()),
            (", device full", {}, small),
            (", device full, without waiting", {"cpu_wait_share": 0.0}, small),
        ):
            settings = {"tenants": tenants(), **config, **more}

            def start(
                mib: int,
                directory: Path = directory,
                options: tuple[str, ...] = options,
                settings: dict[str, Any] = settings,
            ) -> Server:
                return ours(directory, mib, *options, **settings)

            sides[tier + suffix] = Side(tier + suffix, start, directory)
    return sides


def tenants() -> dict[str, str]:
    """Return the organisations that servers know, by digests of their keys."""
    return {sha256(f"key of {org}".encode()).hexdigest(): org for org in ("acme", "other")}


def main() -> int:
    """Run the benchmark and return its exit status."""
    options = arguments(__doc__ or "", pairs=3)
    result = Result("burst_crowd", options.quick)
    crowds = QUICK_CROWDS if options.quick else CROWDS
    points: Points = {}
    crowd = Crowd(lasting(returning(max(*crowds, CROWD_OF_ONE + 1))))
    with tempfile.TemporaryDirectory(prefix="cachescope-") as scratch:
        place = Path(scratch)
        with closing(RedisServer(place)) as redis:
            sides = sides_of(place, redis)
            pairs = [
                ("files", "files, without waiting", crowds),
                ("files", "vLLM fs", crowds),
                *(
                    (name, f"{name}, without waiting", QUICK_CROWDS[1:])
                    for name in ("Redis", "disk", "files, device full")
                ),
            ]
            for one, other, some in pairs:
                compare(result, options.pairs, crowd, some, sides[one], sides[other], points)
            if (python := peer_python()) is not None:
                directory = place / "lifeboat"
                directory.mkdir(mode=0o700)
                peer = Side(
                    "Lifeboat Cache", lambda mib: lifeboat(python, directory, mib), directory
                )
                compare(result, options.pairs, crowd, crowds, sides["files"], peer, points)
            neighbour(result, options.pairs, crowd, sides["files"])
    plot(points, options.results / "burst_crowd.svg")
    return finish(result, options.results)


if __name__ == "__main__":
    sys.exit(main())
