"""A session that moves is repaired elsewhere as here, and no text moves along."""

import json
import random
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.test_repair import (
    EVERYTHING,
    ME,
    VALUES,
    Session,
    body,
    call,
    kinds,
    other_way_round,
    tool,
)
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.repair.arrangement import MAX_ARRANGEMENT, arranged, arrangement_of
from vllm_cachescope.repair.numbers import numbers_of, with_numbers
from vllm_cachescope.repair.session_firsts import MAX_ARRANGED, MAX_ARRANGEMENTS, told_firsts
from vllm_cachescope.repair.spelling import packed, tool_in_any_spelling


def moved(session: Session, **repair: Any) -> Session:
    """Return another replica, which knows of the session what it is told."""
    told = session.repairer.memory.told(ME)
    other = Session(**repair)
    if told is not None:
        other.repairer.memory.adopt(ME, told)
    return other


def shuffled(tools: list[dict[str, Any]], chance: random.Random) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = other_way_round(tools, chance)
    for one in found:
        chance.shuffle(one["input_schema"]["required"])
    return found


def test_tools_are_spelled_elsewhere_as_they_first_were_here() -> None:
    here = Session(json_form=True, latched_field=True)
    first = body(
        tool("a", strict=None),
        {"name": "b", "input_schema": {"$schema": "https://json-schema.org/draft/2020-12/schema"}},
        tool("c", description="C"),
    )
    here.asks(first)
    there = moved(here, json_form=True, latched_field=True)
    changed = deepcopy(first)
    changed["tools"] = shuffled(
        [tool("a", description=""), {"input_schema": {"required": []}, "name": "b"}, tool("c")],
        random.Random(1),
    )
    changed["tools"][2]["description"] = "C"
    mended = there.asks(changed)
    assert json.dumps(mended.fields) == json.dumps(first)
    # And on a third one, which the second has told.
    third = moved(there, json_form=True, latched_field=True)
    assert json.dumps(third.asks(changed).fields) == json.dumps(first)


@pytest.mark.parametrize(
    "first", ['{"b": 1, "a": "é"}', '{"b":1,"a":"é"}', '{"b":1,"a":"\\u00e9"}']
)
def test_inputs_are_written_elsewhere_as_they_first_were_here(first: str) -> None:
    here = Session(json_form=True)
    here.asks(call(first), protocol=Protocol.CHAT)
    for later in ('{"a": "é", "b": 1}', '{"a":"\\u00e9", "b":1}'):
        mended = moved(here, json_form=True).asks(call(later), protocol=Protocol.CHAT)
        function = mended.fields["messages"][1]["tool_calls"][0]["function"]
        assert function["arguments"] == first and kinds(mended) == ["json_form"]


def test_what_numbers_do_not_tell_is_as_it_first_was_there() -> None:
    here = Session(json_form=True)
    here.asks(call('{"b":  1, "a": 2}'), protocol=Protocol.CHAT)
    there = moved(here, json_form=True)
    later = call('{"a": 2, "b": 1}')
    assert there.asks(later, protocol=Protocol.CHAT).fields is later


def test_a_head_has_its_first_numbers_elsewhere() -> None:
    heads = [{"pattern": r"It is [^\n]*\n"}]
    here = Session(volatile_head=heads)
    first = body(system="It is Monday, 12:59:01.\nYou help.")
    here.asks(first)
    there = moved(here, volatile_head=heads)
    later = there.asks(body(system="It is Monday, 13:00:59.\nYou help."))
    assert later.fields["system"] == first["system"] and kinds(later) == ["volatile_head"]
    # Another text stands as it is, and is the first from then on.
    other = body(system="It is Tuesday, 00:10:00.\nYou help.")
    there = moved(here, volatile_head=heads)
    assert there.asks(other).fields is other
    third = moved(there, volatile_head=heads)
    later = third.asks(body(system="It is Tuesday, 00:11:00.\nYou help."))
    assert later.fields["system"] == other["system"]


# Numbers tell of no field of unknown name that is null.
SAID = VALUES.filter(lambda value: value is not None)


@settings(max_examples=30)
@given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4), st.randoms(), st.booleans())
def test_who_moves_is_repaired_as_who_stays(
    schemas: list[tuple[Any, Any]], chance: random.Random, any_defaults: bool
) -> None:
    choice = {**EVERYTHING, "latched_field": any_defaults}
    here = Session(**choice)
    given = body(
        *({"name": str(i), "input_schema": a, "more": b} for i, (a, b) in enumerate(schemas)),
        messages=[
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": str(i), "name": "x", "input": one}],
            }
            for i, (one, _) in enumerate(schemas)
        ],
    )
    here.asks(other_way_round(given, chance))
    there = moved(here, **choice)
    for _ in range(2):
        changed = other_way_round(given, chance)
        chance.shuffle(changed["tools"])
        assert json.dumps(there.asks(changed).fields) == json.dumps(here.asks(changed).fields)


@settings(max_examples=40)
@given(st.dictionaries(st.text("ab", max_size=2), VALUES), st.binary(max_size=40), st.randoms())
def test_no_arrangement_makes_another_value(
    schema: dict[str, Any], told: bytes, chance: random.Random
) -> None:
    """Not even one that is of something else, or of nothing."""
    one = {"name": "a", "input_schema": schema}
    evened = tool_in_any_spelling(one)
    others = [told, arrangement_of(packed(other_way_round(one, chance)), evened, False)]
    for arrangement in others:
        here = Session(json_form=True)
        here.repairer.memory.adopt(ME, told_firsts([], {}))
        session = moved(here, json_form=True)
        session.asks(body(other_way_round(one, chance)))
        firsts = session.repairer.memory.told(ME)
        assert firsts is not None
        forged = told_firsts([], {}, dict.fromkeys(firsts.arrangements, arrangement))
        session = Session(json_form=True)
        session.repairer.memory.adopt(ME, forged)
        mended = session.asks(body(one))
        assert tool_in_any_spelling(mended.fields["tools"][0]) == evened


def test_arrangements_hold_no_text_and_are_bounded() -> None:
    session = Session(**EVERYTHING)
    secret = {"properties": {f"secret{n}": {"description": "hidden"} for n in range(60)}}
    tools = [{"name": f"name{n}", "input_schema": {**secret, "n": n}} for n in range(700)]
    session.asks(body(*tools, system="Nonce: covert\nYou help."))
    told = session.repairer.memory.told(ME)
    assert told is not None and 0 < len(told.arrangements) <= MAX_ARRANGEMENTS
    assert sum(len(k) + len(v) for k, v in told.arrangements.items()) <= MAX_ARRANGED
    assert all(len(one) <= MAX_ARRANGEMENT for one in told.arrangements.values())
    for said in (*told.arrangements.values(), *told.heads.values()):
        assert not any(text in said for text in (b"secret", b"hidden", b"covert", b"name"))
    wide = {f"{n * 7919 % 2000:04}": n for n in range(2000)}
    with pytest.raises(ValueError, match="numbers do not tell"):
        arrangement_of(packed(wide), packed(dict(sorted(wide.items()))), False)


@settings(max_examples=30)
@given(st.text("a1 ,", max_size=12), st.text("a1 ,", max_size=12))
def test_numbers_alone_are_put_in(first: str, now: str) -> None:
    told = numbers_of(first)
    assert told is not None
    assert with_numbers(first, told) == first
    assert with_numbers(now, told) in (None, first)
    assert numbers_of("1 " * 300) is None
    assert with_numbers("1", told[:16] + b"x") is None


def test_an_arrangement_of_something_else_is_refused() -> None:
    evened = packed({"a": 1, "b": [1, 2]})
    for told in ([[0]], [[0, 0]], [[1, 2]], [[0, 1], [0, 0]], [[0, 1, -5000]], "text"):
        with pytest.raises(ValueError, match="something else"):
            arranged(evened, packed(told), is_text=False)
    with pytest.raises(ValueError, match="something else"):
        arranged(evened, packed([]), is_text=True)
