"""Breaks: which prefixes were not read, why, and what to do."""

from grafana_foundation_sdk.builders import stat, table, timeseries
from grafana_foundation_sdk.models.common import StackingMode

from monitoring.limits import BREAKS_PER_PROMPT
from monitoring.panels import RED, Query, Words, graph, listing, number, thresholds
from monitoring.queries import CHOSEN, MODELS, RANGE, STEP, grown, largest, of, total
from monitoring.recordings import BREAK_RATIO
from monitoring.suggestions import SUGGESTIONS
from vllm_cachescope.metrics import (
    BREAKS,
    LOST_TOKENS,
    REPAIR_FAILURES,
    REPAIRED_TOKENS,
    REPAIRS,
    UNEXPLAINED_TOKENS,
)


def panels() -> list[stat.Panel | table.Panel | timeseries.Panel]:
    """Return the row's panels."""
    labels = ("cause", "region", "expected")

    def repeated(selector: str) -> str:
        # A second label with the cause, which the table shows as the suggestion.
        counted = total(grown(selector, RANGE), *labels)
        return f'label_replace({counted}, "suggestion", "$1", "cause", "(.*)") > 0'

    return [
        listing(
            Words(
                "Breaks by cause, and what to do",
                "Breaks and lost tokens over the time shown, by cause, by the region of the prompt "
                "that changed, and by whether that is as it should be.",
                "Begin with the line that lost most tokens. GET /cachescope/breaks lists the "
                "requests, with the path in the body; docs/diagnostics.md explains each cause.",
                "No breaks",
            ),
            [
                Query(repeated(of(LOST_TOKENS, CHOSEN)), "tokens lost"),
                Query(repeated(of(BREAKS, CHOSEN)), "breaks"),
            ],
            {**{label: label for label in labels}, "suggestion": "what to do"},
            {"what to do": {str(cause): text for cause, text in SUGGESTIONS.items()}},
            {"cause": 150, "region": 90, "expected": 80, "what to do": 420},
            "tokens lost",
            16,
        ),
        graph(
            Words(
                "Tokens lost by cause",
                "Tokens that had to be computed anew, by cause.",
                "Steps name the minute at which a client or a tier changed.",
                "No breaks",
            ),
            [Query(total(grown(of(LOST_TOKENS, CHOSEN), STEP), "cause"), "{{cause}}")],
            "short",
            stacking=StackingMode.NORMAL,
        ),
        graph(
            Words(
                "Breaks by cause",
                "Requests that could not read as far as an earlier request of their session had "
                "let them.",
                "Many breaks with few tokens are short prompts; a few with many tokens are long "
                "sessions that begin anew.",
                "No breaks",
            ),
            [Query(total(grown(of(BREAKS, CHOSEN), STEP), "cause"), "{{cause}}")],
            "short",
            stacking=StackingMode.NORMAL,
            span=9,
        ),
        graph(
            Words(
                "Breaks per prompt",
                "Share of prompts that broke unexpectedly, by cause, over 15 minutes. Made by "
                "configs/prometheus/rules.yaml.",
                f"Above {BREAKS_PER_PROMPT:.0%} *CacheScopeBreaks* fires; see its runbook.",
                "No breaks",
            ),
            [Query(largest(f"{BREAK_RATIO}{{{MODELS}}}", "cause"), "{{cause}}")],
            "percentunit",
            limit=BREAKS_PER_PROMPT,
            span=9,
        ),
        number(
            Words(
                "Unexplained tokens",
                "Tokens over the time shown that had been cached and were not there, for no known "
                "reason.",
                "Any is a bug: report it with the log's lines of `vllm.cachescope.breaks`.",
            ),
            f"{total(grown(of(UNEXPLAINED_TOKENS, CHOSEN), RANGE))} or vector(0)",
            "short",
            6,
            thresholds((1, RED)),
            is_graph=False,
        ),
        graph(
            Words(
                "Tokens saved by repairs",
                "Tokens that were read and would have been computed anew without a repair, by its "
                "kind: an estimate.",
                "Repairs are off unless `repair` is set; docs/repair.md has the kinds, and "
                "`cachescope explain --repair` says what they would save.",
                "No repairs",
            ),
            [Query(total(grown(of(REPAIRED_TOKENS, CHOSEN), STEP), "kind"), "{{kind}}")],
            "short",
            stacking=StackingMode.NORMAL,
        ),
        graph(
            Words(
                "Repaired requests",
                "Requests in which something was put right before they were served, by kind.",
                "A client that needs a repair at every request is better mended itself.",
                "No repairs",
            ),
            [Query(total(grown(of(REPAIRS, CHOSEN), STEP), "kind"), "{{kind}}")],
            "short",
            stacking=StackingMode.NORMAL,
        ),
        graph(
            Words(
                "Failed repairs",
                "Requests that were served as they came because their repair failed: refused (by "
                "the server), error (a mistake in the repair, with a traceback in the log).",
                "A template that refuses moved heads refuses them always: hold them instead.",
                "None",
            ),
            [Query(total(grown(of(REPAIR_FAILURES, CHOSEN), STEP), "reason"), "{{reason}}")],
            "short",
        ),
    ]
