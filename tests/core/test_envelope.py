"""Values and leases in a remote store: genuine ones pass, and nothing else does."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.tiers.envelope import (
    HEADER_BYTES,
    BadEnvelope,
    EncryptedEnvelopes,
    Envelopes,
)
from vllm_cachescope.tiers.jobs import Outgoing
from vllm_cachescope.tiers.leases import LEASE_BYTES, Leases, claimed_end

SECRET = b"a secret of the tests"
SLOT = 300
PAYLOAD = random.Random(1).randbytes(SLOT)

SEALERS = {
    "in the clear": Envelopes(SECRET, "model"),
    "encrypted": EncryptedEnvelopes(SECRET, "model", SLOT),
}
either = pytest.mark.parametrize("envelopes", SEALERS.values(), ids=SEALERS)


def sealed(envelopes: Envelopes, key: bytes, payload: bytes = PAYLOAD, ttl_s: int = 300) -> bytes:
    """Return a value as a store holds it."""
    with envelopes.sealing([Outgoing(key, memoryview(payload), ttl_s, 0.0)]) as (value,):
        return value.head + bytes(value.payload)


def opened(envelopes: Envelopes, key: bytes, value: bytes) -> tuple[int, bytes]:
    """Return the TTL and the payload of a value, read as a tier reads it."""
    slot = memoryview(bytearray(SLOT))
    with envelopes.landing([slot]) as (landed,):
        found = value[HEADER_BYTES:]
        landed[: len(found)] = found
        ttl_s = envelopes.open(key, value[:HEADER_BYTES], landed, slot)
    return ttl_s, bytes(slot)


@either
@given(
    key=st.binary(max_size=80),
    payload=st.binary(min_size=SLOT, max_size=SLOT),
    ttl_s=st.integers(0, 2**32 - 1),
)
def test_what_was_sealed_is_what_is_opened(envelopes, key, payload, ttl_s):
    value = sealed(envelopes, key, payload, ttl_s)
    assert len(value) == HEADER_BYTES + SLOT
    assert opened(envelopes, key, value) == (ttl_s, payload)


@either
@given(bits=st.sets(st.integers(0, (HEADER_BYTES + SLOT) * 8 - 1), min_size=1, max_size=40))
def test_no_bits_of_a_value_can_flip_unnoticed(envelopes, bits):
    value = bytearray(sealed(envelopes, b"key"))
    for bit in bits:
        value[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadEnvelope):
        opened(envelopes, b"key", bytes(value))


@either
def test_no_bit_of_a_header_can_flip_unnoticed(envelopes):
    value = sealed(envelopes, b"key")
    for bit in range(HEADER_BYTES * 8):
        flipped = bytearray(value)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadEnvelope):
            opened(envelopes, b"key", bytes(flipped))


@either
def test_a_value_belongs_to_its_key_model_secret_and_kind(envelopes):
    value = sealed(envelopes, b"key")
    kind = type(envelopes)
    rest = (SLOT,) if kind is EncryptedEnvelopes else ()
    others = [
        (envelopes, b"kez"),
        (envelopes, b"key\0"),
        (kind(SECRET + b"!", "model", *rest), b"key"),
        (kind(SECRET, "another model", *rest), b"key"),
        *((other, b"key") for other in SEALERS.values() if other is not envelopes),
    ]
    for other, key in others:
        with pytest.raises(BadEnvelope, match="MAC does not match"):
            opened(other, key, value)


@either
def test_parts_of_two_values_do_not_go_together(envelopes):
    one, two = (sealed(envelopes, b"key", bytes([n]) * SLOT) for n in (1, 2))
    salt = slice(12, 28)
    for mixed in (
        one[:HEADER_BYTES] + two[HEADER_BYTES:],
        one[: salt.start] + two[salt] + one[salt.stop :],
        one[: salt.stop] + two[salt.stop :],
    ):
        with pytest.raises(BadEnvelope, match="MAC does not match"):
            opened(envelopes, b"key", mixed)


@either
@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b"", "too short"),
        (b"CSKV" + bytes(HEADER_BYTES - 5), "too short"),
        # A whole value of the last version, which had a checksum.
        (b"CSKV\1\0\0\0" + PAYLOAD[: HEADER_BYTES - 8] + PAYLOAD, "no value of version 2"),
    ],
    ids=["nothing", "cut short", "of the last version"],
)
def test_what_is_no_value_of_ours_says_so(envelopes, value, says):
    with pytest.raises(BadEnvelope, match=says):
        opened(envelopes, b"key", value)


@either
def test_equal_blocks_look_different_each_time(envelopes):
    """No two values share a key, which AES-GCM would not survive."""
    heads = {sealed(envelopes, b"key")[:HEADER_BYTES] for _ in range(50)}
    assert len(heads) == 50
    rests = {sealed(envelopes, b"key")[HEADER_BYTES:] for _ in range(50)}
    assert len(rests) == (50 if isinstance(envelopes, EncryptedEnvelopes) else 1)


def test_only_encrypted_values_hide_the_block():
    assert PAYLOAD in sealed(SEALERS["in the clear"], b"key")
    value = sealed(SEALERS["encrypted"], b"key")
    assert not any(PAYLOAD[i : i + 4] in value for i in range(SLOT - 3))


def test_several_encrypted_values_at_once_share_no_memory():
    envelopes = EncryptedEnvelopes(SECRET, "model", SLOT)
    blocks = [Outgoing(b"%d" % n, memoryview(bytes([n]) * SLOT), 300, 0.0) for n in range(3)]
    for _ in range(2):
        with envelopes.sealing(blocks) as values:
            stored = [value.head + bytes(value.payload) for value in values]
        for n, value in enumerate(stored):
            assert opened(envelopes, b"%d" % n, value) == (300, bytes([n]) * SLOT)


@given(name=st.binary(max_size=80), at=st.integers(0, 2**64 - 1))
def test_a_lease_says_until_when(name, at):
    lease = Leases(SECRET).grant(name, at)
    assert len(lease) == LEASE_BYTES
    assert Leases(SECRET).end(name, lease) == claimed_end(lease) == at


@given(bits=st.sets(st.integers(0, LEASE_BYTES * 8 - 1), min_size=1, max_size=20))
def test_no_bits_of_a_lease_can_flip_unnoticed(bits):
    lease = bytearray(Leases(SECRET).grant(b"name", 1000))
    for bit in bits:
        lease[bit // 8] ^= 1 << bit % 8
    assert Leases(SECRET).end(b"name", bytes(lease)) is None


def test_a_lease_belongs_to_its_name_and_secret():
    lease = Leases(SECRET).grant(b"name", 1000)
    assert Leases(SECRET).end(b"nama", lease) is None
    assert Leases(SECRET).end(b"name\0", lease) is None
    assert Leases(SECRET + b"!").end(b"name", lease) is None
    assert Leases(SECRET).end(b"name", lease[:-1]) is None
    assert Leases(SECRET).end(b"name", b"") is None
