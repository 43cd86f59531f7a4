"""The availability of a store: whether its tier may use it now, and why not."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

from vllm_cachescope.cache.miss_causes import MissCause
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.breaker import Breaker
from vllm_cachescope.tiers.limits import Limits
from vllm_cachescope.tiers.store import ForeignSecret, Store, StoreUnfit

logger = logger_of(__name__)

GREET_EVERY_S = 20.0
"""How often a tier makes sure that it may still run on its store, in seconds."""


MAX_STRANGERS = 8
"""How many kinds of engines that share nothing with this one the log tells of."""


class Availability:
    """Whether a store answers, may be used, is readable and is writable.

    Before anything else is asked of a store it is greeted (`Store.greet`), and again every
    `GREET_EVERY_S`. Once it fails too often in a row it is left alone: nothing is asked of it but
    a greeting now and then, until one succeeds.

    Safe to use from several threads: breakers have locks of their own, and each other attribute is
    one reference that is replaced. `greet_if_due` and `seconds_to_greeting` belong to the thread
    that asks; every thread may report what it saw by the other methods.

    Args:
        name: the tier's name.
        address: the store's, without its password.
        limits: how many failures in a row are too many, and when to probe.
        clock: the tier's clock.
        random: a number in [0, 1).
        on_up: called when the store has become usable, on the thread that asks.
        on_down: called with the reason when something fails while the store is not usable, on the
            thread that noticed. The caller holds no lock.

    Attributes:
        reads: the breaker of loads. It is open while the store answers questions and is too slow
            for loads: answered questions must not hide that.
        writes: the breaker of stores. It is open while the store refuses writes: a store that is
            full or read-only still answers reads.
        known: the latest answer of `Store.greet`, in plain data.
    """

    def __init__(
        self,
        name: str,
        address: str,
        limits: Limits,
        clock: Callable[[], float],
        random: Callable[[], float],
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
    ) -> None:
        probes = (limits.first_probe_s, limits.longest_probe_s, clock, random)
        self._name = name
        self._address = address
        self._timeout_s = limits.timeout_s
        self._clock = clock
        self._on_up, self._on_down = on_up, on_down
        self._answers = Breaker(limits.failures, *probes)
        self.reads = Breaker(limits.failures, *probes)
        self.writes = Breaker(1, *probes)
        self._greeted = False
        self._greet_at = 0.0
        self._tried = threading.Event()
        self._foreign_secret = False
        self._strangers: set[str] = set()
        self.known: dict[str, Any] = {}

    @property
    def usable(self) -> bool:
        """Whether the store answers and the tier may run on it."""
        return self._greeted and self._answers.closed

    @property
    def reason(self) -> str | None:
        """Why the store is not usable, as far as that is known."""
        return self._answers.reason

    @property
    def miss_cause(self) -> MissCause:
        """Why a block is missed while the store is not usable."""
        foreign = self._foreign_secret
        return MissCause.HASH_SETTINGS_DIFFER if foreign else MissCause.TIER_UNAVAILABLE

    def health(self) -> dict[str, Any]:
        """Return the store's state in plain data."""
        return {
            "up": self.usable,
            "readable": self.usable and self.reads.closed,
            "writable": self.usable and self.writes.closed,
            "reason": self._answers.reason or self.reads.reason or self.writes.reason,
        }

    def wait_for_first_greeting(self, timeout_s: float) -> None:
        """Wait until the store was greeted once, whether it answered or not."""
        self._tried.wait(timeout_s)

    # The thread that asks.

    def seconds_to_greeting(self) -> float:
        """Return in how many seconds the store is to be greeted; 0 or less if that is due."""
        return self._greet_at - self._clock() if self.usable else self._answers.probe_in()

    def greet_if_due(self, store: Store) -> bool:
        """Greet the store if that is due. To be called before anything is asked of it.

        Returns:
            Whether the store may be asked now; False until the next probe may be made.

        Raises:
            StoreFailed: if it does not answer. The caller reports that with `failed`.
            StoreUnfit: if the tier must not run on it. The caller reports that with `unfit`.
        """
        if self.usable and self._clock() < self._greet_at:
            return True
        if self._answers.probe_in() > 0:
            return False
        known = store.greet(self._clock() + self._timeout_s)
        strangers = known.pop("strangers", ())
        self.known = known
        self._greet_at = self._clock() + GREET_EVERY_S
        self._foreign_secret = False
        was_usable = self.usable
        # In this order: a thread whose failure opens the breaker meanwhile takes the greeting back.
        self._greeted = True
        self._answers.succeeded()
        self._tried.set()
        if not was_usable:
            self._log_up()
            self._on_up()
        self._log_strangers(strangers)
        return True

    def _log_strangers(self, differences: Iterable[str]) -> None:
        for difference in differences:
            if difference not in self._strangers and len(self._strangers) < MAX_STRANGERS:
                self._strangers.add(difference)
                logger.warning(
                    "Tier %s at %s: other engines use it that share nothing with this one. They "
                    "differ in: %s",
                    self._name,
                    self._address,
                    difference,
                )

    def _log_up(self) -> None:
        used, capacity = self.known["used_bytes"], self.known["capacity_bytes"]
        logger.info(
            "Tier %s at %s is up: %.1f MiB used of %s",
            self._name,
            self._address,
            used / 2**20,
            f"{capacity / 2**20:.1f} MiB" if capacity else "no set limit",
        )

    # What threads report.

    def answered(self) -> None:
        """The store answered."""
        self._answers.succeeded()

    def unfit(self, error: StoreUnfit) -> None:
        """The store answered that the tier must not run on it."""
        self._foreign_secret = isinstance(error, ForeignSecret)
        self.failed(str(error), at_once=True)

    def failed(self, reason: str, at_once: bool = False) -> None:
        """The store did not answer. Must not be called with a lock held that ``on_down`` takes.

        Args:
            reason: what went wrong, in a few words.
            at_once: whether to leave the store alone after this one failure.
        """
        known = self._answers.reason
        opened = self._answers.trip(reason) if at_once else self._answers.failed(reason)
        if opened or (not self._answers.closed and self._answers.reason != known):
            logger.warning(
                "Tier %s at %s is left alone, every request runs as if it held nothing: %s",
                self._name,
                self._address,
                reason,
            )
        if not self._answers.closed:
            self._greeted = False
            self._on_down(reason)
        self._tried.set()

    def read_failed(self, reason: str) -> None:
        """A load got nothing out of the store."""
        if self.reads.failed(reason):
            logger.warning(
                "Tier %s at %s is not read from for a while: %s", self._name, self._address, reason
            )

    def write_refused(self, refusal: str) -> None:
        """The store refused a write, and said why."""
        if self.writes.failed(f"it refuses writes: {refusal}"):
            logger.warning("Tier %s at %s refuses writes: %s", self._name, self._address, refusal)
