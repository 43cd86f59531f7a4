"""Finds volatile text: values that look different in every request, such as a time or a UUID."""

import re
from dataclasses import dataclass
from functools import lru_cache

_MAX_PER_RULE = 5  # values of one rule in one string
_BEFORE = 40  # characters in front of a value, on its line, that may say what it is

# Spaces as JavaScript writes them into a time of day are no breaks.
_SPACE = "[ \u00a0\u202f]"
_YEAR, _MONTH, _DAY = r"(?:20\d\d)", r"(?:0?[1-9]|1[0-2])", r"(?:0?[1-9]|[12]\d|3[01])"
_HOUR, _MINUTE = r"(?:[01]?\d|2[0-3])", r"[0-5]\d"
_ORDINAL = r"\d{1,2}(?:st|nd|rd|th)?"
_MONTH_NAME = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_WEEKDAY = r"(?:mon|tue(?:s)?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\.?"


@dataclass(frozen=True, slots=True)
class Rule:
    """A kind of volatile text, such as timestamps.

    Attributes:
        name: the rule's name in findings.
        words: the kind in words, with an article.
        pattern: matches such text.
        after: has to match in the `_BEFORE` characters before the text, on its line; None for no
            condition.
        unless: must not match there; None for no condition.
    """

    name: str
    words: str
    pattern: "re.Pattern[str]"
    after: "re.Pattern[str] | None" = None
    unless: "re.Pattern[str] | None" = None


def _pattern(*alternatives: str) -> "re.Pattern[str]":
    """Return a pattern for any of ``alternatives``, in any case, as whole words.

    Words are of ASCII: Chinese and Japanese leave no space before a date.
    """
    return re.compile(rf"\b(?:{'|'.join(alternatives)})(?!\w)", re.ASCII | re.IGNORECASE)


# Only the words before a time of day tell that it is now, or before eight digits that they are a
# date.
_NOW = re.compile(
    r"\b(?:now|current|currently|today|date|datetime|timestamp|epoch|clock|started|generated"
    r"|created|updated|as of|it is|it's|time(?!\s?(?:limit|out|frame|span|zone)))\b"
    r"(?!.*\b(?:such as|e\.g\.|example|format|like)(?!\w))",
    re.IGNORECASE,
)
_EXAMPLE = re.compile(
    r"\b(?:such as|e\.g\.|(?:for )?examples?|looks? like|like|formats?|formatted)(?!\w)",
    re.IGNORECASE,
)
_CONSTANT = re.compile(
    r"(?:version\W{0,4}|\b(?:gpt|claude)[\w.-]{0,32}-)\Z", re.ASCII | re.IGNORECASE
)
_CLOCK, _DATE = ("timestamp", "a point in time"), ("date", "an absolute date")
_NONCE = ("nonce", "a nonce or random id")

# The order matters: a date inside a timestamp, or hex digits inside a UUID, are not found again.
# All repetitions are bounded, and all patterns start at the start of a word.
RULES = (
    Rule("uuid", "a UUID", _pattern(r"[\da-f]{8}-(?:[\da-f]{4}-){3}[\da-f]{12}")),
    Rule(
        *_CLOCK,
        _pattern(
            rf"{_YEAR}([-/.])\d\d\1\d\d[T ]\d\d:\d\d(?::\d\d(?:[.,]\d{{1,9}})?)?Z?",
            rf"{_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])[T_-]{_HOUR}{_MINUTE}"
            rf"(?:{_MINUTE}(?:[.,]\d{{1,9}})?)?Z?",
            # On the full or half hour it may be anybody's office hours.
            rf"(?:0?\d|1[0-2]):(?![03]0{_SPACE}?[ap]){_MINUTE}(?::{_MINUTE})?{_SPACE}?[ap]\.?m",
            # Seconds, milli-, micro- and nanoseconds since 1970.
            r"1[6-9]\d{8}|1[5-9]\d{11}(?:\d{3}){0,2}",
        ),
    ),
    Rule(
        *_CLOCK,
        _pattern(rf"{_HOUR}:{_MINUTE}(?::{_MINUTE}(?:[.,]\d{{1,9}})?)?", r"1[4-9]\d{8}"),
        after=_NOW,
    ),
    Rule(
        *_DATE,
        _pattern(
            rf"{_YEAR}([-/.]){_MONTH}\1{_DAY}(?!\.\d)",
            rf"{_MONTH}([-/.]){_DAY}\2{_YEAR}",
            rf"{_DAY}([-/.]){_MONTH}\3{_YEAR}",
            rf"{_MONTH}/{_DAY}/[23]\d(?!/)",
            rf"{_DAY}/{_MONTH}/[23]\d(?!/)",
            rf"{_YEAR} ?年 ?{_MONTH} ?月 ?{_DAY} ?日",
            rf"{_MONTH_NAME} {_ORDINAL},? {_YEAR}",
            rf"{_ORDINAL}\.?(?:-| (?:of )?){_MONTH_NAME}(?:-|,? ){_YEAR}",
            rf"{_WEEKDAY},? {_MONTH_NAME} {_ORDINAL}",
            rf"{_WEEKDAY},? {_ORDINAL}\.? (?:of )?{_MONTH_NAME}",
        ),
        unless=_CONSTANT,
    ),
    Rule(*_DATE, _pattern(r"20\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"), after=_NOW),
    Rule(
        *_NONCE,
        # A value has a digit and a letter, or many digits; the name of a type is none.
        re.compile(
            r"(?<![A-Za-z])(?i:(?:nonce|cch|salt|(?:conversation|correlation|invocation|request|run"
            r"|session|span|thread|trace|transaction)[-_ ]?id)\b[\"']?\s{0,3}(?:[:=>]|\bis\b)"
            r"\s{0,3}[\"']?(?!(?:u?int|float|sha|md|base|utf|uuid|v)-?\d{1,3}\b|\d{1,2}-[a-z]+\b))"
            r"(?:(?=[\w-]{0,63}\d)(?=[\w-]{0,63}[A-Za-z])[\w-]{4,64}|\d{6,64}\b)",
            re.ASCII,
        ),
    ),
    Rule(
        *_NONCE,
        re.compile(
            r"\b(?=[0-9a-f]{0,63}\d)(?=[0-9a-f]{0,63}[a-f])[0-9a-f]{16,64}\b"
            r"|\b(?=[0-9A-F]{0,63}\d)(?=[0-9A-F]{0,63}[A-F])[0-9A-F]{32,64}\b"
            r"|\b0x(?=[0-9A-Fa-f]{0,15}\d)(?=[0-9A-Fa-f]{0,15}[A-Fa-f])[0-9A-Fa-f]{9,16}\b"
            # ULIDs, and ids as the servers of language models give them.
            r"|\b[0-7](?=\d{0,24}[A-Z])[0-9A-HJKMNP-TV-Z]{25}\b"
            r"|\b(?:req|msg|resp|chatcmpl|toolu|call|run|thread|sess|session|conv|batch|trace)[_-]"
            r"(?=[A-Za-z]{0,63}\d)(?=[a-z\d]{0,63}[A-Z])[A-Za-z\d]{10,64}\b"
            r"|/tmp/tmp(?:[a-z0-9_]{8}|\.[A-Za-z0-9]{10})\b",
            re.ASCII,
        ),
    ),
)


# A request repeats the tools and the system prompt of the one before it.
@lru_cache(maxsize=512)
def volatile_values(text: str) -> tuple[tuple[Rule, str], ...]:
    """Return the volatile values in ``text``, each after its rule, `_MAX_PER_RULE` of a rule at
    most."""
    found: list[tuple[Rule, str]] = []
    taken: list[tuple[int, int]] = []
    for rule in RULES:
        count = 0
        for match in rule.pattern.finditer(text):
            start, end = match.span()
            if any(start < b and a < end for a, b in taken) or not _fits(rule, text, start):
                continue
            taken.append((start, end))
            found.append((rule, match[0]))
            count += 1
            if count == _MAX_PER_RULE:
                break
    return tuple(found)


def says_now(text: str, value: str) -> bool:
    """Whether the words before ``value``, on its line, say that it is now."""
    return _NOW.search(_before(text, text.find(value))) is not None


def is_example(text: str, value: str) -> bool:
    """Whether the words before ``value``, on its line, say that it is an example."""
    return _EXAMPLE.search(_before(text, text.find(value))) is not None


def _fits(rule: Rule, text: str, start: int) -> bool:
    """Whether the text before ``start``, on its line, meets the conditions of ``rule``."""
    before = _before(text, start)
    return (rule.after is None or rule.after.search(before) is not None) and (
        rule.unless is None or rule.unless.search(before) is None
    )


def _before(text: str, start: int) -> str:
    return text[max(0, start - _BEFORE) : start].rpartition("\n")[2]
