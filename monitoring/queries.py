"""Pieces of PromQL that panels, recording rules and alerts are made of."""

from collections.abc import Sequence

from vllm_cachescope.metrics import Metric

VARIABLES = ("job", "model_name", "instance", "engine")
"""The dashboard's variables, from the widest to the narrowest: those of vLLM's own dashboards."""

CHOSEN = ", ".join(f'{name}=~"${name}"' for name in VARIABLES)
"""The matchers of what the dashboard's reader has chosen."""

MODELS = 'job=~"$job", model_name=~"$model_name"'
"""The same, of recorded series: they are told apart by job and model only."""

STEP = "$__rate_interval"
"""The window of a graph: Grafana makes it wide enough for a rate at any zoom."""

RANGE = "$__range"
"""All the time that the dashboard shows."""


def of(metric: Metric, *matchers: str, suffix: str = "") -> str:
    """Return the selector of ``metric``'s series.

    Args:
        metric: the metric.
        matchers: of labels, as in ``tier="cpu"``.
        suffix: ``_bucket``, ``_sum`` or ``_count`` of a histogram.
    """
    return f"{metric.shown}{suffix}{{{', '.join(matchers)}}}" if matchers else metric.shown + suffix


def rate(selector: str, window: str = STEP) -> str:
    """Return the growth of a counter in a second, over ``window``."""
    return f"rate({selector}[{window}])"


def grown(selector: str, window: str) -> str:
    """Return by how much counters that seldom move have grown in ``window``.

    A series comes into being with its first event, and Prometheus takes the value that a series
    begins with for no growth. So ``increase`` alone misses the first break of each cause, and the
    only forged plan there ever was. Here a series that was not there before the window counts
    with the value that it began with, too. Only of use below a sum: both parts carry one name.
    """
    began = f"min_over_time({selector}[{window}]) unless {selector} offset {window}"
    return f'increase({selector}[{window}]) or label_replace({began}, "began", "yes", "", "")'


def total(expression: str, *labels: str) -> str:
    """Return the sum of ``expression`` by ``labels``."""
    return _aggregate("sum", expression, labels)


def largest(expression: str, *labels: str) -> str:
    """Return the largest of ``expression`` by ``labels``."""
    return _aggregate("max", expression, labels)


def smallest(expression: str, *labels: str) -> str:
    """Return the smallest of ``expression`` by ``labels``."""
    return _aggregate("min", expression, labels)


def ratio(part: str, whole: str, on: str = "") -> str:
    """Return ``part / whole`` where there is a whole.

    Args:
        part: the dividend.
        whole: the divisor; where it is 0 the result is left out, not infinite.
        on: how the two sides are matched, as in ``ignoring (tier) group_left ()``.
    """
    return f"{part} / {on + ' ' if on else ''}({whole} > 0)"


def quantile(q: float, buckets: str, labels: Sequence[str], window: str = STEP) -> str:
    """Return a quantile of a histogram's observations in ``window``, by ``labels``.

    Args:
        q: from 0 to 1.
        buckets: the selector of its buckets.
        labels: labels to keep apart.
        window: the window.
    """
    summed = total(rate(buckets, window), "le", *labels)
    return f"histogram_quantile({q}, {summed})"


def _aggregate(operator: str, expression: str, labels: Sequence[str]) -> str:
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"{operator}{by} ({expression})"
