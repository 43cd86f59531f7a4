"""Values that look volatile and stay as they are: a date in an example, the id of a project."""

from collections.abc import Iterable, Sequence

from vllm_cachescope.cli.volatile import Rule, is_example, says_now, volatile_values

_KINDS = 4096

Values = tuple[tuple[Rule, str], ...]


class SteadyValues:
    """Tells the values in a text that are no other ones in other requests.

    Two texts are of one kind if nothing but such values differs in them.

    Args:
        texts: the texts of all requests, each with what its requests have in common (a path, a
            model).
    """

    def __init__(self, texts: Iterable[tuple[Sequence[str], str]]) -> None:
        self._seen: dict[int, tuple[int, set[Values]]] = {}
        for about, text in texts:
            values = volatile_values(text)
            if not values:
                continue
            kind = _kind(about, text, values)
            count, seen = self._seen.get(kind, (0, set()))
            if kind in self._seen or len(self._seen) < _KINDS:
                if len(seen) < 2:
                    seen.add(values)
                self._seen[kind] = count + 1, seen

    def has(self, about: Sequence[str], text: str, value: str) -> bool:
        """Whether ``value`` in ``text`` is an example, or stayed the same in several requests.

        What a prompt calls the date of today stays the same for a day.
        """
        if is_example(text, value):
            return True
        count, seen = self._seen.get(_kind(about, text, volatile_values(text)), (0, set()))
        return count > 1 and len(seen) == 1 and not says_now(text, value)


def _kind(about: Sequence[str], text: str, values: Values) -> int:
    for _, value in values:
        text = text.replace(value, "\0")
    return hash((*about, text))
