"""What is wrong with a request's cache fields: refused, or ignored and remembered."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.ignored_marker import IgnoredMarker, IgnoredReason
from vllm_cachescope.wire.fields import read_object

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Mistakes:
    """Takes each mistake in the cache fields of one request.

    Args:
        strict: whether a mistake refuses the request. If not, the request is served without what
            is wrong.

    Attributes:
        strict: the same.
        ignored: what was ignored so far.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.ignored: list[IgnoredMarker] = []

    def found(
        self, reason: IgnoredReason, path: str, value: object, allowed: str | Iterable[str]
    ) -> None:
        """Take a mistake.

        Args:
            reason: its kind.
            path: where in the body it is.
            value: what stands there.
            allowed: what may stand there.

        Raises:
            BadRequest: if mistakes refuse the request.
        """
        if self.strict:
            raise BadRequest(path, value, allowed)
        self.ignore(reason, path)

    def ignore(self, reason: IgnoredReason, path: str) -> None:
        """Take what does not count and refuses no request, however strict."""
        self.ignored.append(IgnoredMarker(path, reason))

    def read(
        self,
        reason: IgnoredReason,
        reader: Callable[_P, _T],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T | None:
        """Return what ``reader(*args)`` returns; None for what it refuses, if that is ignored.

        Raises:
            BadRequest: if ``reader`` does and mistakes refuse the request.
        """
        try:
            return reader(*args, **kwargs)
        except BadRequest as error:
            if self.strict:
                raise
            self.ignore(reason, error.path)
            return None

    def read_object(
        self, value: object, path: str, keys: tuple[str, ...], reason: IgnoredReason
    ) -> Mapping[str, Any] | None:
        """Return the object ``value``; None if it is no object, and that is ignored.

        Keys besides ``keys`` are a mistake, of which the first is told.

        Args:
            value: the value.
            path: where in the body it stands.
            keys: the keys that it may have.
            reason: the kind of mistake if it is no object.

        Raises:
            BadRequest: if mistakes refuse the request.
        """
        known = isinstance(value, Mapping)
        reason = IgnoredReason.UNKNOWN_FIELD if known else reason
        read = self.read(reason, read_object, value, path, keys)
        return value if read is None and isinstance(value, Mapping) else read
