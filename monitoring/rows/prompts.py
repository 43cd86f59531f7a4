"""Prompts: what becomes of their tokens, and whether what is written is read."""

from grafana_foundation_sdk.builders import timeseries
from grafana_foundation_sdk.models.common import StackingMode

from monitoring.panels import Query, Words, graph
from monitoring.queries import CHOSEN, of, rate, ratio, total
from vllm_cachescope.metrics import IGNORED_MARKERS, INPUT_COST, PROMPT_TOKENS, REFUSED_HINTS


def panels() -> list[timeseries.Panel]:
    """Return the row's panels."""
    created = 'outcome="created"'
    read = rate(of(PROMPT_TOKENS, CHOSEN, 'outcome=~"read_.*"'))
    written = rate(of(PROMPT_TOKENS, CHOSEN, created))
    return [
        graph(
            Words(
                "Prompt tokens by outcome",
                "Prompt tokens in a second by what became of them.",
                "“uncached” that does not fall in steady traffic is content without breakpoints.",
            ),
            [Query(total(rate(of(PROMPT_TOKENS, CHOSEN)), "outcome"), "{{outcome}}")],
            "short",
            stacking=StackingMode.NORMAL,
        ),
        graph(
            Words(
                "Composition of prompts",
                "Shares of all prompt tokens: read, written by TTL class, uncached.",
                "Healthy agents' traffic is nine tenths read. A wide band of writes with little "
                "read is a prefix that breaks; see the row *Breaks*.",
            ),
            [
                Query(total(read), "read"),
                Query(total(written, "ttl"), "written for {{ttl}}"),
                Query(total(rate(of(PROMPT_TOKENS, CHOSEN, 'outcome="uncached"'))), "uncached"),
            ],
            "short",
            stacking=StackingMode.PERCENT,
        ),
        graph(
            Words(
                "Reads per write",
                "Tokens read for each token written, by scope: how often a write pays for itself.",
                "Below 0.28 (5m) or 1.11 (1h) a write costs more than it saves. Mark less, or find "
                "out what keeps it from being read.",
            ),
            [Query(ratio(total(read, "scope"), total(written, "scope")), "{{scope}}")],
            "short",
        ),
        graph(
            Words(
                "Input cost with and without caching",
                "What the input costs in a second, in tokens at the price of an uncached one.",
                "Times your price of an input token both are money. The gap is what caching saves.",
            ),
            [Query(total(rate(of(INPUT_COST, CHOSEN)), "caching"), "{{caching}} caching")],
            "short",
            span=12,
        ),
        graph(
            Words(
                "Ignored markers",
                "Cache markers, or fields of them, that did not count as they were written.",
                "`cachescope lint` names the place in a request; docs/clients.md has settings of "
                "clients that are known to do this.",
                "None",
            ),
            [Query(total(rate(of(IGNORED_MARKERS, CHOSEN)), "reason"), "{{reason}}")],
            "short",
            span=12,
        ),
        graph(
            Words(
                "Refused plan hints",
                "Plans that a front end sent in kv_hints and that did not count, per second, by "
                "reason.",
                "docs/frontends.md says what each reason means. “untrusted” from a port that "
                "clients reach is somebody trying to be another organisation.",
                "None",
            ),
            [Query(total(rate(of(REFUSED_HINTS, CHOSEN)), "reason"), "{{reason}}")],
            "short",
            span=12,
        ),
    ]
