import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.core.agent_session import TOOL_NAMES, Agent, Body, Client, tool, words
from tests.examples import examples
from vllm_cachescope.diagnosis.alignment import part_hashes
from vllm_cachescope.diagnosis.changes import ChangeKind
from vllm_cachescope.diagnosis.lineage_store import LineageStore
from vllm_cachescope.diagnosis.outcome import Diagnosis, DiagnosisKind
from vllm_cachescope.diagnosis.placement import Relation
from vllm_cachescope.diagnosis.prefix_match import is_unrelated, match_prefix
from vllm_cachescope.diagnosis.reuse import reusable_tokens
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Caller

EXPLORE_TOOLS = TOOL_NAMES[:17]
SUMMARY = "This session is being continued from a previous conversation. Summary: "


def subagent(seed: object, tools: list[str] = EXPLORE_TOOLS, scale: float = 1.0) -> Agent:
    """An agent with some of the tools, another system prompt and another model."""
    agent = Agent(seed, tools=tools, scale=scale)
    agent.model = "small-model"
    agent.system = [
        agent.system[0],
        {"type": "text", "text": "You explore code and never change it. " + agent.text(3000)},
    ]
    return agent


def title(agent: Agent) -> Body:
    """The side call that names a conversation: no tools, another prompt, the first question."""
    return {
        "model": "small-model",
        "max_tokens": 32,
        "system": [{"type": "text", "text": "Name this conversation in five words."}],
        "messages": [{"role": "user", "content": agent.messages[0]["content"][-1]["text"]}],
    }


def compact(agent: Agent, keep: int = 0, summary: str = SUMMARY) -> Agent:
    """Replace the history by a summary; keep the last ``keep`` messages."""
    text = summary + words(agent.rng, 400)
    kept = agent.messages[-keep:] if keep else []
    agent.messages = [{"role": "user", "content": [{"type": "text", "text": text}]}, *kept]
    return agent


def test_a_conversation_goes_on() -> None:
    client, agent = Client(), Agent("on")
    assert client.send(agent.body()).kind is DiagnosisKind.FIRST_REQUEST
    for _ in range(10):
        before = client.node
        diagnosis = client.send(agent.turn().body())
        assert (diagnosis.kind, diagnosis.lineage) == (DiagnosisKind.CONTINUATION, 1)
        assert client.placement.ancestor is before
        assert diagnosis.shared_tokens == before.fingerprint.tokens
        assert diagnosis.missed_tokens == 0 and diagnosis.where is None


def test_retries() -> None:
    client, agent = Client(), Agent("retry")
    client.send(agent.body())
    client.send(agent.turn().body())
    for _ in range(3):
        diagnosis = client.send(agent.body())
        assert (diagnosis.kind, diagnosis.lineage) == (DiagnosisKind.RETRY, 1)
        assert diagnosis.uncached == ()
    assert client.send(agent.turn().body()).kind is DiagnosisKind.CONTINUATION


def test_an_agent_with_parallel_subagents_titles_and_forks() -> None:
    client = Client()
    main = Agent("main")
    explorers = [subagent(f"explore {i}") for i in range(3)]
    for other in explorers[1:]:
        other.tools, other.system = explorers[0].tools, explorers[0].system
    planner = subagent("plan", TOOL_NAMES[5:])
    assert client.send(title(main)).kind is DiagnosisKind.FIRST_REQUEST
    assert client.send(main.body()).kind is DiagnosisKind.NEW_LINEAGE
    assert client.send(main.turn().body()).kind is DiagnosisKind.CONTINUATION
    seen = [client.send(agent.body()) for agent in (*explorers, planner)]
    assert [d.kind for d in seen] == [DiagnosisKind.NEW_LINEAGE] * 4
    assert len({d.lineage for d in seen}) == 4
    # The second explorer shares tools and system prompt with the first.
    assert seen[1].shared_tokens > 2000 > seen[3].shared_tokens
    rng = random.Random(1)
    agents = [main, *explorers, planner]
    lineages: dict[int, set[int]] = {}
    for _ in range(60):
        which = rng.randrange(len(agents))
        diagnosis = client.send(agents[which].turn(rng.choice([1, 1, 3])).body())
        assert diagnosis.kind is DiagnosisKind.CONTINUATION
        lineages.setdefault(which, set()).add(diagnosis.lineage)
        assert diagnosis.missed_tokens == 0
    assert all(len(numbers) == 1 for numbers in lineages.values())
    fork = main.copy("fork").ask("Say what you did so far, in a sentence.")
    # The last message differs: its answer has not been seen.
    fork.messages[-2]["content"] = [{"type": "text", "text": "Stop here, please."}]
    diagnosis = client.send(fork.body())
    assert diagnosis.kind is DiagnosisKind.FORK and diagnosis.expected
    assert diagnosis.parent_lineage == 2
    assert client.send(fork.turn().body()).lineage == diagnosis.lineage
    assert client.send(main.turn().body()).lineage == 2


def test_a_fork_from_an_earlier_point() -> None:
    client, agent = Client(), Agent("rewind")
    for _ in range(6):
        client.send(agent.turn().body())
    back = agent.copy("back")
    back.messages = back.messages[:5]
    for lineage in (2, 2):
        diagnosis = client.send(back.body())
        assert (diagnosis.kind, diagnosis.lineage) == (DiagnosisKind.RETRY, lineage)
    for _ in range(3):
        assert client.send(back.turn().body()).kind is DiagnosisKind.CONTINUATION
    edited = agent.copy("edited")
    edited.messages = edited.messages[:7]
    edited.messages[-1]["content"] = [{"type": "text", "text": "Do it in another way, please."}]
    diagnosis = client.send(edited.body())
    assert diagnosis.kind is DiagnosisKind.FORK
    assert diagnosis.where is not None and diagnosis.where.path == "messages[6].content[0]"
    assert client.send(edited.turn().body()).kind is DiagnosisKind.CONTINUATION
    assert client.send(agent.turn().body()).kind is DiagnosisKind.CONTINUATION


def test_the_same_request_answered_three_times_in_parallel() -> None:
    client, agent = Client(), Agent("parallel")
    agents = [agent.copy(i) for i in range(3)]
    kinds = [client.send(one.body()).kind for one in agents]
    assert kinds == [DiagnosisKind.FIRST_REQUEST, DiagnosisKind.RETRY, DiagnosisKind.RETRY]
    seen = [client.send(one.turn().body()) for one in agents]
    assert [d.kind for d in seen] == [
        DiagnosisKind.CONTINUATION,
        DiagnosisKind.FORK,
        DiagnosisKind.FORK,
    ]
    for one, diagnosis in zip(agents, seen, strict=True):
        for _ in range(3):
            later = client.send(one.turn().body())
            assert (later.kind, later.lineage) == (DiagnosisKind.CONTINUATION, diagnosis.lineage)


@pytest.mark.parametrize("keep", [0, 2, 4])
def test_a_compaction_is_an_expected_break(keep: int) -> None:
    client, agent = Client(), Agent("compaction")
    for _ in range(12):
        client.send(agent.turn().body())
    diagnosis = client.send(compact(agent, keep).body())
    assert diagnosis.kind is DiagnosisKind.CONTEXT_COMPACTED and diagnosis.expected
    assert diagnosis.lineage == 1
    assert diagnosis.changes[0].kind is ChangeKind.HISTORY_COMPACTED
    assert diagnosis.where is not None and diagnosis.where.path == "messages[0].content[0]"
    assert diagnosis.changes[0].chars_after < diagnosis.changes[0].chars_before / 2
    for _ in range(4):
        assert client.send(agent.turn().body()).kind is DiagnosisKind.CONTINUATION


def test_a_summary_that_stands_last_in_the_system_prompt() -> None:
    """Some frameworks keep the latest turns and put the summary before them as a system message."""
    client, agent = Client(), Agent("running summary")
    system = agent.system
    for round_ in range(3):
        for _ in range(8):
            client.send(agent.turn().body())
        agent.messages = agent.messages[-4:]
        agent.system = [*system, {"type": "text", "text": SUMMARY + words(agent.rng, 400)}]
        diagnosis = client.send(agent.body())
        assert diagnosis.kind is DiagnosisKind.CONTEXT_COMPACTED and diagnosis.expected, round_
        assert diagnosis.where is not None and diagnosis.where.path == "system[3]"
        assert diagnosis.lineage == 1
    # The same turns under a longer system prompt are no compaction.
    agent.system[3]["text"] += " And mind the gap."
    assert client.send(agent.turn().body()).kind is DiagnosisKind.SYSTEM_CHANGED


def test_a_long_summary_is_known_without_its_words() -> None:
    client, agent = Client(), Agent("wordless")
    for _ in range(30):
        client.send(agent.turn().body())
    text = "Done so far: " + agent.text(4000)
    agent.messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    assert client.send(agent.body()).kind is DiagnosisKind.CONTEXT_COMPACTED


def test_a_summary_after_the_first_question() -> None:
    client, agent = Client(), Agent("first question stays")
    for _ in range(12):
        client.send(agent.turn().body())
    first = agent.messages[0]
    compact(agent)
    agent.messages.insert(0, first)
    assert client.send(agent.body()).kind is DiagnosisKind.CONTEXT_COMPACTED


def test_a_declared_compaction() -> None:
    client, agent = Client(), Agent("declared")
    for _ in range(3):
        client.send(agent.turn().body())
    block = {"type": "compaction", "content": "short"}
    agent.messages = [{"role": "assistant", "content": [block]}, *agent.messages[-1:]]
    assert client.send(agent.body()).kind is DiagnosisKind.CONTEXT_COMPACTED
    assert client.send(agent.turn().body()).kind is DiagnosisKind.CONTINUATION


def test_a_new_question_after_clearing_is_no_compaction() -> None:
    client, agent = Client(), Agent("clear")
    for _ in range(12):
        client.send(agent.turn().body())
    agent.messages = []
    agent.ask("Write a summary of the readme file.")
    diagnosis = client.send(agent.body())
    assert diagnosis.kind is DiagnosisKind.NEW_LINEAGE and diagnosis.expected


def test_a_window_that_slides_is_a_break() -> None:
    client, agent = Client(), Agent("window")
    for _ in range(8):
        client.send(agent.turn().body())
    agent.turn().messages[:4] = []
    diagnosis = client.send(agent.body())
    assert diagnosis.kind is DiagnosisKind.MESSAGES_CHANGED and not diagnosis.expected
    assert diagnosis.changes[0].kind is ChangeKind.MESSAGES_REMOVED
    assert diagnosis.changes[0].parts_before == 7


def test_a_reminder_in_front_of_the_latest_message_only() -> None:
    """It is taken out again once it was answered, and what followed it is computed again."""
    client, agent = Client(), Agent("reminder")
    reminder = {"type": "text", "text": "<reminder>Tests first.</reminder>"}
    for i in range(4):
        agent.turn()
        body = agent.body()
        body["messages"][-1]["content"].insert(0, reminder)
        diagnosis = client.send(body)
        if i:
            assert diagnosis.kind is DiagnosisKind.MESSAGES_CHANGED and diagnosis.lineage == 1
            assert diagnosis.changes[0].kind is ChangeKind.MESSAGES_REMOVED
            assert diagnosis.changes[0].path == f"messages[{2 * i}].content[0]"


def test_a_reminder_at_the_very_end_costs_nothing() -> None:
    client, agent = Client(), Agent("last words")
    reminder = {"type": "text", "text": "<reminder>Tests first.</reminder>"}
    for i in range(4):
        agent.turn()
        body = agent.body()
        body["messages"][-1]["content"].append(reminder)
        diagnosis = client.send(body)
        if i:
            assert diagnosis.kind is DiagnosisKind.CONTINUATION and diagnosis.lineage == 1


@pytest.mark.parametrize("model", ["main-model", "small-model"])
def test_after_a_side_call_that_repeats_it_with_its_answer_a_conversation_goes_on(
    model: str,
) -> None:
    client, agent = Client(), Agent("recap")
    for _ in range(3):
        client.send(agent.turn().body())
    agent.turn()
    recap = agent.copy("recap")
    recap.model = model
    recap.system = [
        {"type": "text", "text": "You suggest what to ask next." + words(agent.rng, 90)}
    ]
    recap.ask("Suggest.")
    client.send(recap.body())
    for _ in range(2):
        diagnosis = client.send(agent.body())
        assert diagnosis.kind is DiagnosisKind.CONTINUATION and diagnosis.lineage == 1
        assert diagnosis.expected and diagnosis.flapping is None
        agent.turn()


def test_a_side_call_without_tools_is_a_lineage_of_its_own() -> None:
    client, agent = Client(), Agent("chat", tools=[])
    client.send(agent.turn().turn().body())
    recap = agent.copy("recap").turn()
    recap.system = [
        {"type": "text", "text": "You suggest what to ask next." + words(agent.rng, 90)}
    ]
    assert client.send(recap.body()).kind is DiagnosisKind.NEW_LINEAGE
    # The same system prompt with something else in it is a changed one.
    agent.system[2]["text"] += " It is ten."
    assert client.send(agent.turn().body()).kind is DiagnosisKind.SYSTEM_CHANGED


def test_a_twin_conversation_is_no_break_but_says_what_kept_it_from_sharing() -> None:
    client = Client()
    for day in (1, 2):
        agent = Agent("daily")
        agent.system[1]["text"] = f"You are an agent. Day {day} of the project."
        agent.messages = []
        diagnosis = client.send(agent.ask(f"Question {day}: " + words(agent.rng, 200)).body())
    assert diagnosis.kind is DiagnosisKind.NEW_LINEAGE and diagnosis.expected
    assert diagnosis.where is not None and diagnosis.where.path == "system[1]"
    assert diagnosis.missed_tokens > 1900
    assert "system[1]" in diagnosis.suggestion


def test_an_answer_the_client_began() -> None:
    client, agent = Client(), Agent("prefill")
    body = agent.body()
    body["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "{"}]})
    client.send(body)
    agent.messages.append({"role": "assistant", "content": [{"type": "text", "text": '{"a": 1}'}]})
    assert client.send(agent.ask("And b?").body()).kind is DiagnosisKind.CONTINUATION


def test_chat_conversations() -> None:
    client = Client()
    body: Body = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "You help. " * 50},
            {"role": "user", "content": "What is in the file? " * 20},
        ],
        "tools": [
            {"type": "function", "function": {"name": n, "parameters": {"type": "object"}}}
            for n in ("read", "write")
        ],
    }
    client.send(body, Protocol.CHAT)
    for i in range(4):
        call = {"id": f"c{i}", "type": "function", "function": {"name": "read", "arguments": "{}"}}
        body["messages"] += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{i}", "content": f"line {i} " * 40},
        ]
        assert client.send(body, Protocol.CHAT).kind is DiagnosisKind.CONTINUATION
    body["messages"][3]["content"] += "!"
    body["messages"] += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "on"}]
    diagnosis = client.send(body, Protocol.CHAT)
    assert diagnosis.kind is DiagnosisKind.MESSAGES_CHANGED
    assert diagnosis.changes[0].path == "messages[3].content"
    body["messages"][0]["content"] += "!"
    body["messages"] += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "on"}]
    diagnosis = client.send(body, Protocol.CHAT)
    assert (diagnosis.kind, diagnosis.changes[0].path) == (
        DiagnosisKind.SYSTEM_CHANGED,
        "messages[0].content",
    )


def test_a_prompt_that_is_one_text_grows() -> None:
    client, rng = Client(), random.Random(2)
    text = words(rng, 5000)
    client.send({"model": "m", "prompt": text}, Protocol.COMPLETIONS)
    text += words(rng, 3000)
    assert client.send({"model": "m", "prompt": text}, Protocol.COMPLETIONS).kind is (
        DiagnosisKind.CONTINUATION
    )
    other = text[:4000] + "#" + text[4000:]
    diagnosis = client.send({"model": "m", "prompt": other}, Protocol.COMPLETIONS)
    assert diagnosis.kind is DiagnosisKind.FORK
    assert 3400 // 4 <= diagnosis.shared_tokens <= 4000 // 4


def test_a_response_named_instead_of_repeated() -> None:
    client = Client()

    def ask(text: str, previous: str | None, effort: str = "low") -> Body:
        body: Body = {
            "model": "m",
            "instructions": "Be brief. " * 40,
            "input": [{"role": "user", "content": text * 30}],
            "reasoning": {"effort": effort},
        }
        return body | ({"previous_response_id": previous} if previous else {})

    client.send(ask("one ", None), Protocol.RESPONSES, response_id="r1")
    first = client.node.fingerprint
    for i in range(2, 5):
        body = ask(f"question {i} ", f"r{i - 1}")
        diagnosis = client.send(body, Protocol.RESPONSES, response_id=f"r{i}")
        assert (diagnosis.kind, diagnosis.lineage) == (DiagnosisKind.CONTINUATION, 1)
        assert diagnosis.shared_tokens >= first.tokens
    last = client.node.fingerprint
    assert len(last) == last.ends.buffer_info()[1] == 8 == len(last.piece_ends)
    assert [last.path(i) for i in range(8)] == [
        "instructions",
        "input[0].content",
        *("previous_response_id", "input[0].content") * 3,
    ]
    assert len(last.hashes) == 8 * len(last) and len(last.edges) == 16 * len(last)
    # A branch from the first answer, and a change of a parameter further on.
    assert client.send(ask("branch ", "r1"), Protocol.RESPONSES).kind is DiagnosisKind.FORK
    diagnosis = client.send(ask("more ", "r4", effort="high"), Protocol.RESPONSES)
    assert diagnosis.kind is DiagnosisKind.PARAMS_CHANGED
    unknown = client.send(ask("who? ", "never heard of"), Protocol.RESPONSES)
    assert not unknown.kind.is_break


# Bounds


def test_sessions_and_organisations_are_apart() -> None:
    client, agent = Client(), Agent("apart")
    client.send(agent.body(), response_id="msg_1")
    for other in (Caller("org", "other"), Caller("rival", "s"), Caller("org", None)):
        client.caller = other
        assert client.send(agent.body()).kind is DiagnosisKind.FIRST_REQUEST
    assert client.store.find("org", "msg_1") is not None
    assert client.store.find("rival", "msg_1") is None


def test_a_session_is_forgotten_after_its_time() -> None:
    client, agent = Client(ttl_s=100.0), Agent("time")
    client.send(agent.body(), response_id="msg_1")
    client.now += 98
    assert client.send(agent.turn().body()).kind is DiagnosisKind.CONTINUATION
    client.now += 98
    assert client.store.find("org", "msg_1") is not None
    client.now += 2
    assert client.store.find("org", "msg_1") is None
    assert len(client.store) == 0 and client.store.nbytes == 0
    assert client.send(agent.body()).kind is DiagnosisKind.FIRST_REQUEST


def test_a_long_conversation_keeps_the_ends_of_the_others() -> None:
    client, main = Client(requests=12), Agent("long", scale=0.1)
    helpers = [subagent(f"helper {i}", scale=0.1) for i in range(5)]
    client.send(main.body())
    for helper in helpers:
        client.send(helper.body())
    for _ in range(40):
        client.send(main.turn().body())
    assert len(client.store) == 12
    for helper in helpers:
        assert client.send(helper.turn().body()).kind is DiagnosisKind.CONTINUATION


def test_memory_is_bounded_per_organisation_and_in_all() -> None:
    client = Client(org_bytes=60_000, max_bytes=200_000)
    agent = Agent("bytes", scale=0.1)
    for i in range(60):
        client.caller = Caller(f"org {i % 6}", f"session {i}")
        client.send(agent.body(), response_id=f"msg_{i}")
        assert client.store.nbytes <= 200_000
    # The newest sessions are there, the oldest are not.
    assert client.store.find("org 5", "msg_59") is not None
    assert client.store.find("org 0", "msg_0") is None
    kept = [client.store.find(f"org {i % 6}", f"msg_{i}") for i in range(60)]
    assert client.store.nbytes == sum(node.nbytes for node in kept if node is not None)
    assert len(client.store) == sum(node is not None for node in kept)


@pytest.mark.parametrize("conversations", [70, 300])
def test_clients_that_name_no_session_go_on_all_the_same(conversations: int) -> None:
    client = Client()
    client.caller = Caller("org", None)
    agents = [Agent(f"client {i}", tools=TOOL_NAMES[:2], scale=0.05) for i in range(conversations)]
    for i, agent in enumerate(agents):
        client.send(agent.body(), response_id=f"msg {i}")
    for i, agent in enumerate(agents):
        assert client.store.find("org", f"msg {i}") is not None
        agent.turn()
        if i % 5 == 0:
            agent.tools[1]["description"] += " Again."
        expected = DiagnosisKind.TOOLS_CHANGED if i % 5 == 0 else DiagnosisKind.CONTINUATION
        assert client.send(agent.body()).kind is expected, i
    # What has been gone on from is not kept for long, nor are more ends than were asked for.
    assert conversations <= len(client.store) <= conversations + 64
    small = Client(requests=4, ends=10)
    for agent in agents:
        small.send(agent.body())
    assert len(small.store) == 14


def test_an_id_of_any_length_takes_bounded_memory() -> None:
    client, agent = Client(), Agent("ids", scale=0.1)
    for i in range(3):
        name = f"{i}" * 10_000_000
        client.send(agent.turn().body(), response_id=name)
        assert client.node.response_id is None and client.store.find("org", name) is None
    before = client.store.nbytes
    client.send(agent.body(), response_id="x" * 256)
    assert client.store.find("org", "x" * 256) is client.node
    assert client.store.nbytes - before >= client.node.fingerprint.nbytes + 256


def test_salts_tell_clients_apart_that_name_no_session() -> None:
    client, agent = Client(session=None), Agent("salted", scale=0.1)
    for turn in range(3):
        for salt in ("one", "two"):
            diagnosis = client.send({**agent.body(), "cache_salt": salt}, response_id=f"{turn}")
            assert diagnosis.kind is (
                DiagnosisKind.CONTINUATION if turn else DiagnosisKind.FIRST_REQUEST
            )
            assert client.store.find("org", f"{turn}") is client.node
        agent.turn()
    client.store.drop(client.caller, client.placement)
    assert len(client.store) == 5
    client.caller = Caller("org", "named")
    for salt in ("one", "two"):
        diagnosis = client.send({**agent.turn().body(), "cache_salt": salt})
    assert diagnosis.kind is DiagnosisKind.PARAMS_CHANGED and diagnosis.names == ("cache_salt",)
    assert diagnosis.shared_tokens == 0 < diagnosis.missed_tokens


def test_what_never_ran_is_nothing_to_go_on_from() -> None:
    client, agent = Client(), Agent("refused", scale=0.1)
    client.send(agent.body())
    refused = agent.turn().body()
    refused["tools"][3]["input_schema"] = "not a schema"
    assert client.send(refused).kind is DiagnosisKind.TOOLS_CHANGED
    client.store.drop(client.caller, client.placement)
    client.store.drop(client.caller, client.placement)
    assert len(client.store) == 1
    diagnosis = client.send(agent.body())
    assert diagnosis.kind is DiagnosisKind.CONTINUATION and diagnosis.lineage == 1
    client.store.drop(Caller("other", "s"), client.placement)
    client.store.purge("org")
    client.store.drop(client.caller, client.placement)
    assert client.store.nbytes == 0


def test_one_organisation_cannot_push_out_another() -> None:
    client = Client(org_bytes=100_000, max_bytes=10_000_000)
    agent = Agent("victim", scale=0.1)
    client.send(agent.body())
    flood = Agent("flood", scale=0.1)
    for i in range(200):
        client.caller = Caller("attacker", f"session {i}")
        client.send(flood.body(), response_id="same id every time")
    client.caller = Caller("org", "s")
    assert client.send(agent.turn().body()).kind is DiagnosisKind.CONTINUATION


def test_a_single_session_too_large_keeps_its_newest_request() -> None:
    client, agent = Client(org_bytes=1000), Agent("huge", scale=0.1)
    for _ in range(3):
        client.send(agent.turn().body())
        assert len(client.store) == 1


def test_an_empty_store() -> None:
    store = LineageStore(lambda: 0.0)
    assert store.find("org", "msg") is None and len(store) == 0


# A generator of sessions: what it does is known, so what is diagnosed can be checked


@dataclass
class Conversation:
    """An agent in a generated session, and what it has said since it last sent a request."""

    agent: Agent
    settled: bool = False
    forks: int = 0
    turns: int = 0


@dataclass
class Session:
    """Generates the requests of one session, each with what must be diagnosed."""

    rng: random.Random
    main: Agent
    conversations: list[Conversation] = field(default_factory=list)
    serial: int = 0

    def spawn(self) -> Conversation:
        """A subagent: a kind of its own, or one of the three kinds with prompts of their own."""
        self.serial += 1
        agent = self.main.copy(f"spawn {self.serial}")
        kind = self.rng.randrange(3)
        kinds = random.Random(f"kind {kind}")
        size = 3 + kind * 2
        names = kinds.sample(TOOL_NAMES, size)
        agent.tools = [tool(kinds, name, 60) for name in names]
        agent.system = [
            {"type": "text", "text": f"DiagnosisKind {kind}. " + words(kinds, 400 * (kind + 1))}
        ]
        agent.model = kinds.choice(["small-model", "main-model"])
        agent.messages = []
        agent.ask(agent.text(300), reminder="the same for all" if kind else None)
        return Conversation(agent)


def break_tool_schema(rng: random.Random, agent: Agent) -> tuple[DiagnosisKind, str]:
    i = rng.randrange(len(agent.tools))
    agent.tools[i]["input_schema"]["properties"][f"p{rng.random()}"] = {"type": "string"}
    return DiagnosisKind.TOOLS_CHANGED, f"tools[{i}]"


def break_tool_order(rng: random.Random, agent: Agent) -> tuple[DiagnosisKind, str]:
    i = rng.randrange(len(agent.tools) - 1)
    agent.tools[i], agent.tools[i + 1] = agent.tools[i + 1], agent.tools[i]
    return DiagnosisKind.TOOLS_CHANGED, f"tools[{i}]"


def break_tool_added(rng: random.Random, agent: Agent) -> tuple[DiagnosisKind, str]:
    i = rng.randrange(len(agent.tools) + 1)
    agent.tools.insert(i, tool(rng, f"Extra{rng.getrandbits(40)}", 60))
    return DiagnosisKind.TOOLS_CHANGED, f"tools[{i}]"


def break_tool_removed(rng: random.Random, agent: Agent) -> tuple[DiagnosisKind, str]:
    if len(agent.tools) < 3:
        return break_tool_added(rng, agent)
    i = rng.randrange(len(agent.tools))
    del agent.tools[i]
    return DiagnosisKind.TOOLS_CHANGED, f"tools[{i}]"


def break_system(rng: random.Random, agent: Agent) -> tuple[DiagnosisKind, str]:
    i = len(agent.system) - 1
    agent.system[i]["text"] += f" Build {rng.getrandbits(30)}."
    return DiagnosisKind.SYSTEM_CHANGED, f"system[{i}]"


def break_system_added(rng: random.Random, agent: Agent) -> tuple[DiagnosisKind, str]:
    agent.system.append({"type": "text", "text": f"Note {rng.getrandbits(40)}: " + words(rng, 60)})
    return DiagnosisKind.SYSTEM_CHANGED, f"system[{len(agent.system) - 1}]"


def break_model(rng: random.Random, agent: Agent) -> tuple[DiagnosisKind, str]:
    agent.model += "-next"
    return DiagnosisKind.MODEL_CHANGED, "model"


def break_params(rng: random.Random, agent: Agent) -> tuple[DiagnosisKind, str]:
    agent.params = {"chat_template_kwargs": {"level": rng.random()}}
    return DiagnosisKind.PARAMS_CHANGED, "chat_template_kwargs.level"


def break_history(rng: random.Random, agent: Agent) -> tuple[DiagnosisKind, str]:
    """Edit a block that has been answered: every message but the newest answer and what follows."""
    i = rng.randrange(len(agent.messages) - 2)
    blocks = agent.messages[i]["content"]
    j = rng.randrange(len(blocks))
    blocks[j] = copy.deepcopy(blocks[j])
    key = next(key for key in ("text", "content", "id") if key in blocks[j])
    blocks[j][key] += f" edited {rng.getrandbits(40)}"
    return DiagnosisKind.MESSAGES_CHANGED, f"messages[{i}].content[{j}]"


def break_history_dropped(rng: random.Random, agent: Agent) -> tuple[DiagnosisKind, str]:
    if len(agent.messages) < 7:
        return break_history(rng, agent)
    i = rng.randrange(1, len(agent.messages) - 5, 2)
    del agent.messages[i : i + 2]
    return DiagnosisKind.MESSAGES_CHANGED, f"messages[{i}].content[0]"


BREAKS: list[Callable[[random.Random, Agent], tuple[DiagnosisKind, str]]] = [
    break_tool_schema,
    break_tool_order,
    break_tool_added,
    break_tool_removed,
    break_system,
    break_system_added,
    break_model,
    break_params,
    break_history,
    break_history_dropped,
]


def step(
    session: Session, client: Client
) -> tuple[str, Diagnosis, tuple[DiagnosisKind, ...], str | None]:
    """Make the session's next request; return what it did and what must be said of it."""
    rng = session.rng
    conversation = rng.choice(session.conversations)
    agent = conversation.agent
    act = rng.random()
    if act < 0.10 and len(session.conversations) < 6:
        spawned = session.spawn()
        session.conversations.append(spawned)
        return (
            "spawn",
            client.send(spawned.agent.body()),
            (DiagnosisKind.NEW_LINEAGE, DiagnosisKind.FORK),
            None,
        )
    if act < 0.14:
        body = title(agent)
        body["messages"][0]["content"] += f" {rng.getrandbits(40)}"
        return "title", client.send(body), (DiagnosisKind.NEW_LINEAGE, DiagnosisKind.FORK), None
    if act < 0.20:
        return "retry", client.send(agent.body()), (DiagnosisKind.RETRY,), None
    if act < 0.28 and conversation.turns >= 2 and len(session.conversations) < 6:
        fork = agent.copy(f"fork {rng.random()}")
        cut = rng.randrange(3, len(fork.messages) + 1, 2)
        fork.messages = fork.messages[:cut]
        last = {"type": "text", "text": fork.text(200) + f" {rng.getrandbits(40)}"}
        fork.messages[-1] = {"role": "user", "content": [last]}
        session.conversations.append(Conversation(fork, turns=cut // 2))
        return "fork", client.send(fork.body()), (DiagnosisKind.FORK,), None
    if act < 0.34 and conversation.turns >= 6:
        keep = rng.choice([0, 2])
        compact(agent, keep)
        conversation.turns = keep // 2
        return "compact", client.send(agent.body()), (DiagnosisKind.CONTEXT_COMPACTED,), None
    agent.turn(rng.choice([1, 1, 2]))
    conversation.turns += 1
    if act < 0.50 and conversation.turns >= 2:
        change = rng.choice(BREAKS)
        kind, path = change(rng, agent)
        return change.__name__, client.send(agent.body()), (kind,), path
    return "turn", client.send(agent.body()), (DiagnosisKind.CONTINUATION,), None


def play(seed: int, steps: int) -> tuple[int, int]:
    """Play a session; return how many requests it made and how many breaks it planted."""
    rng = random.Random(seed)
    main = Agent(f"session {seed}", tools=rng.sample(TOOL_NAMES, 5), scale=0.1)
    session = Session(rng, main, [Conversation(main)])
    client = Client()
    client.send(main.body())
    history: list[str] = []
    planted = 0
    for _ in range(steps):
        act, diagnosis, kinds, path = step(session, client)
        history.append(act)
        story = (seed, history, diagnosis)
        assert diagnosis.kind in kinds, story
        assert diagnosis.expected == (path is None), story
        if path is not None:
            planted += 1
            assert diagnosis.where is not None and diagnosis.where.path == path, story
            assert diagnosis.missed_tokens > 0, story
    return steps, planted


def test_generated_sessions_have_no_false_break_and_no_missed_one() -> None:
    requests = planted = 0
    for seed in range(examples(2000)):
        # Most sessions are short; every twentieth is long enough to fork and compact repeatedly.
        played = play(seed, 40 if seed % 20 == 0 else 6)
        requests, planted = requests + played[0], planted + played[1]
    assert requests == examples(15_400)
    assert planted > examples(1_000)


def test_what_is_ruled_out_early_would_have_come_to_nothing() -> None:
    """Requests that begin otherwise and share no message are not looked at; nor would it help."""
    ruled_out = reuses = 0
    for seed in range(20):
        rng = random.Random(seed)
        main = Agent(f"session {seed}", tools=rng.sample(TOOL_NAMES, 5), scale=0.1)
        session, client = Session(rng, main, [Conversation(main)]), Client()
        client.send(main.body())
        fingerprints = [client.placement.node.fingerprint]
        for _ in range(20):
            step(session, client)
            fingerprints.append(client.placement.node.fingerprint)
        for old, new in itertools.permutations(fingerprints, 2):
            static = new.static_hashes
            messages = part_hashes(new, range(new.static_parts, len(new)))
            unrelated = is_unrelated(old, static, frozenset(messages))
            shared = match_prefix(old, new)
            most = max(
                reusable_tokens(old, new, shared, known, messages) for known in (True, False)
            )
            assert not (unrelated and most), (seed, old, new)
            ruled_out, reuses = ruled_out + unrelated, reuses + bool(most)
    assert ruled_out > 1_000 and reuses > 1_000, (ruled_out, reuses)


def test_the_generator_would_notice_a_diagnosis_that_sees_nothing() -> None:
    """The check above can fail: a store that drops everything finds no break."""
    seen = 0
    for seed in range(20):
        try:
            rng = random.Random(seed)
            main = Agent(f"session {seed}", tools=rng.sample(TOOL_NAMES, 5), scale=0.1)
            session = Session(rng, main, [Conversation(main)])
            client = Client(org_bytes=1)
            client.send(main.body())
            for _ in range(12):
                _, diagnosis, kinds, _ = step(session, client)
                seen += diagnosis.kind not in kinds
        except IndexError:
            continue
    assert seen > 20


def test_relations_are_what_kinds_are_made_of() -> None:
    client, agent = Client(), Agent("relations")
    client.send(agent.body())
    assert client.placement.relation is Relation.FIRST
    client.send(agent.turn().body())
    assert client.placement.relation is Relation.CONTINUATION
