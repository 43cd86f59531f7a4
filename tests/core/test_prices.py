from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.config import ConfigError
from vllm_cachescope.usage.prices import (
    ModelPrice,
    Multipliers,
    Prices,
    cost_with,
    cost_without,
    read_prices,
    saved_share,
)

ROOT = Path(__file__).parents[2]
COUNTS = st.integers(0, 10**12)


def test_known_figure() -> None:
    # 2,000,000 prompt tokens at $3, 92 % of them read and the rest written for five minutes.
    price = ModelPrice(3.0)
    without = price.cost_without(2_000_000)
    with_caching = price.cost_with(0, 1_840_000, {300: 160_000})
    assert (without, with_caching) == (6.0, pytest.approx(1.152))
    assert saved_share(without, with_caching) == pytest.approx(0.81, abs=0.005)


@pytest.mark.parametrize(
    ("ttl_s", "multiplier"), [(60, 1.25), (300, 1.25), (301, 2.0), (3600, 2.0), (86400, 2.0)]
)
def test_a_lifetime_without_a_price_counts_as_the_next_longer_one(
    ttl_s: int, multiplier: float
) -> None:
    assert Multipliers().of_write(ttl_s) == multiplier


@given(COUNTS, COUNTS, st.dictionaries(st.sampled_from([60, 300, 1800, 3600]), COUNTS))
def test_the_cost_is_the_sum_of_disjoint_parts(
    uncached: int, read: int, created: dict[int, int]
) -> None:
    price = ModelPrice(3.0, 15.0)
    parts = [
        price.cost_with(uncached, 0, {}),
        price.cost_with(0, read, {}),
        *(price.cost_with(0, 0, {ttl_s: tokens}) for ttl_s, tokens in created.items()),
    ]
    assert price.cost_with(uncached, read, created) == pytest.approx(sum(parts))
    assert price.cost_with(uncached, 0, {}) == price.cost_without(uncached)


def test_an_unknown_price_is_none_and_not_zero() -> None:
    price = Prices({"known": ModelPrice(0.0)}).of("unknown")
    assert cost_without(price, 10) is cost_with(price, 10, 0, {}) is None
    assert saved_share(None, None) is saved_share(0.0, 0.0) is None
    assert ModelPrice(3.0).cost_of_output(10) is None
    assert ModelPrice(3.0, 0.0).cost_of_output(10) == 0.0


def test_a_file_of_prices(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(
        "read: 0.2\n"
        "currency: EUR\n"
        "models:\n"
        "  small: {input: 1, output: 2}\n"
        "  own: {input: 4, read: 0.5, write: {5m: 1, 24h: 3}}\n"
        "  '*': {input: 8}\n"
    )
    prices = read_prices(file)
    assert prices.currency == "EUR"
    assert prices.of("small") == ModelPrice(1, 2, Multipliers(read=0.2))
    assert prices.of("own") == ModelPrice(4, None, Multipliers(0.5, {300: 1, 86400: 3}))
    assert prices.of("another") == ModelPrice(8, None, Multipliers(read=0.2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "prices: Input should be"),
        ("models: {a: {input: -1}}", "prices.models.a.input: .*greater than or equal to 0"),
        ("models: {a: {output: 1}}", "prices.models.a.input: Field required"),
        ("models: {a: {input: .nan}}", "prices.models.a.input: "),
        ("models: {a: {input: 1, write: {}}}", "prices.models.a.write: "),
        ("models: {a: {input: 1, write: {5x: 1}}}", "'5x' is not a duration"),
        ("model: {}", "prices.model: there is no such key"),
    ],
)
def test_a_wrong_file_of_prices(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        read_prices(file)


def test_the_example_has_anthropics_multipliers() -> None:
    example = read_prices(ROOT / "configs" / "prices.yaml")
    assert all(price.multipliers == Multipliers() for price in example.models.values())
    assert example.models
