"""Messages for mistakes that pydantic found: the key, the value and what is allowed."""

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import ValidationError

from vllm_cachescope.config.tiers import TIERS

_Location = tuple[int | str, ...]

_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
_TENANTS = ("tenants", "tenants_file")
_HIDDEN = ("secret", "operator_token", "tiers", *_TENANTS)
_ADDRESSES = (("ledger",), ("ledger", "url"))
"""What may hold a secret: a tier's or a database's address a password; where digests belong, stand
API keys."""


def describe(error: ValidationError, model: Any = None, prefix: _Location = ()) -> str:
    """Return a message for each mistake, joined by semicolons.

    Args:
        error: the mistakes.
        model: the model that was validated; None for one without keys of its own.
        prefix: where in the configuration the validated value stands.
    """
    messages = []
    for detail in error.errors():
        location = prefix + detail["loc"]
        is_unknown = detail["type"] in _UNKNOWN_KEY
        # A key that is misspelt may be that of a secret, too.
        is_plain = not is_unknown or isinstance(detail["input"], int | float | None)
        is_hidden = bool(location) and (
            location[0] in _HIDDEN or location in _ADDRESSES or not is_plain
        )
        shown = "not shown" if is_hidden else repr(detail["input"])
        message = detail["msg"].removeprefix("Value error, ")
        if is_unknown:
            allowed = ", ".join(sorted(_keys_beside(model, location)))
            message = f"there is no such key (value {shown}); allowed: {allowed}"
        elif location:
            message = f"{message} (value {shown})"
        # A mistake of several keys at once has no location; its message names the keys.
        messages.append(f"{_key(location)}: {message}" if location else message)
    return "; ".join(messages)


def _key(location: _Location) -> str:
    if location[:1] == ("tiers",):
        # pydantic puts a tier's type after its number, as if it were a key.
        location = location[:2] + location[3:]
    elif location and location[0] in _TENANTS:
        location = location[:1]
    return ".".join(str(name) for name in location if name != "[key]")


def _keys_beside(model: Any, location: _Location) -> Iterable[str]:
    """Return the keys that may stand where the last one of ``location`` does."""
    for name in location[:-1]:
        if location[0] == "tiers" and name in TIERS:
            model = TIERS[str(name)]
        elif name != "tiers" and (field := model.__pydantic_fields__.get(name)) is not None:
            candidates = (field.annotation, *get_args(field.annotation))
            models = [c for c in candidates if hasattr(c, "__pydantic_fields__")]
            if not models:
                return ()
            model = models[0]
    return [field.alias or name for name, field in model.__pydantic_fields__.items()]
