"""Volatile heads: what an operator's patterns name at the head of system blocks.

It keeps the first value that it had in the session, or is said behind the last breakpoint instead.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from vllm_cachescope.config.repair import VolatileHead, linear
from vllm_cachescope.repair.editable_body import EditableBody
from vllm_cachescope.repair.numbers import with_numbers
from vllm_cachescope.repair.repair import Repair, RepairKind
from vllm_cachescope.repair.session_memory import HEAD, Lessons, SessionState

HEAD_CHARS = 4096
"""Characters of a block that patterns see."""


class Heads:
    """Puts the heads of system blocks right.

    Args:
        rules: the operator's patterns.
    """

    def __init__(self, rules: Sequence[VolatileHead]) -> None:
        self._rules: list[tuple[Any, Literal["hold", "move"]]] = [
            (linear(rule.pattern), rule.action) for rule in rules
        ]

    def mend(
        self, body: EditableBody, state: SessionState, lessons: Lessons, may_move: bool = True
    ) -> list[Repair]:
        """Change the heads of a body's system blocks, and return what was changed.

        Args:
            body: the body.
            state: what came first in the session.
            lessons: takes what comes first now.
            may_move: whether anything may be said elsewhere; if not, it stays in its place.

        Raises:
            CannotMove: if there is no such place; the body is half changed then.
            UnicodeError: for half of a surrogate pair.
        """
        found: list[Repair] = []
        moved: list[str] = []
        seen: Counter[int] = Counter()
        for block in list(body.system_texts()):
            text, kept, at = block.text, "", 0
            said: list[str] = []
            for number, start, at in self._matches(text):
                value, place = text[start:at], f"{HEAD}{number} {seen[number]}"
                seen[number] += 1
                if self._rules[number][1] == "move":
                    if may_move:
                        said.append(value)
                    else:
                        kept += value
                    continue
                first = state.values.get(place)
                if first is None:
                    told = state.heads.get(place)
                    elsewhere = None if told is None else with_numbers(value, told)
                    first = (value if elsewhere is None else elsewhere).encode()
                    lessons.values[place] = first
                kept += first.decode()
            rest = text[at:]
            if said and not (kept + rest).strip():
                # A block of nothing: the server may refuse it.
                kept, said = "".join(said) + kept, []
            if kept + rest != text:
                found.append(Repair(RepairKind.HEAD, block.path))
                moved += said
                block.put(kept + rest)
        if moved and not body.append("\n".join(text.strip() for text in moved)):
            raise CannotMove
        return found

    def _matches(self, text: str) -> list[tuple[int, int, int]]:
        """Return which rules match at the head, one behind the other, and from where to where."""
        head, at = text[:HEAD_CHARS], 0
        left = dict(enumerate(self._rules))
        found: list[tuple[int, int, int]] = []
        while left:
            for number, (pattern, _) in left.items():
                match = pattern.match(head, at)
                # Up to the end of what it sees a pattern might match more yet.
                cut = match is not None and match.end() == len(head) < len(text)
                if match is not None and match.end() > at and not cut:
                    found.append((number, at, match.end()))
                    at = match.end()
                    del left[number]
                    break
            else:
                break
        return found


class CannotMove(Exception):
    """There is no place behind the last breakpoint."""
