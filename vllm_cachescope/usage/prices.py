"""Prices: what tokens cost with and without caching, by model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from vllm_cachescope.config.error import ConfigError
from vllm_cachescope.config.files import read_data
from vllm_cachescope.config.mistakes import describe
from vllm_cachescope.config.values import Duration, Model
from vllm_cachescope.usage.record import FIVE_MINUTES_S, ONE_HOUR_S

ANY_MODEL = "*"
"""Names the price of every model that has none of its own."""

PER = 1_000_000
"""Prices are for this many tokens."""


@dataclass(frozen=True, slots=True)
class Multipliers:
    """What a prompt token costs, as a multiple of one that is neither read nor created.

    The defaults are Anthropic's: 1.25 for a write that lives five minutes, 2 for one that lives an
    hour, 0.1 for a read.

    Attributes:
        read: of a token read from the cache, whatever the tier.
        write: of a token created, by lifetime in seconds. Another lifetime counts as the next
            longer one, or as the longest: as in the usage of Anthropic's replies, which know two.
    """

    read: float = 0.1
    write: Mapping[int, float] = field(
        default_factory=lambda: {FIVE_MINUTES_S: 1.25, ONE_HOUR_S: 2.0}
    )

    def of_write(self, ttl_s: int) -> float:
        """Return the multiplier of a token created to live for ``ttl_s`` seconds."""
        known = sorted(self.write)
        return self.write[next((one for one in known if one >= ttl_s), known[-1])]

    def equivalents(self, uncached: int, read: int, created_by_ttl: Mapping[int, int]) -> float:
        """Return what prompt tokens cost, as a number of tokens that are not cached."""
        created = (tokens * self.of_write(ttl_s) for ttl_s, tokens in created_by_ttl.items())
        return uncached + read * self.read + sum(created)


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """The price of one model's tokens, each for `PER` tokens.

    Attributes:
        input: of prompt tokens that are neither read nor created.
        output: of answered tokens; None if that is not known.
        multipliers: of those that are read or created.
    """

    input: float
    output: float | None = None
    multipliers: Multipliers = Multipliers()

    def cost_without(self, prompt_tokens: int) -> float:
        """Return what ``prompt_tokens`` would cost without caching."""
        return prompt_tokens * self.input / PER

    def cost_with(self, uncached: int, read: int, created_by_ttl: Mapping[int, int]) -> float:
        """Return what prompt tokens cost: the uncached ones, those read, and those created by
        lifetime in seconds."""
        return self.multipliers.equivalents(uncached, read, created_by_ttl) * self.input / PER

    def cost_of_output(self, tokens: int) -> float | None:
        """Return what answered tokens cost; None if their price is not known."""
        return None if self.output is None else tokens * self.output / PER


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of models.

    Attributes:
        models: the price of each, by its name; that of `ANY_MODEL` is every other model's.
        currency: of all of them.
    """

    models: Mapping[str, ModelPrice] = field(default_factory=dict)
    currency: str = "USD"

    def of(self, model: str) -> ModelPrice | None:
        """Return the price of ``model``; None if it is not known."""
        return self.models.get(model, self.models.get(ANY_MODEL))


def cost_without(price: ModelPrice | None, prompt_tokens: int) -> float | None:
    """Return what ``prompt_tokens`` would cost without caching; None for an unknown price."""
    return None if price is None else price.cost_without(prompt_tokens)


def cost_with(
    price: ModelPrice | None, uncached: int, read: int, created_by_ttl: Mapping[int, int]
) -> float | None:
    """Return what prompt tokens cost, see `ModelPrice.cost_with`; None for an unknown price."""
    return None if price is None else price.cost_with(uncached, read, created_by_ttl)


def saved_share(without: float | None, with_caching: float | None) -> float | None:
    """Return which share of the cost caching saves, negative where it costs more than it saves;
    None if a cost is unknown, or there was none."""
    if not without or with_caching is None:
        return None
    return 1 - with_caching / without


_Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Multipliers(Model):
    """Multipliers in a file of prices; what is left out is Anthropic's."""

    read: _Price | None = None
    write: Annotated[dict[Duration, _Price], Field(min_length=1)] | None = None

    def over(self, base: Multipliers) -> Multipliers:
        return Multipliers(
            base.read if self.read is None else self.read,
            base.write if self.write is None else self.write,
        )


class _ModelPrice(_Multipliers):
    """A model's price in a file of prices."""

    input: _Price
    output: _Price | None = None


class _PriceFile(_Multipliers):
    """A file of prices: multipliers for all models, and the price of each."""

    currency: Annotated[str, Field(min_length=1, max_length=16)] = "USD"
    models: dict[str, _ModelPrice]


def read_prices(path: Path, key: str = "prices") -> Prices:
    """Return the prices in a YAML or JSON file, as in ``configs/prices.yaml``.

    Args:
        path: the file.
        key: what names the file, for messages.

    Raises:
        ConfigError: if the file cannot be read or does not hold prices.
    """
    try:
        file = _PriceFile.model_validate(read_data(path, key))
    except ValidationError as error:
        raise ConfigError(describe(error, _PriceFile, (key,))) from None
    base = file.over(Multipliers())
    return Prices(
        {
            name: ModelPrice(one.input, one.output, one.over(base))
            for name, one in file.models.items()
        },
        file.currency,
    )
