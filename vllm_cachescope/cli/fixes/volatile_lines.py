"""Moves what is another one in each request from the system prompt behind the last breakpoint.

Lines and sentences are moved as a whole, so that what is said stays said. A value that cannot be
told without what stands around it stays where it is.
"""

import re
from collections.abc import Iterable
from itertools import pairwise

from vllm_cachescope.cli.findings.edits import EditKind, edit_of
from vllm_cachescope.cli.fixes.fix import Fix, LeftAsIs
from vllm_cachescope.cli.fixes.sent_body import SentBody
from vllm_cachescope.repair.editable_body import SystemText

_UNITS = re.compile(r"(\n+|(?<=[.!?])[ \t]+)")
_WORDS = re.compile(r"[^\W\d_]{2,}")
_MOST = 3  # lines or sentences of a text that are moved
_REQUESTS = 3  # from so many on, what is new in each is taken to be new in the next

_Place = tuple[tuple[str | None, str], str, int]  # conversation, path, and how many units


def volatile_fixes(bodies: Iterable[SentBody]) -> tuple[list[Fix], list[LeftAsIs]]:
    """Return what moves volatile lines into the latest messages, and what has to stay."""
    places: dict[_Place, list[tuple[SentBody, SystemText, list[str]]]] = {}
    for body in bodies:
        for text in body.system_texts():
            units = _UNITS.split(text.text)
            key = (body.conversation, text.path, len(units))
            places.setdefault(key, []).append((body, text, units))
    fixes: dict[str, Fix] = {}
    left: list[LeftAsIs] = []
    for (_, path, size), found in places.items():
        first = found[0]
        varying = [i for i in range(0, size, 2) if any(u[i] != first[2][i] for *_, u in found)]
        if not varying or any(one[2][i] != first[2][i] for one in found for i in range(1, size, 2)):
            continue
        if not _is_volatile(found, varying):
            continue
        whole = [_WORDS.findall(units[i]) for *_, units in found for i in varying]
        if len(varying) > _MOST or any(len(words) < 2 for words in whole):
            reason = "what varies there says nothing by itself"
            left.append(LeftAsIs(first[0].source, path, reason))
            continue
        fix = fixes.setdefault(
            path, Fix("changing_system", path, "what varies is said in the latest message instead")
        )
        for body, text, units in found:
            _move(fix, body, text, units, varying)
    return list(fixes.values()), left


def _is_volatile(found: list[tuple[SentBody, SystemText, list[str]]], varying: list[int]) -> bool:
    texts = [text.text for _, text, _ in found]
    if len(texts) >= _REQUESTS and len(set(texts)) == len(texts):
        return True
    pairs = pairwise(found)
    return all(
        edit_of(a[2][i], b[2][i]).kind is EditKind.VALUE
        for a, b in pairs
        for i in varying
        if a[2][i] != b[2][i]
    )


def _move(fix: Fix, body: SentBody, text: SystemText, units: list[str], varying: list[int]) -> None:
    moved = "\n".join(units[i].strip() for i in varying)
    kept = "".join(
        unit for i, unit in enumerate(units) if i not in varying and i - 1 not in varying
    )

    def put() -> None:
        if body.append(moved):
            text.put(kept.strip() and kept)

    fix.add(body.source, put)
