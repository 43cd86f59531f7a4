"""Which blocks only one conversation of a session has used, and whose they are."""

import random

from vllm_cachescope.cache import session_prompts
from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.cache.session_prompts import MAX_PROMPTS, SessionPrompts
from vllm_cachescope.tenancy.owner_tags import NOBODY, OwnerTags
from vllm_cachescope.tenancy.scope import Caller

TAGS = OwnerTags(b"a secret of the tests")
A, B = TAGS.of(Caller("acme", "a")), TAGS.of(Caller("acme", "b"))


def chain(*parts: str) -> list[bytes]:
    """Return keys, each of which stands for all in front of it."""
    return [b"/".join(p.encode() for p in parts[: i + 1]) for i in range(len(parts))]


def test_a_conversation_that_ends_has_what_no_other_of_its_session_has() -> None:
    prompts = SessionPrompts(1000)
    prompts.add(A, "main", chain(*"ssm"), 3)
    prompts.add(A, "sub 1", chain(*"ssx"), 3)
    # It goes on: what was generated is rendered otherwise.
    prompts.add(A, "sub 1b", chain(*"ssxq"), 3)
    prompts.add(A, "sub 2", chain(*"ssxy"), 4)
    prompts.add(B, "other", chain(*"ssxy"), 4)
    assert prompts.end("sub 1") == (b"", ())
    assert prompts.end("sub 1b") == (b"", ())
    assert prompts.end("sub 2") == (A, chain(*"ssxy")[2:])
    assert prompts.end("sub 2") == (b"", ())
    assert prompts.end_session(A) == chain(*"ssm")
    assert prompts.end_session(A) == []
    prompts.purge(A[:8])
    assert len(prompts) == prompts.keys == 0


def test_without_a_session_or_a_nonce_nothing_is_kept() -> None:
    prompts = SessionPrompts(1000)
    prompts.add(TAGS.of(Caller("acme")), "1", chain(*"ab"), 2)
    prompts.add(A, "", chain(*"ab"), 2)
    prompts.add(A, "2", [], 0)
    prompts.add(A, "3", chain(*"ab") * 600, 2)
    assert len(prompts) == 0


def test_its_size_is_bounded_whatever_clients_do(monkeypatch) -> None:
    monkeypatch.setattr(session_prompts, "MAX_IN_ALL", 100)
    chance, prompts = random.Random(1), SessionPrompts(500)
    for number in range(3000):
        owner = TAGS.of(Caller("acme", str(chance.randrange(40))))
        keys = chain(*chance.choices("abc", k=chance.randrange(1, 9)))
        prompts.add(owner, str(number), keys, len(keys))
        if chance.random() < 0.1:
            prompts.end(str(number - 1))
        kept = [k for of in prompts._sessions.values() for k in of.values()]  # noqa: SLF001
        assert prompts.keys == sum(len(k.keys) for k in kept) <= 500
        assert len(prompts) == len(kept) <= 100
    for number in range(3 * MAX_PROMPTS):
        prompts.add(A, f"a {number}", chain(str(number)), 1)
    assert len(prompts.end_session(A)) <= MAX_PROMPTS


def test_a_block_knows_the_only_session_that_has_used_it() -> None:
    ledger = Ledger()

    def user() -> bytes | None:
        entry = ledger.get(b"key")
        assert entry is not None
        return entry.user

    ledger.touch(b"key", 300, 0.0, A)
    assert user() is None
    ledger.touch(b"key", 300, 1.0, A, bytes(A))
    ledger.touch(b"key", 300, 2.0, A, bytes(A))
    ledger.touch(b"key", 300, 3.0)
    assert user() == A
    ledger.touch(b"key", 300, 4.0, user=B)
    assert user() == NOBODY
    ledger.touch(b"key", 300, 5.0, user=A)
    assert user() == NOBODY


def test_a_prompt_that_was_cut_off_counts_with_what_was_computed_of_it() -> None:
    prompts = SessionPrompts(1000)
    prompts.add(A, "cut off", chain(*"ss"), 4)
    prompts.add(A, "in full", chain(*"ssmm"), 4)
    assert prompts.owner_of("cut off") is None
    assert prompts.end("in full") == (A, chain(*"ssmm"))
