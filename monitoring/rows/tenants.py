"""Tenants: what each listed organisation reads, writes, saves and loses."""

from grafana_foundation_sdk.builders import timeseries
from grafana_foundation_sdk.models.common import StackingMode

from monitoring.limits import NEIGHBOUR_SHARE
from monitoring.panels import Query, Words, graph
from monitoring.queries import CHOSEN, STEP, grown, of, rate, ratio, total
from vllm_cachescope.metrics import (
    INPUT_COST,
    LOST_TOKENS,
    ORG_EVICTIONS,
    PREFILL_SECONDS_SAVED,
    PROMPT_TOKENS,
)

_LISTED = 'org!=""'
_EMPTY = "No organisation is listed for metrics"


def panels() -> list[timeseries.Panel]:
    """Return the row's panels."""
    tokens = of(PROMPT_TOKENS, CHOSEN, _LISTED)
    read = of(PROMPT_TOKENS, CHOSEN, _LISTED, 'outcome=~"read_.*"')
    paid = of(INPUT_COST, CHOSEN, _LISTED, 'caching="with"')
    unaided = of(INPUT_COST, CHOSEN, _LISTED, 'caching="without"')
    return [
        graph(
            Words(
                "Hit ratio by organisation",
                "Share of each organisation's prompt tokens that were read.",
                "One line that falls alone is that organisation's client: ask `GET "
                "/cachescope/breaks` for its breaks.",
                _EMPTY,
            ),
            [Query(ratio(total(rate(read), "org"), total(rate(tokens), "org")), "{{org}}")],
            "percentunit",
            top=1,
        ),
        graph(
            Words(
                "Prompt tokens by organisation",
                "Prompt tokens in a second; “other” is everyone who is not listed.",
                "A large “other” hides organisations worth listing.",
                _EMPTY,
            ),
            [Query(total(rate(tokens), "org"), "{{org}}")],
            "short",
            stacking=StackingMode.NORMAL,
        ),
        graph(
            Words(
                "Saved by organisation",
                "Share of the price of its input that caching saves an organisation.",
                "Below 0 it writes more than it reads: its prompts break, or are never repeated.",
                _EMPTY,
            ),
            [
                Query(
                    f"1 - {ratio(total(rate(paid), 'org'), total(rate(unaided), 'org'))}",
                    "{{org}}",
                )
            ],
            "percentunit",
            is_signed=True,
        ),
        graph(
            Words(
                "Prefill saved by organisation",
                "Seconds of prefill in a second that reading saved.",
                "It says for whom the memory is spent; quotas shift it.",
                _EMPTY,
            ),
            [Query(total(rate(of(PREFILL_SECONDS_SAVED, CHOSEN, _LISTED)), "org"), "{{org}}")],
            "short",
        ),
        graph(
            Words(
                "Evictions caused and suffered by organisation",
                "Entries in a second that left the device or the CPU tier before their time: "
                "*caused* made room for this organisation, *suffered* were its own and made room "
                "for another.",
                f"One that causes more than {NEIGHBOUR_SHARE:.0%} of what leaves a tier is a noisy "
                "neighbour: give it a quota. `cachescope usage --by org` has everyone's.",
                _EMPTY,
            ),
            [
                Query(
                    total(rate(of(ORG_EVICTIONS, CHOSEN, _LISTED, 'part!="own"')), "org", "part"),
                    "{{org}}, {{part}}",
                )
            ],
            "short",
        ),
        graph(
            Words(
                "Tokens lost by organisation",
                "Tokens that unexpected breaks made an organisation compute anew.",
                "Send the organisation its own breaks: its key opens `GET /cachescope/breaks`.",
                "No breaks, or no organisation is listed for metrics",
            ),
            [
                Query(
                    total(grown(of(LOST_TOKENS, CHOSEN, _LISTED, 'expected="false"'), STEP), "org"),
                    "{{org}}",
                )
            ],
            "short",
            stacking=StackingMode.NORMAL,
        ),
    ]
