"""Costs: what caching itself takes."""

from grafana_foundation_sdk.builders import timeseries

from monitoring.panels import Query, Words, graph
from monitoring.queries import CHOSEN, of, quantile, rate, ratio, smallest, total
from vllm_cachescope.metrics import (
    LEDGER_RECORDS,
    PREFILL_RATE,
    QUEUED_DIAGNOSES,
    SESSION_NOTES,
    STAGE_SECONDS,
    TOKENIZED_TOKENS,
)


def panels() -> list[timeseries.Panel]:
    """Return the row's panels."""
    return [
        graph(
            Words(
                "Time of a request in each stage",
                "plan: what the engine waits for; boundaries: where breakpoints lie, mostly beside "
                "tokenising; diagnosis: mostly after the reply. Median and 99th percentile.",
                "plan is the only one that a client waits for. Milliseconds mean an API process "
                "short of CPU: run more of them (`--api-server-count`).",
            ),
            [
                Query(
                    quantile(q, of(STAGE_SECONDS, CHOSEN, suffix="_bucket"), ("stage",)),
                    f"{{{{stage}}}}, p{q * 100:g}",
                )
                for q in (0.5, 0.99)
            ],
            "s",
            span=8,
        ),
        graph(
            Words(
                "Cores spent on caching",
                "Seconds in a second that each stage takes, over all API processes.",
                "Set it against *Prefill saved*.",
            ),
            [Query(total(rate(of(STAGE_SECONDS, CHOSEN, suffix="_sum")), "stage"), "{{stage}}")],
            "short",
            span=8,
        ),
        graph(
            Words(
                "Tokens not tokenised again",
                "Share of prompts' tokens that were known from a prompt that begins alike.",
                "Near the hit rate of long sessions. 0: the model's tokenizer is none of the fast "
                "ones, or `token_bytes` is too small for the sessions that are at work.",
                "No prompts",
            ),
            [
                Query(
                    ratio(
                        total(rate(of(TOKENIZED_TOKENS, CHOSEN, 'source="known"'))),
                        total(rate(of(TOKENIZED_TOKENS, CHOSEN))),
                    ),
                    "known",
                )
            ],
            "percentunit",
            span=8,
        ),
        graph(
            Words(
                "Diagnoses waiting",
                "Requests that are answered and wait to be diagnosed.",
                "Steady growth means more traffic than one API process can diagnose.",
            ),
            [Query(total(of(QUEUED_DIAGNOSES, CHOSEN), "instance"), "{{instance}}")],
            "short",
            span=8,
        ),
        graph(
            Words(
                "Records of the ledger",
                "Records of requests in a second by what became of them. A record that is dropped "
                "or failed is missing in `cachescope usage`, and nowhere else.",
                "dropped: the database is away or too slow for the traffic. failed: it refused "
                "them; the server's log says why.",
                "No ledger",
            ),
            [Query(total(rate(of(LEDGER_RECORDS, CHOSEN)), "outcome"), "{{outcome}}")],
            "short",
            span=8,
        ),
        graph(
            Words(
                "Notes on sessions",
                "Notes in a second that replicas write for each other, and questions for them, by "
                "what became of them.",
                "unavailable, late: Redis does not answer, and a session that moves is a first "
                "request. damaged: somebody else writes to the Redis, or replicas of several "
                "versions run. dropped: more is to be written than Redis takes.",
                "No Redis",
            ),
            [Query(total(rate(of(SESSION_NOTES, CHOSEN)), "outcome"), "{{outcome}}")],
            "short",
            span=8,
        ),
        graph(
            Words(
                "Prefill rate",
                "Prompt tokens that an engine computes in a second of computing: what *Prefill "
                "saved* is reckoned with.",
                "A rate that falls while traffic does not is an engine that is short of something "
                "else; look at vLLM's own dashboards.",
            ),
            [
                Query(
                    smallest(of(PREFILL_RATE, CHOSEN), "instance", "engine"),
                    "{{instance}}, engine {{engine}}",
                )
            ],
            "short",
            span=8,
        ),
    ]
