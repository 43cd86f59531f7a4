"""Engines of this version and of earlier ones on one Redis: each reads what it can, the rest is a
miss, and all answers are those of a cold run."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from demo.model import MODELS, TINY, build
from tests.engine.engine import BLOCK, draw_tokens
from tests.redis.earlier import ROOT, earlier_tree
from tests.redis.servers import RedisServer, entries

# `test_upgrade` has the short form: the tier's code of both versions, without engines.
pytestmark = [pytest.mark.engine, pytest.mark.slow]

BLOCKS = 3

# Each version runs this with its own code, and its own tests' engine.
_ENGINE = """
import json, select, sys
from pathlib import Path
from tests.engine.engine import Ask, Engine, org_plan, sealed

model, scratch, url, options = sys.argv[1:]
options = json.loads(options)
config = {"tiers": [{"type": "redis", "url": url, "timeout": "2s", "load_deadline": "5s"}]}
config |= options.pop("config", {})
engine = Engine(Path(model), Path(scratch), config=config, **options)
print("ready", flush=True)
while True:
    # vLLM's own loop steps on as long as blocks are being stored.
    while not select.select([sys.stdin], [], [], 0.002)[0]:
        engine.step()
    what, org, tokens = json.loads(sys.stdin.readline())
    if what == "empty":
        engine.empty_device()
        engine.empty()
        answer = {}
    elif what == "up":
        states = engine.connector.command_health()
        answer = {"up": all(state["up"] for state in states)}
    elif what == "cold":
        answer = {"tokens": engine.uncached(tokens)}
    else:
        (found,) = engine.run(Ask(tokens, sealed(org_plan(org, tokens)), 8))
        answer = {"tokens": found.tokens, "read": found.read}
    print("answer " + json.dumps(answer), flush=True)
"""


class Engine:
    """An engine in a process of its own, which runs the code in a directory."""

    def __init__(self, tree: Path, scratch: Path, url: str, options: dict[str, Any]) -> None:
        scratch.mkdir()
        self._log = scratch / "log"
        self._heard: list[str] = []
        model = build(MODELS / "tiny", TINY)
        with open(self._log, "w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _ENGINE, str(model), str(scratch), url, json.dumps(options)],
                cwd=tree,
                env={"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin", "HOME": str(scratch)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ready(self) -> None:
        """Wait until it runs."""
        self._read("ready\n")

    def ask(self, tokens: list[int], org: str = "acme") -> tuple[list[int], int]:
        """Return what it answers to a prompt, and how many tokens of that it has read."""
        answer = self._do("ask", org, tokens)
        return answer["tokens"], answer["read"]

    def cold(self, tokens: list[int]) -> list[int]:
        """Return what it answers when nothing is cached."""
        found: list[int] = self._do("cold", "", tokens)["tokens"]
        return found

    def empty(self) -> None:
        """Empty its device and CPU tier."""
        self._do("empty", "", [])

    @property
    def is_up(self) -> bool:
        """Whether all of its tiers are."""
        return bool(self._do("up", "", [])["up"])

    def close(self) -> str:
        """End it; return what it has logged."""
        self._process.kill()
        said, _ = self._process.communicate()
        return self.said + said

    @property
    def said(self) -> str:
        """What it has logged so far."""
        return "".join(self._heard) + self._log.read_text()

    def _do(self, what: str, org: str, tokens: list[int]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, org, tokens]) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._read("answer ").removeprefix("answer "))
        return found

    def _read(self, start: str) -> str:
        assert self._process.stdout is not None
        # vLLM logs there, too.
        for line in self._process.stdout:
            if line.startswith(start):
                return line
            self._heard.append(line)
        raise AssertionError(self._log.read_text()[-3000:])


Start = Callable[..., Engine]


@pytest.fixture
def start(server: RedisServer, tmp_path: Path) -> Iterator[Start]:
    engines: list[Engine] = []

    def starting(tree: Path = ROOT, **options: Any) -> Engine:
        engines.append(Engine(tree, tmp_path / f"engine {len(engines)}", server.url, options))
        return engines[-1]

    yield starting
    for engine in engines:
        said = engine.close()
        assert "Traceback" not in said and "ERROR" not in said, said[-5000:]


@pytest.mark.parametrize(
    ("commit", "reads"),
    [
        pytest.param("57c1f18", True, id="the last one"),
        # It notes no sessions.
        pytest.param("8e6960d", True, id="an earlier one"),
        # Its engines' identity has less in it.
        pytest.param("f5db786", False, id="another identity"),
    ],
)
def test_engines_of_two_versions(server, start, tmp_path_factory, commit, reads):
    tree = partial(earlier_tree, tmp_path_factory.mktemp)(commit)
    engines = start(), start(tree)
    for engine in engines:
        engine.ready()
    chance, shared = random.Random(commit), BLOCKS * BLOCK
    for first, second in (engines, engines[::-1]):
        prompt = draw_tokens(chance, shared + 5)
        longer = prompt[:shared] + draw_tokens(chance, BLOCK + 9)
        cold = first.cold(prompt)
        before = len(entries(server))
        assert first.ask(prompt) == (cold, 0)
        assert first.is_up and second.is_up
        if reads:
            while len(entries(server)) < before + BLOCKS:
                assert first.is_up
        # Another version answers the same, from what it can read.
        assert second.ask(prompt) == (cold, shared if reads else 0)
        assert second.ask(prompt, "other") == (cold, 0)
        assert second.ask(longer)[0] == second.cold(longer)
        # And the first one what the second has added.
        assert second.is_up
        first.empty()
        answer, read = first.ask(longer)
        assert answer == first.cold(longer) and read >= shared


DIFFERENT = [
    # Of the same model, an engine does not run on a store at all that others use with a secret.
    ({"config": {"secret": "another secret, long enough"}}, "with another secret"),
    ({"dtype": "bfloat16"}, "dtype"),
    ({"block_size": 256}, "block"),
]


def test_engines_that_share_nothing_are_told_so(server, start):
    """By a real engine's own identity, where `test_upgrade` has made-up ones."""
    ours = start()
    ours.ready()
    prompt = draw_tokens(random.Random(3), BLOCKS * 256 + 5)
    assert ours.ask(prompt) == (ours.cold(prompt), 0)
    for options, told in DIFFERENT:
        other = start(**options)
        other.ready()
        assert other.ask(prompt)[1] == 0
        said = [line for line in other.said.splitlines() if "Tier redis at" in line]
        assert any(told in line.partition("Tier redis at")[2] for line in said), said
        other.close()
    # Nor has it cost the first one anything.
    ours.empty()
    assert ours.ask(prompt) == (ours.cold(prompt), BLOCKS * 256) and ours.is_up
