"""The rules of ``explain`` and ``lint``: a stable code and a name for each kind of finding.

Codes are never given to another rule. A CI job allows or forbids rules by code or by name.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from rich.console import Console
from rich.table import Table


class Level(IntEnum):
    """How bad a finding is.

    Attributes:
        NOTE: may be meant that way, or cannot be helped; never fails a job by itself.
        WARNING: costs reads from the cache.
    """

    NOTE = 0
    WARNING = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """A kind of finding.

    Attributes:
        code: its stable code.
        name: its name.
        words: what it finds, in a sentence without a full stop.
        level: how bad it is as a rule.
    """

    code: str
    name: str
    words: str
    level: Level = Level.WARNING


_EXPLAIN = (
    Rule("CS101", "model_changed", "another model in the middle of a conversation"),
    Rule("CS102", "param_changed", "a parameter that changes the prompt came, went or changed"),
    Rule("CS201", "tools_added", "tools came in the middle of a conversation"),
    Rule("CS202", "tools_removed", "tools went in the middle of a conversation"),
    Rule("CS203", "tools_reordered", "the same tools in another order"),
    Rule("CS204", "tool_changed", "a tool's definition was edited"),
    Rule("CS205", "tool_keys_reordered", "a tool's keys in another order"),
    Rule("CS206", "tool_list_reordered", "a list in a tool (enum, required) in another order"),
    Rule("CS207", "tool_value", "a value in a tool that is another one in each request"),
    Rule("CS208", "tool_spaces", "other spaces or line breaks in a tool, and nothing else"),
    Rule("CS301", "system_added", "a system block came in the middle of a conversation"),
    Rule("CS302", "system_removed", "a system block went in the middle of a conversation"),
    Rule("CS303", "system_reordered", "the same system blocks in another order"),
    Rule("CS304", "system_changed", "a system block was edited"),
    Rule("CS305", "system_value", "a value in a system block that is another one in each request"),
    Rule("CS306", "system_spaces", "other spaces or line breaks in a system block"),
    Rule("CS401", "messages_added", "messages were put in before the end"),
    Rule("CS402", "messages_removed", "earlier messages were removed"),
    Rule("CS403", "messages_reordered", "earlier messages in another order"),
    Rule("CS404", "messages_changed", "an earlier message was edited"),
    Rule("CS405", "message_value", "a value in an earlier message that is another one each time"),
    Rule("CS406", "message_spaces", "other spaces or line breaks in an earlier message"),
    Rule("CS407", "call_ids_changed", "earlier tool calls were given other ids"),
    Rule("CS408", "call_keys_reordered", "the input of an earlier tool call in another key order"),
    Rule("CS409", "message_cut", "an earlier message was shortened or cleared"),
    Rule("CS410", "context_compacted", "a summary took the place of earlier turns", Level.NOTE),
    Rule("CS501", "marker_removed", "a breakpoint went, and what it covered is no longer kept"),
    Rule("CS502", "scope_changed", "the same content under another scope"),
    Rule("CS601", "expired", "a prefix was not used for longer than its lifetime"),
    Rule("CS602", "not_covered", "content that is sent again stands behind the last breakpoint"),
    Rule("CS603", "not_read", "the recorded usage says that an equal prefix was not read"),
    Rule(
        "CS604",
        "block_straddle",
        "a shared prefix ends within a block, which is lost (--block-size)",
        Level.NOTE,
    ),
    Rule(
        "CS605",
        "short_prefix",
        "a shared prefix is shorter than a block (--block-size)",
        Level.NOTE,
    ),
    Rule(
        "CS701",
        "could_share",
        "a new conversation nearly has the tools and system prompt of another",
        Level.NOTE,
    ),
)

_LINT = (
    Rule("CS801", "timestamp", "a point in time in what should stay the same"),
    Rule("CS802", "date", "an absolute date"),
    Rule("CS803", "uuid", "a UUID"),
    Rule("CS804", "nonce", "a nonce or random id"),
    Rule("CS805", "unsorted_json", "a tool's keys or lists in varying order"),
    Rule("CS806", "tool_order", "tools in varying order"),
    Rule("CS807", "changing_system", "a system block that differs in each request"),
    Rule("CS808", "breakpoint_after_volatile", "a breakpoint that covers what is volatile"),
    Rule("CS809", "ignored_marker", "a cache marker that a server ignores"),
    Rule("CS810", "refused_request", "a request that its server refuses for its cache markers"),
    Rule("CS811", "stuck_breakpoint", "a breakpoint that stays while the conversation grows"),
)

RULES = {rule.name: rule for rule in (*_EXPLAIN, *_LINT)}
"""All rules, by their names."""

_BY_CODE = {rule.code: rule for rule in RULES.values()}


class Selection:
    """The rules that a command line allows, and those that it forbids.

    Args:
        allowed: rules that never fail the job.
        forbidden: rules of which any finding fails the job, whatever else is allowed.
    """

    def __init__(self, allowed: Iterable[Rule] = (), forbidden: Iterable[Rule] = ()) -> None:
        self._allowed, self._forbidden = frozenset(allowed), frozenset(forbidden)

    def allows(self, rule: Rule) -> bool:
        """Whether findings of ``rule`` count for nothing."""
        return rule in self._allowed and rule not in self._forbidden

    def forbids(self, rule: Rule) -> bool:
        """Whether a single finding of ``rule`` fails the job."""
        return rule in self._forbidden


def add_arguments(parser: "argparse._ActionsContainer") -> None:
    """Add ``--allow``, ``--forbid`` and ``--rules``; `selection` reads the first two."""
    parser.add_argument(
        "--allow",
        type=_rules,
        action="extend",
        default=[],
        metavar="RULES",
        help="rules that never fail the job, by code or name, with commas: CS601,tools_added",
    )
    parser.add_argument(
        "--forbid",
        type=_rules,
        action="extend",
        default=[],
        metavar="RULES",
        help="rules of which a single finding fails the job, notes included",
    )
    parser.add_argument("--rules", action=_ListRules, help="list the rules and their codes")


def selection(args: argparse.Namespace) -> Selection:
    """Return what the parsed arguments allow and forbid."""
    return Selection(args.allow, args.forbid)


def _rules(text: str) -> list[Rule]:
    found: list[Rule] = []
    for name in filter(None, (one.strip() for one in text.split(","))):
        rule = _BY_CODE.get(name.upper()) or RULES.get(name.lower())
        if rule is None:
            raise argparse.ArgumentTypeError(f"{name!r} is no rule; --rules lists them")
        found.append(rule)
    return found


class _ListRules(argparse.Action):
    """Prints the rules, and ends the program."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_args: object, **_options: object) -> None:
        table = Table("code", "name", "level", "finds")
        for rule in RULES.values():
            table.add_row(rule.code, rule.name, rule.level.name.lower(), rule.words)
        Console().print(table)
        parser.exit()
