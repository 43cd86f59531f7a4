"""Names as the ledger keeps them: clients choose them, and databases do not take every string."""

from vllm_cachescope.tenancy.scope import MAX_NAME, short_name

MAX_KEPT = MAX_NAME
"""Most characters of a name."""


def kept_name(name: str) -> str:
    """Return ``name`` as it is kept: at most `MAX_KEPT` characters, of which none is half of a
    surrogate pair or NUL. Different names stay different but for those escapes."""
    if len(name) <= MAX_KEPT and name.isascii() and "\0" not in name:
        return name
    text = name.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")
    return short_name(text)
