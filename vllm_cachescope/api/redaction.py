"""Prompt texts without what looks like a secret: keys, tokens, passwords, e-mail addresses."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

MAX_CHARACTERS = 200_000
"""Characters that are kept of one tool or system block."""

MAX_DEPTH = 32
"""Levels of a tool that are kept. A list or an object below them is only mentioned."""

REDACTED = "[redacted]"

# A first letter is spelled in both cases, and the rest ignores case: the engine of `re` can then
# skip to it, which takes a quarter of the time.
_NAME = (
    r"[ACPSTacpst](?i:(?:pi|ccess|ccount|rivate|ecret|igning|hared)[ _-]?keys?|oken|ecrets?"
    r"|ass(?:wo?r)?ds?|assphrase|wd|uthorization|redentials?|ookie)"
)

# No pattern reads far and then fails, or far again from the next character on: a client must not
# be able to make these slow. Strings of a tool stand in the text as they are, but a string may
# itself hold JSON, hence the backslashes.
_SECRETS = (
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[\s\\rn]{1,8}[A-Z][A-Za-z-]{2,20}:[^\n\\]{0,200}){0,4}"
    r"[\s\\A-Za-z0-9+/=]{0,16000}(?:-----END[A-Z -]{0,60})?",
    r"eyJ[\w-]{8,}(?:\.[\w-]+){0,2}",
    r"://[^\s/@\"'<>]{1,1000}+@",
    r"\b(?:(?:sk|pk|rk|xox[abprs]|gh[opsu]|github_pat|glpat|npm|hf|key)[-_]|AKIA|ASIA|AIza)"
    r"[\w-]{12,}",
    r"[Bb](?i:(?<=\bb)(?:earer|asic))\s{1,8}[\w.~+/=-]{8,}",
    _NAME + r"\\{0,3}[\"']?\s{0,8}[:=>]{1,2}\s{0,8}"
    r"(?:\\{0,3}\"[^\"\n]{6,}|\\{0,3}'[^'\n]{6,}|[^\s\"',;]{6,})",
    r"(?<![\w.%+-])[\w.%+-]++@[\w-]+(?:\.[\w-]+){1,8}",
)

_SECRET_FIELD = re.compile(_NAME + r"\d{0,4}$")
_SHOWN_FIELDS = frozenset({"type", "title", "description", "format"})
"""Fields of a schema that are shown even where the schema is named like a secret."""

_PART = 256  # least cost of a part, in characters
_PIECE = 32  # least cost of a number, a name or a bracket in a tool, in characters


class Redaction:
    """Replaces what is secret in a text.

    Args:
        rules: further patterns of what is secret, as `re` has them.
    """

    def __init__(self, rules: Iterable[str]) -> None:
        self._rules = [re.compile(rule) for rule in (*_SECRETS, *rules)]

    def redact(self, text: str) -> str:
        """Return ``text`` with `REDACTED` in place of each secret."""
        for rule in self._rules:
            text = rule.sub(REDACTED, text)
        return text


def readable_text(content: Any) -> tuple[str, int]:
    """Return a tool or a system block as text of many short lines, which still has to be redacted.

    Only the values of fields that are named like a secret, such as ``api_key``, are left out here.

    Args:
        content: the tool or the block, as JSON has it.

    Returns:
        The text, at most `MAX_CHARACTERS` long, and its cost: the length of a text that takes as
        much time to make and to redact.
    """
    if isinstance(content, dict) and len(content) == 2 and isinstance(content.get("text"), str):
        content = content["text"]
    if isinstance(content, str):
        text = content[:MAX_CHARACTERS]
        return text, _PART + len(text)
    pieces, cost = [], 0
    for piece in _pieces(content):
        pieces.append(piece)
        cost += max(len(piece), _PIECE)
        if cost >= MAX_CHARACTERS:
            break
    return "".join(pieces)[:MAX_CHARACTERS], _PART + min(cost, MAX_CHARACTERS)


def _pieces(value: Any, line: str = "\n", hidden: bool = False) -> Iterator[str]:
    """Yield ``value`` as JSON with an indent, except that strings are not escaped.

    Escapes would hide a secret from the patterns, and hinder whoever reads a diff of long texts.

    Args:
        value: what JSON can hold.
        line: a line break, and the indent of the line that the value begins on.
        hidden: whether the value is in a field that is named like a secret.
    """
    if isinstance(value, str):
        yield f'"{REDACTED if hidden else value[:MAX_CHARACTERS]}"'
    elif not isinstance(value, dict | list) or not value:
        yield REDACTED if hidden and type(value) in (int, float) else json.dumps(value)
    elif len(line) > 2 * MAX_DEPTH:
        yield "(nested too deeply to be shown)"
    elif isinstance(value, dict):
        for i, (key, inner) in enumerate(value.items()):
            name = key[:MAX_CHARACTERS]
            yield f'{"," if i else "{"}{line}  "{name}": '
            secret = _SECRET_FIELD.search(name) or (hidden and name not in _SHOWN_FIELDS)
            yield from _pieces(inner, f"{line}  ", bool(secret))
        yield f"{line}}}"
    else:
        for i, inner in enumerate(value):
            yield f"{',' if i else '['}{line}  "
            yield from _pieces(inner, f"{line}  ", hidden)
        yield f"{line}]"
