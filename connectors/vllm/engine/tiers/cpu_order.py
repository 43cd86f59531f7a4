"""The order of eviction of the CPU tier, and of a device that learns, as it is configured."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from vllm_cachescope.cache.eviction import LifetimeShare
from vllm_cachescope.cache.learned_file import read_learned, write_learned
from vllm_cachescope.cache.learned_order import LearnedOrder
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.cache.return_counts import Counted
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.logs import logger_of

logger = logger_of(__name__)


def _no_reserve(org: bytes) -> int:
    return 0


def make_order(
    settings: EvictionSettings, quotas: Quotas | None, chunks: int
) -> LifetimeShare | LearnedOrder:
    """Return an empty order of eviction.

    Args:
        settings: which one.
        quotas: what each organisation may have of the tier; None for no limits.
        chunks: how many chunks the tier has.
    """
    reserve: Callable[[bytes], int] = quotas.reserve if quotas is not None else _no_reserve
    if settings.policy == "lifetime":
        return LifetimeShare(reserve)
    path = settings.state_file

    def keep(counted: Counted) -> None:
        if path is not None:
            write_learned(path, counted)

    return make_learned(settings, chunks, reserve, keep)


def make_learned(
    settings: EvictionSettings,
    blocks: int,
    reserve: Callable[[bytes], int] = _no_reserve,
    keep: Callable[[Counted], None] = lambda counted: None,
) -> LearnedOrder:
    """Return an empty order that learns, on a thread of its own, from what the state file holds.

    Args:
        settings: how.
        blocks: how many blocks its tier has.
        reserve: returns how many blocks of an organisation are spared.
        keep: gets what was learned.
    """
    fits = ThreadPoolExecutor(1, "cachescope-eviction")

    def compute(fit: Callable[[], None]) -> None:
        fits.submit(fit).add_done_callback(_tell)

    order = LearnedOrder(reserve, int(blocks * settings.long_share), compute, keep)
    path = settings.state_file
    if path is not None and (state := read_learned(path)) is not None:
        if order.restore(state):
            logger.info("eviction.state_file: goes on from what %s holds", path)
        else:
            logger.warning("eviction.state_file: %s is of another version, or damaged", path)
    return order


def _tell(fit: "Future[None]") -> None:
    # The order goes on with the prices that it has.
    if (error := fit.exception()) is not None:
        logger.error("The order of eviction could not be fitted", exc_info=error)
