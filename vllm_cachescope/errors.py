"""The error that refuses a client's request: it names the field, the value and what is allowed."""

import reprlib
from collections.abc import Iterable


class BadRequest(ValueError):
    """A request that must be refused before any work is done for it.

    Attributes:
        path: where in the body, as in ``system[2].cache_control.ttl``.
        value: what stands there.
        allowed: what may stand there, in words or as the list of values.
    """

    def __init__(self, path: str, value: object, allowed: str | Iterable[str]) -> None:
        self.path = path
        self.value = value
        self.allowed = allowed if isinstance(allowed, str) else "one of " + ", ".join(allowed)
        super().__init__(f"{path}: {_brief(value)} is not allowed here; allowed: {self.allowed}")


# A client's value may be megabytes long, or nested deeper than `repr` can follow.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def _brief(value: object) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
