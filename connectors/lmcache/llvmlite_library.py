"""llvmlite's library object, which comes with LMCache, kept from claiming to be everything.

The object has a function for every name that it is asked for, and takes ``__dict__`` for one, too.
vLLM 0.32 reads the ``__dict__`` of all objects of all modules when a worker starts on a CPU, and
fails over this one: an engine would not start in a process that had checked a tier over LMCache.
"""

from contextlib import suppress
from typing import Any


def refuse_special_names() -> None:
    """Have the object answer for no name that Python asks for itself. Once is enough; a second
    call changes nothing."""
    with suppress(ImportError, AttributeError):
        from llvmlite.binding import ffi

        library = type(ffi.lib)
        answer = library.__getattr__
        if getattr(answer, "refuses_special_names", False):
            return

        def __getattr__(self: Any, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return answer(self, name)

        __getattr__.refuses_special_names = True  # type: ignore[attr-defined]
        library.__getattr__ = __getattr__
