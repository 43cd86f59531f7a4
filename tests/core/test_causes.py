"""Each token that was not read is put down to one cause, by what the engine reports and by where
the tokens had been computed."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.api.request_context import PromptTiming
from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.cache.prefix_hashes import hashes_of_blocks
from vllm_cachescope.cache.report import EngineId, Report, Row
from vllm_cachescope.diagnosis.outcome import NEW_CONTENT, Diagnosis
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.wire import READERS

BLOCK = 16
HERE, THERE = EngineId(0, "a", "h"), EngineId(1, "b", "h")
SHARING, SHARED_WITH = (replace(engine, tiers=("redis",)) for engine in (HERE, THERE))
C = MissCause


class Server:
    """An API server's side of a conversation. Its engines answer as they are told to."""

    def __init__(self, tools_behind_system: bool | None = None) -> None:
        self.now = 100.0
        self.diagnoser = Diagnoser(
            b"a secret of tests",
            BLOCK,
            lambda: self.now,
            lambda: self.now,
            registry=CollectorRegistry(),
            tools_behind_system=lambda: tools_behind_system,
        )
        self.body: dict[str, Any] = {"model": "m", "max_tokens": 1, "messages": []}
        self.tokens: list[int] = []
        self.chance = random.Random(1)

    def turn(self, tokens: int = 400) -> None:
        """Let the conversation grow by an answer and a question, ``tokens`` long together."""
        messages = self.body["messages"]
        if messages:
            messages.append({"role": "assistant", "content": "yes " * 10})
        messages.append({"role": "user", "content": "why " * 4 * tokens})
        self.tokens += self.chance.choices(range(1000), k=tokens)

    def ask(
        self,
        *misses: CacheMiss,
        read: int = 0,
        engine: EngineId = HERE,
        began: float | None = None,
        covered: int | None = None,
        readable: int | None = None,
        unasked: CacheMiss | None = None,
        reach_s: float | None = None,
        final: bool = True,
        computed: int | None = None,
        blocks: Sequence[bytes] = (),
    ) -> Diagnosis:
        """Send the conversation as it is; the engine has read ``read`` tokens of it."""
        request = READERS[Protocol.MESSAGES](self.body, (300, 3600))
        pending = self.diagnoser.open(Caller("acme", "s"), request, self.body, {})
        length = len(self.tokens)
        rows = (
            Row("read_device", Scope.ORG, 300, read),
            Row("created", Scope.ORG, 300, length - read),
        )
        hashes = hashes_of_blocks(blocks, BLOCK) if blocks else None
        report = Report(rows, misses, unasked, engine if final else None, reach_s, computed, hashes)
        timing = PromptTiming(
            list(self.tokens),
            length if covered is None else covered,
            length if readable is None else readable,
            self.now if began is None else began,
            self.now,
        )
        self.diagnoser.close(pending, [report], None, [timing])
        diagnosis = pending.diagnosis
        if final:
            assert sum(tokens for _, tokens in diagnosis.uncached) == length - read
        return diagnosis


@pytest.fixture
def server() -> Server:
    return Server()


def causes(diagnosis: Diagnosis) -> dict[str, int]:
    return {cause: tokens for cause, tokens in diagnosis.uncached if cause != NEW_CONTENT}


def test_another_engine_of_the_same_server(server: Server) -> None:
    server.turn(408)
    server.ask(engine=THERE)
    server.turn()
    seen = server.ask(engine=HERE)
    assert causes(seen) == {C.OTHER_REPLICA: 400, C.PARTIAL_BLOCK: 8}
    # The first engine still has what it computed; of what came since it has nothing.
    server.turn()
    seen = server.ask(engine=THERE, read=400)
    assert causes(seen) == {C.OTHER_REPLICA: 400, C.PARTIAL_BLOCK: 8}
    server.turn()
    assert causes(server.ask(engine=THERE, read=1200)) == {C.PARTIAL_BLOCK: 8}


def test_a_model_that_resumes_prompts_at_few_positions(server: Server) -> None:
    """Nobody has lost anything where no state was kept: it is no break, and nothing to mend."""
    server.turn(408)
    server.ask()
    server.turn()
    seen = server.ask(CacheMiss(C.NO_CHECKPOINT, 400))
    assert causes(seen) == {C.NO_CHECKPOINT: 400, C.PARTIAL_BLOCK: 8}
    assert (seen.expected, seen.cause, seen.suggestion) == (True, "continuation", "")
    # What the cache lost counts all the same.
    server.turn()
    seen = server.ask(CacheMiss(C.NO_CHECKPOINT, 400), CacheMiss(C.EXPIRED, 400, ttl_s=300))
    assert (seen.expected, seen.cause) == (False, "expired")


@pytest.mark.parametrize(
    ("engine", "told", "cause"),
    [
        (HERE, {}, C.OTHER_REPLICA),
        (SHARING, {}, C.OTHER_REPLICA),
        (SHARING, {"unasked": CacheMiss(C.TIER_UNAVAILABLE, 0, "redis")}, C.TIER_UNAVAILABLE),
        (SHARING, {"unasked": CacheMiss(C.TIMED_OUT, 0, "redis")}, C.TIMED_OUT),
        (replace(SHARING, hashing="other"), {}, C.HASH_SETTINGS_DIFFER),
        # Without a tier between them it does not matter how they hash.
        (replace(HERE, hashing="other"), {}, C.OTHER_REPLICA),
        (replace(SHARED_WITH, epoch="later"), {}, C.ENGINE_RESTARTED),
    ],
)
def test_where_it_was_and_why_it_is_not_here(
    server: Server, engine: EngineId, told: dict[str, Any], cause: MissCause
) -> None:
    server.turn()
    server.ask(engine=SHARED_WITH)
    server.turn()
    seen = server.ask(engine=engine, **told)
    assert causes(seen) == {cause: 400}
    assert not seen.expected and seen.suggestion
    assert server.diagnoser.breaks.recent("acme")[0].diagnosis.cause == cause


def test_a_shared_tier_has_no_copy_of_what_no_breakpoint_covers(server: Server) -> None:
    server.turn()
    server.ask(engine=SHARED_WITH, covered=170)
    server.turn()
    assert causes(server.ask(engine=SHARING, read=160)) == {C.NEVER_STORED: 240}


def test_what_the_engine_reports_comes_first(server: Server) -> None:
    server.turn(640)
    server.ask(engine=THERE)
    server.turn()
    expired = CacheMiss(C.EXPIRED, 320, "cpu", 300, 5.0)
    seen = server.ask(expired, engine=HERE, read=160)
    assert causes(seen) == {C.EXPIRED: 320, C.OTHER_REPLICA: 160}
    assert seen.cause == C.EXPIRED


def test_what_was_on_the_device_alone_was_never_stored(server: Server) -> None:
    server.turn(640)
    server.ask(covered=330)
    server.turn()
    evicted = CacheMiss(C.EVICTED, 640, "device", 300, 5.0)
    seen = server.ask(evicted, read=0)
    assert causes(seen) == {C.EVICTED: 320, C.NEVER_STORED: 320}
    assert [miss.detail for miss in seen.engine] == [None, "not covered by a breakpoint"]


def test_a_purge_takes_what_was_not_covered_as_well(server: Server) -> None:
    server.turn(640)
    server.ask(covered=330)
    server.turn()
    purged = CacheMiss(C.EVICTED, 640, "device", 300, 5.0, "it was purged")
    assert causes(server.ask(purged)) == {C.EVICTED: 640}


def test_nobody_can_read_a_session_without_a_name(server: Server) -> None:
    server.turn(640)
    server.ask(readable=160)
    server.turn()
    seen = server.ask(read=160, readable=160)
    assert causes(seen) == {C.NEVER_STORED: 480}
    assert "session" in (seen.engine[0].detail or "")


def test_an_earlier_request_was_still_at_it(server: Server) -> None:
    server.turn(640)
    server.ask()
    server.turn()
    server.now += 5
    # It began before the other had its first token.
    seen = server.ask(began=99.0)
    assert causes(seen) == {C.NEVER_STORED: 640}
    assert "still computing" in (seen.engine[0].detail or "")


def test_an_earlier_request_was_cut_off(server: Server) -> None:
    server.turn(640)
    server.ask(computed=325)
    seen = server.ask(read=320, computed=640)
    assert causes(seen) == {C.CUT_OFF: 304, C.PARTIAL_BLOCK: 16}
    assert (seen.expected, seen.cause, seen.suggestion) == (True, "retry", "")
    # What it had left, and the cache has lost, counts all the same.
    server.turn()
    server.ask(read=640, computed=800)
    server.turn()
    seen = server.ask(CacheMiss(C.EXPIRED, 160, ttl_s=300), read=640)
    assert causes(seen) == {C.EXPIRED: 160, C.CUT_OFF: 240}
    assert server.diagnoser.breaks.recent("acme")[0].diagnosis.cause == C.EXPIRED


def test_what_was_cut_off_and_what_was_not_are_told_apart(server: Server) -> None:
    """Of several earlier requests the one counts that left most, wherever the latest one ended."""
    server.turn(640)
    server.ask()
    server.ask(read=320, computed=320)
    seen = server.ask(read=320)
    assert causes(seen) == {C.UNKNOWN: 304, C.PARTIAL_BLOCK: 16}


def hashes(*runs: tuple[str, int]) -> list[bytes]:
    """Return the hashes of blocks: of each run its name and how many blocks it has."""
    return [f"{name}{i:06}".encode() for name, count in runs for i in range(count)]


def test_the_same_tokens_in_another_scope(server: Server) -> None:
    server.turn(640)
    server.ask(blocks=hashes(("or", 40)))
    server.turn()
    seen = server.ask(read=144, blocks=hashes(("or", 9), ("se", 56)))
    assert causes(seen) == {C.SCOPE_CHANGED: 496}
    assert not seen.expected and "scope" in seen.suggestion
    # Engines of other settings have other hashes for everything.
    server.turn()
    other = replace(SHARED_WITH, tiers=("redis",), hashing="other")
    seen = server.ask(engine=other, blocks=hashes(("xx", 90)))
    assert causes(seen) == {C.HASH_SETTINGS_DIFFER: 1040}


def test_a_prompt_that_an_earlier_one_goes_on_from(server: Server) -> None:
    """Its last token is computed, and with it the last block, though another request has it."""
    server.turn(640)
    server.ask()
    server.turn(64)
    server.ask(read=640)
    server.body["messages"][-1]["content"] = "something else"
    del server.tokens[656:]
    assert causes(server.ask(read=640)) == {C.PARTIAL_BLOCK: 16}


def test_a_template_that_renders_the_same_turns_differently(server: Server) -> None:
    server.turn(640)
    server.ask()
    server.turn()
    server.tokens[300:] = server.chance.choices(range(1000), k=len(server.tokens) - 300)
    seen = server.ask(read=288)
    assert causes(seen) == {C.RENDERED_DIFFERENTLY: pytest.approx(352, abs=3)}
    assert "template" in seen.suggestion
    # A few tokens at the end, where the answer begins, are always others.
    server.turn(407)
    server.ask(read=1040)
    server.turn()
    server.tokens[1445:1447] = [5000, 5001]
    assert causes(server.ask(read=1440)) == {C.PARTIAL_BLOCK: 7}


@pytest.mark.parametrize(
    ("behind", "same", "first", "token"),
    [
        # The tokens tell where tools are: some 440 of them, and 220 of the system prompt, of which
        # the last third changes.
        (None, 0, "tools_changed", 0),
        (None, 200, "system_changed", 192),
        (False, 0, "tools_changed", 0),
        # Known beforehand, it need not be told by them.
        (True, 200, "system_changed", 192),
        # Nothing stands in front of where they diverge.
        (True, 288, "system_changed", 288),
    ],
)
def test_changes_come_in_the_order_in_which_they_are_rendered(
    behind: bool | None, same: int, first: str, token: int
) -> None:
    server = Server(behind)
    tool = {"name": "t", "description": "what it does " * 800, "input_schema": {}}
    server.body |= {"tools": [tool], "system": [{"type": "text", "text": "be so kind " * 470}]}
    server.turn(700)
    server.body["messages"][0]["content"] = "why " * 250
    server.ask()
    tool["description"] = "how " + tool["description"]
    server.body["system"][0]["text"] = server.body["system"][0]["text"][:-1500] + "now " * 375
    server.tokens[same:] = server.chance.choices(range(1000), k=len(server.tokens) - same)
    seen = server.ask(read=same // BLOCK * BLOCK)
    assert (seen.kind, seen.where.token) == (first, pytest.approx(token, abs=BLOCK))
    assert [change.token for change in seen.changes] == sorted(c.token for c in seen.changes)
    assert seen.changes[0].path == seen.where.path


@pytest.mark.parametrize("rendered", [100, 340, 900])
def test_new_tokens_behind_history_that_is_rendered_differently(
    server: Server, rendered: int
) -> None:
    """Its length before, which was 640 tokens, does not tell where the new ones begin."""
    server.turn(640)
    server.ask()
    server.turn(400)
    server.tokens[300:] = server.chance.choices(range(1000), k=rendered - 300 + 400)
    read = len(server.tokens[:300]) // BLOCK * BLOCK
    if rendered < 300:
        server.tokens[:] = [*server.tokens[:rendered], *server.chance.choices(range(1000), k=400)]
        read = rendered // BLOCK * BLOCK
    seen = server.ask(read=read)
    assert dict(seen.uncached)[NEW_CONTENT] == pytest.approx(400, abs=BLOCK)
    assert causes(seen).get(C.RENDERED_DIFFERENTLY, 0) == pytest.approx(
        max(0, rendered - read), abs=BLOCK
    )


@pytest.mark.parametrize(
    ("idle_s", "cause"), [(50.0, C.UNKNOWN), (200.0, C.EVICTED), (400.0, C.EXPIRED)]
)
def test_what_was_too_long_ago(server: Server, idle_s: float, cause: MissCause) -> None:
    """An engine remembers its last 200,000 blocks; that may be less than a session's pauses."""
    server.turn()
    server.ask()
    server.turn()
    server.now += idle_s
    seen = server.ask(reach_s=60.0)
    assert causes(seen) == {cause: 400}
    assert seen.unknown_tokens == (400 if cause is C.UNKNOWN else 0)


def test_whom_the_engine_never_answered_is_nobodys_ancestor_in_tokens(server: Server) -> None:
    server.turn()
    assert not server.ask(final=False).measured
    server.turn()
    assert server.diagnoser.breaks.recent(None) == []
    assert server.ask(final=True).expected


def test_the_counts_add_up_whatever_is_reported(server: Server) -> None:
    chance = random.Random(4)
    engines = [HERE, THERE, SHARING, SHARED_WITH, replace(SHARING, epoch="z", hashing="y")]
    for _ in range(400):
        if len(server.tokens) > 4000 or chance.random() < 0.1:
            server.body["messages"].clear()
            server.tokens.clear()
        server.turn(chance.randrange(1, 500))
        length = len(server.tokens)
        if chance.random() < 0.3:
            at = chance.randrange(length)
            server.tokens[at:] = chance.choices(range(1000), k=length - at)
        misses = [
            CacheMiss(chance.choice(list(MissCause)), chance.randrange(1, 40) * BLOCK)
            for _ in range(chance.randrange(4))
        ]
        server.now += chance.uniform(0, 100)
        seen = server.ask(
            *misses,
            read=chance.randrange(length // BLOCK + 1) * BLOCK,
            engine=chance.choice(engines),
            began=server.now - chance.uniform(0, 150),
            covered=chance.randrange(length + 1),
            readable=chance.randrange(length + 1),
            unasked=chance.choice([None, CacheMiss(C.TIMED_OUT, 0, "redis")]),
            reach_s=chance.choice([None, chance.uniform(0, 200)]),
        )
        assert all(tokens > 0 for _, tokens in seen.uncached)
        assert all(miss.tokens > 0 for miss in seen.engine)
