"""Findings in the forms that tools read: SARIF 2.1.0, and annotations of GitHub's workflows."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import vllm_cachescope
from vllm_cachescope.cli.findings.rules import Level, Rule

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LINE = re.compile(r"(\d+)(?:#\d+)?\Z")
_ANNOTATIONS = 50  # GitHub shows no more of one step


@dataclass(frozen=True, slots=True)
class Located:
    """A finding and where it is.

    Attributes:
        rule: its kind.
        level: how bad it is here.
        message: what was found, and what to do.
        sources: files and lines that have it, as in ``traffic.jsonl:12``, the first one first.
        properties: what else a tool may want to know.
    """

    rule: Rule
    level: Level
    message: str
    sources: Sequence[str]
    properties: dict[str, Any]


def sarif(findings: Iterable[Located]) -> dict[str, Any]:
    """Return findings as a SARIF log, for code scanning."""
    found = list(findings)
    rules = {finding.rule.code: finding.rule for finding in found}
    order = list(rules)
    driver = {
        "name": "cachescope",
        "version": vllm_cachescope.__version__,
        "rules": [
            {
                "id": rule.code,
                "name": rule.name,
                "shortDescription": {"text": rule.words},
                "defaultConfiguration": {"level": rule.level.name.lower()},
            }
            for rule in rules.values()
        ],
    }
    results = [
        {
            "ruleId": finding.rule.code,
            "ruleIndex": order.index(finding.rule.code),
            "level": finding.level.name.lower(),
            "message": {"text": finding.message},
            "locations": [_location(source) for source in finding.sources[:1]],
            "relatedLocations": [
                {"id": i, **_location(source)} for i, source in enumerate(finding.sources[1:], 1)
            ],
            "properties": finding.properties,
        }
        for finding in found
    ]
    run = {"tool": {"driver": driver}, "results": results, "columnKind": "unicodeCodePoints"}
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def annotations(findings: Iterable[Located]) -> list[str]:
    """Return findings as commands of GitHub's workflows, a line each."""
    lines: list[str] = []
    for finding in list(findings)[:_ANNOTATIONS]:
        path, line = _place(finding.sources[0])
        kind = "warning" if finding.level is Level.WARNING else "notice"
        where = f"file={_property(path)},line={line}"
        title = _property(f"{finding.rule.code} {finding.rule.name}")
        lines.append(f"::{kind} {where},title={title}::{_data(finding.message)}")
    return lines


def _location(source: str) -> dict[str, Any]:
    path, line = _place(source)
    return {
        "physicalLocation": {
            "artifactLocation": {"uri": path.replace("\\", "/")},
            "region": {"startLine": line},
        }
    }


def _place(source: str) -> tuple[str, int]:
    """Return the file and the line of a source; a document's requests are all at its line."""
    path, _, number = source.rpartition(":")
    found = _LINE.fullmatch(number)
    return (path, max(1, int(found[1]))) if found and path else (source, 1)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
