"""The kind of an engine: what must be equal of two engines that share blocks, as digests that
engines leave in a store, so that those which share nothing can be told why."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAMED = 6
"""How many differences are named."""

SECRET = "the secret"
"""The difference that hides all others: digests are made without it, block hashes are not."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """The kind of an engine.

    Attributes:
        secret_digest: tells its secret from others; see `keyspace.secret_digest`.
        fields: a digest of each thing that it must have in common with others, by name.
    """

    secret_digest: bytes
    fields: Mapping[str, str]

    @classmethod
    def of(cls, identity: Mapping[str, Any], secret_digest: bytes) -> "EngineKind":
        """Return the kind of an engine with this identity; see `Keyspace`."""
        fields: dict[str, str] = {}
        for name, value in identity.items():
            nested = value if isinstance(value, dict) else {"": value}
            for inner, part in nested.items():
                canonical = json.dumps(part, sort_keys=True, separators=(",", ":"), default=str)
                digest = hashlib.sha256(canonical.encode()).hexdigest()[:8]
                fields[f"{name}.{inner}" if inner else name] = digest
        return cls(secret_digest, fields)

    @classmethod
    def read(cls, data: bytes) -> "EngineKind | None":
        """Return the kind in ``data``; None if there is none, or one of a later version."""
        secret, _, text = data.partition(b" ")
        try:
            fields = json.loads(text)
        except ValueError:
            return None
        if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
            return None
        return cls(secret, fields)

    def to_bytes(self) -> bytes:
        """Return it as bytes."""
        return self.secret_digest + b" " + json.dumps(self.fields, sort_keys=True).encode()

    def differences(self, other: "EngineKind") -> list[str]:
        """Return the names of what differs."""
        names = sorted(
            name
            for name in self.fields.keys() | other.fields.keys()
            if self.fields.get(name) != other.fields.get(name)
        )
        secret = [] if self.secret_digest == other.secret_digest else [SECRET]
        return secret + names


def difference_in_words(ours: EngineKind, theirs: bytes) -> str | None:
    """Return what differs between an engine and one that has left ``theirs``, in words; None if
    nothing does, or that cannot be told."""
    kind = EngineKind.read(theirs)
    names = [] if kind is None else ours.differences(kind)
    if not names:
        return None
    # Somebody else may write to the store.
    listed = ", ".join(name[:60] if name.isprintable() else "?" for name in names[:NAMED])
    more = len(names) - NAMED
    return f"{listed} and {more} more" if more > 0 else listed
