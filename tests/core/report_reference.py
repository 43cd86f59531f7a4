"""Hosted caching once more, a prompt at a time and one way to mark prompts: slow and plain."""

from dataclasses import dataclass, field

from vllm_cachescope.cli.report.prompt_view import PromptView


@dataclass
class Entry:
    tokens: int
    until: float
    ttl: int


@dataclass
class PlainCache:
    min_tokens: int
    entries: dict[int, Entry] = field(default_factory=dict)

    def use(self, at: float, view: PromptView, marks: dict[int, int]) -> tuple[int, int, int, int]:
        """Return the tokens read, written for five minutes, written for an hour, and the others.

        ``marks`` are TTLs by block.
        """
        marks = {i: ttl for i, ttl in marks.items() if ttl and view.ends[i] >= self.min_tokens}
        back = len(view.keys) if view.lookback is None else view.lookback
        near = {i for mark in marks for i in range(max(0, mark - back), mark + 1)}
        read = 0
        for i in near:
            entry = self.entries.get(view.keys[i])
            if entry and entry.until >= at:
                read = max(read, view.ends[i])
        for i in near:
            entry = self.entries.get(view.keys[i])
            if entry and entry.until >= at and view.ends[i] <= read:
                entry.until = max(entry.until, at + entry.ttl)
        short = long = 0
        behind = read
        for i in sorted(marks):
            new = max(0, view.ends[i] - behind)
            if max(ttl for j, ttl in marks.items() if j >= i) > 300:
                long += new
            else:
                short += new
            behind = max(behind, view.ends[i])
            if view.ends[i] <= read:
                continue
            entry = self.entries.get(view.keys[i])
            ttl = marks[i] if entry is None or entry.until < at else max(entry.ttl, marks[i])
            until = at + ttl if entry is None else max(entry.until, at + ttl)
            self.entries[view.keys[i]] = Entry(view.ends[i], until, ttl)
        return read, short, long, view.tokens - read - short - long
