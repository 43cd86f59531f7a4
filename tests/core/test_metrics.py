"""The list of metrics, and what fills them: no tenant and no number of blocks makes them grow."""

import random
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.config import ConfigError, OrgQuota, load
from vllm_cachescope.metrics import (
    BREAKS,
    ENGINE_LABELS,
    HIT_AGE,
    METRICS,
    QUEUED_DIAGNOSES,
    SHARE_BUCKETS,
    STORE_BUCKETS,
    Metric,
)
from vllm_cachescope.observations import Observations
from vllm_cachescope.registration import TotalHistogram, counter, gauge, histogram
from vllm_cachescope.tenancy.org_labels import NO_ORG_LABELS, OrgLabels
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tiers.operation_times import OperationTimes

README = Path(__file__).parents[2] / "README.md"
SECRET = b"sixteen bytes at least"
UNITS = ("bytes", "seconds", "ratio", "tokens", "per_second")


def table() -> dict[str, list[str]]:
    """Return the labels that README has for each metric."""
    rows: dict[str, list[str]] = {}
    for line in README.read_text().splitlines():
        if line.startswith("| `cachescope_"):
            names, labels, _ = line.strip("|").split("|")
            for name in re.findall(r"`(\w+)`", names):
                assert name not in rows, name
                rows[name] = re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", labels))
    return rows


def test_readme_has_each_metric_with_its_labels_and_no_other() -> None:
    rows = table()
    assert set(rows) == {metric.shown for metric in METRICS}
    for metric in METRICS:
        assert rows[metric.shown] == list(metric.labels_by(by_org=True)), metric.name


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_each_metric_is_named_and_explained(metric: Metric) -> None:
    assert re.fullmatch(r"cachescope_[a-z]+(_[a-z]+)*", metric.name)
    assert not metric.name.endswith("_total")
    assert metric.help.endswith(".") and "\n" not in metric.help
    assert not {"session", *ENGINE_LABELS} & set(metric.labels)
    if metric.kind == "histogram":
        assert list(metric.buckets) == sorted(metric.buckets)
        assert metric.name.endswith(UNITS)
    # Base units: no milliseconds, no per cents, no megabytes.
    assert not re.search(r"(milli|micro|percent|kilo|mega|_ms|_mb)", metric.name)


def test_names_are_unique() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def shown(registry: CollectorRegistry) -> list[tuple[str, tuple[tuple[str, str], ...], float]]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return sorted(
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in families
        for sample in family.samples
    )


@pytest.mark.parametrize("bounds", [SHARE_BUCKETS, STORE_BUCKETS])
def test_observations_are_those_of_the_client_library(bounds: tuple[float, ...]) -> None:
    chance = random.Random(3)
    own, theirs = CollectorRegistry(), CollectorRegistry()
    collected = Observations(bounds)
    there = Histogram("h", "Help.", ["tier"], registry=theirs, buckets=bounds)
    here = TotalHistogram("h", "Help.", ["tier"], registry=own, buckets=bounds)
    for _ in range(3):
        for _ in range(200):
            value = chance.choice([chance.uniform(0, 3), *bounds])
            tier, times = chance.choice(["device", "cpu"]), chance.randrange(1, 4)
            collected.add(value, (tier,), times)
            for _ in range(times):
                there.labels(tier).observe(value)
        for labels, counts, total in collected.take():
            here.labels(*labels).add(counts, total)
    expected = [one for one in shown(theirs) if not one[0].endswith("_created")]
    for ours, other in zip(shown(own), expected, strict=True):
        assert ours[:2] == other[:2]
        assert ours[2] == pytest.approx(other[2])
    assert list(collected.take()) == []


def test_many_observations_take_the_room_of_their_buckets() -> None:
    collected = Observations(SHARE_BUCKETS)
    for i in range(10_000):
        collected.add(i / 10_000, ("device", "5m"))
    ((labels, counts, total),) = collected.take()
    assert labels == ("device", "5m")
    assert sum(counts.values()) == 10_000 and len(counts) == len(SHARE_BUCKETS)
    assert total == pytest.approx(4999.5)


def test_registered_metrics_have_vllms_labels_first_and_organisations_last() -> None:
    registry = CollectorRegistry()
    by_org = counter(BREAKS, registry, by_org=True)
    by_org.labels("m", "0", "evicted", "none", "false", "name:acme").inc()
    gauge(QUEUED_DIAGNOSES, registry).labels("m", "none").inc()
    histogram(HIT_AGE, registry).labels("m", "0", "device", "5m").observe(0.3)
    labels = {name: dict(labels) for name, labels, _ in shown(registry)}
    assert labels["cachescope_breaks_total"]["org"] == "name:acme"
    assert all(given["model_name"] == "m" and given["engine"] for given in labels.values())
    assert not any(name.endswith("_created") for name in labels)


def test_only_named_organisations_have_a_label() -> None:
    labels, tags = OrgLabels(["name:acme", "key:1"], SECRET), OwnerTags(SECRET)
    for org, label in [("name:acme", "name:acme"), ("name:other", "other"), ("anonymous", "other")]:
        assert labels.of(org) == (label,)
        assert labels.of_owner(tags.of(Caller(org, "a session"))) == (label,)
    for is_listed in (True, False):
        assert labels.of_owner(tags.of(Caller("key:1"), is_listed)) == ("key:1",)
    many = {labels.of(f"key:{i}") for i in range(10_000)}
    assert many == {("other",), ("key:1",)}
    assert NO_ORG_LABELS.of("name:acme") == NO_ORG_LABELS.of_owner(bytes(16)) == ()


def test_the_operator_says_who_has_a_label() -> None:
    tenants = {"0" * 64: "acme", "1" * 64: "globex"}
    assert load({}).labelled_orgs() is None
    everyone = load({"tenants": tenants, "org_label": True}).labelled_orgs()
    assert everyone == {"name:acme", "name:globex"}
    one = load({"tenants": tenants, "org_label": ["acme", "anonymous"]}).labelled_orgs()
    assert one == {"name:acme", "anonymous"}
    gateway = load({"org_header": "X-Org", "org_label": ["acme"]}).labelled_orgs()
    assert gateway == {"header:acme"}
    assert load({"org_label": []}).labelled_orgs() == frozenset()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"org_label": True}, "there are none"),
        ({"org_label": ["acme"]}, "'acme' is no organisation"),
        ({"org_label": "acme"}, "org_label"),
        ({"org_label": 1}, "org_label"),
    ],
)
def test_a_mistake_there_ends_the_start(config: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(config).check(lambda tier: None)


def test_the_fullest_quota() -> None:
    chance = random.Random(5)
    orgs = {bytes([i]) * 8: OrgQuota(quota=chance.choice([None, 0, 40, 400])) for i in range(4)}
    for default in (None, 0, 100):
        quotas = Quotas(1, OrgQuota(quota=default), orgs)
        for _ in range(200):
            accounts = [bytes([chance.randrange(8)]) * 8 for _ in range(5)]
            held = {account: chance.randrange(1, 200) for account in accounts}
            shares = [0.0]
            for account, entries in held.items():
                quota = quotas.quota(account)
                shares += [] if quota is None else [entries / quota if quota else 1.0]
            assert quotas.fullest(held) == max(shares)


def test_times_of_operations_say_how_they_ended() -> None:
    times = OperationTimes("redis")
    with times.measure("lookup"):
        pass
    with pytest.raises(ConnectionError), times.measure("lookup"):
        raise ConnectionError
    found = {labels: sum(counts.values()) for labels, counts, _ in times.take().take()}
    assert found == {("redis", "lookup", "ok"): 1, ("redis", "lookup", "failed"): 1}
    assert list(times.take().take()) == []
