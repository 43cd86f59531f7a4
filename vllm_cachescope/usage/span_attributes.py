"""The attributes of a trace's span that say what became of a prompt's tokens.

The names ``gen_ai…`` are those of OpenTelemetry's semantic conventions for GenAI, where
``input_tokens`` includes what was read from the cache and what was put into it.
"""

from vllm_cachescope.cache.report import Report
from vllm_cachescope.usage.record import RequestRecord, by_class

INPUT = "gen_ai.usage.input_tokens"
OUTPUT = "gen_ai.usage.output_tokens"
CACHE_READ = "gen_ai.usage.cache_read.input_tokens"
CACHE_CREATION = "gen_ai.usage.cache_creation.input_tokens"

Attributes = dict[str, str | int | float | bool]


def usage_attributes(report: Report, output_tokens: int) -> Attributes:
    """Return the attributes of one prompt.

    Args:
        report: the engine's report on it.
        output_tokens: how many tokens it was answered with.
    """
    created = report.created_by_ttl
    attributes: Attributes = {
        INPUT: report.prompt_tokens,
        OUTPUT: output_tokens,
        CACHE_READ: report.read_tokens,
        CACHE_CREATION: sum(created.values()),
        "cachescope.uncached.tokens": report.uncached_tokens,
    }
    for tier, tokens in report.read_by_tier.items():
        attributes[f"cachescope.read.{tier}.tokens"] = tokens
    for ttl, tokens in by_class(created).items():
        if tokens:
            attributes[f"cachescope.created.{ttl}.tokens"] = tokens
    if report.prefill_seconds_saved is not None:
        attributes["cachescope.prefill_seconds_saved"] = report.prefill_seconds_saved
    if report.memory_wait_s is not None:
        attributes["cachescope.memory_wait.seconds"] = report.memory_wait_s
    return attributes


def request_attributes(record: RequestRecord) -> Attributes:
    """Return the attributes of the request that a prompt is of: whose it is, and what broke it."""
    known = {
        "cachescope.org": record.org,
        "cachescope.session": record.session,
        "cachescope.replica": record.replica or None,
        "cachescope.engine": record.engine,
        "cachescope.lineage": record.lineage,
        "cachescope.cause": record.cause,
        "cachescope.region": record.region,
        "cachescope.path": record.path,
    }
    attributes: Attributes = {name: value for name, value in known.items() if value is not None}
    if record.cause is not None:
        attributes["cachescope.expected"] = record.expected
        attributes["cachescope.missed.tokens"] = record.missed_tokens
    return attributes
