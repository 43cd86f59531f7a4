"""Repeated content: what stands in a prompt where no cache of prefixes finds it, and was computed
before elsewhere.

A cache that reuses content at other positions could read it: tools that a subagent shares with its
parent, a file that is read twice, a history behind a changed system prompt. Content is compared in
chunks that end where the text says so, and not at fixed distances: a line in front of a file moves
no chunk of it.
"""

import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_cachescope.cli.report.origin import Origin, origins
from vllm_cachescope.diagnosis.canonical import canonical_content
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.prompt.request import Part, PromptRequest

MIN_CHARS = 128
"""Characters of the shortest chunk that counts: some 32 tokens."""

_MAX_CHARS = 1024
_ENDS = 4  # one line in so many ends a chunk
_MAX_CHUNKS = 2**18
_MAX_ORIGINS = 4096


class RepeatScope(StrEnum):
    """Who had computed what is repeated.

    Attributes:
        PROMPT: the prompt itself has it twice.
        SESSION: an earlier call of the same session.
        ORGANISATION: only calls of other sessions.
    """

    PROMPT = "prompt"
    SESSION = "session"
    ORGANISATION = "org"


@dataclass(frozen=True, slots=True)
class Repeat:
    """Tokens that were computed before, elsewhere.

    Attributes:
        origin: what they are.
        scope: who had computed them.
        tokens: how many.
    """

    origin: Origin
    scope: RepeatScope
    tokens: int


class Repeats:
    """Finds repeated content, and adds it up.

    Attributes:
        tokens: repeated tokens by what they are and who had computed them.
        other: those of origins beyond the `_MAX_ORIGINS` that are kept apart.
    """

    def __init__(self) -> None:
        # By hash of a chunk, the session and the number of the call that had it last.
        self._seen: OrderedDict[int, tuple[str | None, int]] = OrderedDict()
        self._calls = 0
        self.tokens: Counter[tuple[Origin, RepeatScope]] = Counter()
        self.other = 0

    def see(
        self, session: str | None, request: PromptRequest, fingerprint: Fingerprint, read: int
    ) -> list[Repeat]:
        """Record a prompt, and return what it repeats behind its first ``read`` tokens.

        Args:
            session: the session of the call.
            request: the prompt.
            fingerprint: its fingerprint.
            read: how many leading tokens a cache of prefixes reads.
        """
        self._calls += 1
        found: Counter[tuple[int, RepeatScope]] = Counter()
        by_path = {part.path: part for part in request.parts}
        paths = fingerprint.paths.split("\n")
        parts: list[Part | None] = [by_path.get(path) for path in paths]
        for i, part in enumerate(parts):
            if part is None or fingerprint.ends[i] <= read:
                continue
            for scope, share in self._shares(session, fingerprint.model, part):
                tokens = fingerprint.size(i) * share
                found[i, scope] += round(min(tokens, fingerprint.ends[i] - read))
        if not found:
            return []
        named = origins(request.parts, {path for path in paths if path in by_path})
        repeats = [
            Repeat(named[paths[i]], scope, tokens)
            for (i, scope), tokens in found.items()
            if tokens and paths[i] in named
        ]
        for one in repeats:
            self._count(one)
        return repeats

    def _shares(
        self, session: str | None, model: str, part: Part
    ) -> Iterator[tuple[RepeatScope, float]]:
        """Record a part, and yield which share of it was computed before, by whom."""
        _, data, text = canonical_content(part.content)
        text = data.decode("utf-8", "replace") if text is None else text
        if len(text) < MIN_CHARS:
            return
        chars: Counter[RepeatScope] = Counter()
        for chunk in chunks(text):
            if len(chunk) < MIN_CHARS:
                continue
            key = hash((model, chunk))  # no model reads what another one computed
            if (had := self._seen.get(key)) is not None:
                chars[self._scope(session, *had)] += len(chunk)
                self._seen.move_to_end(key)
            elif len(self._seen) >= _MAX_CHUNKS:
                self._seen.popitem(last=False)
            self._seen[key] = session, self._calls
        for scope, n in chars.items():
            yield scope, n / len(text)

    def _scope(self, session: str | None, owner: str | None, call: int) -> RepeatScope:
        if call == self._calls:
            return RepeatScope.PROMPT
        return RepeatScope.SESSION if session == owner else RepeatScope.ORGANISATION

    def _count(self, repeat: Repeat) -> None:
        key = repeat.origin, repeat.scope
        if key in self.tokens or len(self.tokens) < _MAX_ORIGINS:
            self.tokens[key] += repeat.tokens
        else:
            self.other += repeat.tokens


def chunks(text: str) -> Sequence[str]:
    """Cut a text into chunks of whole lines; where a line is very long, into pieces of it."""
    found: list[str] = []
    chunk: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if len(line) > _MAX_CHARS:
            found += ["".join(chunk)] if chunk else []
            found += [line[i : i + _MAX_CHARS] for i in range(0, len(line), _MAX_CHARS)]
            chunk, size = [], 0
            continue
        chunk.append(line)
        size += len(line)
        if size >= MIN_CHARS and (_ends(line) or size >= _MAX_CHARS):
            found.append("".join(chunk))
            chunk, size = [], 0
    return [*found, "".join(chunk)] if chunk else found


def _ends(line: str) -> bool:
    """Whether a line ends a chunk, wherever it stands."""
    return zlib.crc32(line.encode("utf-8", "surrogatepass")) % _ENDS == 0
