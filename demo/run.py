"""``python -m demo.run``: two organisations' agents on one server, and what the cache did for them.

Every claim of the closing table is measured in the run; the exit status is 0 only if all hold. With
``--hold`` the server stays until Ctrl-C, and its page can be looked at.
"""

import argparse
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo.client import (
    MODEL,
    Answer,
    AnthropicClient,
    Metrics,
    OpenAIClient,
    empty_device_cache,
    read_metrics,
)
from demo.hold import KEYS, hold
from demo.server import Server
from demo.session import AgentSession, agent_session, marked
from vllm_cachescope.cli.serve import serve_command
from vllm_cachescope.config.secret import OPERATOR_VARIABLE
from vllm_cachescope.durations import parse_duration

BLOCK = 128
"""Tokens per block on the CPU platform."""

TURNS = 20
SHORT_TURNS = 4
PROBED_TURN = 5
REPEATS = 3
TTL_S = 10

CONFIG: dict[str, Any] = {
    "cpu_bytes": "1GiB",
    "ttls": [f"{TTL_S}s"],
    "regions": {"messages": {"scope": "session"}},
    "page": True,
    "tenants": {sha256(key.encode()).hexdigest(): org for org, key in KEYS.items()},
}

# Seconds each step takes on an idle machine with two cores: what the progress bar is made of.
_BUILD, _START, _COLD, _ASK = 8.0, 40.0, 7.0, 0.6
_TOTAL = (
    _BUILD
    + _START
    + _COLD
    + _ASK * (1 + TURNS + 2 * REPEATS + 2 * SHORT_TURNS)
    + 2 * _COLD
    + 4 * _ASK
    + TTL_S
)


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of the closing table: what is claimed, what was measured, and whether it holds."""

    claim: str
    measured: str
    holds: bool


class Screen:
    """What the run shows: lines as it goes, above one progress bar."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=100)
        self.progress = Progress(
            SpinnerColumn(),
            BarColumn(30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self.progress.add_task("", total=_TOTAL)
        self._done = 0.0

    def heading(self, text: str) -> None:
        """Start a chapter."""
        self.console.print(f"\n[bold]{text}[/bold]")

    def line(self, text: str) -> None:
        """Say what is done."""
        self.console.print(f"  {text}", markup=False)

    def doing(self, text: str) -> None:
        """Show what is going on now beside the bar."""
        self.progress.update(self._task, description=text)

    def within(self, seconds: float, of: float) -> None:
        """A step of ``of`` seconds has been going on for ``seconds``."""
        self.progress.update(self._task, completed=self._done + min(seconds, of * 0.95))

    def did(self, seconds: float) -> None:
        """A step of ``seconds`` is done."""
        self._done += seconds
        self.progress.update(self._task, completed=self._done)

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        start = time.monotonic()
        while (waited := time.monotonic() - start) < seconds:
            self.within(waited, seconds)
            time.sleep(min(0.1, seconds - waited))
        self.did(seconds)

    def columns(self) -> None:
        """Print the header of the lines that `answer` prints."""
        self.console.print(
            f"  {'client':<10}{'org':<7}{'session':<9}{'what':<24}{'prompt':>8}{'read':>8}"
            f"{'created':>9}{'rest':>6}{'TTFT':>12}",
            style="dim",
        )

    def answer(self, client: str, org: str, session: str, what: str, answer: Answer) -> None:
        """Print one request's line."""
        self.console.print(
            f"  {client:<10}{org:<7}{session:<9}{what:<24}{answer.prompt_tokens:>8,}"
            f"{answer.read:>8,}{answer.created:>9,}{answer.uncached:>6,}"
            f"{1000 * answer.ttft_s:>9,.0f} ms"
        )


class Run:
    """The drive through one server: asks, shows, and keeps what the claims are made of."""

    def __init__(self, server: Server, screen: Screen) -> None:
        self.server = server
        self.screen = screen
        self.answers: list[Answer] = []
        self.claims: list[Claim] = []
        self.ttft_s: dict[str, float] = {}
        self._clients = {
            ("anthropic", org): AnthropicClient(server.url, key) for org, key in KEYS.items()
        } | {("openai", "north"): OpenAIClient(server.url, KEYS["north"])}

    def ask(
        self,
        client: str,
        org: str,
        session: str,
        what: str,
        body: dict[str, Any],
        seconds: float = _ASK,
    ) -> tuple[Answer, Metrics]:
        """Put ``body`` to the server; return the answer and what /metrics counted for it."""
        self.screen.doing(f"{org}, {session}: {what}")
        before = read_metrics(self.server.url)
        answer = self._clients[client, org].ask(body, session)
        self.answers.append(answer)
        counted = self._counted(before, answer)
        self.screen.answer(client, org, session, what, answer)
        self.screen.did(seconds)
        return answer, counted

    def _counted(self, before: Metrics, answer: Answer, timeout_s: float = 5.0) -> Metrics:
        # The engine reports once per step, a moment after the client has its last token.
        deadline = time.monotonic() + timeout_s
        while True:
            counted = read_metrics(self.server.url).since(before)
            if counted.total() >= answer.prompt_tokens or time.monotonic() > deadline:
                return counted
            time.sleep(0.02)

    def claim(self, claim: str, measured: str, holds: bool) -> None:
        """Note a claim with what was measured."""
        self.claims.append(Claim(claim, measured, holds))

    def warm_up(self) -> None:
        """Load what the server loads on its first request."""
        self.screen.doing("first requests, so that no other pays for them")
        body = {"messages": [{"role": "user", "content": "Is the office open? " * 100}]}
        self.answers.append(self._clients["anthropic", "north"].ask(body, "warm-up"))
        self.answers.append(self._clients["openai", "north"].ask(body, "warm-up"))
        self._counted(Metrics(), Answer(0, "", 0, 0, sum(a.prompt_tokens for a in self.answers)))
        self.screen.did(_ASK)

    def agent(self, north: AgentSession) -> tuple[Answer, Metrics]:
        """An agent's session from the first turn to the last; return how the first one went."""
        self.screen.heading(f"One agent's session, {TURNS} turns")
        self.screen.columns()
        first, counted = self.ask(
            "anthropic", "north", "north-1", "turn 1, cold", marked(north.body(0)), _COLD
        )
        answers = [first]
        for turn in range(1, TURNS):
            body = marked(north.body(turn))
            answers.append(self.ask("anthropic", "north", "north-1", f"turn {turn + 1}", body)[0])
        whole = sum(
            later.read == earlier.prompt_tokens // BLOCK * BLOCK
            for earlier, later in pairwise(answers)
        )
        prompts = sum(answer.prompt_tokens for answer in answers)
        read = sum(answer.read for answer in answers)
        self.claim(
            "Each turn reads all of the turn before",
            f"{whole} of {TURNS - 1} turns; {read / prompts:.1%} of {prompts:,} tokens",
            whole == TURNS - 1,
        )
        self.claim(
            "The session has 15,000 tokens or more",
            f"{answers[-1].prompt_tokens:,} in the last turn",
            answers[-1].prompt_tokens >= 15_000,
        )
        return first, counted

    def tiers(self, north: AgentSession, cold: Answer) -> None:
        """The first prompt again, from the device and from CPU memory."""
        self.screen.heading("The first prompt again: device cache, then CPU memory alone")
        self.screen.columns()
        body = marked(north.body(0))
        whole = readable(cold)
        self.ttft_s["cold"] = cold.ttft_s
        texts = {cold.text}
        for tier, name in (("device", "device cache"), ("cpu", "CPU tier")):
            answers = []
            read = 0
            for _ in range(REPEATS):
                if tier == "cpu":
                    empty_device_cache(self.server.url)
                answer, counted = self.ask("anthropic", "north", "north-1", f"turn 1, {name}", body)
                answers.append(answer)
                read += counted.total(f"read_{tier}")
            self.ttft_s[tier] = statistics.median(answer.ttft_s for answer in answers)
            texts |= {answer.text for answer in answers}
            faster = cold.ttft_s / self.ttft_s[tier]
            self.claim(
                f"A hit in the {name}: 10 times sooner",
                f"{faster:.0f} times; {read // REPEATS:,} of {cold.prompt_tokens:,} tokens",
                read == REPEATS * whole and faster >= 10,
            )
        self.claim(
            "Computed or from either tier: one answer",
            f"{len(texts)} distinct of {1 + 2 * REPEATS} answers",
            len(texts) == 1,
        )

    def neighbours(self, cold: Metrics) -> None:
        """Another session of the same organisation, and another organisation."""
        shared = {scope: cold.total("created", scope) for scope in ("global", "org")}
        self.screen.heading("Another session, in OpenAI's format; another organisation")
        self.screen.columns()
        wide: list[Metrics] = []
        for client, org, session, seed in (
            ("openai", "north", "north-2", 2),
            ("anthropic", "south", "south-1", 3),
        ):
            agent = agent_session(seed, TURNS, org=org, **SIZES)
            for turn in range(SHORT_TURNS):
                body = marked(agent.body(turn))
                _, counted = self.ask(client, org, session, f"turn {turn + 1}", body)
                if turn == 0:
                    wide.append(counted)
        for counted, whom, expected in (
            (wide[0], "North-2 reads global and org content", shared),
            (wide[1], "South reads the global prefix alone", {**shared, "org": 0}),
        ):
            read = {scope: counted.total("read", scope) for scope in shared}
            self.claim(
                whom,
                ", ".join(f"{scope} {tokens:,}" for scope, tokens in read.items()),
                read == expected and shared["global"] > 0 < shared["org"],
            )

    def isolation(self, north: AgentSession) -> None:
        """One of the agent's prompts, byte for byte, from those it is not meant for."""
        self.screen.heading("A prompt of north-1's, byte for byte, from others")
        self.screen.columns()
        body = marked(north.body(PROBED_TURN))
        # South goes as far as to claim the session's name.
        _, south = self.ask("anthropic", "south", "north-1", "north-1's turn 6", body, _COLD)
        _, neighbour = self.ask("anthropic", "north", "north-2", "north-1's turn 6", body, _COLD)
        owner, own = self.ask("anthropic", "north", "north-1", "its own turn 6", body)
        self.claim(
            "South reads nothing that is north's",
            f"{south.total('read', 'org') + south.total('read', 'session')} tokens, of "
            f"{own.total('read', 'org') + own.total('read', 'session'):,} that north reads",
            south.total("read", "org") == south.total("read", "session") == 0
            and south.total("read", "global") == own.total("read", "global") > 0
            and own.total("read", "org") > 0 < own.total("read", "session")
            and owner.read == own.total("read"),
        )
        self.claim(
            "North-2 reads none of north-1's messages",
            f"{neighbour.total('read', 'session')} tokens, of {own.total('read', 'session'):,} "
            "that north-1 reads",
            neighbour.total("read", "session") == 0
            and neighbour.total("read", "org") == own.total("read", "org"),
        )

    def expiry(self) -> None:
        """Messages that live for seconds, behind a system prompt that lives for an hour."""
        ttl = f"{TTL_S}s"
        self.screen.heading(f"A lifetime of {TTL_S} seconds, behind an hour's")
        self.screen.columns()
        agent = agent_session(4, TURNS, org="north", **SIZES)
        body = marked(agent.body(1), ttl)
        before = read_metrics(self.server.url)

        def ask(what: str) -> tuple[Answer, Metrics]:
            return self.ask("anthropic", "north", "north-1", what, body)

        first, _ = ask(f"messages for {ttl}")
        within, _ = ask("right away")
        self.screen.doing(f"waiting for {TTL_S + 1} seconds")
        self.screen.wait(TTL_S + 1)
        after, counted = ask(f"{TTL_S + 1} s later")
        evictions = read_metrics(self.server.url).since(before).evictions
        short_blocks = first.created // BLOCK
        self.claim(
            f"No tier serves {ttl} content after {ttl}",
            f"{within.read - first.read:,} tokens before, {counted.total('read', 'session')} after",
            first.created > 0
            and within.read == readable(first)
            and counted.total("read", "session") == 0
            and after.created == first.created,
        )
        self.claim(
            "What lives for an hour is still there",
            f"{after.read:,} tokens read",
            after.read == first.read > 0,
        )
        self.claim(
            "Both tiers give expired memory back",
            ", ".join(f"{tier} {evictions[tier, 'ttl']}" for tier in ("device", "cpu"))
            + f" of {short_blocks} blocks",
            all(evictions[tier, "ttl"] == short_blocks > 0 for tier in ("device", "cpu")),
        )

    def accounts(self) -> Metrics:
        """Compare all usages with /metrics; return the metrics."""
        metrics = read_metrics(self.server.url)
        totals = {
            "read": (sum(a.read for a in self.answers), metrics.total("read")),
            "created": (sum(a.created for a in self.answers), metrics.total("created")),
            "rest": (sum(a.uncached for a in self.answers), metrics.total("uncached")),
        }
        self.claim(
            "Usages add up to /metrics, to the token",
            ", ".join(
                f"{usage:,}" + ("" if usage == counted else f" against {counted:,}") + f" {name}"
                for name, (usage, counted) in totals.items()
            ),
            all(usage == counted for usage, counted in totals.values()),
        )
        return metrics


SIZES = {"tools": 14, "rules": 80}
"""Of each agent's prompt: a handbook of some 7,000 tokens for all, and as much for the org."""


def readable(answer: Answer) -> int:
    """Return how much of a prompt can be read when it comes again: every whole block, but never
    the last token, which the engine needs to compute."""
    return (answer.prompt_tokens - 1) // BLOCK * BLOCK


def drive(server: Server, screen: Screen) -> tuple[Run, Metrics]:
    """Run all chapters against ``server``."""
    run = Run(server, screen)
    run.warm_up()
    north = agent_session(1, TURNS, org="north", **SIZES)
    cold, counted = run.agent(north)
    run.tiers(north, cold)
    run.neighbours(counted)
    run.isolation(north)
    run.expiry()
    return run, run.accounts()


def tables(run: Run, metrics: Metrics) -> list[Table]:
    """Return the closing tables: times, tokens, claims."""
    times = _table("Time to the first token of the first turn's prompt")
    times.add_column("computed", justify="right")
    times.add_column("from the device cache", justify="right")
    times.add_column("from the CPU tier", justify="right")
    times.add_row(*(f"{1000 * run.ttft_s[how]:,.0f} ms" for how in ("cold", "device", "cpu")))

    outcomes = ("read_device", "read_cpu", "created", "uncached")
    tokens = _table("Prompt tokens of the whole run, from /metrics")
    for name in ("scope", "TTL"):
        tokens.add_column(name)
    for name in ("read, device", "read, CPU", "created", "uncached"):
        tokens.add_column(name, justify="right")
    order = ("global", "org", "session")
    classes = sorted(
        {(scope, ttl) for _, scope, ttl in metrics.tokens},
        key=lambda c: (order.index(c[0]), 0 if c[1] == "none" else parse_duration(c[1])),
    )
    for scope, ttl in classes:
        counts = (metrics.tokens[outcome, scope, ttl] for outcome in outcomes)
        tokens.add_row(scope, ttl, *(f"{count:,}" if count else "–" for count in counts))

    claims = _table("Claims")
    for name in ("claim", "measured", "holds"):
        claims.add_column(name)
    for claim in run.claims:
        sign = "[green]yes[/green]" if claim.holds else "[bold red]NO[/bold red]"
        claims.add_row(claim.claim, claim.measured, sign)
    return [times, tokens, claims]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def main() -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.run")
    parser.add_argument("--hold", action="store_true", help="keep the server until Ctrl-C")
    holds = parser.parse_args().hold
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    screen = Screen()
    try:
        with tempfile.TemporaryDirectory(prefix="cachescope-demo-") as scratch, screen.progress:
            return _run(Path(scratch), screen, holds)
    except KeyboardInterrupt:
        screen.console.print("Interrupted. The server is stopped, and nothing is left behind.")
        return 130
    except Exception as error:
        screen.console.print(f"[bold red]The demo failed:[/bold red] {error}")
        for note in getattr(error, "__notes__", ()):
            screen.console.print(note, markup=False)
        return 1


def conclude(run: Run, metrics: Metrics, console: Console) -> int:
    """Print the closing tables; return the exit status."""
    for table in tables(run, metrics):
        console.print()
        console.print(table)
    failed = [claim.claim for claim in run.claims if not claim.holds]
    for claim in failed:
        console.print(f"[bold red]Does not hold:[/bold red] {claim}")
    if not failed:
        console.print(f"All {len(run.claims)} claims hold.")
    return 1 if failed else 0


def _run(scratch: Path, screen: Screen, holds: bool) -> int:
    screen.heading("Setting up")
    screen.doing("making a model")
    start = time.monotonic()
    # Takes seconds to import, so that the bar has to be there first.
    from demo.model import SMALL, build

    model = build(scratch / "model", SMALL)
    screen.did(_BUILD)
    screen.line(f"a small model with random weights, made in {time.monotonic() - start:.0f} s")
    screen.doing("starting vLLM with the plugin")
    start = time.monotonic()
    token = secrets.token_urlsafe(18)
    with serving(model, token, lambda seconds: screen.within(seconds, _START)) as server:
        screen.did(_START)
        screen.line(f"vLLM with the plugin, up in {time.monotonic() - start:.0f} s")
        run, metrics = drive(server, screen)
        screen.progress.stop()
        status = conclude(run, metrics, screen.console)
        if holds:
            hold(server.url, token, screen.console)
        else:
            screen.console.print("make demo HOLD=1 keeps the server, to look at its page.")
    return status


def serving(
    model: Path, token: str, on_wait: Callable[[float], None] = lambda seconds: None
) -> Server:
    """Return the demo's server; enter it to start it.

    Args:
        model: the model's directory. Diffs of what breaks prefixes go beside it.
        token: the operator's token.
        on_wait: as of `Server`.
    """
    command = serve_command(
        str(model),
        CONFIG | {"diffs": {"directory": str(model.parent / "diffs")}},
        [
            *("--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "32768", "--chat-template-content-format", "openai"),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        ],
    )
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        OPERATOR_VARIABLE: token,
    }
    return Server(command, environment, on_wait)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
