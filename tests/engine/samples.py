"""Samples of the metrics of an engine in this process."""

from typing import Any

from prometheus_client import REGISTRY

from vllm_cachescope.metrics import Metric

Samples = dict[tuple[str, ...], float]


def samples(metric: Metric, suffix: str = "") -> Samples:
    """Return what ``metric`` shows, by the values of its own labels (and ``le``); without what is
    0. ``suffix`` chooses one of the series of a histogram."""
    name = metric.shown + suffix
    labels = [*metric.labels, *(["le"] if suffix == "_bucket" else [])]
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == name and sample.value
    }


def since(before: Samples, metric: Metric, suffix: str = "") -> Samples:
    """Return by how much `samples` has grown since ``before``."""
    now = samples(metric, suffix)
    grown = {key: value - before.get(key, 0.0) for key, value in now.items()}
    return {key: value for key, value in grown.items() if value}


def of_engine(engine: Any, metric: Metric) -> Samples:
    """Return `samples`, called in the process of ``engine``."""
    return samples(metric)
